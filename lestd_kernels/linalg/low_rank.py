"""Low-rank pairs W ~ A B in a metric, and the ranks of several matrices under one byte budget.

Shapes: W (in, out), y = x W; A (in, r), B (r, out); C = S S^T (in, in) the metric of the inputs.

The pair of least squared error ``||S^T (W - A B)||`` comes from the singular value decomposition
``S^T W = U diag(s) V^T``: A = S^-T U_r, B = diag(s_r) V_r^T, and the squared error is the sum of
the squares of the singular values left out (Eckart, Young, Mirsky). A is the factor and B holds
the values: B is fitted by least squares to A as it is stored, so that A's rounding costs little.

References: Eckart, Young, "The approximation of one matrix by another of lower rank", Psychometrika
1(3), 1936; Wang et al., "SVD-LLM: Truncation-aware singular value decomposition for large language
model compression", ICLR 2025, section 3.1, for the metric of a Gram matrix.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lestd_kernels.linalg.metric import Root
from lestd_kernels.linalg.stage1 import gram_matrix, leading_eigenvectors
from lestd_kernels.storage.codecs import CODECS
from lestd_kernels.storage.few_bits import FULL_BITS
from lestd_kernels.storage.matrix import EncodedCore


class Bits(NamedTuple):
    """Bits of an element of A and of B; 16 for the value dtype."""

    factor: int = FULL_BITS
    value: int = FULL_BITS


@dataclass(frozen=True)
class Spectrum:
    """Singular vectors of ``S^T W`` on its shorter side, and its energies.

    Attributes:
        vectors: ``(k, k)``, k = min(in, out): U where in <= out, else V.
        energies: squares of the singular values over their sum, descending, float64, on CPU.
    """

    vectors: Tensor
    energies: Tensor


def spectrum(W: Tensor, root: Root) -> Spectrum:
    """Decompose ``S^T W`` for W ``(in, out)`` float32."""
    X = root.apply(W)
    # Squares of very large or small weights would leave the range of float32.
    X = X / X.abs().max().clamp(min=torch.finfo(X.dtype).tiny)
    values, vectors = leading_eigenvectors(gram_matrix(X if W.shape[0] <= W.shape[1] else X.T))
    energies = values.clamp(min=0).cpu()
    return Spectrum(vectors, energies / energies.sum().clamp(min=1e-300))


@dataclass(frozen=True)
class Pair:
    """A pair as it is stored: A^T ``(r, in)``, each row of it in groups of its own, and B."""

    left: EncodedCore
    right: EncodedCore


def fit_pair(
    W: Tensor, root: Root, found: Spectrum, rank: int, value_dtype: torch.dtype, bits: Bits
) -> Pair:
    """The pair of a rank; B is fitted to A as it is stored."""
    X = root.apply(W)
    leading = found.vectors[:, :rank]
    if W.shape[0] > W.shape[1]:
        leading = X @ leading
        leading = leading / leading.norm(dim=0).clamp(min=torch.finfo(X.dtype).tiny)
    A = root.solve(leading).T.contiguous()
    left = EncodedCore.quantized(A, bits.factor, value_dtype)
    B = least_squares(root.apply(left.decode().float().T), X)
    return Pair(left, EncodedCore.quantized(B, bits.value, value_dtype))


def least_squares(A: Tensor, X: Tensor) -> Tensor:
    """B of least ``||X - A B||``, of least norm where A has no full column rank; float32."""
    exact = A.double()
    inverse = torch.linalg.pinv(exact.T @ exact, hermitian=True)
    B: Tensor = inverse @ (exact.T @ X.double())
    return B.float()


def matrix_bytes(rows: int, columns: int, value_bytes: int, bits: int) -> int:
    """Stored bytes of a dense matrix, scales included: never less than it takes."""
    return CODECS["dense"].stored_bytes(rows, columns, rows * columns, value_bytes, bits)


def pair_bytes(rows: int, columns: int, rank: int, value_bytes: int, bits: Bits) -> int:
    """Stored bytes of a pair for W ``(rows, columns)``, at most."""
    return matrix_bytes(rank, rows, value_bytes, bits.factor) + matrix_bytes(
        rank, columns, value_bytes, bits.value
    )


def largest_rank(size: Callable[[int], int], most: int, byte_budget: int) -> int:
    """The largest rank up to `most` whose size fits; 0 where none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if size(middle) <= byte_budget:
            low = middle
        else:
            high = middle - 1
    return low


def common_slope(
    energies: Sequence[Sequence[float]], sizes: Sequence[Callable[[int], int]], byte_budget: int
) -> list[int]:
    """Ranks of several matrices, of least summed error within one byte budget.

    Every step raises the rank that lowers the error most per byte, which is the optimum but for
    the last steps, since the energies fall. Whatever still fits then is used the same way.

    Args:
        energies: per matrix what each further rank takes off the error, descending.
        sizes: per matrix the stored bytes at a rank.
        byte_budget: for all of them; at least what rank 1 of each takes.

    Returns:
        One rank per matrix, at least 1.
    """
    ranks = [1] * len(energies)
    stored = [size(1) for size in sizes]
    left = byte_budget - sum(stored)

    def step(m: int) -> tuple[float, int, int]:
        """``(-energy per byte, matrix, bytes)`` of the next rank of matrix m."""
        more = sizes[m](ranks[m] + 1) - stored[m]
        return -energies[m][ranks[m]] / max(more, 1), m, more

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
