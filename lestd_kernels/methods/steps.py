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
from lestd_kernels.stage1 import Factors, hooi, hosvd, squared_sum
from lestd_kernels.stage2 import fit_core
from lestd_kernels.tensorize import PROJECTIONS, GroupLayout

_ERROR_CHUNK_ELEMENTS = 1 << 22
# Parts of tensors in progress, and freed memory that the allocator keeps for small tensors.
_BUFFERS_BYTES = 192 << 20


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


Search = Callable[[Tensor, Factors, GroupShape, Sequence[Limits]], list[CurvePoint]]
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
    """

    factors: Factors
    squared_energy: float
    hooi_iterations: int
    scale: float
    curve: tuple[CurvePoint, ...]


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
        The basis, and its least-squares cores ``(R1, R3, n_c, R2)``, float32, divided by the
        scale; elements that the value dtype rounds to zero are zero.
    """
    with clock("stage1"):
        scale = scale_to_one(unfolding)
        W = type_major(unfolding, shape)
        bases = hosvd(W)
    with clock("rank_search"):
        budgets = (limits.byte_budget, *curve_budgets)
        every = [replace(limits, byte_budget=budget) for budget in budgets]
        chosen, *curve = search(W, bases, shape, every)
    with clock("stage1"):
        found = hooi(W, bases, chosen.ranks, args.hooi_tol, args.hooi_max_iter)
        del bases
        factors = found.factors.to(value_dtype)
        if shape.pattern == TWO_OF_FOUR:
            factors = spread(factors)
        energy, iterations = found.squared_energy, found.iterations
        del found
    with clock("stage2"):
        core = fit_core(W, factors)
        cores = [part.contiguous() for part in torch.split(core, list(shape.core_slices), dim=2)]
        for core in cores:
            core.masked_fill_((core * scale).to(value_dtype) == 0, 0)
    points = (replace(point, squared_error=point.squared_error * scale**2) for point in curve)
    return SharedBasis(factors, energy, iterations, scale, tuple(points)), cores


def finish(
    unfolding: Tensor,
    shape: GroupShape,
    basis: SharedBasis,
    cores: Sequence[Tensor],
    clock: Stopwatch,
) -> Decomposed:
    """Round the cores to the value dtype, encode them, and measure what was stored.

    Args:
        unfolding: ``(d, S p)``, float32, what the cores were fitted to: divided by the scale.
        shape: sizes of the group.
        basis: the shared basis.
        cores: what to store in it, float32, ``(R1, R3, n_c, R2)`` each, divided by the scale.
        clock: gets the stages ``"stage2"`` (encoding) and ``"error"``.

    Raises:
        LestdError: a core value does not fit the value dtype.
    """
    layout, factors = shape.layout, basis.factors
    names = [CORE_NAME] if shape.learned else [module.name for module in layout.modules]
    with clock("stage2"):
        encoded = {
            name: EncodedCore.encode(
                _round_core(core, basis.scale, factors.U1.dtype, name), shape.pattern
            )
            for name, core in zip(names, cores, strict=True)
        }
        stored = SharedTucker(
            layout, factors.U1, factors.U2, encoded, factors.U3 if shape.learned else None
        )
        kept = [v[v != 0] for v in (core.tensors["values"] for core in encoded.values())]
    with clock("error"):
        slices, squared_norm, squared_error = _slice_stats(unfolding, basis.scale, stored)
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
    )


def _round_core(core: Tensor, scale: float, value_dtype: torch.dtype, name: str) -> Tensor:
    matrix = (core.flatten(1) * scale).to(value_dtype)
    if not bool(matrix.isfinite().all()):
        limit = torch.finfo(value_dtype).max
        advice = (
            "convert the checkpoint to bfloat16"
            if value_dtype == torch.float16
            else "weights this large are most likely damaged: check the checkpoint"
        )
        raise LestdError(
            f"the core of {name} has a value of magnitude {float(core.abs().max()) * scale:.4g}, "
            f"which does not fit {value_dtype} (at most {limit:.4g}); {advice}"
        )
    return matrix


