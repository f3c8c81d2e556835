"""LeSTD in a metric, with few-bit values and factors, and beyond attention.

Every module stands in the basis of its side of the model's width, see
lestd_kernels.methods.common.one_sided_basis: Q, K and V share one on their input side and O has
one on its output side; so gate, up and down; the gates and ups of all experts share one, and their
downs. The bytes of a group are divided between the two sides as the dense ones are. What is made
small is the sum of the projections' squared errors, each relative to the projection's norm:
otherwise V, whose weights are small, would be pruned first. In the metric loss it is the loss to
expect, which decides as well what each side gets of the bytes.

References: LeSTD (ICLR 2026), Stages I and II; "Rethinking the Role of Tensor Decompositions in
Post-Training LLM Compression", arXiv 2606.03465, on the metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch

from lestd_kernels.errors import LestdError
from lestd_kernels.formats.chain import ModuleChain
from lestd_kernels.formats.ops import Multiply
from lestd_kernels.formats.shared_tucker import U1_NAME
from lestd_kernels.linalg.stage1 import Ranks
from lestd_kernels.methods.common.base import (
    ACTIVATION,
    BUFFERS_BYTES,
    CALIBRATED,
    LOSS,
    Bounds,
    Decomposed,
    Group,
    MethodArgs,
)
from lestd_kernels.methods.common.foresight import Costs, foreseen_rounding
from lestd_kernels.methods.common.one_sided_basis import IDENTITY, SidedGroup, readers_of
from lestd_kernels.methods.common.per_module import StoredChains, chain_result
from lestd_kernels.methods.common.side_budgets import Lost, divide_by_loss, errors_by_kind, search
from lestd_kernels.methods.common.stopwatch import Stopwatch
from lestd_kernels.methods.common.two_sided_basis import LossGroup, TwoSided
from lestd_kernels.search.basis_rank import SidedShape
from lestd_kernels.search.budget import CurvePoint
from lestd_kernels.storage.few_bits import FULL_BITS
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.tensorize import PROJECTIONS, BasisSide, GroupLayout, ModuleLayout

U1_OUTPUT_NAME = "lestd_u1_output"
BASIS_NAMES: dict[BasisSide, str] = {"input": U1_NAME, "output": U1_OUTPUT_NAME}
RANK_NAMES: dict[BasisSide, str] = {"input": "R1", "output": "R1_output"}
WEIGHT_OPTIONS = (
    "type_mode",
    "stage2",
    "pattern",
    "keep_outliers",
    "alpha",
    "hooi_tol",
    "hooi_max_iter",
)


def serves(layout: GroupLayout, args: MethodArgs) -> bool:
    """Whether a group is stored by this file: in a metric, in few bits, or beyond attention."""
    plain = MethodArgs()
    if any(projection not in PROJECTIONS for projection, _ in layout.slices):
        return True
    return any(
        getattr(args, option) != getattr(plain, option)
        for option in ("metric", "value_bits", "factor_bits")
    )


def sides(layout: GroupLayout) -> dict[BasisSide, tuple[ModuleLayout, ...]]:
    """The modules of each side, those that read the same input adjacent; sides that have any."""
    found: dict[BasisSide, tuple[ModuleLayout, ...]] = {}
    for side in BASIS_NAMES:
        modules = [module for module in layout.modules if module.basis_side == side]
        order = {reads: i for i, reads in enumerate(dict.fromkeys(m.reads for m in modules))}
        if modules:
            found[side] = tuple(sorted(modules, key=lambda m: order[m.reads]))
    return found


def side_shape(
    layout: GroupLayout,
    side: BasisSide,
    value_dtype: torch.dtype,
    args: MethodArgs,
) -> SidedShape:
    """Sizes of the cores of one side."""
    modules = sides(layout)[side]
    uses = len({module.reads for module in modules}) if side == "input" else len(modules)
    return SidedShape(
        width=layout.width,
        core_columns=tuple(len(module.slices) * layout.head_dim for module in modules),
        rank_first=side == "input",
        factor_uses=uses,
        value_bytes=value_dtype.itemsize,
        value_bits=args.value_bits,
        factor_bits=args.factor_bits,
    )


def _shapes(
    layout: GroupLayout, value_dtype: torch.dtype, args: MethodArgs
) -> dict[BasisSide, SidedShape]:
    for option in WEIGHT_OPTIONS:
        expected, found = getattr(MethodArgs(), option), getattr(args, option)
        if found != expected:
            raise LestdError(
                f"{option} {found!r} is for attention in the metric 'weight' at 16 bits only; "
                f"change it to {expected!r}, or metric, bits and scope"
            )
    return {side: side_shape(layout, side, value_dtype, args) for side in sides(layout)}


def _shares(shapes: dict[BasisSide, SidedShape], byte_budget: int) -> dict[BasisSide, int]:
    """The bytes of each side, in proportion to its elements; none is left over."""
    total = sum(shape.elements for shape in shapes.values())
    shares: dict[BasisSide, int] = {}
    before = 0
    for side, shape in shapes.items():
        after = before + shape.elements
        shares[side] = byte_budget * after // total - byte_budget * before // total
        before = after
    return shares


@dataclass(kw_only=True)
class PreparedSides(Group):
    """A group with the bases of its sides.

    Attributes:
        groups: one per side.
        scales: module name -> what its weight in `groups` was divided by: the norm of all weights
            of its projection in the metric; 1 in the metric loss.
    """

    groups: dict[BasisSide, SidedGroup | LossGroup]
    scales: dict[str, float]

    def in_bits(self, args: MethodArgs) -> PreparedSides:
        """See `Group.in_bits`; the bases are the same."""
        shapes, groups = _shapes(self.layout, self.value_dtype, args), {}
        for side, group in self.groups.items():
            groups[side] = copy(group)
            groups[side].shape = shapes[side]
        return replace(self, args=args, groups=groups)


def prepare(group: Group) -> PreparedSides:
    """Find the basis of each side; see `Method.prepare`."""
    layout = group.layout
    shapes = _shapes(layout, group.value_dtype, group.args)
    clock = Stopwatch(group.unfolding.device)
    with clock("stage1"):
        loss = group.args.metric == LOSS
        scales = {m.name: 1.0 for m in layout.modules} if loss else projection_norms(group)
        groups: dict[BasisSide, SidedGroup | LossGroup] = {}
        for side, modules in sides(layout).items():
            weights = {module.name: group.weight(module) for module in modules}
            reads = {module.name: module.reads for module in modules}
            if side == "output":
                # Each has a core of its own, even where inputs are the same.
                reads = {module.name: module.name for module in modules}
            if loss:
                groups[side] = LossGroup(two_sided(group, modules, reads), shapes[side])
                continue
            readers, unit = readers_of(weights, reads, group.metrics, scales)
            groups[side] = SidedGroup(readers, shapes[side], unit)
    known = vars(group) | {"seconds": clock.seconds}
    return PreparedSides(**known, groups=groups, scales=scales)


def two_sided(
    group: Group,
    modules: Sequence[ModuleLayout],
    reads: Mapping[str, str],
    scales: Mapping[str, float] | None = None,
) -> list[TwoSided]:
    """The modules of a side, those of the output side transposed.

    Args:
        group: theirs.
        modules: of one side.
        reads: module name -> the input that it reads.
        scales: module name -> what its errors are relative to, where there is no metric of outputs.
    """
    found = []
    for module in modules:
        W, metric = group.weight(module), group.metric(module)
        if scales is not None:
            metric = metric._replace(output=W.new_full((W.shape[1],), scales[module.name] ** -2))
        if module.basis_side == "output":
            W, metric = W.T, metric.transposed
        found.append(TwoSided(W, metric, reads[module.name]))
    return found


def _projection(module: ModuleLayout) -> tuple[str, ...]:
    """The projections of a module's slices."""
    return tuple(sorted({projection for projection, _ in module.slices}))


