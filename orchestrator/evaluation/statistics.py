"""Standard errors of figures."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
