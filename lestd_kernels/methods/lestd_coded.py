"""LeSTD with bases and cores coded by their entropy: ``--coding entropy``.

The bases are those of lestd_kernels.methods.common.two_sided_basis, in whatever metric. A basis and
its cores are rounded to whole numbers on a common step (lestd_kernels.methods.common.coded_matrix),
each in the metric in which its errors count:

    input side   W ~ A M    A: L and the diagonal of G = sum M N M^T    M: H = A^T L A and N
    output side  W ~ M A^T  the same of W^T; what is rounded of M is M itself: N and H

with M fitted to A as it is stored. Zeros cost fractions of a bit, so that a sparse core is the end
of fine steps' other side and needs no mask. Or no basis is stored and the weights are rounded
themselves, which is WaterSIC.

Whether, and at which rank, decides the lower convex hull of what octaves of the step and some ranks
store and lose: one slope for both sides. They are tried with all feedback: without that along the
outputs, which helps whole weights more than cores, a basis is chosen too soon. Then one number fits
the steps of both sides to the budget.

References: LeSTD (ICLR 2026), Stages I and II; "WaterSIC: information-theoretically (near) optimal
linear layer quantization", arXiv 2603.04956.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lestd_kernels.formats.chain import ModuleChain
from lestd_kernels.formats.ops import Multiply
from lestd_kernels.linalg.metric import Metric, apply_metric, solver
from lestd_kernels.linalg.stage1 import Ranks
from lestd_kernels.methods import watersic
from lestd_kernels.methods.common.base import (
    LOSS,
    Bounds,
    Decomposed,
    Group,
    MethodArgs,
    require_default,
)
from lestd_kernels.methods.common.coded_matrix import (
    MOST_BITS,
    MOST_RMS,
    RoundedMatrix,
    SteppedMatrix,
    bits_of,
    damping_of,
    disk_bits,
    fitting,
    rounded,
)
from lestd_kernels.methods.common.coded_matrix import least_bytes as least_matrix_bytes
from lestd_kernels.methods.common.one_sided_basis import IDENTITY
from lestd_kernels.methods.common.per_module import StoredChains, chain_result
from lestd_kernels.methods.common.stopwatch import Stopwatch
from lestd_kernels.methods.common.two_sided_basis import LossGroup, TwoSided
from lestd_kernels.methods.lestd_in_metric import (
    BASIS_NAMES,
    RANK_NAMES,
    projection_norms,
    side_shape,
    sides,
    two_sided,
)
from lestd_kernels.options import FIXED, Size
from lestd_kernels.search.budget import CurvePoint
from lestd_kernels.search.rank_and_step import Point, divide, error_at, lower_hull, refined
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.tensorize import BasisSide, GroupLayout, ModuleLayout

# Of the width.
_RANKS = (1 / 12, 1 / 8, 3 / 16, 1 / 4, 3 / 8)
_OCTAVES_MORE = 3.0
_MOST_POINTS = 16
# Octaves above a step at which all numbers are zero; what zeros of a basis may take of the bytes.
_NOTHING_LEFT, _MOST_OVERHEAD = 12.0, 0.9
# Coarse steps at which a rank may be of no use.
_MOST_VAIN = 3


@dataclass
class CodedSide:
    """The modules of one side.

    Attributes:
        modules: in order.
        group: their bases and metrics; transposed on the output side.
        value_dtype: of the scales.
        size: which bytes count.
    """

    modules: tuple[ModuleLayout, ...]
    group: LossGroup
    value_dtype: torch.dtype
    size: Size

    @property
    def elements(self) -> int:
        """Of the dense modules."""
        return self.group.shape.elements

    def _standing(self, M: Tensor, metric: Metric) -> tuple[Tensor, Metric]:
        """A core, or a weight, as it stands in its module, and the metric for rounding it."""
        if not self.group.shape.rank_first:
            M, metric = M.T, metric.transposed
        return M.contiguous(), metric

    def on_steps(self, R: int, near: float) -> Callable[[float], list[RoundedMatrix]]:
        """The matrices of a rank, the basis first, by the logarithm of the step.

        Args:
            R: the rank; `IDENTITY` for no basis.
            near: about that logarithm; it decides the damping.
        """
        if R == IDENTITY:
            standing = [
                self._standing(one.W, metric)
                for one, metric in zip(self.group.modules, self.group.metrics(), strict=True)
            ]
            weights = self._on_steps(standing, near)
            return lambda at: rounded(weights, 2.0**at)
        A0 = self.group.basis[:, :R].contiguous()
        energy = torch.zeros(R, device=A0.device)
        for one, metric in zip(self.group.modules, self.group.metrics(), strict=True):
            M = _core(A0, one, metric)[0]
            energy += (M * Metric(None, metric.output).apply(M)).sum(dim=1)
        [basis] = self._on_steps([(A0, Metric(self.group.mean(), energy))], near)

        def at(log_step: float) -> list[RoundedMatrix]:
            [factor] = rounded([basis], 2.0**log_step)
            factor = factor.fitted()
            A, cores = factor.value(), []
            for one, metric in zip(self.group.modules, self.group.metrics(), strict=True):
                M, H = _core(A, one, metric)
                cores.append(self._standing(M, metric._replace(input=H)))
            stepped = self._on_steps(cores, near)
            return [factor, *rounded(stepped, 2.0**log_step)]

        return at

    def error(self, R: int, matrices: Sequence[Tensor]) -> float:
        """Squared error of the values of the matrices of `on_steps`."""
        A = None if R == IDENTITY else matrices[0]
        total = 0.0
        cores = matrices if A is None else matrices[1:]
        for one, M in zip(self.group.modules, cores, strict=True):
            M = M if self.group.shape.rank_first else M.T
            total += one.exact.squares(one.W - (M if A is None else A @ M))
        return total

    def points(self, least: int, most: int, start: float, finest: float, step: int) -> list[Point]:
        """What ranks and octaves of the step come to, from about `least` bytes to `most`.

        Args:
            least: bytes.
            most: bytes.
            start: logarithm of a step to begin with.
            finest: that of the step below which nothing is gained.
            step: of the grid of ranks.
        """

        def tried(R: int, log_step: float) -> Point:
            found = self.on_steps(R, log_step)(log_step)
            found = [one.fitted() for one in found]
            size = sum(one.size for one in found)
            return Point(size, self.error(R, [one.value() for one in found]), R, log_step)

        # Of zeros alone no coarser step takes less.
        least = max(least, 1 + sum(map(self._least_of, self.group.modules)))
        known = [tried(IDENTITY, start)]
        while known[-1].size > least and len(known) < _MOST_POINTS:
            known.append(tried(IDENTITY, known[-1].log_step + 1))
        known.reverse()
        while known[-1].size < most and known[-1].log_step > finest:
            known.append(tried(IDENTITY, max(known[-1].log_step - 1, finest)))
        found, width = list(known), self.group.shape.width
        steps = [one.log_step for one in known]
        steps += [steps[-1] - 1, steps[-1] - 2]  # A truncated basis is worth finer ones.
        for R in sorted({min(-(-int(width * share) // step) * step, width) for share in _RANKS}):
            # From coarse steps to fine ones, as long as the basis pays.
            paid = [False]
            for log_step in steps:
                point = tried(R, log_step)
                pays = point.error < error_at(known, point.size)
                if point.size > most or (not pays and (any(paid) or len(paid) > _MOST_VAIN)):
                    break
                paid.append(pays)
                found += [point] if pays else []
        return refined(lower_hull(found))

    def _least_of(self, one: TwoSided) -> int:
        return least_matrix_bytes(one.W.shape, self.value_dtype.itemsize, self.size)

    def _on_steps(
        self, matrices: Sequence[tuple[Tensor, Metric]], near: float
    ) -> list[SteppedMatrix]:
        """Matrices and metrics on their steps, damped as their numbers have bits near a step."""

        def stepped(metrics: Sequence[Metric], damping: float) -> list[SteppedMatrix]:
            factors: dict[int, Tensor] = {}
            of = partial(SteppedMatrix.of, size=self.size, factors=factors)
            return [
                of(W, metric, damping, self.value_dtype)
                for (W, _), metric in zip(matrices, metrics, strict=True)
            ]

        rough = stepped([metric.diagonal for _, metric in matrices], damping_of(MOST_BITS))
        elements = sum(one.W.numel() for one in rough)
        rms = math.sqrt(sum(one.rms() ** 2 * one.W.numel() for one in rough) / elements)
        return stepped([metric for _, metric in matrices], damping_of(bits_of(rms / 2**near)))


def _core(A: Tensor, one: TwoSided, metric: Metric) -> tuple[Tensor, Tensor]:
    """The core of least error for a basis, and the metric of its rows."""
    assert metric.input is not None, "both sides of a regularized metric are there"
    image = apply_metric(metric.input, A)
    H = A.T @ image
    H = (H + H.T) / 2
    # Columns that a coarse step has left nothing of.
    H.diagonal().masked_fill_(~A.any(dim=0), 1)
    return solver(H)(image.T @ one.W), H


@dataclass(kw_only=True)
class PreparedCoded(Group):
    """A group with the bases of its sides."""

    sides: dict[BasisSide, CodedSide]


def prepare(group: Group) -> PreparedCoded:
    """Find the basis of each side; see `Method.prepare`."""
    layout, found = group.layout, {}
    clock = Stopwatch(group.unfolding.device)
    with clock("stage1"):
        scales = None if group.args.metric == LOSS else projection_norms(group)
        for side, modules in sides(layout).items():
            inputs = side == "input"
            reads = {module.name: module.reads if inputs else module.name for module in modules}
            shape = side_shape(layout, side, group.value_dtype, group.args)
            bases = LossGroup(two_sided(group, modules, reads, scales), shape)
            found[side] = CodedSide(modules, bases, group.value_dtype, group.args.size)
    known = vars(group) | {"seconds": clock.seconds}
    return PreparedCoded(**known, sides=found)


def encode(
    prepared: PreparedCoded,
    byte_budget: int,
    curve_budgets: Sequence[int] = (),
    *,
    reuse: bool = False,
) -> Decomposed:
    """Store a group; see `Method.encode`."""
    layout, args = prepared.layout, prepared.args
    bounds(layout, byte_budget, prepared.value_dtype, args)
    clock = Stopwatch(prepared.unfolding.device)
    every = list(prepared.sides.values())
    budgets = [byte_budget, *curve_budgets]
    with clock("rank_search"):
        bits = disk_bits(8 * byte_budget / layout.elements, args.size)
        hulls = []
        for side in every:
            share = side.elements / layout.elements
            rms = max(one.matrix.rms() for one in side.on_steps(IDENTITY, 0.0)(0.0))
            finest = math.log2((rms or 1.0) / MOST_RMS)
            start = finest + max(MOST_BITS - bits, 0.0)
            least, most = int(min(budgets) * share / 2), max(budgets) if len(budgets) > 1 else 0
            most = max(most, int(byte_budget * min(1.0, 2 * share)))
            hulls.append(side.points(least, most, start, finest, args.rank_step))
        divided = [divide(hulls, budget) for budget in budgets]
    with clock("stage2"):
        points = divided[0].points
        at = _rounding(every, points)
        if sum(one.size for one in at(_NOTHING_LEFT)) > _MOST_OVERHEAD * byte_budget:
            points = [point._replace(R=IDENTITY) for point in points]
            at = _rounding(every, points)
        _, stored = fitting(at, layout.elements, byte_budget, -_OCTAVES_MORE, 0.0, args.size)
        chains, shared, ranks = _chains(prepared, points, stored)
    done = chain_result(prepared, StoredChains(chains, shared, ranks), clock)
    ratio = done.metric_squared_error / divided[0].error if divided[0].error else 1.0
    curve = tuple(
        CurvePoint(budget, Ranks(one.points[0].R, 0, 0), one.error * ratio)
        for budget, one in zip(curve_budgets, divided[1:], strict=True)
    )
    values = [side.group.singular_values for side in every]
    return replace(done, curve=curve, singular_values=(values[0], ()))


def _rounding(
    sides: Sequence[CodedSide], points: Sequence[Point]
) -> Callable[[float], list[RoundedMatrix]]:
    """The matrices of all sides, by how many octaves all steps are above those of their points."""
    rounding = [
        side.on_steps(point.R, point.log_step) for side, point in zip(sides, points, strict=True)
    ]

    def at(more: float) -> list[RoundedMatrix]:
        found = [
            matrices(point.log_step + more)
            for matrices, point in zip(rounding, points, strict=True)
        ]
        return [one for some in found for one in some]

    return at


def _chains(
    prepared: PreparedCoded,
    points: Sequence[Point],
    stored: Sequence[EncodedCore],
) -> tuple[dict[str, ModuleChain], dict[str, EncodedCore], dict[str, int]]:
    """Of every module its chain; what modules share; ranks."""
    found: dict[str, ModuleChain] = {}
    shared: dict[str, EncodedCore] = {}
    ranks: dict[str, int] = {}
    left = iter(stored)
    for (name, side), point in zip(prepared.sides.items(), points, strict=True):
        ops: tuple[Multiply, ...] = (Multiply(0),)
        if point.R != IDENTITY:
            shared[BASIS_NAMES[name]], ranks[RANK_NAMES[name]] = next(left), point.R
            U1 = Multiply(BASIS_NAMES[name], transposed=name == "output")
            ops = (U1, Multiply(0)) if name == "input" else (Multiply(0), U1)
        for module in side.modules:
            found[module.name] = ModuleChain(ops, (next(left),))
    modules = {module.name: found[module.name] for module in prepared.layout.modules}
    return modules, shared, ranks


def bounds(
    layout: GroupLayout, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
) -> Bounds:
    """See `Method.bounds`."""
    least = least_bytes(layout, value_dtype, args)
    watersic.require_coded_budget("lestd with coding entropy", byte_budget, least, args)
    plain = watersic.bounds(layout, byte_budget, value_dtype, _of_watersic(args))
    # Metrics in their units, and all columns of a basis, with a decomposition of that size.
    squares = sum(layout.weight_shape(module)[1] ** 2 for module in layout.modules)
    squares += sum(layout.weight_shape(module)[0] ** 2 for module in layout.modules)
    workspace = plain.workspace_bytes + 8 * squares + 56 * layout.width**2 + 12 * layout.elements
    return replace(plain, workspace_bytes=workspace)


def least_bytes(layout: GroupLayout, value_dtype: torch.dtype, args: MethodArgs) -> int:
    """See `Method.least_bytes`."""
    options = ("value_bits", "factor_bits", "type_mode", "stage2", "pattern", "max_flops")
    require_default("lestd with coding entropy", args, *options)
    return watersic.least_bytes(layout, value_dtype, _of_watersic(args))


def _of_watersic(args: MethodArgs) -> MethodArgs:
    return replace(args, coding=FIXED)
