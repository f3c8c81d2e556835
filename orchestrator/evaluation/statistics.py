"""Standard errors and correlations of figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import StatisticsError
from statistics import correlation as correlation_of


def jackknife_stderr(figures: Sequence[float]) -> float | None:
    """Standard error of a figure.

    Args:
        figures: the figure without each of the samples in turn.

    Returns:
        The jackknife's; None where a figure is not finite, or there are fewer than two.
    """
    count = len(figures)
    if count < 2 or not all(map(math.isfinite, figures)):
        return None
    center = math.fsum(figures) / count
    squares = math.fsum((figure - center) ** 2 for figure in figures)
    return math.sqrt((count - 1) / count * squares)


def correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Pearson's correlation of the logarithms of pairs of figures.

    None of fewer than three pairs, where a figure is not above zero, or where all are the same.
    """
    if len(pairs) < 3 or min(min(pair) for pair in pairs) <= 0:
        return None
    try:
        return correlation_of(*zip(*((math.log(a), math.log(b)) for a, b in pairs), strict=True))
    except StatisticsError:
        return None
