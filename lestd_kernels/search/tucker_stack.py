"""Tucker decomposition of a stack of matrices: bases, the ranks for a byte budget, HOOI.

Shapes: T (n, a, b), n matrices of a x b. U (a, Ra), V (b, Rb) and, where the stack itself is
compressed, P (n, Rn), all with orthonormal columns; otherwise P stands for the identity:

    T_i ~ U M_i V^T,   M_i (Ra, Rb) = sum_r P[i, r] K_r,   K (Rn, Ra, Rb)

To choose the ranks, T is rotated by its full HOSVD bases, every truncation is
then a leading sub-block, and what it leaves out is its error. With three modes a tensor train is
this very form with P the identity, so it shares the code.

References: De Lathauwer, De Moor, Vandewalle, "On the best rank-1 and rank-(R1, ..., RN)
approximation of higher-order tensors", SIMAX 21(4), 2000; Kolda and Bader, "Tensor Decompositions
and Applications", SIAM Review 51(3), 2009, sections 4.2 and 5.4.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lestd_kernels.linalg.low_rank import largest_rank
from lestd_kernels.linalg.stage1 import gram_matrix, leading_eigenvectors, squared_sum
from lestd_kernels.search.budget import rank_grid

# Values of a rank that a search looks at: all of a small dimension, so many of a large one.
_GRID_VALUES = 256
_STACK_VALUES = 32


class StackRanks(NamedTuple):
    """Multilinear rank: of the stack, and of the matrices' rows and columns."""

    Rn: int
    Ra: int
    Rb: int


StackBytes = Callable[[StackRanks], int]
"""Stored bytes of a decomposition of these ranks; rises with every rank."""


@dataclass(frozen=True)
class StackFactors:
    """U (a, Ra), V (b, Rb) and P (n, Rn), or None for the identity."""

    U: Tensor
    V: Tensor
    P: Tensor | None

    def leading(self, ranks: StackRanks) -> StackFactors:
        """The first columns of each factor."""
        P = None if self.P is None else self.P[:, : ranks.Rn].contiguous()
        return StackFactors(
            self.U[:, : ranks.Ra].contiguous(), self.V[:, : ranks.Rb].contiguous(), P
        )


def full_ranks(shape: Sequence[int]) -> StackRanks:
    """The ranks beyond which T ``(n, a, b)`` gains nothing."""
    n, a, b = shape
    return StackRanks(min(n, a * b), min(a, n * b), min(b, n * a))


def full_bases(T: Tensor, compress: bool) -> StackFactors:
    """The HOSVD bases of T ``(n, a, b)``, as many columns each as `full_ranks` says.

    Args:
        T: float32, any scale.
        compress: whether the stack has a factor P; otherwise it is None.
    """
    P = leading_vectors(T, 0) if compress else None
    return StackFactors(leading_vectors(T, 1), leading_vectors(T, 2), P)


def leading_vectors(T: Tensor, mode: int) -> Tensor:
    """Left singular vectors of a mode's unfolding, as columns, largest singular value first."""
    # Squares of very large or small elements would leave the range of float32.
    scale = 1 / T.abs().max().clamp(min=torch.finfo(T.dtype).tiny)
    flat = T.movedim(mode, 0).flatten(1) * scale
    if flat.shape[0] <= flat.shape[1]:
        return leading_eigenvectors(gram_matrix(flat))[1]
    # Their images are orthogonal, so that this only normalizes them, zeros as well.
    images = flat @ leading_eigenvectors(flat.T @ flat)[1]
    basis, triangle = torch.linalg.qr(images)
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    vectors: Tensor = basis * signs
    return vectors


def mix_stack(T: Tensor, P: Tensor | None) -> Tensor:
    """``T x_n P^T``: (n, a, b) -> (Rn, a, b); T itself for the identity."""
    return T if P is None else (P.T @ T.flatten(1)).view(-1, *T.shape[1:])


class RankGrid(NamedTuple):
    """The ranks that a search looks at, ascending, per mode of T."""

    stack: list[int]
    rows: list[int]
    columns: list[int]


