"""LeSTD: a shared Tucker basis (Stage I) with ultra-sparse cores (Stage II).

Reference: "LeSTD: LLM Compression via Learning-based Sparse Tensor Decomposition", ICLR 2026.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from lestd_kernels.budget import (
    GroupShape,
    Limits,
    rank_grid,
    require_feasible,
    search_sparse,
)
from lestd_kernels.methods.base import Bounds, Decomposed, Method, MethodArgs
from lestd_kernels.methods.steps import (
    Stopwatch,
    finish,
    group_shape,
    limits_of,
    shared_basis,
    workspace_bytes,
)
from lestd_kernels.stage1 import Ranks
from lestd_kernels.stage2 import gram_factors, one_shot, prune_refit
from lestd_kernels.tensorize import GroupLayout


def _checked(
    layout: GroupLayout, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
) -> tuple[GroupShape, Limits, Ranks]:
    """The group's sizes, the limits, and the smallest ranks."""
    shape, limits = group_shape(layout, value_dtype, args), limits_of(byte_budget, args)
    R1, R2 = (rank_grid(m, args.rank_step)[0] for m in (layout.width, layout.head_dim))
    smallest = Ranks(R1, R2, 1)
    require_feasible(shape, limits, smallest, _least_bytes(shape, smallest))
    return shape, limits, smallest


def _least_bytes(shape: GroupShape, ranks: Ranks) -> int:
    """Stored bytes with a single non-zero."""
    return shape.stored_bytes(ranks, [1] + [0] * (len(shape.core_slices) - 1))


def decompose(
    unfolding: Tensor,
    layout: GroupLayout,
    byte_budget: int,
    value_dtype: torch.dtype,
    args: MethodArgs,
) -> Decomposed:
    """Decompose a slice group with sparse cores; see `Method.decompose`."""
    shape, limits, _ = _checked(layout, byte_budget, value_dtype, args)
    clock = Stopwatch(unfolding.device)
    basis, cores = shared_basis(unfolding, shape, limits, search_sparse, value_dtype, args, clock)

    def fits(nnz: Sequence[int]) -> bool:
        return shape.stored_bytes(basis.factors.ranks, nnz) <= byte_budget

    with clock("stage2"):
        grams = gram_factors(basis.factors)
        if args.stage2 == "prune-refit":
            cores = prune_refit(cores, fits, grams, args.alpha)
        else:
            cores = one_shot(cores, fits, grams)
    return finish(unfolding, shape, basis, cores, clock)


@cache
def bounds(
    layout: GroupLayout, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
) -> Bounds:
    """Sizes of a LeSTD decomposition from shapes alone; see `Method.bounds`."""
    shape, limits, smallest = _checked(layout, byte_budget, value_dtype, args)
    grid1, grid2 = (rank_grid(m, args.rank_step) for m in (layout.width, layout.head_dim))

    def feasible(ranks: Ranks) -> bool:
        fits = _least_bytes(shape, ranks) <= byte_budget
        return fits and limits.allows_flops(shape, ranks)

    max_R1 = max(R1 for R1 in grid1 if feasible(smallest._replace(R1=R1)))
    max_R2 = max(R2 for R2 in grid2 if feasible(smallest._replace(R2=R2)))
    candidates = [
        Ranks(R1, R2, R3)
        for R1 in grid1[: grid1.index(max_R1) + 1]
        for R2 in grid2[: grid2.index(max_R2) + 1]
        for R3 in range(1, shape.types + 1)
    ]
    allowed = [ranks for ranks in candidates if limits.allows_flops(shape, ranks)]
    return Bounds(
        minimum_bytes=_least_bytes(shape, smallest),
        max_R1=max_R1,
        max_R2=max_R2,
        max_nnz=max(1, *(_most_nonzeros(shape, limits, ranks) for ranks in allowed)),
        workspace_bytes=workspace_bytes(shape, max_R1 * max_R2 * len(layout.slices)),
    )


def _most_nonzeros(shape: GroupShape, limits: Limits, ranks: Ranks) -> int:
    """The most non-zeros that fit the byte budget with all cores in one codec."""
    elements, most = shape.core_elements(ranks), 0
    lines_of_cores = [shape.codec_lines(ranks, core) for core in range(len(shape.core_slices))]
    for lines in zip(*lines_of_cores, strict=True):
        left = limits.byte_budget - shape.factor_bytes(ranks) - sum(fixed for fixed, _ in lines)
        if left >= 0:
            per_nonzero = lines[0][1]  # 0 for the dense codec: any number fits
            most = max(most, min(elements, left // per_nonzero) if per_nonzero else elements)
    return most


METHOD = Method("lestd", decompose, bounds)
