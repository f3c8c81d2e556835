"""The values that make up best for the elements that a sparse matrix leaves out.

Shapes: M (rows, columns) sparse, its target X of the same shape; the metric of its two sides in the
forms of lestd_kernels.linalg.metric.

Least squares on a support: M that is zero outside of it and makes ``tr(H (M - X) K (M - X)^T)``
small, by conjugate gradients, preconditioned with the diagonals.

Reference: Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", 1952.
"""

from __future__ import annotations

from torch import Tensor

from lestd_kernels.linalg.metric import Metric, diagonal_of

_ITERATIONS = 12
_TOLERANCE = 1e-4


def fit_on_support(X: Tensor, mask: Tensor, metric: Metric) -> Tensor:
    """The fitted matrix, float32; its error is never above that of ``X`` with zeros put in.

    Args:
        X: ``(rows, columns)``, float32.
        mask: bool, of its shape: the support.
        metric: H and K, positive definite, float32.
    """
    M = X * mask
    if bool(mask.all()):
        return M
    sizes = mask.float()
    if metric.input is not None:
        sizes = sizes / diagonal_of(metric.input)[:, None]
    if metric.output is not None:
        sizes = sizes / diagonal_of(metric.output)
    residual = metric.apply(X - M) * mask
    direction = scaled = sizes * residual
    left = first = _dot(residual, scaled)
    for _ in range(_ITERATIONS):
        if left <= _TOLERANCE**2 * first:
            break
        curved = metric.apply(direction) * mask
        curvature = _dot(direction, curved)
        if curvature <= 0:
            break
        M = M + left / curvature * direction
        residual = residual - left / curvature * curved
        scaled = sizes * residual
        before, left = left, _dot(residual, scaled)
        direction = scaled + left / before * direction
    return M


def _dot(a: Tensor, b: Tensor) -> float:
    """In float64: in float32 the products of small values underflow."""
    return float((a.double() * b.double()).sum())