def search_grid(shape: Sequence[int], compress: bool) -> RankGrid:
    """The grid of T ``(n, a, b)``; without compression the stack has one value, n."""
    n, a, b = full_ranks(shape)
    stack = rank_grid(n, -(-n // _STACK_VALUES)) if compress else [shape[0]]
    return RankGrid(stack, *(rank_grid(m, -(-m // _GRID_VALUES)) for m in (a, b)))


def leading_energies(T: Tensor, bases: StackFactors, grid: RankGrid) -> Tensor:
    """Squared norm of every leading sub-block of T rotated by `bases`.

    Returns:
        ``(stack values, row values, column values)`` float64, on CPU.
    """
    rows, columns = (torch.tensor(ends, device=T.device) - 1 for ends in grid[1:])
    total = T.new_zeros(len(rows), len(columns), dtype=torch.float64)
    energies = []
    for i, matrix in enumerate(mix_stack(T, bases.P)):
        squares = (bases.U.T @ matrix @ bases.V).double().square_()
        total += squares.cumsum(0)[rows].cumsum(1)[:, columns]
        if i + 1 in grid.stack:
            energies.append(total.clone())
    return torch.stack(energies).cpu()


def best_ranks(
    energies: Tensor, grid: RankGrid, stored_bytes: StackBytes, byte_budget: int
) -> StackRanks | None:
    """The ranks within a byte budget that keep the most energy; None where none fits.

    For each rank of the stack and of the columns the rank of the rows is the largest integer that
    fits. Equal candidates: the smallest Rn, then Rb.
    """
    best, most = None, -1.0
    for Rn in grid.stack:
        for Rb in grid.columns:
            Ra = _largest_rows(grid.rows[-1], Rn, Rb, stored_bytes, byte_budget)
            if not Ra:
                break
            ranks = StackRanks(Rn, Ra, Rb)
            energy = kept_energy(energies, grid, ranks)
            if energy > most:
                best, most = ranks, energy
    return best


def kept_energy(energies: Tensor, grid: RankGrid, ranks: StackRanks) -> float:
    """The energy of a leading sub-block, of the grid's next lower ranks where it is between."""
    places = [_last_within(values, rank) for values, rank in zip(grid, ranks, strict=True)]
    return float(energies[tuple(places)]) if min(places) >= 0 else 0.0


def _largest_rows(most: int, Rn: int, Rb: int, stored_bytes: StackBytes, byte_budget: int) -> int:
    return largest_rank(lambda Ra: stored_bytes(StackRanks(Rn, Ra, Rb)), most, byte_budget)


def _last_within(values: Sequence[int], bound: int) -> int:
    """Index of the last of ascending values that is at most `bound`; -1 where none is."""
    return bisect.bisect_right(values, bound) - 1


def refine(
    T: Tensor, bases: StackFactors, ranks: StackRanks, tol: float, max_iter: int
) -> StackFactors:
    """HOOI from the leading columns of the HOSVD bases.

    Each sweep renews U, V and P in turn from T projected by the others. None is made where less
    than two modes are truncated: a truncated HOSVD is the optimum then.

    Args:
        T: ``(n, a, b)``, float32.
        bases: of `full_bases`.
        ranks: of the result.
        tol: stop when the fit ``1 - ||T - T_hat|| / ||T||`` changes by less than this, relatively.
        max_iter: sweeps at most; 0 gives the truncated HOSVD.
    """
    factors, fit = bases.leading(ranks), -math.inf
    if sum(rank < full for rank, full in zip(ranks, full_ranks(T.shape), strict=True)) < 2:
        return factors
    squared_norm = max(squared_sum(T), 1e-300)
    for _ in range(max_iter):
        P = factors.P
        mixed = mix_stack(T, P)
        U = leading_vectors(mixed @ factors.V, 1)[:, : ranks.Ra].contiguous()
        V = leading_vectors(U.T @ mixed, 2)[:, : ranks.Rb].contiguous()
        del mixed
        if P is not None:
            P = leading_vectors(U.T @ T @ V, 0)[:, : ranks.Rn].contiguous()
        factors = StackFactors(U, V, P)
        missing = squared_norm - squared_sum(project(T, factors))
        previous, fit = fit, 1 - math.sqrt(max(missing, 0.0) / squared_norm)
        if abs(fit - previous) < tol * fit:
            break
    return factors


def project(T: Tensor, factors: StackFactors) -> Tensor:
    """The core K ``(Rn, Ra, Rb)`` of T for orthonormal factors."""
    return mix_stack(factors.U.T @ T @ factors.V, factors.P)


def fit_core(T: Tensor, factors: StackFactors) -> Tensor:
    """The core of least squared residual for factors that are not orthonormal, as stored ones."""
    P = None if factors.P is None else _dual(factors.P)
    return project(T, StackFactors(_dual(factors.U), _dual(factors.V), P))


def _dual(factor: Tensor) -> Tensor:
    """``F (F^T F)^+`` of a factor, float32."""
    exact = factor.double()
    dual: Tensor = exact @ torch.linalg.pinv(exact.T @ exact, hermitian=True)
    return dual.float()