def projection_norms(group: Group) -> dict[str, float]:
    """For each module the norm of all weights of its projection, in their metrics; 1 if it is 0."""
    squares: dict[tuple[str, ...], float] = {}
    for module in group.layout.modules:
        found = group.metric(module).squares(group.weight(module))
        squares[_projection(module)] = squares.get(_projection(module), 0.0) + found
    return {m.name: math.sqrt(squares[_projection(m)]) or 1.0 for m in group.layout.modules}


def encode(
    prepared: PreparedSides,
    byte_budget: int,
    curve_budgets: Sequence[int] = (),
    *,
    reuse: bool = False,
) -> Decomposed:
    """Store a group with sparse cores in the bases of its sides; see `Method.encode`."""
    args, layout = prepared.args, prepared.layout
    bounds(layout, byte_budget, prepared.value_dtype, args)
    clock = Stopwatch(prepared.unfolding.device)
    shapes = {side: group.shape for side, group in prepared.groups.items()}
    budgets = [byte_budget, *curve_budgets]
    expected = [0.0] * len(budgets)
    with clock("rank_search"):
        if args.metric == LOSS:
            divided = divide_by_loss(prepared.groups, budgets, args)
        else:
            shares = [_shares(shapes, budget) for budget in budgets]
            divided = {}
            for side, group in prepared.groups.items():
                own = [share[side] for share in shares]
                divided[side] = own, search(group, own, args, reuse)
    known = 0.0
    # With few bits it matters whether a basis is stored or none.
    by_kind = args.metric == LOSS and args.value_bits != FULL_BITS and bool(curve_budgets)
    by_kinds = [0.0] * len(budgets)
    shared: dict[str, EncodedCore] = {}
    chains: dict[str, ModuleChain] = {}
    ranks: dict[str, int] = {}
    every: dict[BasisSide, list[int]] = {}
    for side, group in prepared.groups.items():
        own, found = divided[side]
        every[side] = [options[0][0] for options in found]
        measured: dict[bool, Lost] = {}
        for i, options in enumerate(found):
            expected[i] += options[0][1]
        with clock("stage2"):
            scales = [prepared.scales[module.name] for module in sides(layout)[side]]
            best, several = None, len(found[0]) > 1 or by_kind
            for R, searched in found[0]:
                encoded = group.encode(R, own[0], prepared.value_dtype, scales)
                # What rounding does to the two, no search knows.
                error = group.error(encoded.factor, encoded.cores, scales) if several else 0.0
                if by_kind:
                    measured[R == IDENTITY] = Lost.of(searched, encoded, error)
                if best is None or error < best[0]:
                    best = error, R, *encoded
            assert best is not None
            _, R, factor, cores, before = best
            known += before or 0.0
            U1 = Multiply(BASIS_NAMES[side], transposed=side == "output")
            ops: tuple[Multiply, ...] = (Multiply(0),)
            if factor is not None:
                shared[BASIS_NAMES[side]], ranks[RANK_NAMES[side]] = factor, R
                ops = (U1, Multiply(0)) if side == "input" else (Multiply(0), U1)
            for module, core in zip(sides(layout)[side], cores, strict=True):
                chains[module.name] = ModuleChain(ops, (core,))
        if by_kind:
            assert isinstance(group, LossGroup), "those of the metric loss"
            with clock("rank_search"):
                errors = errors_by_kind(group, own, found, measured, prepared.value_dtype)
                by_kinds = [sum(two) for two in zip(by_kinds, errors, strict=True)]
    modules = {module.name: chains[module.name] for module in layout.modules}
    done = chain_result(prepared, StoredChains(modules, shared, ranks), clock)
    if args.metric == LOSS:
        # What is left out, cores that are fitted make up for in part; what rounding loses, it loses
        # whatever is left out.
        ratio = known / expected[0] if expected[0] else 1.0
        rounding = max(done.metric_squared_error - known, 0.0)
        bound: float | None = known
    else:
        # The search knows the sum of the projections' relative errors before anything is rounded.
        # What came of it for this budget says how much to expect of the others.
        each = done.metric_squared_norm / len({_projection(module) for module in layout.modules})
        ratio = done.metric_squared_error / expected[0] if expected[0] else each
        rounding, bound = 0.0, None
        if args.metric != ACTIVATION:  # There what the search knows is too low, see `SidedGroup`.
            # A sum of relative errors, and none of their norms is larger.
            bound = expected[0] * max(prepared.scales.values()) ** 2
    first = every.get("input", [0] * len(budgets))
    curve = tuple(
        CurvePoint(budget, Ranks(R, 0, 0), by_kinds[i] if by_kind else error * ratio + rounding)
        for i, (budget, R, error) in enumerate(zip(budgets, first, expected, strict=True))
    )
    # Of the weights divided by their projections' norms.
    values = tuple(group.singular_values for group in prepared.groups.values())
    return replace(
        done, curve=curve[1:], singular_values=(values[0], ()), expected_squared_error=bound
    )


