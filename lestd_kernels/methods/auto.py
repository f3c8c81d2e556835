"""The method of least expected loss for each group, among methods and bits.

Every candidate that may have the least error stores the group within the byte budget in the metric
loss; what is kept is the one whose error, as stored, is least. The error to expect at another
budget is the least that one of these expects there, or has with what it stored, or that is foreseen
of a quantizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from lestd_kernels.linalg.stage1 import Ranks
from lestd_kernels.methods import gptq, lestd, sparsegpt, svd_llm, watersic
from lestd_kernels.methods.common.base import (
    LOSS,
    Bounds,
    Chosen,
    Decomposed,
    Group,
    Method,
    MethodArgs,
    add_seconds,
    require_budget,
    require_default,
    require_no_core,
)
from lestd_kernels.methods.common.foresight import costs_of
from lestd_kernels.methods.common.stopwatch import Stopwatch
from lestd_kernels.search.budget import CurvePoint
from lestd_kernels.storage.matrix import counted_bytes
from lestd_kernels.tensorize import GroupLayout

CANDIDATES: tuple[tuple[Method, int, int], ...] = (
    *((lestd.METHOD, bits, max(bits, 4)) for bits in (16, 8, 4, 3, 2)),
    *((svd_llm.METHOD, bits, bits) for bits in (16, 8, 4)),
    *((gptq.METHOD, bits, 16) for bits in (8, 4, 3, 2)),
    *((sparsegpt.METHOD, bits, 16) for bits in (4, 3)),
    (watersic.METHOD, 16, 16),
)
"""Method, bits of a value and bits of a factor. watersic has no bits of its own."""


# Those that know what another budget costs without storing the group for it.
_KNOW_OTHERS = (lestd.METHOD, svd_llm.METHOD, watersic.METHOD)
# What is stored has this share of the error that was foreseen, or more, as far as was seen.
_LEAST_OF_FORESEEN = 0.5


def label(method: Method, bits: int) -> str:
    """What a candidate is called, see `Chosen`."""
    return method.name if method is watersic.METHOD else f"{method.name}-{bits}"


def _args_of(args: MethodArgs, value_bits: Any, factor_bits: Any) -> MethodArgs:
    return replace(args, value_bits=value_bits, factor_bits=factor_bits)


_Candidate = tuple[Method, MethodArgs, int]
"""With its arguments and the fewest bytes that it needs."""


def _least(layout: GroupLayout, value_dtype: torch.dtype, args: MethodArgs) -> list[_Candidate]:
    """The candidates that serve a layout."""
    require_no_core("auto", args)
    require_default("auto", args, "value_bits", "factor_bits")
    found = []
    for method, *bits in CANDIDATES:
        if len(layout.modules) == 1 and not method.per_matrix:  # A basis that nothing shares.
            continue
        own = _args_of(args, *bits)
        found.append((method, own, method.least_bytes(layout, value_dtype, own)))
    return found


def _foreseen(prepared: Group, candidates: Sequence[_Candidate], byte_budget: int) -> list[float]:
    """About the error of each candidate, at the bytes that it needs at least or this budget; 0 of
    one that only storing tells of."""
    costs, found = costs_of(prepared), []
    for method, of_method in groupby(candidates, key=lambda one: one[0]):
        own = None
        for _, args, least in of_method:
            if method.foresee is None:
                found.append(0.0)
                continue
            own = _prepared(prepared, method, args) if own is None else own.in_bits(args)
            found.append(method.foresee(own, max(byte_budget, least), costs))
    return found


def _prepared(group: Group, method: Method, args: MethodArgs) -> Any:
    """Prepared by a candidate; in the metric loss none of them writes to the unfolding."""
    return method.prepare(replace(group, args=args))


def encode(
    prepared: Group,
    byte_budget: int,
    curve_budgets: Sequence[int] = (),
    *,
    reuse: bool = False,
) -> Decomposed:
    """Keep what the best candidate stores; see `Method.encode`.

    Candidates are stored in the order of the errors foreseen, two of them or more where as many
    fit, until no other can have the least one. Their curves are what is known of other budgets, and
    of quantizers that are not stored what is foreseen; where there is neither, storing nothing is.
    """
    layout, dtype = prepared.layout, prepared.value_dtype
    every = _least(layout, dtype, prepared.args)
    require_budget("auto", byte_budget, min(least for _, _, least in every))
    reach = max((byte_budget, *curve_budgets))
    candidates = [
        one
        for one in every
        if one[2] <= byte_budget or (one[2] <= reach and one[0].jumps(layout, dtype, one[1]))
    ]
    clock = Stopwatch(prepared.unfolding.device)
    with clock("rank_search"):
        foreseen = _foreseen(prepared, candidates, byte_budget)
    seconds = [clock.seconds]
    kept: Decomposed | None = None
    errors: list[tuple[float, str]] = []
    points: dict[int, CurvePoint] = {}

    def has(size: int, error: float) -> list[CurvePoint]:
        return [CurvePoint(one, Ranks(0, 0, 0), error) for one in curve_budgets if one >= size]

    def add(more: Sequence[CurvePoint]) -> None:
        for point in more:
            known = points.setdefault(point.byte_budget, point)
            if point.squared_error < known.squared_error:
                points[point.byte_budget] = point

    for index in sorted(range(len(candidates)), key=lambda i: foreseen[i]):
        method, args, least = candidates[index]
        is_dear = len(errors) > 1 and _LEAST_OF_FORESEEN * foreseen[index] > 2 * min(errors)[0]
        if least > byte_budget or is_dear:
            if method.jumps(layout, dtype, args):
                add(has(least, foreseen[index]))
            continue
        own = _prepared(prepared, method, args)
        budgets = [one for one in curve_budgets if one >= least and method in _KNOW_OTHERS]
        done = method.encode(own, byte_budget, budgets)
        seconds += own.seconds, done.seconds
        add(done.curve)
        add(has(counted_bytes(done.decomposition, args.size), done.metric_squared_error))
        errors.append((done.metric_squared_error / 2, label(method, args.value_bits)))
        if kept is None or done.metric_squared_error < kept.metric_squared_error:
            kept = done
        del own, done  # One group is prepared at a time, and one result kept.
    assert kept is not None, "the budget has room for a candidate"
    (loss, name), *others = sorted(errors, key=lambda one: one[0])
    chosen = Chosen(name, loss, *(others[0][::-1] if others else (None, None)))
    nothing = kept.metric_squared_norm
    curve = [
        points.get(budget) or CurvePoint(budget, Ranks(0, 0, 0), nothing)
        for budget in curve_budgets
    ]
    return replace(
        kept,
        curve=tuple(curve),
        chosen=chosen,
        expected_squared_error=None,  # The choice is by what was measured.
        seconds=add_seconds(*seconds),
    )


def bounds(
    layout: GroupLayout, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
) -> Bounds:
    """See `Method.bounds`."""
    candidates = _least(layout, value_dtype, args)
    require_budget("auto", byte_budget, min(least for _, _, least in candidates))
    each = [
        method.bounds(layout, byte_budget, value_dtype, own)
        for method, own, least in candidates
        if least <= byte_budget
    ]
    # And what the best so far stores.
    workspace = max(one.workspace_bytes for one in each) + byte_budget
    memory = max(one.memory_bytes or one.max_bytes for one in each)
    most = max(one.max_bytes for one in each)
    return Bounds(None, None, None, most, workspace, 0, memory)


def least_bytes(layout: GroupLayout, value_dtype: torch.dtype, args: MethodArgs) -> int:
    """See `Method.least_bytes`."""
    return min(least for _, _, least in _least(layout, value_dtype, args))


def jumps(layout: GroupLayout, value_dtype: torch.dtype, args: MethodArgs) -> tuple[int, ...]:
    """See `Method.jumps`."""
    every = (m.jumps(layout, value_dtype, own) for m, own, _ in _least(layout, value_dtype, args))
    return tuple(jump for own in every for jump in own)


# Every candidate prepares the group for itself: one at a time is in memory.
METHOD = Method(
    "auto", lambda group: group, encode, bounds, least_bytes, (LOSS,), jumps, per_matrix=True
)
