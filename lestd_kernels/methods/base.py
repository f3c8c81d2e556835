"""What every method takes and gives.

Shapes: see lestd_kernels.tensorize and decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lestd_kernels.budget import CurvePoint
from lestd_kernels.codecs import UNSTRUCTURED
from lestd_kernels.decomposition import SharedTucker
from lestd_kernels.tensorize import GroupLayout


@dataclass(frozen=True)
class MethodArgs:
    """Arguments of a method: plain values, part of a task's identity.

    Attributes:
        type_mode: ``"identity"`` (U3 = I, every projection its own cores) or ``"learned"`` (U3 is
            fitted; MHA only).
        stage2: ``"one-shot"`` or ``"prune-refit"``.
        pattern: where core elements may be kept: ``"unstructured"`` or ``"2:4"`` (see
            lestd_kernels.pattern).
        alpha: prune-refit: share of the survivors pruned per step, in (0, 1].
        rank_step: R1 and R2 are multiples of it, or the full dimension.
        max_flops: upper bound of multiply-adds per token relative to the dense projections.
        hooi_tol: HOOI stops when the fit changes by less than this, relatively.
        hooi_max_iter: HOOI sweeps at most.
    """

    type_mode: str = "identity"
    stage2: str = "one-shot"
    pattern: str = UNSTRUCTURED
    alpha: float = 0.1
    rank_step: int = 8
    max_flops: float | None = None
    hooi_tol: float = 1e-6
    hooi_max_iter: int = 25


@dataclass(frozen=True)
class Bounds:
    """What is known of a decomposition from shapes alone.

    Attributes:
        max_R1: the largest R1 that fits, beside the smallest other ranks.
        max_R2: the largest R2 that fits, beside the smallest other ranks.
        max_nnz: the most non-zeros that fit at any ranks, however they spread over the cores.
        max_bytes: upper bound of the stored bytes: the budget, or less where the pattern leaves
            some of it unused even at full rank.
        workspace_bytes: peak memory of `Method.decompose` beside the unfolding.
        reuse_bytes: how much more it is where a group is prepared for several budgets.
    """

    max_R1: int  # noqa: N815
    max_R2: int  # noqa: N815
    max_nnz: int
    max_bytes: int
    workspace_bytes: int
    reuse_bytes: int


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
        curve: the error to expect at other byte budgets, where asked for.
        singular_values: of the mode-1 unfolding (d) and of the mode-2 unfolding (p), descending.
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
    curve: tuple[CurvePoint, ...]
    singular_values: tuple[tuple[float, ...], tuple[float, ...]]


class Encode(Protocol):
    """See `Method.encode`."""

    def __call__(
        self,
        prepared: Any,
        byte_budget: int,
        curve_budgets: Sequence[int] = (),
        *,
        reuse: bool = False,
    ) -> Decomposed:
        """Decompose a prepared slice group."""


def add_seconds(*parts: dict[str, float]) -> dict[str, float]:
    """Seconds per stage, summed over parts of the work."""
    names = {name: None for part in parts for name in part}
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


@dataclass(frozen=True)
class Method:
    """One way to decompose a slice group.

    Attributes:
        name: how configuration and manifest call it.
        prepare: ``(unfolding (d, S p) float32, layout, value_dtype, args)``; what no byte budget
            decides, done once for all of them. What it returns has its cost as `seconds`. The
            unfolding is used up: it is scaled in place, since a copy would double the memory.
            Raises LestdError where the type mode does not go with the layout or the pattern.
        encode: ``(prepared, byte_budget, curve_budgets, reuse=...)``; the result stores at most
            `byte_budget` bytes, and has the error to expect at each of the curve's budgets
            (feasible ones). What was prepared is used up unless it is to be reused, for another
            budget: neither order nor number of the budgets changes a bit of a result.
            Deterministic for a fixed device and number of threads. Raises LestdError as `bounds`
            does, and where a core value does not fit the value dtype.
        bounds: ``(layout, byte_budget, value_dtype, args)``; reads no weights. Raises LestdError
            where the smallest ranks exceed the budget or `max_flops`, where a learned type
            mode meets projections with different numbers of heads, or where the method, the type
            mode or the kind of Stage II does not go with the pattern.
        least_bytes: ``(layout, value_dtype, args)``; the smallest feasible byte budget. Raises
            LestdError as `bounds` does, but for the budget and `max_flops`.
    """

    name: str
    prepare: Callable[[Tensor, GroupLayout, torch.dtype, MethodArgs], Any]
    encode: Encode
    bounds: Callable[[GroupLayout, int, torch.dtype, MethodArgs], Bounds]
    least_bytes: Callable[[GroupLayout, torch.dtype, MethodArgs], int]

    def decompose(
        self,
        unfolding: Tensor,
        layout: GroupLayout,
        byte_budget: int,
        value_dtype: torch.dtype,
        args: MethodArgs,
        curve_budgets: Sequence[int] = (),
    ) -> Decomposed:
        """Decompose a slice group for one byte budget: `prepare`, then `encode`."""
        prepared = self.prepare(unfolding, layout, value_dtype, args)
        done = self.encode(prepared, byte_budget, curve_budgets)
        return replace(done, seconds=add_seconds(prepared.seconds, done.seconds))
