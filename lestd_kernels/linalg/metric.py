"""The metric in which an error is measured: a Gram matrix of inputs, or its diagonal.

Shapes: W (in, out) of a module, y = x W; G ``(in, in)`` or ``(in,)``, float32.

With inputs X the error of the outputs is ``||X (W - W_hat)||^2 = tr(D^T G D)``, ``D = W - W_hat``
and ``G = X^T X``. What is worked with is ``C = G / mean(diag G) + 1e-3 I``, which is well
conditioned however few inputs there were. With ``C = S S^T`` (Cholesky) the error is
``||S^T W - S^T W_hat||^2``: decompose ``S^T W``, and take S^-T off its left factor.

References: Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language
Model Compression", ICLR 2025, section 3 (whitening); Frantar and Alistarh, "Optimal Brain
Compression", NeurIPS 2022 (the order in which errors are fed back).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_RIDGE = 1e-3
_SOLVED_COLUMNS = 1024


def mean_diagonal(grams: Sequence[Tensor]) -> float:
    """What grams are divided by: the mean of the diagonals of those that are not zero; or 1."""
    diagonals = [gram if gram.dim() == 1 else gram.diagonal() for gram in grams]
    means = [float(diagonal.double().mean()) for diagonal in diagonals]
    found = [mean for mean in means if mean > 0]
    return sum(found) / len(found) if found else 1.0


def regularized(gram: Tensor, unit: float) -> Tensor:
    """The metric C of a Gram matrix or of a diagonal.

    Args:
        gram: ``(in, in)`` or ``(in,)``.
        unit: what it is divided by, see `mean_diagonal`.

    Returns:
        Of its shape, float32, positive definite. A Gram matrix of no inputs at all, as of an
        expert that no token chose, says nothing of them: then the identity, as a diagonal.
    """
    if not bool(gram.any()):
        return gram.new_ones(gram.shape[0], dtype=torch.float32)
    C = gram.float() / unit
    if C.dim() == 1:
        return C + _RIDGE
    C.diagonal().add_(_RIDGE)
    return C


def apply_metric(C: Tensor, X: Tensor) -> Tensor:
    """``C X`` of ``X (in, n)``."""
    return C[:, None] * X if C.dim() == 1 else C @ X


def diagonal_of(C: Tensor) -> Tensor:
    """The diagonal ``(in,)``."""
    return C if C.dim() == 1 else C.diagonal()


def root(C: Tensor) -> Tensor:
    """S with ``C = S S^T``: lower triangular, or the diagonal of a diagonal one; float32."""
    if C.dim() == 1:
        return C.sqrt()
    return _cholesky(C.double()).float()


def _cholesky(C: Tensor) -> Tensor:
    """Of a symmetric matrix that rounding may have left with eigenvalues below zero; float64."""
    C = C.clone()
    ridge = 1e-7 * float(C.diagonal().mean())
    while True:
        # The share keeps columns of any size apart, the ridge columns of zeros.
        C.diagonal().mul_(1 + 1e-7).add_(1e-5 * ridge)
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(C)
        if not int(failed):
            return lower
        C.diagonal().add_(ridge)
        ridge *= 10


def whiten(S: Tensor, W: Tensor) -> Tensor:
    """``S^T W`` of ``W (in, n)``."""
    return S[:, None] * W if S.dim() == 1 else S.T @ W


def unwhiten(S: Tensor, U: Tensor) -> Tensor:
    """``S^-T U`` of ``U (in, n)``, the inverse of `whiten`."""
    if S.dim() == 1:
        return U / S[:, None]
    solved: Tensor = torch.linalg.solve_triangular(S.T, U, upper=True)
    return solved


def solve(H: Tensor, B: Tensor) -> Tensor:
    """``H^-1 B`` of a symmetric positive semidefinite H, float32, solved in float64."""
    return solver(H)(B)


def solver(H: Tensor) -> Callable[[Tensor], Tensor]:
    """`solve` for one H and several B, a few of whose columns are in float64 at a time."""
    lower = _cholesky(H.double())

    def solved(B: Tensor) -> Tensor:
        parts = torch.split(B, _SOLVED_COLUMNS, dim=1)
        return torch.cat([torch.cholesky_solve(part.double(), lower).float() for part in parts], 1)

    return solved


def feedback_root(C: Tensor) -> Tensor:
    """Upper triangular R with ``C = R R^T``, or the diagonal of a diagonal one; float32.

    ``R_ii^2`` is what is left of ``C_ii`` once the rows after i make up for a change of row i as
    well as they can: the error of that change, per its square.
    """
    if C.dim() == 1:
        return C.sqrt()
    lower = _cholesky(C.double().flip(0, 1))
    return lower.flip(0, 1).float()


# Added to a metric whose mean diagonal is 1, so that directions no input has are still defined.
_RIDGE = 1e-3


@dataclass(frozen=True)
class Root:
    """S of a metric ``C = G / mean(diag G) + 1e-3 I = S S^T``, float32.

    Attributes:
        factor: the Cholesky factor ``(in, in)``, or of a diagonal metric its root ``(in,)``; None
            for the identity.
    """

    factor: Tensor | None

    @classmethod
    def of(cls, metric: Tensor | None) -> Root:
        """The root of a Gram matrix ``(in, in)`` or of a diagonal ``(in,)``.

        A metric of zeros, of inputs that never came, counts as none.
        """
        if metric is None or not bool(metric.any()):
            return cls(None)
        if metric.dim() == 1:
            return cls((metric / metric.mean() + _RIDGE).sqrt())
        C = metric.double() / metric.diagonal().double().mean()
        C.diagonal().add_(_RIDGE)
        return cls(torch.linalg.cholesky(C).float())

    def apply(self, X: Tensor) -> Tensor:
        """``S^T X`` of X ``(in, n)``."""
        if self.factor is None:
            return X
        return self.factor.T @ X if self.factor.dim() == 2 else self.factor[:, None] * X

    def solve(self, X: Tensor) -> Tensor:
        """``S^-T X`` of X ``(in, n)``."""
        if self.factor is None:
            return X
        if self.factor.dim() == 1:
            return X / self.factor[:, None]
        solved: Tensor = torch.linalg.solve_triangular(self.factor.T, X, upper=True)
        return solved
