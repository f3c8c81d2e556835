"""Ranks and bytes of the two sides of a group, and what curves promise of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from lestd_kernels.methods.common.base import CALIBRATED, MethodArgs
from lestd_kernels.methods.common.one_sided_basis import IDENTITY, Encoded, SidedGroup
from lestd_kernels.methods.common.two_sided_basis import LossGroup
from lestd_kernels.tensorize import BasisSide

# An expected error so much larger than the other basis' is not made up for by rounding.
_NEAR = 4
# Ways to divide bytes between two sides that are tried in the metric loss, less one.
_DIVISIONS = 32

Options = list[tuple[int, float]]
"""Ranks worth encoding, with the squared error to expect; the best one first."""


def divide_by_loss(
    groups: Mapping[BasisSide, SidedGroup | LossGroup], budgets: Sequence[int], args: MethodArgs
) -> dict[BasisSide, tuple[list[int], list[Options]]]:
    """Of each side its bytes for each budget, and what `search` has for them.

    The bytes are divided where the expected loss is least.
    """
    if len(groups) == 1:
        [(side, group)] = groups.items()
        return {side: (list(budgets), search(group, budgets, args, reuse=True))}
    (one, first), (other, second) = groups.items()
    least, spare = (group.shape.least_bytes(args.rank_step) for group in (first, second))
    ways = [
        [least + (budget - spare - least) * i // _DIVISIONS for i in range(_DIVISIONS + 1)]
        for budget in budgets
    ]
    parts = [part for way in ways for part in way]
    rests = [budget - part for budget, way in zip(budgets, ways, strict=True) for part in way]
    found = search(first, parts, args, reuse=True)
    others = search(second, rests, args, reuse=True)
    errors = [mine[0][1] + theirs[0][1] for mine, theirs in zip(found, others, strict=True)]
    best = []
    for start in range(0, len(parts), _DIVISIONS + 1):
        tried = errors[start : start + _DIVISIONS + 1]
        best.append(start + tried.index(min(tried)))
    return {
        one: ([parts[i] for i in best], [found[i] for i in best]),
        other: ([rests[i] for i in best], [others[i] for i in best]),
    }


def search(
    group: SidedGroup | LossGroup, budgets: Sequence[int], args: MethodArgs, reuse: bool
) -> list[Options]:
    """For each budget the ranks worth encoding, and the error to expect; the best one first."""
    grid = group.shape.grid(args.rank_step, args.max_flops)
    if args.max_flops is not None and args.max_flops < 1:
        options = [[one] for one in group.search(grid, budgets)]
    else:
        wholes = group.search_identity(budgets)
        # Where all weights fit as they are, a basis takes more bytes and gains a hundredth of the
        # error at best, as measured in 4 bits.
        left = [budget for budget, whole in zip(budgets, wholes, strict=True) if whole > 0]
        found = iter(group.search(grid, left) if left else [])
        options = [
            _worth_encoding(next(found), whole, args) if whole > 0 else [(IDENTITY, whole)]
            for whole in wholes
        ]
    if not reuse:
        group.forget()
    return options


def _worth_encoding(based: tuple[int, float], whole: float, args: MethodArgs) -> Options:
    """Of a rank with its error, and of no basis with that error."""
    if args.metric not in CALIBRATED:
        # Pruned by what it knows of the weights alone, a model falls apart at errors at which
        # a shared basis does not.
        return [based]
    both = sorted([(IDENTITY, whole), based], key=lambda one: one[1])
    return [one for one in both if one[1] <= _NEAR * both[0][1]]


class Lost(NamedTuple):
    """What came of a side that was encoded.

    Attributes:
        ratio: of the error before rounding to what the search had expected.
        rounding: squared error that rounding has added.
    """

    ratio: float
    rounding: float

    @classmethod
    def of(cls, searched: float, encoded: Encoded, error: float) -> Lost:
        """By what the search, the encoding and the measurement say."""
        known = encoded.expected or 0.0
        return cls(known / searched if searched else 1.0, max(error - known, 0.0))


def errors_by_kind(
    group: LossGroup,
    budgets: Sequence[int],
    found: Sequence[Options],
    measured: dict[bool, Lost],
    value_dtype: torch.dtype,
) -> list[float]:
    """The squared error to expect of a side at each budget, with what rounding adds.

    Few-bit values lose about the same at every budget, but without a basis several times less than
    with one. So of either kind that the search chooses one is encoded, at the budget next to the
    first.

    Args:
        group: the side.
        budgets: of the side.
        found: what the search has for them.
        measured: what is known, by whether there is no basis.
        value_dtype: of values or scales.
    """
    kinds = [options[0][0] == IDENTITY for options in found]
    nearest = sorted(range(len(budgets)), key=lambda i: abs(budgets[i] - budgets[0]))
    known = dict(measured)
    for i in nearest:
        if kinds[i] not in known and found[i][0][1] < torch.inf:
            R, searched = found[i][0]
            encoded = group.encode(R, budgets[i], value_dtype)
            error = group.error(encoded.factor, encoded.cores)
            known[kinds[i]] = Lost.of(searched, encoded, error)
    errors = []
    for kind, ((_, searched), *_) in zip(kinds, found, strict=True):
        lost = known.get(kind, Lost(1.0, 0.0))
        errors.append(searched * lost.ratio + lost.rounding)
    return errors
