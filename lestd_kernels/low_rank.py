"""Low-rank pairs W ~ A B in a metric, and ranks of several matrices under one byte budget.

Shapes: W (in, out), y = x W; A (in, r), B (r, out); C (in, in) the metric of the inputs, C = S S^T.

The pair of least squared error ``||S^T (W - A B)||`` comes from the singular value decomposition
``S^T W = U diag(s) V^T``: A = S^-T U_r and B = diag(s_r) V_r^T, with the squared error the sum of
the squares of the singular values left out (Eckart, Young, Mirsky). A is the factor, B holds the
values: fewer bits for A cost nothing but its own rounding, since B is fitted by least squares to A
as it is stored.

References: Eckart, Young, "The approximation of one matrix by another of lower rank", Psychometrika
1(3), 1936; Wang et al., "SVD-LLM", ICLR 2025, section 3.1, for the metric of a Gram matrix.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from torch import Tensor

RankBytes = Callable[[int], int]
"""Stored bytes of one matrix at a rank; rises with the rank."""


def common_slope(
    energies: Sequence[Sequence[float]], sizes: Sequence[RankBytes], byte_budget: int
) -> list[int] | None:
    """Ranks of several matrices, of least summed error within one byte budget.

    Every step raises the rank that lowers the error most per byte; since the energies fall, this
    is the optimum but for the last step. Then whatever still fits is raised the same way.

    Args:
        energies: per matrix what each further rank takes off the error, descending.
        sizes: per matrix the stored bytes at a rank.
        byte_budget: for all of them.

    Returns:
        One rank per matrix, at least 1; None where these do not fit.
    """
    ranks = [1] * len(energies)
    stored = [size(1) for size in sizes]
    left = byte_budget - sum(stored)
    if left < 0:
        return None

    def step(m: int) -> tuple[float, int, int]:
        """``(-energy per byte, matrix, bytes)`` of its next rank."""
        more = sizes[m](ranks[m] + 1) - stored[m]
        return -energies[m][ranks[m]] / more, m, more

    heap = [step(m) for m in range(len(energies)) if len(energies[m]) > 1]
    heapq.heapify(heap)
    while heap:
        _, m, more = heapq.heappop(heap)
        if more > left:
            continue
        left -= more
        ranks[m] += 1
        stored[m] += more
        if ranks[m] < len(energies[m]):
            heapq.heappush(heap, step(m))
    return ranks
