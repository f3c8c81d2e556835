"""The steps that the shared-basis methods have in common: from an unfolding to cores, and back.

Shapes: see lestd_kernels.tensorize, stage1 and decomposition.

Gram matrices hold squares, which leave the range of float32 where the weights only come near its
square root. So the arithmetic is done on ``W / scale`` with the power of two that brings the
largest weight to about one: exact, and the same bits for the same weights at any scale.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lestd_kernels.budget import CurvePoint, GroupShape, Limits
from lestd_kernels.codecs import TWO_OF_FOUR, UNSTRUCTURED
from lestd_kernels.decomposition import CORE_NAME, EncodedCore, SharedTucker
from lestd_kernels.errors import LestdError
from lestd_kernels.methods.base import Decomposed, MethodArgs, SliceStats
from lestd_kernels.pattern import spread
from lestd_kernels.rank_search import RotatedCore
from lestd_kernels.stage1 import FLOAT64_ORDER, Factors, hooi, hosvd, squared_sum
from lestd_kernels.stage2 import fit_cores
from lestd_kernels.tensorize import PROJECTIONS, GroupLayout

_ERROR_CHUNK_COLUMNS, _SQUARE_ELEMENTS = 512, 1 << 16
# Multiples of the value dtype's epsilon. With a larger relative error the least-squares core of the
# rounded factors gains less than 1e-4 of it over the core of the unrounded ones.
_UNFITTED_ERROR = 20
# Parts of tensors in progress, and freed memory that the allocator keeps for small tensors.
_BUFFERS_BYTES = 80 << 20


class Stopwatch:
    """Seconds per stage, summed; waits for the device, so that a stage pays for its own work."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a block as part of `stage`."""
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


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
            "cores and so fills the pattern up; change one of the two"
        )
    heads = range(len(layout.slices) // len(PROJECTIONS))
    if learned and set(layout.slices) != {(t, i) for t in PROJECTIONS for i in heads}:
        counts = (sum(s[0] == t for s in layout.slices) for t in PROJECTIONS)
        found = ", ".join(f"{t} {count}" for t, count in zip(PROJECTIONS, counts, strict=True))
        raise LestdError(
            "type_mode 'learned' needs equally many query, key, value and output heads, but this "
            f"group has {found}; use type_mode 'identity'"
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
"""A rank search of lestd_kernels.rank_search or lestd_kernels.pattern."""


@dataclass(frozen=True)
class SharedBasis:
    """The shared basis of a group as it will be stored.

    Attributes:
        factors: in the value dtype.
        squared_energy: ``||G||^2`` of the orthonormal float32 factors, in units of scale^2.
        hooi_iterations: sweeps after the HOSVD.
        scale: what the unfolding was divided by, and the cores are to be multiplied by.
        curve: what the rank search found at the curve's budgets, in the units of the weights.
        singular_values: of the mode-1 and mode-2 unfoldings, in the units of the weights.
    """

    factors: Factors
    squared_energy: float
    hooi_iterations: int
    scale: float
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


def shared_basis(
    unfolding: Tensor,
    shape: GroupShape,
    limits: Limits,
    search: Search,
    value_dtype: torch.dtype,
    args: MethodArgs,
    clock: Stopwatch,
    curve_budgets: Sequence[int] = (),
) -> tuple[SharedBasis, list[Tensor]]:
    """HOSVD, rank search, HOOI at the chosen ranks, and the cores for the factors as stored.

    Args:
        unfolding: ``(d, S p)``, float32; divided in place by the basis' scale.
        shape: sizes of the group.
        limits: of the ranks.
        search: chooses the ranks.
        value_dtype: of the stored tensors.
        args: of the method.
        clock: gets the stages ``"stage1"``, ``"rank_search"`` and ``"stage2"``.
        curve_budgets: feasible byte budgets to predict the error at.

    Returns:
        The basis, and its cores ``(R1, R3, n_c, R2)``, float32, divided by the scale: those of
        least squares, or where these cannot be better by more than 1e-4 of the error, those of
        the factors before they are rounded. Elements that the value dtype rounds to zero are zero.
    """
    with clock("stage1"):
        scale = scale_to_one(unfolding)
        W = type_major(unfolding, shape)
        bases = hosvd(W)
        singular_values = bases.singular_values(1, scale), bases.singular_values(2, scale)
    with clock("rank_search"):
        budgets = (limits.byte_budget, *curve_budgets)
        every = [replace(limits, byte_budget=budget) for budget in budgets]
        rotated = RotatedCore(W, bases, shape.core_slices)
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
    basis = SharedBasis(factors, energy, iterations, scale, tuple(points), singular_values)
    return basis, cores


def finish(
    unfolding: Tensor,
    shape: GroupShape,
    basis: SharedBasis,
    cores: list[Tensor],
    clock: Stopwatch,
) -> Decomposed:
    """Round the cores to the value dtype, encode them, and measure what was stored.

    Args:
        unfolding: ``(d, S p)``, float32, what the cores were fitted to: divided by the scale.
        shape: sizes of the group.
        basis: the shared basis.
        cores: what to store in it, float32, ``(R1, R3, n_c, R2)`` each, divided by the scale;
            emptied.
        clock: gets the stages ``"stage2"`` (encoding) and ``"error"``.

    Raises:
        LestdError: a core value does not fit the value dtype.
    """
    layout, factors = shape.layout, basis.factors
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
        slices, squared_norm, squared_error = _slice_stats(unfolding, basis.scale, stored, rounded)
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


def relative(squared_error: float, squared_norm: float) -> float:
    """``sqrt(error / norm)``; 0 for an error of 0, even of a zero tensor."""
    if squared_error == 0:
        return 0.0
    return math.sqrt(squared_error / squared_norm) if squared_norm else math.inf


def _squares(slices: Tensor) -> Tensor:
    """Squared norm of each of n slices ``(m, n, p)``, ``(n,)``, accumulated in float64."""
    per_chunk = max(1, _SQUARE_ELEMENTS // slices[0].numel())
    total = slices.new_zeros(slices.shape[1], dtype=torch.float64)
    for rows in torch.split(slices, per_chunk):
        total += rows.double().square_().sum(dim=(0, 2))
    return total


def _nonzeros(slices: Tensor) -> list[int]:
    """Non-zeros of each of n slices ``(m, n, p)``, float32."""
    # A norm of order 0 counts, exactly up to 2^24 elements.
    counts = torch.linalg.vector_norm(slices, 0, dim=2).sum(dim=0, dtype=torch.float64)
    return [int(count) for count in counts.tolist()]


def _slice_stats(
    unfolding: Tensor, scale: float, stored: SharedTucker, cores: Sequence[Tensor]
) -> tuple[list[SliceStats], float, float]:
    """Statistics per slice, and ``||W||^2`` and ``||W - W_hat||^2`` summed over them.

    The unfolding is divided by `scale`; the figures are in the units of the weights. `cores` are
    what the stored ones decode to.
    """
    layout = stored.layout
    U1, U2 = stored.U1.float(), stored.U2.float()
    d, p, R1, R2 = layout.width, layout.head_dim, U1.shape[1], U2.shape[1]
    per_chunk = max(1, _ERROR_CHUNK_COLUMNS // p)
    W = unfolding.view(d, -1, p)
    encoded = list(stored.cores.values())
    heads = [] if stored.U3 is None else _head_bytes(stored, cores[0])
    slices: list[SliceStats] = []
    total_norm = total_error = 0.0
    for module, core in enumerate(stored.mixed_cores(cores)):
        in_module = len(layout.modules[module].slices)
        for part in torch.split(core.view(R1, -1, R2), per_chunk, dim=1):
            M = part / scale
            first, count = len(slices), M.shape[1]
            chunk = W[:, first : first + count]
            residual = (U1 @ (M @ U2.T).flatten(1)).view_as(chunk).sub_(chunk)
            norms, errors, energies = (
                _squares(x).mul_(scale**2).tolist() for x in (chunk, residual, M)
            )
            counts = _nonzeros(M)
            for i, (projection, head) in enumerate(layout.slices[first : first + count]):
                slices.append(
                    SliceStats(
                        projection=projection,
                        head=head,
                        nnz=counts[i],
                        density=counts[i] / (R1 * R2),
                        core_bytes=(
                            heads[head] / len(PROJECTIONS)
                            if heads
                            else _share(encoded[module], counts[i], in_module)
                        ),
                        relative_error=relative(errors[i], norms[i]),
                        squared_norm=norms[i],
                        squared_energy=energies[i],
                    )
                )
            total_norm += sum(norms)
            total_error += sum(errors)
    return slices, total_norm, total_error


def _share(core: EncodedCore, nonzeros: int, slices: int) -> float:
    """Bytes of a core that belong to one of its slices."""
    return core.stored_bytes * (nonzeros / core.nnz if core.nnz else 1 / slices)


def _head_bytes(stored: SharedTucker, core: Tensor) -> list[float]:
    """Bytes of every head's share of the one core of a learned type mode."""
    [encoded], (_, R2, R3) = stored.cores.values(), stored.ranks.values()
    counts = _nonzeros(core.float().view(core.shape[0] * R3, -1, R2))
    return [_share(encoded, count, len(counts)) for count in counts]


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
    reordered = unfolding_bytes if shape.learned else 0
    return max(eigenproblem, rotated) + reordered + _BUFFERS_BYTES