def relative(squared_error: float, squared_norm: float) -> float:
    """``sqrt(error / norm)``; 0 for an error of 0, even of a zero tensor."""
    if squared_error == 0:
        return 0.0
    return math.sqrt(squared_error / squared_norm) if squared_norm else math.inf


def _slice_stats(
    unfolding: Tensor, scale: float, stored: SharedTucker
) -> tuple[list[SliceStats], float, float]:
    """Statistics per slice, and ``||W||^2`` and ``||W - W_hat||^2`` summed over them.

    The unfolding is divided by `scale`; the figures are in the units of the weights.
    """
    layout = stored.layout
    U1, U2 = stored.U1.float(), stored.U2.float()
    d, p, R1, R2 = layout.width, layout.head_dim, U1.shape[1], U2.shape[1]
    per_chunk = max(1, _ERROR_CHUNK_ELEMENTS // (d * p))
    W = unfolding.view(d, -1, p)
    core_bytes = _core_bytes(stored)
    slices: list[SliceStats] = []
    total_norm = total_error = 0.0
    for core in stored.module_cores():
        for part in torch.split(core.view(R1, -1, R2), per_chunk, dim=1):
            M = part / scale
            first, count = len(slices), M.shape[1]
            chunk = W[:, first : first + count]
            residual = (U1 @ (M @ U2.T).flatten(1)).view_as(chunk).sub_(chunk)
            norms, errors, energies = (
                torch.linalg.vector_norm(x, dim=(0, 2), dtype=torch.float64)
                .square()
                .mul(scale**2)
                .tolist()
                for x in (chunk, residual, M)
            )
            counts = part.count_nonzero(dim=(0, 2)).tolist()
            for i, (projection, head) in enumerate(layout.slices[first : first + count]):
                slices.append(
                    SliceStats(
                        projection=projection,
                        head=head,
                        nnz=counts[i],
                        density=counts[i] / (R1 * R2),
                        core_bytes=core_bytes[first + i],
                        relative_error=relative(errors[i], norms[i]),
                        squared_norm=norms[i],
                        squared_energy=energies[i],
                    )
                )
            total_norm += sum(norms)
            total_error += sum(errors)
    return slices, total_norm, total_error


def _core_bytes(stored: SharedTucker) -> list[float]:
    """Bytes of every slice's share of its core, in unfolding order."""
    R2, R3 = stored.U2.shape[1], 1 if stored.U3 is None else stored.U3.shape[1]

    def shares(core: EncodedCore) -> list[float]:
        counts = core.decode().view(core.rows, R3, -1, R2).count_nonzero(dim=(0, 1, 3)).tolist()
        return [core.stored_bytes * (c / core.nnz if core.nnz else 1 / len(counts)) for c in counts]

    if stored.U3 is None:
        return [x for module in stored.layout.modules for x in shares(stored.cores[module.name])]
    heads = shares(stored.cores[CORE_NAME])
    return [heads[head] / len(PROJECTIONS) for _, head in stored.layout.slices]


def workspace_bytes(shape: GroupShape, core_elements: int) -> int:
    """Upper bound of the peak memory of a decomposition beside the unfolding, measured on CPU.

    The largest of two moments: an eigenproblem (float64, d x d, with its work space) beside the
    projected tensors of a HOOI sweep; and at the end the least-squares cores beside the encoded
    and again decoded ones. A learned type mode may need a reordered copy of the unfolding.

    Args:
        shape: sizes of the group.
        core_elements: upper bound of R1 R2 S.
    """
    unfolding_bytes = shape.layout.elements * 4
    eigenproblem = 2 * unfolding_bytes + 48 * shape.layout.width**2
    # In copies of the cores: with a learned type mode they are encoded and mixed all at once.
    cores = (6 if shape.learned else 5) * 4 * core_elements
    reordered = unfolding_bytes if shape.learned else 0
    return max(eigenproblem, cores) + reordered + _BUFFERS_BYTES
