"""Low-rank pairs W ~ P Q in a metric, and the ranks of several matrices under one byte budget.

Shapes: W (in, out), y = x W; P (in, r), Q (r, out); S_A (in, in) and S_B (out, out) the roots of
the metrics of its two sides, see lestd_kernels.linalg.metric.

The pair of least squared error ``||S_A^T (W - P Q) S_B||`` comes from the singular value
decomposition ``S_A^T W S_B = U diag(s) V^T``: P = S_A^-T U_r, Q = diag(s_r) V_r^T S_B^-1, and the
squared error is the sum of the squares of the singular values left out (Eckart, Young, Mirsky). P
is the factor and Q holds the values: Q is fitted by least squares to P as it is stored, so that P's
rounding costs little. With P given, Q is the same whatever S_B is.

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

from lestd_kernels.linalg.error_feedback import output_factor, round_with_feedback
from lestd_kernels.linalg.metric import Metric, Root, Roots
from lestd_kernels.linalg.stage1 import gram_matrix, leading_eigenvectors
from lestd_kernels.storage.codecs import CODECS
from lestd_kernels.storage.few_bits import FULL_BITS
from lestd_kernels.storage.matrix import EncodedCore


class Bits(NamedTuple):
    """Bits of an element of P and of Q; 16 for the value dtype."""

    factor: int = FULL_BITS
    value: int = FULL_BITS


@dataclass(frozen=True)
class Spectrum:
    """Singular vectors of ``S_A^T W S_B`` on its shorter side, and its energies.

    Attributes:
        vectors: ``(k, k)``, k = min(in, out): U where in <= out, else V.
        energies: float64, on CPU: squares of the singular values over their sum, descending; or
            what each further rank takes off the error in a metric that is given.
    """

    vectors: Tensor
    energies: Tensor


def spectrum(W: Tensor, roots: Roots, metric: Metric | None = None) -> Spectrum:
    """Decompose ``S_A^T W S_B`` for W ``(in, out)`` float32.

    Args:
        W: the weights.
        roots: of the regularized metric.
        metric: as it is, where errors in it are asked for: then the energies sum to
            ``tr(A W B W^T)``.
    """
    X = roots.apply(W)
    # Squares of very large or small weights would leave the range of float32.
    X = X / X.abs().max().clamp(min=torch.finfo(X.dtype).tiny)
    values, vectors = leading_eigenvectors(gram_matrix(X if W.shape[0] <= W.shape[1] else X.T))
    if metric is not None:
        if W.shape[0] > W.shape[1]:
            W, roots, metric = W.T, roots.transposed, metric.transposed
        return Spectrum(vectors, _error_steps(W, roots.input, vectors, metric))
    energies = values.clamp(min=0).cpu()
    return Spectrum(vectors, energies / energies.sum().clamp(min=1e-300))


def _error_steps(W: Tensor, root: Root, U: Tensor, metric: Metric) -> Tensor:
    """Reduction of the error in a metric by each further rank, ``(k,)`` float64, on CPU.

    Rank r leaves ``D = P_r Y_r`` with the columns of ``P = S_A^-T U`` and the rows of
    ``Y = U^T S_A^T W`` from r on, whose error is the sum of the elements from (r, r) on of
    ``(P^T A P) * (Y B Y^T)``.
    """
    P, Y = root.solve(U), U.T @ root.apply(W)
    left = P.T @ Metric(metric.input).apply(P)
    right = Y @ Metric(None, metric.output).apply(Y).T
    both = (left.double() * right).cpu()
    both = both + both.T
    return both.triu(1).sum(dim=1) + both.diagonal() / 2


@dataclass(frozen=True)
class Pair:
    """A pair as it is stored: P^T ``(r, in)``, each row of it in groups of its own, and Q."""

    left: EncodedCore
    right: EncodedCore


def fit_pair(
    W: Tensor,
    roots: Roots,
    found: Spectrum,
    rank: int,
    value_dtype: torch.dtype,
    bits: Bits,
    metric: Metric | None = None,
) -> Pair:
    """The pair of a rank; Q is fitted to P as it is stored.

    In few bits both are rounded with the error fed back along the sides of a metric that is given.
    """
    root, X = roots.input, roots.input.apply(W)
    leading = found.vectors[:, :rank]
    if W.shape[0] > W.shape[1]:
        leading = roots.apply(W) @ leading
        leading = leading / leading.norm(dim=0).clamp(min=torch.finfo(X.dtype).tiny)
    P = root.solve(leading).T.contiguous()
    left = _stored(P, bits.factor, value_dtype, metric and metric.input)
    Q = least_squares(root.apply(left.decode().float().T), X)
    return Pair(left, _stored(Q, bits.value, value_dtype, metric and metric.output))


def _stored(M: Tensor, bits: int, value_dtype: torch.dtype, columns: Tensor | None) -> EncodedCore:
    """A dense matrix, rounded with the error fed back along its columns where they have a metric.

    The directions of a pair are all but orthogonal: they cannot make up for each other.
    """
    V = output_factor(columns)
    if bits == FULL_BITS or V is None:
        return EncodedCore.quantized(M, bits, value_dtype)
    M, scales = round_with_feedback(M, M.new_ones(len(M)), bits, value_dtype, V=V)
    return EncodedCore.quantized(M, bits, value_dtype, scales, codec="dense")


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
