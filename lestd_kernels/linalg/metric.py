"""The metric in which an error is measured: of the inputs of a module, and of its outputs.

Shapes: W (in, out) of a module, y = x W. The metric G of one of its sides of width n is symmetric
and positive semi-definite, float32, in one of three forms:

    (n, n)      a Gram matrix
    (k, p, p)   its diagonal blocks, n = k p: one for each head
    (n,)        its diagonal

With inputs X the error of the outputs is ``||X (W - W_hat)||^2 = tr(D^T A D)``, ``D = W - W_hat``
and ``A = X^T X``. With the gradients g of the loss by the outputs, ``B = E[g^T g]`` and
``A = E[x^T x]``, ``tr(A D B D^T) / 2`` is the loss to expect of D, in nats per token (K-FAC).

What is worked with is ``C = G / mean(diag G) + 1e-3 I``, which is well conditioned however few
inputs there were. With ``C = S S^T`` (Cholesky) on either side the error is ``||S_A^T D S_B||^2``:
decompose ``S_A^T W S_B``, and take S_A^-T off its left factor and S_B^-1 off its right one.

References: Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language
Model Compression", ICLR 2025, section 3 (whitening); Frantar and Alistarh, "Optimal Brain
Compression", NeurIPS 2022 (the order in which errors are fed back); Martens and Grosse, "Optimizing
Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015 (A and B).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Added to a metric whose mean diagonal is 1, so that directions no input has are still defined.
_RIDGE = 1e-3
_SOLVED_COLUMNS = 1024


class Metric(NamedTuple):
    """Of one module; None stands for the identity.

    Attributes:
        input: of its inputs.
        output: of its outputs.
    """

    input: Tensor | None
    output: Tensor | None = None

    @property
    def transposed(self) -> Metric:
        """The metric of the transposed module."""
        return Metric(self.output, self.input)

    @property
    def diagonal(self) -> Metric:
        """The diagonals of both sides."""
        return Metric(*(None if side is None else diagonal_of(side) for side in self))

    def apply(self, X: Tensor) -> Tensor:
        """``A X B`` of ``X (in, out)``."""
        weighted = X if self.input is None else apply_metric(self.input, X)
        return weighted if self.output is None else apply_metric(self.output, weighted.T).T

    def squares(self, X: Tensor) -> float:
        """``tr(A X B X^T)`` of ``X (in, out)``, accumulated in float64."""
        weighted = self.apply(X)
        total = 0.0
        for left, right in zip(torch.split(X, 512), torch.split(weighted, 512), strict=True):
            total += float((left.double() * right).sum())
        return max(total, 0.0)


def mean_diagonal(grams: Sequence[Tensor]) -> float:
    """Divisor of Gram matrices: the mean of the diagonals of those that are not zero; or 1."""
    means = [float(diagonal_of(gram).double().mean()) for gram in grams]
    found = [mean for mean in means if mean > 0]
    return sum(found) / len(found) if found else 1.0


def regularized(gram: Tensor, unit: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The metric C of a Gram matrix, of its blocks or of its diagonal.

    Args:
        gram: in one of the three forms.
        unit: what it is divided by, see `mean_diagonal`.
        dtype: in which C is.

    Returns:
        Of its form, positive definite. A Gram matrix of no inputs at all, as of an expert that no
        token chose, says nothing of them: then the identity, as a diagonal.
    """
    if not bool(gram.any()):
        return gram.new_ones(len(diagonal_of(gram)), dtype=dtype)
    C = gram.to(dtype) / unit
    (C if C.dim() == 1 else C.diagonal(dim1=-2, dim2=-1)).add_(_RIDGE)
    return C


def apply_metric(C: Tensor, X: Tensor) -> Tensor:
    """``C X`` of ``X (n, m)``."""
    if C.dim() == 1:
        return C[:, None] * X
    if C.dim() == 2:
        return C @ X
    product: Tensor = C @ X.reshape(len(C), -1, X.shape[1])
    return product.reshape(X.shape)


def diagonal_of(C: Tensor) -> Tensor:
    """The diagonal ``(n,)``."""
    return C if C.dim() == 1 else C.diagonal(dim1=-2, dim2=-1).reshape(-1)


