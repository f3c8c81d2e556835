"""Stage I: the shared basis of a slice group, by HOSVD and HOOI.

Shapes: a group is seen as a 4-way tensor W (d, T, n, p), type major: T types of n slices each.
    type mode identity   T = 1, n = S slices in unfolding order; U3 is the 1 x 1 identity
    type mode learned    T = 4 (q, k, v, o), n = h heads; U3 (4, R3)
The slice axis n is never compressed. The factors are U1 (d, R1), U2 (p, R2) and U3 (T, R3), with
orthonormal columns, and the core is ``G = W x1 U1^T x2 U2^T x3 U3^T``, laid out (R1, R3, n, R2).

Singular vectors of an unfolding are found as eigenvectors of its Gram matrix (d x d, T x T or
p x p): no singular value decomposition of an unfolding is ever needed. Arithmetic is float32, and
float64 in eigenproblems that are small.

References: De Lathauwer, De Moor, Vandewalle, "On the best rank-1 and rank-(R1, ..., RN)
approximation of higher-order tensors", SIMAX 21(4), 2000 (HOOI); Kolda and Bader, "Tensor
Decompositions and Applications", SIAM Review 51(3), 2009, section 4.2; LeSTD (ICLR 2026), Stage I.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lestd_kernels.with_tensorly import project_modes

_SUM_ELEMENTS = 1 << 16
_GRAM_BLOCKS = 8
# Beyond, an eigenproblem in float64 takes longer than everything else together. In float32 the
# eigenvectors are orthonormal to 1e-5, and directions whose eigenvalues differ by less than 1e-6 of
# the largest may mix, which costs no more than that share of the energy.
FLOAT64_ORDER = 1024


class Ranks(NamedTuple):
    """Multilinear rank of a group: of the width, the head width, and the types."""

    R1: int
    R2: int
    R3: int


@dataclass(frozen=True)
class Factors:
    """The shared factors U1 (d, R1), U2 (p, R2), U3 (T, R3)."""

    U1: Tensor
    U2: Tensor
    U3: Tensor

    @property
    def ranks(self) -> Ranks:
        """Number of columns of each factor."""
        return Ranks(self.U1.shape[1], self.U2.shape[1], self.U3.shape[1])

    def leading(self, ranks: Ranks) -> Factors:
        """The first columns of each factor."""
        pairs = zip((self.U1, self.U2, self.U3), ranks, strict=True)
        return Factors(*(factor[:, :rank].contiguous() for factor, rank in pairs))

    def to(self, *args: Any) -> Factors:
        """`torch.Tensor.to` on each factor."""
        return Factors(self.U1.to(*args), self.U2.to(*args), self.U3.to(*args))


def leading_eigenvectors(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of a symmetric matrix, largest eigenvalue first, with fixed signs.

    The entry of largest magnitude of each column (the first one on ties) is positive.

    Args:
        gram: ``(m, m)``, symmetric up to rounding.

    Returns:
        ``(eigenvalues (m,) float64, eigenvectors (m, m) float32)``.
    """
    exact = gram.double() if gram.shape[0] <= FLOAT64_ORDER else gram
    values, vectors = torch.linalg.eigh(exact)
    pivots = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    vectors.mul_(torch.where(pivots < 0, -1, 1))
    return values.flip(0).double(), vectors.flip(1).float()


def project_rows(W: Tensor, U1: Tensor) -> Tensor:
    """``W x1 U1^T``: (d, T, n, p) -> (R1, T, n, p)."""
    return (U1.T @ W.flatten(1)).view(-1, *W.shape[1:])


def mix(W: Tensor, U3: Tensor) -> Tensor:
    """``W x3 U3^T``: (d, T, n, p) -> (d, R3, n, p); W itself where U3 is the 1 x 1 identity."""
    if U3.numel() == 1 and float(U3) == 1:
        return W
    return (U3.T @ W.flatten(2)).view(W.shape[0], -1, *W.shape[2:])


def _gram1(W: Tensor) -> Tensor:
    return gram_matrix(W.flatten(1))


