"""LeSTD: a shared Tucker basis (Stage I) with ultra-sparse cores (Stage II).

Reference: "LeSTD: LLM Compression via Learning-based Sparse Tensor Decomposition", ICLR 2026.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache

import torch

from lestd_kernels.budget import (
    GroupShape,
    Limits,
    rank_grid,
    require_feasible,
)
from lestd_kernels.codecs import TWO_OF_FOUR, UNSTRUCTURED
from lestd_kernels.errors import LestdError
from lestd_kernels.methods.base import Bounds, Decomposed, Method, MethodArgs, require_plain
from lestd_kernels.methods.steps import (
    Prepared,
    Stopwatch,
    finish,
    group_shape,
    limits_of,
    prepare,
    reuse_bytes,
    shared_basis,
    workspace_bytes,
)
from lestd_kernels.pattern import (
    fitting_ranks,
    pattern_bytes,
    pattern_nonzeros,
    search_two_of_four,
    select_two_of_four,
)
from lestd_kernels.rank_search import search_sparse
from lestd_kernels.stage1 import Ranks
from lestd_kernels.stage2 import gram_factors, one_shot, prune_refit, refit_targets
from lestd_kernels.tensorize import GroupLayout


def _checked(
    layout: GroupLayout, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
) -> tuple[GroupShape, Limits, Ranks]:
    """The group's sizes, the limits, and the smallest ranks."""
    if args.pattern != UNSTRUCTURED and args.stage2 != "one-shot":
        raise LestdError(
            f"pattern {args.pattern!r} needs stage2 'one-shot', found {args.stage2!r}, which "
            "prunes by one threshold; change one of the two"
        )
    require_plain("lestd", args)
    shape, limits = group_shape(layout, value_dtype, args), limits_of(byte_budget, args)
    smallest = _smallest(layout, args)
    require_feasible(shape, limits, smallest, _least_bytes(shape, smallest))
    return shape, limits, smallest


def _smallest(layout: GroupLayout, args: MethodArgs) -> Ranks:
    R1, R2 = (rank_grid(m, args.rank_step)[0] for m in (layout.width, layout.head_dim))
    return Ranks(R1, R2, 1)


def _least_bytes(shape: GroupShape, ranks: Ranks) -> int:
    """Stored bytes with what the pattern keeps, or else a single non-zero."""
    if shape.pattern == TWO_OF_FOUR:
        return pattern_bytes(shape, ranks)
    return shape.stored_bytes(ranks, [1] + [0] * (len(shape.core_slices) - 1))


def encode(
    prepared: Prepared, byte_budget: int, curve_budgets: Sequence[int] = (), *, reuse: bool = False
) -> Decomposed:
    """Decompose a slice group with sparse cores; see `Method.encode`."""
    args = prepared.args
    shape, limits, _ = _checked(prepared.shape.layout, byte_budget, prepared.value_dtype, args)
    clock = Stopwatch(prepared.unfolding.device)
    search = search_two_of_four if shape.pattern == TWO_OF_FOUR else search_sparse
    basis, cores = shared_basis(prepared, limits, search, clock, curve_budgets, reuse)

    def fits(nnz: Sequence[int]) -> bool:
        return shape.stored_bytes(basis.factors.ranks, nnz) <= byte_budget

    with clock("stage2"):
        grams = gram_factors(basis.factors)
        if shape.pattern == TWO_OF_FOUR:
            cores = refit_targets(cores, select_two_of_four(cores, shape), grams)
        elif args.stage2 == "prune-refit":
            cores = prune_refit(cores, fits, grams, args.alpha)
        else:
            cores = one_shot(cores, fits, grams)
    return finish(prepared, basis, cores, clock)


@cache
def bounds(
    layout: GroupLayout, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
) -> Bounds:
    """Sizes of a LeSTD decomposition from shapes alone; see `Method.bounds`."""
    shape, limits, smallest = _checked(layout, byte_budget, value_dtype, args)
    if shape.pattern == TWO_OF_FOUR:
        fitting = fitting_ranks(shape, limits)
        return Bounds(
            max_R1=max(ranks.R1 for ranks in fitting),
            max_R2=max(ranks.R2 for ranks in fitting),
            max_nnz=max(sum(pattern_nonzeros(shape, ranks)) for ranks in fitting),
            max_bytes=max(pattern_bytes(shape, ranks) for ranks in fitting),
            workspace_bytes=workspace_bytes(shape, max(map(shape.core_elements, fitting))),
            reuse_bytes=reuse_bytes(shape),
        )
    grid1, grid2 = (rank_grid(m, args.rank_step) for m in (layout.width, layout.head_dim))

    def feasible(ranks: Ranks) -> bool:
        empty = [0] * len(shape.core_slices)
        fits = shape.stored_bytes(ranks, empty) <= byte_budget
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
        max_R1=max_R1,
        max_R2=max_R2,
        max_nnz=_most_nonzeros(shape, byte_budget, allowed),
        max_bytes=byte_budget,
        workspace_bytes=workspace_bytes(shape, max_R1 * max_R2 * len(layout.slices)),
        reuse_bytes=reuse_bytes(shape),
    )


def _most_nonzeros(shape: GroupShape, byte_budget: int, candidates: Sequence[Ranks]) -> int:
    """The most non-zeros that fit the byte budget at any of the ranks."""

    def ceiling(ranks: Ranks) -> int:
        """No codec stores a non-zero in fewer bytes than its value."""
        values = (byte_budget - shape.factor_bytes(ranks)) // shape.value_bytes
        return min(shape.core_elements(ranks), values)

    most = 0
    for ranks in sorted(candidates, key=ceiling, reverse=True):
        if ceiling(ranks) <= most:
            break
        most = max(most, _most_nonzeros_at(shape, byte_budget, ranks))
    return most


def _most_nonzeros_at(shape: GroupShape, byte_budget: int, ranks: Ranks) -> int:
    """The most non-zeros that fit with each core in any codec; exact."""
    cores = range(len(shape.core_slices))
    sizes = [rows * columns for rows, columns in (shape.core_shape(ranks, c) for c in cores)]
    most = 0
    for codecs in itertools.product(*(shape.codec_lines(ranks, core) for core in cores)):
        left = byte_budget - shape.factor_bytes(ranks) - sum(fixed for fixed, _ in codecs)
        if left < 0:
            continue
        total = 0
        for per_nonzero, size in sorted((o, s) for (_, o), s in zip(codecs, sizes, strict=True)):
            # The dense codec stores every element at the same bytes.
            count = min(size, left // per_nonzero) if per_nonzero else size
            total += count
            left -= count * per_nonzero
        most = max(most, total)
    return most


def least_bytes(layout: GroupLayout, value_dtype: torch.dtype, args: MethodArgs) -> int:
    """The smallest feasible byte budget; see `Method.least_bytes`."""
    return _least_bytes(group_shape(layout, value_dtype, args), _smallest(layout, args))


METHOD = Method("lestd", prepare, encode, bounds, least_bytes)