def whole(C: Tensor) -> Tensor:
    """A metric of blocks as one matrix ``(n, n)``; others as they are."""
    if C.dim() != 3:
        return C
    matrix: Tensor = torch.block_diag(*C)  # type: ignore[no-untyped-call]
    return matrix


def _cholesky(C: Tensor) -> Tensor:
    """Of a symmetric matrix, or of several, float64.

    One in float32 may have been left by rounding with eigenvalues below zero.
    """
    lower: Tensor
    if C.dtype == torch.float64:
        lower = torch.linalg.cholesky(C)
        return lower
    exact = C.double()
    diagonal = exact.diagonal(dim1=-2, dim2=-1)
    ridge = 1e-7 * float(diagonal.mean())
    while True:
        # The share keeps columns of any size apart, the ridge columns of zeros.
        diagonal.mul_(1 + 1e-7).add_(1e-5 * ridge)
        lower, failed = torch.linalg.cholesky_ex(exact)
        if not bool(failed.any()):
            return lower
        diagonal.add_(ridge)
        ridge *= 10


@dataclass(frozen=True)
class Root:
    """S of a metric C with ``C = S S^T``, float32.

    Attributes:
        factor: in the form of C, lower triangular; None for the identity.
    """

    factor: Tensor | None

    @classmethod
    def of(cls, C: Tensor) -> Root:
        """The root of a positive definite metric."""
        return cls(C.float().sqrt() if C.dim() == 1 else _cholesky(C).float())

    @classmethod
    def of_gram(cls, gram: Tensor | None) -> Root:
        """The root of ``G / mean(diag G) + 1e-3 I``; one of zeros counts as none."""
        if gram is None or not bool(gram.any()):
            return cls(None)
        dtype = torch.float32 if gram.dim() == 1 else torch.float64
        return cls.of(regularized(gram, float(diagonal_of(gram).to(dtype).mean()), dtype))

    def apply(self, X: Tensor) -> Tensor:
        """``S^T X`` of X ``(n, m)``."""
        if self.factor is None:
            return X
        return apply_metric(self.factor if self.factor.dim() == 1 else self.factor.mT, X)

    def solve(self, X: Tensor) -> Tensor:
        """``S^-T X`` of X ``(n, m)``, the inverse of `apply`."""
        S = self.factor
        if S is None:
            return X
        if S.dim() == 1:
            return X / S[:, None]
        blocks = X if S.dim() == 2 else X.reshape(len(S), -1, X.shape[1])
        solved: Tensor = torch.linalg.solve_triangular(S.mT, blocks, upper=True)
        return solved.reshape(X.shape)


class Roots(NamedTuple):
    """Of the metric of a module.

    Attributes:
        input: of its inputs' metric.
        output: of its outputs'.
    """

    input: Root
    output: Root = Root(None)

    @property
    def transposed(self) -> Roots:
        """Those of the transposed module."""
        return Roots(self.output, self.input)

    def apply(self, X: Tensor) -> Tensor:
        """``S_A^T X S_B`` of ``X (in, out)``."""
        X = self.input.apply(X)
        return X if self.output.factor is None else self.output.apply(X.T).T


def solver(H: Tensor) -> Callable[[Tensor], Tensor]:
    """``B -> H^-1 B`` for a symmetric positive semi-definite H ``(n, n)``, solved in float64.

    B and the result are float32; a few of their columns are in float64 at a time.
    """
    lower = _cholesky(H)

    def solved(B: Tensor) -> Tensor:
        parts = torch.split(B, _SOLVED_COLUMNS, dim=1)
        return torch.cat([torch.cholesky_solve(part.double(), lower).float() for part in parts], 1)

    return solved


def feedback_root(C: Tensor) -> Tensor:
    """Upper triangular R with ``C = R R^T``, in the form of C, float32.

    ``R_ii^2`` is what is left of ``C_ii`` once the rows after i make up for a change of row i as
    well as they can: the error of that change, per its square.
    """
    if C.dim() == 1:
        return C.sqrt()
    return _cholesky(C.flip(-2, -1)).flip(-2, -1).float()
