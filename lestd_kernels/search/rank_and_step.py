"""Ranks and steps of several sides at one slope of error against bytes.

A side is tried at some ranks and octaves of the step. Of what it stores and loses there only the
lower convex hull is worth anything; bytes go along the hulls of all sides, the steepest segment
first, as in orchestrator.planning.allocation. Between octaves of one rank logarithms of errors are
straight.

Reference: Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", IEEE
Transactions on Acoustics, Speech, and Signal Processing 36(9), 1988.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

# Of a segment between two octaves.
_PARTS = 8


class Point(NamedTuple):
    """A side, tried.

    Attributes:
        size: bytes.
        error: squared, in the metric.
        R: the rank; `IDENTITY` for no basis.
        log_step: logarithm of the step.
    """

    size: int
    error: float
    R: int
    log_step: float


def error_at(points: Sequence[Point], size: int) -> float:
    """The error at a size: between points, of ascending size, logarithms are straight."""
    if size <= points[0].size:
        return points[0].error
    for a, b in pairwise(points):
        if size <= b.size:
            share = (size - a.size) / max(b.size - a.size, 1)
            return _between(a, b, share)
    return points[-1].error


def _between(a: Point, b: Point, share: float) -> float:
    low, high = (math.log(max(one.error, 1e-300)) for one in (a, b))
    return math.exp(low + share * (high - low))


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """Those on the lower convex hull, by size, down to the least error."""
    hull: list[Point] = []
    for point in sorted(points):
        if hull and point.size == hull[-1].size:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    while len(hull) > 1 and hull[-2].error <= hull[-1].error:
        hull.pop()
    return hull


def refined(hull: Sequence[Point]) -> list[Point]:
    """With points between those of one rank, so that both sides come to one slope."""
    found = list(hull[:1])
    for a, b in pairwise(hull):
        for share in (part / _PARTS for part in range(1, _PARTS)) if a.R == b.R else ():
            size = a.size + round(share * (b.size - a.size))
            step = a.log_step + share * (b.log_step - a.log_step)
            if found[-1].size < size < b.size:
                found.append(Point(size, _between(a, b, share), a.R, step))
        found.append(b)
    return found


def _slope(a: Point, b: Point) -> float:
    return (b.error - a.error) / (b.size - a.size)


class Divided(NamedTuple):
    """A budget, divided between the sides.

    Attributes:
        points: of each side the one to begin with; together they fit, if any do.
        error: squared, to expect.
    """

    points: list[Point]
    error: float


def divide(hulls: Sequence[Sequence[Point]], byte_budget: int) -> Divided:
    """Where errors are least: the steepest segments of the hulls first."""
    at, shares = [0] * len(hulls), [0.0] * len(hulls)
    left = byte_budget - sum(hull[0].size for hull in hulls)
    segments = sorted(
        (_slope(a, b), side, b.size - a.size)
        for side, hull in enumerate(hulls)
        for a, b in pairwise(hull)
    )
    for _, side, length in segments:
        if left < length:
            shares[side] = max(left, 0) / length
            break
        at[side], left = at[side] + 1, left - length
    chosen, error = [], 0.0
    for hull, place, share in zip(hulls, at, shares, strict=True):
        if not share:
            chosen.append(hull[place])
            error += hull[place].error
            continue
        chosen.append(hull[place])
        error += _between(hull[place], hull[place + 1], share)
    return Divided(chosen, error)
