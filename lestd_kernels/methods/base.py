"""What every method takes and gives, and the steps that the shared-basis methods have in common.

Shapes: see lestd_kernels.tensorize, stage1 and decomposition.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lestd_kernels.budget import GroupShape, Limits
from lestd_kernels.decomposition import CORE_NAME, EncodedCore, SharedTucker
from lestd_kernels.errors import LestdError
from lestd_kernels.stage1 import Factors, Ranks, hooi, hosvd, squared_sum
from lestd_kernels.stage2 import fit_core
from lestd_kernels.tensorize import PROJECTIONS, GroupLayout

_ERROR_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class MethodArgs:
    """Arguments of a method: plain values, part of a task's identity.

    Attributes:
        type_mode: ``"identity"`` (U3 = I, every projection its own cores) or ``"learned"`` (U3 is
            fitted; MHA only).
        stage2: ``"one-shot"`` or ``"prune-refit"``.
        alpha: prune-refit: share of the survivors pruned per step, in (0, 1].
        rank_step: R1 and R2 are multiples of it, or the full dimension.
        max_flops: upper bound of multiply-adds per token relative to the dense projections.
        hooi_tol: HOOI stops when the fit changes by less than this, relatively.
        hooi_max_iter: HOOI sweeps at most.
    """

    type_mode: str = "identity"
    stage2: str = "one-shot"
    alpha: float = 0.1
    rank_step: int = 8
    max_flops: float | None = None
    hooi_tol: float = 1e-6
    hooi_max_iter: int = 25


@dataclass(frozen=True)
class Bounds:
    """What is known of a decomposition from shapes alone.

    Attributes:
        minimum_bytes: stored bytes at the smallest ranks with one non-zero.
        max_R1: the largest R1 that fits, beside the smallest other ranks.
        max_R2: the largest R2 that fits, beside the smallest other ranks.
        max_nnz: the most non-zeros that fit at any ranks, with equally dense cores.
        workspace_bytes: peak memory of `Method.decompose` beside the unfolding.
    """

    minimum_bytes: int
    max_R1: int
    max_R2: int
    max_nnz: int
    workspace_bytes: int


@dataclass(frozen=True)
class SliceStats:
    """One slice of a decomposed group.

    Attributes:
        projection: ``"q" "k" "v" "o"``.
        head: index of the head.
        nnz: non-zeros of the slice's M_s (mixed, with a learned type mode).
        density: nnz / (R1 R2).
        core_bytes: the slice's share of its core's bytes, in proportion to nnz; with a learned
            type mode a fourth of its head's share.
        relative_error: ``||W_s - W_hat_s|| / ||W_s||``.
        squared_norm: ``||W_s||^2``.
        squared_energy: ``||M_s||^2``.
    """

    projection: str
    head: int
    nnz: int
    density: float
    core_bytes: float
    relative_error: float
    squared_norm: float
    squared_energy: float


@dataclass(frozen=True)
class Decomposed:
    """A decomposition and what it cost. Sums over elements are accumulated in float64.

    Attributes:
        decomposition: as stored.
        squared_norm: ``||W||^2``.
        squared_error: ``||W - W_hat||^2``, the residual of the tensors as stored.
        relative_error: ``||W - W_hat|| / ||W||``.
        squared_energy_stage1: ``||G||^2`` after HOOI, for orthonormal float32 factors.
        squared_energy_stage2: sum of the squares of the stored core values.
        threshold: smallest stored |g|; 0 where nothing is stored.
        hooi_iterations: sweeps after the HOSVD.
        seconds: wall time of ``"stage1"``, ``"rank_search"``, ``"stage2"``, ``"error"``.
        slices: statistics of every slice, in unfolding order.
    """

    decomposition: SharedTucker
    squared_norm: float
    squared_error: float
    relative_error: float
    squared_energy_stage1: float
    squared_energy_stage2: float
    threshold: float
    hooi_iterations: int
    seconds: dict[str, float]
    slices: tuple[SliceStats, ...]


@dataclass(frozen=True)
class Method:
    """One way to decompose a slice group.

    Attributes:
        name: how configuration and manifest call it.
        decompose: ``(unfolding (d, S p) float32, layout, byte_budget, value_dtype, args)``; the
            result stores at most `byte_budget` bytes. Deterministic for a fixed device and number
            of threads. Raises LestdError as `bounds` does, and where a core value does not fit
            the value dtype.
        bounds: ``(layout, byte_budget, value_dtype, args)``; reads no weights. Raises LestdError
            where the smallest ranks exceed the budget or `max_flops`, or where a learned type
            mode meets projections with different numbers of heads.
    """

    name: str
    decompose: Callable[[Tensor, GroupLayout, int, torch.dtype, MethodArgs], Decomposed]
    bounds: Callable[[GroupLayout, int, torch.dtype, MethodArgs], Bounds]


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
        LestdError: type mode learned, and the group is not one q, k, v and o slice per head.
    """
    learned = args.type_mode == "learned"
    heads = range(len(layout.slices) // len(PROJECTIONS))
    if learned and set(layout.slices) != {(t, i) for t in PROJECTIONS for i in heads}:
        counts = (sum(s[0] == t for s in layout.slices) for t in PROJECTIONS)
        found = ", ".join(f"{t} {count}" for t, count in zip(PROJECTIONS, counts, strict=True))
        raise LestdError(
            "type_mode 'learned' needs equally many query, key, value and output heads, but this "
            f"group has {found}; use type_mode 'identity'"
        )
    return GroupShape(layout, learned, value_dtype.itemsize)


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


Search = Callable[[Tensor, Factors, GroupShape, Limits], Ranks]
"""A rank search of lestd_kernels.budget."""


@dataclass(frozen=True)
class SharedBasis:
    """The shared basis of a group as it will be stored, and the cores that fit it best.

    Attributes:
        factors: in the value dtype.
        targets: least-squares cores for these factors, ``(R1, R3, n_c, R2)`` each, float32;
            elements that the value dtype rounds to zero are zero.
        squared_energy: ``||G||^2`` of the orthonormal float32 factors.
        hooi_iterations: sweeps after the HOSVD.
    """

    factors: Factors
    targets: tuple[Tensor, ...]
    squared_energy: float
    hooi_iterations: int


def shared_basis(
    unfolding: Tensor,
    shape: GroupShape,
    limits: Limits,
    search: Search,
    value_dtype: torch.dtype,
    args: MethodArgs,
    clock: Stopwatch,
) -> SharedBasis:
    """HOSVD, rank search, HOOI at the chosen ranks, and the cores for the factors as stored."""
    W = type_major(unfolding, shape)
    with clock("stage1"):
        bases = hosvd(W)
    with clock("rank_search"):
        ranks = search(W, bases, shape, limits)
    with clock("stage1"):
        start = bases.leading(ranks)
        del bases
        found = hooi(W, start, args.hooi_tol, args.hooi_max_iter)
        factors = found.factors.to(value_dtype)
        energy, iterations = found.squared_energy, found.iterations
        del found
    with clock("stage2"):
        core = fit_core(W, factors)
        core.masked_fill_(core.to(value_dtype) == 0, 0)
    return SharedBasis(factors, core.split(shape.core_slices, dim=2), energy, iterations)


def finish(
    unfolding: Tensor,
    shape: GroupShape,
    basis: SharedBasis,
    cores: Sequence[Tensor],
    clock: Stopwatch,
) -> Decomposed:
    """Round the cores to the value dtype, encode them, and measure what was stored.

    Args:
        unfolding: ``(d, S p)``, float32, what the cores were fitted to.
        shape: sizes of the group.
        basis: the shared basis.
        cores: what to store in it, float32, ``(R1, R3, n_c, R2)`` each.
        clock: gets the stages ``"stage2"`` (encoding) and ``"error"``.

    Raises:
        LestdError: a core value does not fit the value dtype.
    """
    layout, factors = shape.layout, basis.factors
    names = [CORE_NAME] if shape.learned else [module.name for module in layout.modules]
    with clock("stage2"):
        encoded = {
            name: EncodedCore.encode(_round_core(core, factors.U1.dtype, name))
            for name, core in zip(names, cores, strict=True)
        }
        stored = SharedTucker(
            layout, factors.U1, factors.U2, encoded, factors.U3 if shape.learned else None
        )
        values = torch.cat([core.tensors["values"].float() for core in encoded.values()]).abs()
        values = values[values > 0]
        threshold = float(values.min()) if values.numel() else 0.0
        energy = squared_sum(values)
    with clock("error"):
        slices, squared_norm, squared_error = _slice_stats(unfolding, stored)
    return Decomposed(
        decomposition=stored,
        squared_norm=squared_norm,
        squared_error=squared_error,
        relative_error=relative(squared_error, squared_norm),
        squared_energy_stage1=basis.squared_energy,
        squared_energy_stage2=energy,
        threshold=threshold,
        hooi_iterations=basis.hooi_iterations,
        seconds=clock.seconds,
        slices=tuple(slices),
    )


def _round_core(core: Tensor, value_dtype: torch.dtype, name: str) -> Tensor:
    matrix = core.flatten(1).to(value_dtype)
    if not bool(matrix.isfinite().all()):
        limit = torch.finfo(value_dtype).max
        raise LestdError(
            f"the core of {name} has a value of magnitude {float(core.abs().max()):.4g}, which does "
            f"not fit {value_dtype} (at most {limit:.4g}); convert the checkpoint to bfloat16"
        )
    return matrix


def relative(squared_error: float, squared_norm: float) -> float:
    """``sqrt(error / norm)``; 0 for an error of 0, even of a zero tensor."""
    if squared_error == 0:
        return 0.0
    return math.sqrt(squared_error / squared_norm) if squared_norm else math.inf


def _slice_stats(
    unfolding: Tensor, stored: SharedTucker
) -> tuple[list[SliceStats], float, float]:
    """Statistics per slice, and ``||W||^2`` and ``||W - W_hat||^2`` summed over them."""
    layout = stored.layout
    U1, U2 = stored.U1.float(), stored.U2.float()
    d, p, R1, R2 = layout.width, layout.head_dim, U1.shape[1], U2.shape[1]
    per_chunk = max(1, _ERROR_CHUNK_ELEMENTS // (d * p))
    W = unfolding.view(d, -1, p)
    core_bytes = _core_bytes(stored)
    slices: list[SliceStats] = []
    total_norm = total_error = 0.0
    for module in layout.modules:
        core = stored.module_core(module).view(R1, -1, R2)
        for M in core.split(per_chunk, dim=1):
            first, count = len(slices), M.shape[1]
            chunk = W[:, first : first + count]
            residual = chunk - (U1 @ (M @ U2.T).flatten(1)).view_as(chunk)
            norms, errors, energies = (
                torch.linalg.vector_norm(x, dim=(0, 2), dtype=torch.float64).square().tolist()
                for x in (chunk, residual, M)
            )
            counts = M.count_nonzero(dim=(0, 2)).tolist()
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


def workspace_bytes(shape: GroupShape, max_R1: int) -> int:
    """TODO"""
    return 0
