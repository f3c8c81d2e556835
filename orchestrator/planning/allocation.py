"""Byte budgets for all groups at once, from each group's curve of error against bytes.

A curve is a list of points ``(bytes, squared error)`` with ascending bytes. A weighted sum of the
errors under a total number of bytes is least where all weighted curves have the same slope, the
Lagrange multiplier of the constraint. On the curves' lower convex hulls, which are piecewise
linear, that solution is found by handing out bytes segment by segment, the steepest first, until
none are left. Arithmetic is exact, and ties go to the first group, so the budgets are the same on
every machine.

What is minimized is the sum of the relative squared errors, so that no group counts for more
because its weights are large: a sum of absolute ones starves small layers, which perplexity
resents. But it is minimized only as far as the sum of the absolute ones allows, which is not to
rise either: neither sum is ever above that of uniform allocation. In the metric loss errors are
nats per token, the same currency in every group, and their plain sum is minimized.

References: Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", IEEE
Transactions on Acoustics, Speech, and Signal Processing 36(9), 1988.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

Curve = Sequence[tuple[int, float]]
"""Points ``(bytes, squared error)``, bytes ascending."""

_POINTS_PER_SIDE = 16
# How much the absolute errors count beside the relative ones: not at all, then ever more.
_SHARES = (Fraction(0), *(Fraction(1, 2**k) for k in range(12, -1, -1)))
# Predictions are that good. Less is not worth the risk of encoding a third time.
_WORTHWHILE = Fraction(1, 1000)


def curve_budgets(
    least: int, uniform: int, most: int, jumps: Sequence[int] = ()
) -> tuple[int, ...]:
    """Where a group's curve is looked at: from the least bytes to the most, ascending.

    The budget of uniform allocation is one of the points. They lie close together around it, where
    most groups end, and ever wider apart away from it; and where the method's curve jumps.
    """
    n = _POINTS_PER_SIDE
    below = {uniform - (uniform - least) * i**2 // n**2 for i in range(n + 1)}
    above = {uniform + (most - uniform) * i**2 // n**2 for i in range(n + 1)}
    return tuple(sorted(below | above | {jump for jump in jumps if least < jump < most}))


def lower_hull(curve: Curve) -> list[tuple[int, Fraction]]:
    """The points of the lower convex hull, from the first to the least error: slopes ascend."""
    hull: list[tuple[int, Fraction]] = []
    for size, error in curve:
        point = size, Fraction(error)
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    while len(hull) > 1 and hull[-2][1] <= hull[-1][1]:
        hull.pop()
    return hull


def _slope(a: tuple[int, Fraction], b: tuple[int, Fraction]) -> Fraction:
    return (b[1] - a[1]) / (b[0] - a[0])


def allocate(curves: Sequence[Curve], weights: Sequence[Fraction], total: int) -> list[int]:
    """Byte budgets, one per curve, that minimize the weighted error on the curves' hulls.

    Their sum is `total`, or less where no curve has anything left to gain. At most one budget lies
    inside a segment of its hull, the last one that was handed out.

    Raises:
        ValueError: the total is below the curves' first points.
    """
    hulls = [lower_hull(curve) for curve in curves]
    budgets = [hull[0][0] for hull in hulls]
    left = total - sum(budgets)
    if left < 0:
        raise ValueError(f"{total} bytes for curves that begin at {sum(budgets)} bytes together")
    segments = sorted(
        (weight * _slope(a, b), group, b[0] - a[0])
        for group, (hull, weight) in enumerate(zip(hulls, weights, strict=True))
        for a, b in pairwise(hull)
    )
    for _, group, length in segments:
        taken = min(length, left)
        budgets[group] += taken
        left -= taken
    return budgets


def cheapest_within(curves: Sequence[Curve], limit: Fraction) -> list[int] | None:
    """The fewest bytes, one budget per curve, with a sum of errors on the hulls within a limit.

    As in `allocate` at most one budget lies inside a segment of its hull. None where all bytes
    together leave more.
    """
    hulls = [lower_hull(curve) for curve in curves]
    budgets = [hull[0][0] for hull in hulls]
    excess = sum((hull[0][1] for hull in hulls), Fraction(0)) - limit
    segments = sorted(
        (_slope(a, b), group, b[0] - a[0])
        for group, hull in enumerate(hulls)
        for a, b in pairwise(hull)
    )
    for slope, group, length in segments:
        if excess <= 0:
            break
        taken = min(length, -(excess // slope))
        budgets[group] += taken
        excess += slope * taken
    return budgets if excess <= 0 else None


def predicted_error(curve: Curve, size: int) -> Fraction:
    """The squared error at a number of bytes on the curve, interpolated between its points.

    Args:
        curve: the curve itself, not its hull: where it is not convex, the hull promises too much.
        size: between the curve's first point and its last.
    """
    for a, b in pairwise(curve):
        if a[0] <= size < b[0]:
            start = a[0], Fraction(a[1])
            return start[1] + _slope(start, (b[0], Fraction(b[1]))) * (size - a[0])
    return Fraction(curve[-1][1])


def better_than_uniform(
    curves: Sequence[Curve], squared_norms: Sequence[float] | None, uniform: Sequence[int]
) -> list[int] | None:
    """Budgets with a lower sum of errors, in the bytes that uniform ones take.

    Without norms that is the plain sum. With them a weighted sum of relative and absolute errors is
    minimized: the one with the smallest share of absolute ones whose solution has both sums below
    those of uniform budgets, by a part in a thousand.

    Args:
        curves: one per group.
        squared_norms: ``||W||^2`` of each group; None where errors are nats.
        uniform: the budgets of uniform allocation, each on its curve.

    Returns:
        Budgets whose sum is at most that of `uniform`; None where no such are found.
    """
    # Nats: as if all norms were one, and relative errors were absolute ones.
    norms = [Fraction(norm) for norm in squared_norms or [1] * len(curves)]
    relative = [1 / norm if norm else Fraction(0) for norm in norms]
    absolute = Fraction(len(norms)) / sum(norms) if any(norms) else Fraction(0)

    def sums(budgets: Sequence[int]) -> tuple[Fraction, Fraction]:
        errors = [predicted_error(curve, b) for curve, b in zip(curves, budgets, strict=True)]
        weighted = (error * weight for error, weight in zip(errors, relative, strict=True))
        return sum(weighted, Fraction(0)), sum(errors, Fraction(0))

    limits = [total * (1 - _WORTHWHILE) for total in sums(uniform)]
    for share in _SHARES:
        weights = [(1 - share) * weight + share * absolute for weight in relative]
        budgets = allocate(curves, weights, sum(uniform))
        if all(total < limit for total, limit in zip(sums(budgets), limits, strict=True)):
            return budgets
    return None
