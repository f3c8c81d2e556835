"""Tucker with dense cores in a shared basis: the TensorLLM baseline.

Reference: "TensorLLM: Tensorising Multi-Head Attention for Enhanced Reasoning and Compression in
LLMs", arXiv 2501.15674.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from lestd_kernels.errors import LestdError
from lestd_kernels.linalg.stage1 import Ranks
from lestd_kernels.methods.common.base import Bounds, Decomposed, Method, MethodArgs, require_plain
from lestd_kernels.methods.common.shared_basis import (
    Prepared,
    finish,
    group_shape,
    limits_of,
    prepare,
    reuse_bytes,
    shared_basis,
    workspace_bytes,
)
from lestd_kernels.methods.common.stopwatch import Stopwatch
from lestd_kernels.search.budget import (
    GroupShape,
    Limits,
    dense_bytes,
    largest_dense_rank,
    rank_grid,
    require_feasible,
)
from lestd_kernels.search.tucker_ranks import search_dense
from lestd_kernels.storage.codecs import UNSTRUCTURED
from lestd_kernels.tensorize import GroupLayout


def _checked(
    layout: GroupLayout, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
) -> tuple[GroupShape, Limits]:
    """The group's sizes, and limits that the smallest ranks respect (R1 is any integer)."""
    if args.pattern != UNSTRUCTURED:
        raise LestdError(
            f"pattern {args.pattern!r} needs method 'lestd', found 'tucker', whose cores are "
            "dense; change one of the two"
        )
    require_plain("tucker", args)
    shape, limits = group_shape(layout, value_dtype, args), limits_of(byte_budget, args)
    smallest = _smallest(layout, args)
    require_feasible(shape, limits, smallest, dense_bytes(shape, smallest))
    return shape, limits


def _smallest(layout: GroupLayout, args: MethodArgs) -> Ranks:
    return Ranks(1, rank_grid(layout.head_dim, args.rank_step)[0], 1)


def encode(
    prepared: Prepared, byte_budget: int, curve_budgets: Sequence[int] = (), *, reuse: bool = False
) -> Decomposed:
    """Decompose a slice group with dense cores; see `Method.encode`."""
    layout, value_dtype = prepared.shape.layout, prepared.value_dtype
    _, limits = _checked(layout, byte_budget, value_dtype, prepared.args)
    clock = Stopwatch(prepared.unfolding.device)
    basis, cores = shared_basis(prepared, limits, search_dense, clock, curve_budgets, reuse)
    return finish(prepared, basis, cores, clock)


@cache
def bounds(
    layout: GroupLayout, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
) -> Bounds:
    """Sizes of a Tucker decomposition from shapes alone; see `Method.bounds`."""
    shape, limits = _checked(layout, byte_budget, value_dtype, args)
    grid2 = rank_grid(layout.head_dim, args.rank_step)
    fitting = [
        Ranks(R1, R2, R3)
        for R3 in range(1, shape.types + 1)
        for R2 in grid2
        if (R1 := largest_dense_rank(shape, limits, R2, R3))
    ]
    max_nnz = max(shape.core_elements(ranks) for ranks in fitting)
    return Bounds(
        max_R1=max(ranks.R1 for ranks in fitting),
        max_R2=max(ranks.R2 for ranks in fitting),
        max_nnz=max_nnz,
        max_bytes=byte_budget,
        workspace_bytes=workspace_bytes(shape, max_nnz),
        reuse_bytes=reuse_bytes(shape),
    )


def least_bytes(layout: GroupLayout, value_dtype: torch.dtype, args: MethodArgs) -> int:
    """The smallest feasible byte budget; see `Method.least_bytes`."""
    return dense_bytes(group_shape(layout, value_dtype, args), _smallest(layout, args))


METHOD = Method("tucker", prepare, encode, bounds, least_bytes)