def gram_matrix(flat: Tensor) -> Tensor:
    """``A A^T (m, m)`` of A ``(m, n)``, by the blocks on and above the diagonal.

    That is little more than half of the work of a product.
    """
    gram = flat.new_empty(len(flat), len(flat))
    step = -(-len(flat) // _GRAM_BLOCKS)
    for first in range(0, len(flat), step):
        block = slice(first, first + step)
        products = flat[block] @ flat[first:].T
        gram[block, first:], gram[first:, block] = products, products.T
    return gram


def _gram2(W: Tensor) -> Tensor:
    flat = W.flatten(0, 2)
    return flat.T @ flat


def _gram3(W: Tensor) -> Tensor:
    if W.shape[1] == 1:
        return W.new_ones(1, 1)
    flat = W.transpose(0, 1).flatten(1)
    return flat @ flat.T


@dataclass(frozen=True)
class Bases(Factors):
    """Square factors, leading directions first, and the squared norm of W along each direction.

    ``spectra``: eigenvalues of the Gram matrices of modes 1, 2 and 3, float64.
    """

    spectra: tuple[Tensor, Tensor, Tensor]

    def singular_values(self, mode: int, scale: float) -> tuple[float, ...]:
        """Singular values of W's unfolding in mode 1, 2 or 3, times `scale`, descending.

        The square roots of eigenvalues of a float32 Gram matrix: what is below about 1e-3 of the
        largest is rounding. Rounded to float32, where an eigenvalue below zero becomes zero.
        """
        values = self.spectra[mode - 1].clamp(min=0).sqrt().mul(scale)
        return tuple(values.float().tolist())


def hosvd(W: Tensor) -> Bases:
    """Full orthogonal bases of modes 1, 2 and 3.

    Args:
        W: ``(d, T, n, p)``, float32.

    Returns:
        U1 ``(d, d)``, U2 ``(p, p)``, U3 ``(T, T)``.
    """
    pairs = [leading_eigenvectors(gram(W)) for gram in (_gram1, _gram2, _gram3)]
    spectra, (U1, U2, U3) = zip(*pairs, strict=True)
    return Bases(U1, U2, U3, spectra)


@dataclass(frozen=True)
class Stage1:
    """Result of `hooi`.

    Attributes:
        factors: orthonormal, float32.
        squared_energy: ``||G||^2`` of the core ``G = W x1 U1^T x2 U2^T x3 U3^T``;
            ``||W - W_hat||^2 = ||W||^2 - ||G||^2``.
        iterations: HOOI sweeps after the HOSVD; 0 where the HOSVD is already optimal.
    """

    factors: Factors
    squared_energy: float
    iterations: int


def hooi(W: Tensor, bases: Bases, ranks: Ranks, tol: float, max_iter: int) -> Stage1:
    """Higher-order orthogonal iteration from the leading columns of the HOSVD.

    Each sweep renews U1, U3 and U2 in turn: W is projected by the other modes' factors, and the
    leading left singular vectors of that mode's unfolding become the factor. With fewer than two
    modes truncated a truncated HOSVD is the optimum (a full mode constrains nothing), and no
    sweep is made.

    Args:
        W: ``(d, T, n, p)``, float32.
        bases: of `hosvd`.
        ranks: of the result.
        tol: stop when the fit ``1 - ||W - W_hat|| / ||W||`` changes by less than this, relatively.
        max_iter: largest number of sweeps; 0 gives the truncated HOSVD.
    """
    factors, iterations = bases.leading(ranks), 0
    kept = [
        max(float(spectrum[:rank].sum()), 0.0)
        for spectrum, rank in zip(bases.spectra, ranks, strict=True)
        if rank < len(spectrum)
    ]
    squared_norm, fit = squared_sum(W), -math.inf
    # Exact with one mode truncated; with more the first sweep tells.
    squared_energy = min([squared_norm, *kept])
    if len(kept) > 1 and max_iter == 0:
        every = ((0, factors.U1), (1, factors.U3), (3, factors.U2))
        # A square orthogonal factor changes no norm.
        truncated = {mode: U for mode, U in every if len(U) > U.shape[1]}
        squared_energy = squared_sum(project_modes(W, [*truncated.values()], [*truncated]))
    while len(kept) > 1 and iterations < max_iter:
        factors, squared_energy = _sweep(W, factors)
        iterations += 1
        previous = fit
        fit = 1 - math.sqrt(max(squared_norm - squared_energy, 0) / max(squared_norm, 1e-300))
        if abs(fit - previous) < tol * fit:
            break
    return Stage1(factors, squared_energy, iterations)


def _sweep(W: Tensor, factors: Factors) -> tuple[Factors, float]:
    """One HOOI sweep; also ``||G||^2`` with the new factors."""
    R1, R2, R3 = factors.ranks
    gram = _gram1(_reduce_types(_reduce_columns(W, factors.U2), factors.U3))
    factors = replace(factors, U1=_leading(gram, R1))
    del gram
    rows = project_rows(W, factors.U1)
    factors = replace(factors, U3=_leading(_gram3(_reduce_columns(rows, factors.U2)), R3))
    values, vectors = leading_eigenvectors(_gram2(_reduce_types(rows, factors.U3)))
    return replace(factors, U2=vectors[:, :R2].contiguous()), float(values[:R2].sum())


def _leading(gram: Tensor, rank: int) -> Tensor:
    return leading_eigenvectors(gram)[1][:, :rank].contiguous()


# A square orthogonal factor changes no other mode's Gram matrix, so it need not be applied.


def _reduce_columns(W: Tensor, U2: Tensor) -> Tensor:
    return W if U2.shape[0] == U2.shape[1] else W @ U2


def _reduce_types(W: Tensor, U3: Tensor) -> Tensor:
    return W if U3.shape[0] == U3.shape[1] else mix(W, U3)


def squared_sum(tensor: Tensor) -> float:
    """Squared Frobenius norm, accumulated in float64."""
    flat, total = tensor.flatten(), tensor.new_zeros((), dtype=torch.float64)
    # In parts that stay in a cache while they are float64.
    scratch = flat.new_empty(min(_SUM_ELEMENTS, flat.numel()), dtype=torch.float64)
    for part in torch.split(flat, _SUM_ELEMENTS):
        exact = scratch[: len(part)].copy_(part)
        total += torch.dot(exact, exact)
    return float(total)
