"""The steps that the shared-basis methods have in common: from an unfolding to cores, and back.

Shapes: see lestd_kernels.tensorize, stage1 and decomposition.

Gram matrices hold squares, which leave the range of float32 where the weights only come near its
square root. So the arithmetic is done on ``W / scale`` with the power of two that brings the
largest weight to about one: exact, and the same bits for the same weights at any scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lestd_kernels.errors import LestdError
from lestd_kernels.formats.shared_tucker import CORE_NAME, SharedTucker
from lestd_kernels.linalg.stage1 import FLOAT64_ORDER, Bases, Factors, hooi, hosvd, squared_sum
from lestd_kernels.linalg.stage2 import fit_cores
from lestd_kernels.methods.common.base import BUFFERS_BYTES, Decomposed, Group, MethodArgs
from lestd_kernels.methods.common.slice_statistics import relative, slice_stats
from lestd_kernels.methods.common.stopwatch import Stopwatch
from lestd_kernels.search.budget import CurvePoint, GroupShape, Limits
from lestd_kernels.search.tucker_ranks import RotatedCore
from lestd_kernels.search.two_of_four import spread
from lestd_kernels.storage.codecs import TWO_OF_FOUR, UNSTRUCTURED
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.tensorize import PROJECTIONS, GroupLayout

# Multiples of the value dtype's epsilon. With a larger relative error the least-squares core of the
# rounded factors gains less than 1e-4 of it over the core of the unrounded ones.
_UNFITTED_ERROR = 20


def group_shape(layout: GroupLayout, value_dtype: torch.dtype, args: MethodArgs) -> GroupShape:
    """Sizes of a group under a type mode.

    Raises:
        LestdError: type mode learned, and the group is not one q, k, v and o slice per head, or
            the pattern is 2:4.
    """
    learned = args.type_mode == "learned"
    if learned and args.pattern != UNSTRUCTURED:
        raise LestdError(
            f"pattern {args.pattern!r} needs type_mode 'identity', found 'learned', which mixes "
            "cores and so breaks the pattern; change one of the two"
        )
    heads = range(len(layout.slices) // len(PROJECTIONS))
    if learned and set(layout.slices) != {(t, i) for t in PROJECTIONS for i in heads}:
        counts = (sum(s[0] == t for s in layout.slices) for t in PROJECTIONS)
        found = ", ".join(f"{t} {count}" for t, count in zip(PROJECTIONS, counts, strict=True))
        raise LestdError(
            "type_mode 'learned' needs equal numbers of query, key, value and output heads, but "
            f"this group has {found}; use type_mode 'identity'"
        )
    return GroupShape(layout, learned, value_dtype.itemsize, args.pattern)


def limits_of(byte_budget: int, args: MethodArgs) -> Limits:
    """The limits that a rank search must respect."""
    return Limits(byte_budget, args.max_flops, args.rank_step)


def type_major(unfolding: Tensor, shape: GroupShape) -> Tensor:
    """The unfolding ``(d, S p)`` as W ``(d, T, n, p)`` of stage1; a view where the order allows."""
    layout = shape.layout
    slices = unfolding.view(layout.width, -1, layout.head_dim)
    if shape.learned:
        n = len(layout.slices) // shape.types
        order = [layout.slices.index((t, i)) for t in PROJECTIONS for i in range(n)]
        if order != list(range(len(order))):
            slices = slices[:, order]
    return slices.reshape(layout.width, shape.types, -1, layout.head_dim)


Search = Callable[[RotatedCore, GroupShape, Sequence[Limits]], list[CurvePoint]]
"""A rank search of lestd_kernels.search.tucker_ranks or lestd_kernels.search.two_of_four."""


@dataclass(frozen=True)
class SharedBasis:
    """The shared basis of a group as it will be stored.

    Attributes:
        factors: in the value dtype.
        squared_energy: ``||G||^2`` of the orthonormal float32 factors, in units of scale^2.
        hooi_iterations: sweeps after the HOSVD.
        scale: what the unfolding was divided by, and the cores are to be multiplied by.
        expected_squared_error: what the rank search found, in the units of the weights.
        curve: the same at the curve's budgets.
        singular_values: of the mode-1 and mode-2 unfoldings, in the units of the weights.
    """

    factors: Factors
    squared_energy: float
    hooi_iterations: int
    scale: float
    expected_squared_error: float
    curve: tuple[CurvePoint, ...]
    singular_values: tuple[tuple[float, ...], tuple[float, ...]]


def scale_to_one(unfolding: Tensor) -> float:
    """Divide in place by the power of two that brings ``max |W|`` into [1, 2).

    Returns:
        The power of two. Its exponent is at most 126 in magnitude, so that it and its reciprocal
        are normal float32 numbers: weights beyond 2^127 or below 2^-126 only come near one.
    """
    # aminmax reads without a copy; abs() would make one of the unfolding.
    largest = max(abs(float(end)) for end in torch.aminmax(unfolding))
    exponent = math.frexp(largest)[1] - 1 if largest else 0
    scale = math.ldexp(1.0, min(max(exponent, -126), 126))
    unfolding.mul_(1 / scale)
    return scale


@dataclass
class Prepared:
    """A group as Stage I leaves it for every byte budget.

    Attributes:
        unfolding: ``(d, S p)``, float32, divided by the scale.
        shape: sizes of the group.
        value_dtype: of the stored tensors.
        args: of the method.
        scale: see `scale_to_one`.
        seconds: what this took, by stage.
    """

    unfolding: Tensor
    shape: GroupShape
    value_dtype: torch.dtype
    args: MethodArgs
    scale: float
    seconds: dict[str, float]
    _parts: tuple[Tensor, Bases, RotatedCore] | None

    def parts(self, reuse: bool) -> tuple[Tensor, Bases, RotatedCore]:
        """W ``(d, T, n, p)``, its HOSVD bases, its rotation; forgotten here if not reused.

        Raises:
            ValueError: they were used up.
        """
        if self._parts is None:
            raise ValueError("the prepared group was used up by an encode without reuse")
        parts = self._parts
        if not reuse:
            self._parts = None
        return parts


def prepare(group: Group) -> Prepared:
    """Scale a group and find its HOSVD bases; see `Method.prepare`. Metrics are not used.

    Its rotation by them, the other half of what budgets have in common, is computed as far as rank
    searches ask for it.
    """
    unfolding, value_dtype = group.unfolding, group.value_dtype
    shape = group_shape(group.layout, value_dtype, group.args)
    clock = Stopwatch(unfolding.device)
    with clock("stage1"):
        scale = scale_to_one(unfolding)
        W = type_major(unfolding, shape)
        bases = hosvd(W)
        rotated = RotatedCore(W, bases, shape.core_slices)
    parts = (W, bases, rotated)
    return Prepared(unfolding, shape, value_dtype, group.args, scale, clock.seconds, parts)


def shared_basis(
    prepared: Prepared,
    limits: Limits,
    search: Search,
    clock: Stopwatch,
    curve_budgets: Sequence[int],
    reuse: bool,
) -> tuple[SharedBasis, list[Tensor]]:
    """Rank search, HOOI at the chosen ranks, and the cores for the factors as stored.

    Args:
        prepared: the group.
        limits: of the ranks.
        search: chooses the ranks.
        clock: gets the stages ``"stage1"``, ``"rank_search"`` and ``"stage2"``.
        curve_budgets: feasible byte budgets to predict the error at.
        reuse: leave the prepared group as it is, for another budget.

    Returns:
        The basis, and its cores ``(R1, R3, n_c, R2)``, float32, divided by the scale: those of
        least squares, or where these cannot be better by more than 1e-4 of the error, those of
        the factors before they are rounded. Elements that the value dtype rounds to zero are zero.
    """
    shape, args, scale = prepared.shape, prepared.args, prepared.scale
    value_dtype = prepared.value_dtype
    W, bases, rotated = prepared.parts(reuse)
    singular_values = bases.singular_values(1, scale), bases.singular_values(2, scale)
    with clock("rank_search"):
        budgets = (limits.byte_budget, *curve_budgets)
        every = [replace(limits, byte_budget=budget) for budget in budgets]
        chosen, *curve = search(rotated, shape, every)
        # With one mode truncated the HOSVD's bases are the factors, and the order of their columns
        # is kept unless the pattern changes it.
        truncated = sum(
            r < len(U) for r, U in zip(chosen.ranks, (bases.U1, bases.U2, bases.U3), strict=True)
        )
        unrounded = truncated < 2 and shape.pattern == UNSTRUCTURED
        known = _UNFITTED_ERROR * torch.finfo(value_dtype).eps
        if unrounded and chosen.squared_error >= known**2 * rotated.squared_norm:
            cores = rotated.leading(chosen.ranks)
            if reuse:  # They are changed in place.
                cores = [core.clone() for core in cores]
        else:
            cores = []
        del rotated
    with clock("stage1"):
        found = hooi(W, bases, chosen.ranks, args.hooi_tol, args.hooi_max_iter)
        del bases
        factors = found.factors.to(value_dtype)
        if shape.pattern == TWO_OF_FOUR:
            factors = spread(factors)
        energy, iterations = found.squared_energy, found.iterations
        del found
    with clock("stage2"):
        if not cores:
            cores = fit_cores(W, factors, shape.core_slices)
        finfo = torch.finfo(value_dtype)
        # Half of the smallest number still becomes zero.
        rounded_to_zero = finfo.smallest_normal * finfo.eps / 2 / scale
        for core in cores:
            torch.hardshrink(core, rounded_to_zero, out=core)
    points = (replace(point, squared_error=point.squared_error * scale**2) for point in curve)
    expected = chosen.squared_error * scale**2
    basis = SharedBasis(
        factors, energy, iterations, scale, expected, tuple(points), singular_values
    )
    return basis, cores


def finish(
    prepared: Prepared, basis: SharedBasis, cores: list[Tensor], clock: Stopwatch
) -> Decomposed:
    """Round the cores to the value dtype, encode them, and measure what was stored.

    Args:
        prepared: the group that the cores were fitted to.
        basis: the shared basis.
        cores: what to store in it, float32, ``(R1, R3, n_c, R2)`` each, divided by the scale;
            emptied.
        clock: gets the stages ``"stage2"`` (encoding) and ``"error"``.

    Raises:
        LestdError: a core value does not fit the value dtype.
    """
    shape, factors = prepared.shape, basis.factors
    layout = shape.layout
    names = [CORE_NAME] if shape.learned else [module.name for module in layout.modules]
    with clock("stage2"):
        # One by one, so that float32 and rounded cores do not all exist at a time.
        rounded = [_round_core(cores, basis.scale, factors.U1.dtype, name) for name in names]
        encoded = {
            name: EncodedCore.encode(core, shape.pattern)
            for name, core in zip(names, rounded, strict=True)
        }
        stored = SharedTucker(
            layout, factors.U1, factors.U2, encoded, factors.U3 if shape.learned else None
        )
        kept = [_without_zeros(core) for core in encoded.values()]
    with clock("error"):
        slices, squared_norm, squared_error = slice_stats(
            prepared.unfolding, basis.scale, stored, rounded
        )
    return Decomposed(
        decomposition=stored,
        squared_norm=squared_norm,
        squared_error=squared_error,
        relative_error=relative(squared_error, squared_norm),
        squared_energy_stage1=basis.squared_energy * basis.scale**2,
        squared_energy_stage2=sum(squared_sum(values) for values in kept),
        threshold=min((float(v.abs().min()) for v in kept if v.numel()), default=0.0),
        hooi_iterations=basis.hooi_iterations,
        seconds=clock.seconds,
        slices=tuple(slices),
        curve=basis.curve,
        singular_values=basis.singular_values,
        metric_squared_norm=squared_norm,
        metric_squared_error=squared_error,
        expected_squared_error=basis.expected_squared_error,
    )


def _round_core(cores: list[Tensor], scale: float, value_dtype: torch.dtype, name: str) -> Tensor:
    """The first of the cores, which is taken away, as the matrix that is stored."""
    core = cores.pop(0)
    matrix = core.flatten(1).mul_(scale).to(value_dtype)
    if not all(math.isfinite(end) for end in torch.aminmax(matrix)):
        limit = torch.finfo(value_dtype).max
        advice = (
            "convert the checkpoint to bfloat16"
            if value_dtype == torch.float16
            else "weights this large are most likely damaged: check the checkpoint"
        )
        raise LestdError(
            f"the core of {name} has a value of magnitude {float(core.abs().max()):.4g}, "
            f"which does not fit {value_dtype} (at most {limit:.4g}); {advice}"
        )
    return matrix


def _without_zeros(core: EncodedCore) -> Tensor:
    values = core.tensors["values"]
    return values if values.numel() == core.nnz else values[values != 0]


def workspace_bytes(shape: GroupShape, core_elements: int) -> int:
    """Upper bound of the peak memory of a decomposition beside the unfolding, measured on CPU.

    The largest of two moments: an eigenproblem, d x d, with its work space; and the rotated group,
    or a projected tensor of a HOOI sweep, which is not larger, beside two d x d matrices and the
    selection in its cores. A learned type mode encodes and mixes its one core as a whole, and may
    need a reordered copy of the unfolding.

    Args:
        shape: sizes of the group.
        core_elements: upper bound of R1 R2 S.
    """
    unfolding_bytes, square = shape.layout.elements * 4, shape.layout.width**2
    eigenproblem = 48 * square if shape.layout.width <= FLOAT64_ORDER else 28 * square
    # A mask of every element; magnitudes, and what they are compared to, core by core.
    largest = max(shape.core_slices) / sum(shape.core_slices)
    rotated = unfolding_bytes + 8 * square + int((1 + 5 * largest) * core_elements)
    # A reordered copy, and what copying in another order leaves with the allocator.
    reordered = unfolding_bytes * 5 // 4 if shape.learned else 0
    return max(eigenproblem, rotated) + reordered + BUFFERS_BYTES


def reuse_bytes(shape: GroupShape) -> int:
    """Upper bound of what is kept of a group for further budgets: rotation, bases, reordered copy.

    With one budget they are gone before the memory of `workspace_bytes` peaks.
    """
    copies = 2 if shape.learned else 1
    return copies * shape.layout.elements * 4 + 4 * shape.layout.width**2
