"""LeSTD: a shared Tucker basis (Stage I) with ultra-sparse cores (Stage II).

Attention in the weights' own norm, 16 bits to a value, is stored here; everything else by
lestd_kernels.methods.lestd_in_metric.

Reference: "LeSTD: LLM Compression via Learning-based Sparse Tensor Decomposition", ICLR 2026.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from lestd_kernels.errors import LestdError
from lestd_kernels.linalg.stage1 import Ranks
from lestd_kernels.linalg.stage2 import gram_factors, one_shot, prune_refit, refit_targets
from lestd_kernels.methods import lestd_coded, lestd_in_metric
from lestd_kernels.methods.common.base import (
    ACTIVATION,
    LOSS,
    NORM,
    WEIGHT,
    Bounds,
    Decomposed,
    Group,
    Method,
    MethodArgs,
    require_plain,
)
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
from lestd_kernels.methods.lestd_coded import PreparedCoded
from lestd_kernels.methods.lestd_in_metric import PreparedSides
from lestd_kernels.options import ENTROPY
from lestd_kernels.search.budget import GroupShape, Limits, rank_grid, require_feasible
from lestd_kernels.search.tucker_ranks import search_sparse
from lestd_kernels.search.two_of_four import (
    fitting_ranks,
    pattern_bytes,
    pattern_nonzeros,
    search_two_of_four,
    select_two_of_four,
)
from lestd_kernels.storage.codecs import TWO_OF_FOUR, UNSTRUCTURED
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
    """The most non-zeros that fit with each core in any codec; exact.

    A core's bytes are concave in its non-zeros: the fewest of several lines. To shift non-zeros
    from one partly filled core to another, in the better direction, costs nothing, so that with
    some optimal numbers every core but one is full or empty.
    """
    cores = range(len(shape.core_slices))
    kinds = Counter(
        (math.prod(shape.core_shape(ranks, core)), tuple(shape.codec_lines(ranks, core)))
        for core in cores
    )
    empty = sum(count * _core_bytes(lines, 0) for (_, lines), count in kinds.items())
    spare = byte_budget - shape.factor_bytes(ranks) - empty
    if spare < 0:
        return 0
    most = 0
    filling = [_core_bytes(lines, size) - _core_bytes(lines, 0) for size, lines in kinds]
    *others, last = (range(count + 1) for count in kinds.values())
    for some in itertools.product(*others):
        left = spare - sum(n * more for n, more in zip(some, filling, strict=False))
        if left < 0:
            continue
        # Of cores that are all alike the most that fit are full.
        top = min(last[-1], left // filling[-1])
        for full in range(top if not others else 0, top + 1):
            rest = left - full * filling[-1]
            total = partial = 0
            for n, (size, lines), count in zip((*some, full), kinds, kinds.values(), strict=True):
                total += n * size
                if n < count:
                    partial = max(partial, _partial(size, lines, rest + _core_bytes(lines, 0)))
            most = max(most, total + partial)
    return most


def _core_bytes(lines: Sequence[tuple[int, int]], nnz: int) -> int:
    return min(fixed + per_nonzero * nnz for fixed, per_nonzero in lines)


def _partial(size: int, lines: Sequence[tuple[int, int]], byte_budget: int) -> int:
    """The most non-zeros of one core within a budget, with the best codec."""
    return max(
        min(size, (byte_budget - fixed) // per_nonzero) if per_nonzero else size
        for fixed, per_nonzero in lines
        if fixed <= byte_budget
    )


def least_bytes(layout: GroupLayout, value_dtype: torch.dtype, args: MethodArgs) -> int:
    """The smallest feasible byte budget; see `Method.least_bytes`."""
    return _least_bytes(group_shape(layout, value_dtype, args), _smallest(layout, args))


def _room(layout: GroupLayout, args: MethodArgs) -> Any:
    """The file that stores a group."""
    if args.coding == ENTROPY:
        return lestd_coded
    return lestd_in_metric if lestd_in_metric.serves(layout, args) else None


def _prepare_any(group: Group) -> Prepared | PreparedSides | PreparedCoded:
    room = _room(group.layout, group.args)
    found: Prepared | PreparedSides | PreparedCoded = (room.prepare if room else prepare)(group)
    return found


def _encode_any(
    prepared: Prepared | PreparedSides | PreparedCoded,
    byte_budget: int,
    curve_budgets: Sequence[int] = (),
    *,
    reuse: bool = False,
) -> Decomposed:
    if isinstance(prepared, Prepared):
        return encode(prepared, byte_budget, curve_budgets, reuse=reuse)
    if isinstance(prepared, PreparedCoded):
        return lestd_coded.encode(prepared, byte_budget, curve_budgets, reuse=reuse)
    return lestd_in_metric.encode(prepared, byte_budget, curve_budgets, reuse=reuse)


def _bounds_any(
    layout: GroupLayout, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
) -> Bounds:
    room = _room(layout, args)
    found: Bounds = (room.bounds if room else bounds)(layout, byte_budget, value_dtype, args)
    return found


def _least_bytes_any(layout: GroupLayout, value_dtype: torch.dtype, args: MethodArgs) -> int:
    room = _room(layout, args)
    found: int = (room.least_bytes if room else least_bytes)(layout, value_dtype, args)
    return found


METHOD = Method(
    "lestd",
    _prepare_any,
    _encode_any,
    _bounds_any,
    _least_bytes_any,
    (NORM, WEIGHT, ACTIVATION, LOSS),
    weight_options=lestd_in_metric.WEIGHT_OPTIONS,
    foresee=lestd_in_metric.foresee,
)