def foresee(prepared: PreparedSides, byte_budget: int, costs: Mapping[str, Costs]) -> float:
    """See `Method.foresee`. Few bits as if no basis was stored."""
    args = prepared.args
    divided = divide_by_loss(prepared.groups, [byte_budget], args)
    left_out = sum(options[0][1] for _, (options,) in divided.values())
    return left_out + sum(foreseen_rounding(prepared, costs, args.value_bits).values())


def bounds(
    layout: GroupLayout, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
) -> Bounds:
    """Sizes from shapes alone; see `Method.bounds`."""
    shapes = _shapes(layout, value_dtype, args)
    least = least_bytes(layout, value_dtype, args)
    if byte_budget < least:
        raise LestdError(
            f"the byte budget of a slice group is {byte_budget:,} bytes, but its smallest ranks "
            f"take {least:,} bytes; raise keep, or lower rank_step or bits"
        )
    shares = _shares(shapes, byte_budget)
    if args.metric == LOSS:  # The loss divides them, which shapes do not know.
        shares = dict.fromkeys(shapes, byte_budget)
    largest, nnz, most_bytes = {}, 0, 0
    for side, shape in shapes.items():
        grid = shape.grid(args.rank_step, args.max_flops)
        if args.max_flops is not None and shape.flops(grid[0]) > args.max_flops * shape.elements:
            raise LestdError(
                f"max_flops is {args.max_flops}, but the smallest rank of a slice group "
                f"({grid[0]}) takes {shape.flops(grid[0]) / shape.elements:.3f} of the dense "
                "multiply-adds; raise max_flops or lower rank_step"
            )
        empty = [0] * len(shape.core_columns)
        fitting = [R for R in grid if shape.stored_bytes(R, empty) <= shares[side]]
        largest[side] = fitting[-1]
        full = [grid[-1] * n for n in shape.core_columns]
        most_bytes += min(shares[side], shape.stored_bytes(grid[-1], full))
        # With a factor of the smallest rank, or with none.
        nnz += min(shape.elements, 8 * shares[side] // _value_size(shape))
    return Bounds(
        max_R1=largest.get("input", largest.get("output")),
        max_R2=None,
        max_nnz=nnz,
        max_bytes=min(most_bytes, byte_budget),
        workspace_bytes=_workspace_bytes(layout, shapes, args),
        reuse_bytes=4 * layout.elements,
    )


def _value_size(shape: SidedShape) -> int:
    """Bits of a value at least, its scale and index not counted."""
    return shape.value_bits if shape.value_bits != FULL_BITS else 8 * shape.value_bytes


def _workspace_bytes(
    layout: GroupLayout, shapes: dict[BasisSide, SidedShape], args: MethodArgs
) -> int:
    """Upper bound of the peak memory beside the unfolding and the metrics as they were read.

    A copy of the weights; of one side the cores, their scores and masks, and what is stored; of
    the largest of its inputs products and reconstructions; metrics in their units, and roots of
    the cores' rows, in the metric loss of one module; of the largest metric some factors in
    float64; of each core how many elements have which size.
    """
    most = largest = 0
    for side, modules in sides(layout).items():
        most = max(most, shapes[side].elements)
        readers: dict[str, int] = {}
        for module in modules:
            reader = module.reads if side == "input" else module.name
            columns = len(module.slices) * layout.head_dim
            readers[reader] = readers.get(reader, 0) + layout.width * columns
        largest = max(largest, *readers.values())
    inputs = {m.reads: layout.weight_shape(m)[1] for m in layout.modules}
    squares = sum(width**2 for width in inputs.values()) if args.metric in CALIBRATED else 0
    if args.metric == LOSS:  # Both sides' metrics, and the steps of fitting a core to its support.
        squares = max(sum(n**2 for n in layout.weight_shape(m)) for m in layout.modules)
        largest *= 2
    widest = max([layout.width, *inputs.values()] if squares else [layout.width])
    groups = 4 * layout.elements + 12 * most + 18 * largest
    counts = 6 * max(map(len, sides(layout).values())) << 17
    return groups + 8 * squares + 40 * widest**2 + counts + BUFFERS_BYTES


def least_bytes(layout: GroupLayout, value_dtype: torch.dtype, args: MethodArgs) -> int:
    """The smallest feasible byte budget; see `Method.least_bytes`."""
    shapes = _shapes(layout, value_dtype, args)
    total = sum(shape.elements for shape in shapes.values())
    # The budget of which each side's share is enough.
    return max(
        -(-(shape.least_bytes(args.rank_step) + 1) * total // shape.elements)
        for shape in shapes.values()
    )
