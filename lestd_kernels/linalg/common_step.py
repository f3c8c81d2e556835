"""Rounding to whole numbers on a step that is the same everywhere in units of the loss.

Shapes: W (in, out), y = x W; A (in, in) and B (out, out) the metric of a module's inputs and
outputs, see lestd_kernels.linalg.metric; r (in,), c (out,) scales; Z (in, out) whole numbers, and
what is stored is ``diag(r) Z diag(c)``.

With error feedback, an error of element (i, j) by one step of r_i c_j costs ``(L_A,ii L_B,jj r_i
c_j)^2``, where L are the Cholesky factors: what the elements after it cannot make up for. Rate and
distortion are in balance, the slope of both being the same for every element, where that cost is
the same everywhere: ``r_i = 1 / L_A,ii`` and ``c_j = 1 / L_B,jj``, times one number for all.

References: "WaterSIC: information-theoretically (near) optimal linear layer quantization",
arXiv 2603.04956, for inputs; Tseng, Sun, De Sa, "Model-preserving adaptive rounding" (YAQA), arXiv
2505.22988, for feedback along both sides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lestd_kernels.linalg.metric import Metric, whole
from lestd_kernels.linalg.two_sided_feedback import in_tiles

_ROWS = 32
_RIDGE = 1e-6
MOST_INTEGER = (1 << 15) - 1
"""The largest magnitude of a whole number, which the coder knows."""


def whole_numbers(
    W: Tensor, U: Tensor, r: Tensor, c: Tensor, value_dtype: torch.dtype, V: Tensor | None = None
) -> Tensor:
    """Round with feedback, b matrices of one shape side by side.

    Args:
        W: ``(b, in, out)``, float32.
        U: ``(b, in, in)``, see `error_feedback.inverse_factor`; diagonals ``(b, in)`` where inputs
            cannot make up for each other.
        r: ``(b, in)``, positive.
        c: ``(b, out)``, positive.
        value_dtype: Z is exact in it.
        V: ``(b, k, p, p)``, see `two_sided_feedback.output_factor`.

    Returns:
        Z ``(b, in, out)``, float32.
    """
    if U.dim() == 2 or V is not None:
        steps = r[:, :, None] * c[:, None]
        if V is None:
            return _nearest(W, steps, value_dtype)
        found = in_tiles(W, U, V, steps, lambda x, step: _nearest(x, step, value_dtype) * step)
        return (found / steps).round_()
    passed_on = (U / U.diagonal(dim1=1, dim2=2)[..., None]).triu_(1)
    W, Z = W.clone(memory_format=torch.contiguous_format), torch.empty_like(W)
    rows = W.shape[1]
    for start in range(0, rows, _ROWS):
        block = slice(start, min(start + _ROWS, rows))
        steps = r[:, block, None] * c[:, None]
        Z[:, block], errors = _by_rows(W[:, block], steps, passed_on[:, block, block], value_dtype)
        W[:, block.stop :] -= passed_on[:, block, block.stop :].mT @ errors
    return Z


def _nearest(values: Tensor, steps: Tensor, value_dtype: torch.dtype) -> Tensor:
    # The largest that 16 bits know: above it, bfloat16 and float16 would make it 2^15.
    most = min(MOST_INTEGER, (MOST_INTEGER + 1) * (1 - torch.finfo(value_dtype).eps / 2))
    Z = (values / steps).round_().clamp_(-most, most)
    return Z.to(value_dtype).float()


def _by_rows(
    W: Tensor, steps: Tensor, passed_on: Tensor, value_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Round rows in turn: whole numbers, and the error of each as it was rounded.

    Args:
        W: ``(b, n, out)``, changed in place.
        steps: ``(b, n, out)``.
        passed_on: ``(b, n, n)``, strictly upper triangular: what of an error later rows make up
            for.
        value_dtype: see `whole_numbers`.
    """
    Z, errors = torch.empty_like(W), torch.empty_like(W)
    for row in range(W.shape[1]):
        Z[:, row] = _nearest(W[:, row], steps[:, row], value_dtype)
        errors[:, row] = W[:, row] - Z[:, row] * steps[:, row]
        share = passed_on[:, row, row + 1 :, None]
        W[:, row + 1 :].addcmul_(share, errors[:, row, None], value=-1)
    return Z, errors


def fit_scales(W: Tensor, Z: Tensor, r: Tensor, c: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """Scales of least error in the metric for whole numbers as they are: r, and then c.

    Each is a linear least-squares problem, ``(A o (Y B Y^T)) r = diag(A W B Y^T)`` with ``Y = Z
    diag(c)``; a scale of zeros alone stays as it is.

    Args:
        W: ``(in, out)``, float32.
        Z: of `whole_numbers`.
        r: ``(in,)``.
        c: ``(out,)``.
        metric: of the module.

    Returns:
        r and c, float32.
    """
    wanted = metric.apply(W)
    r = _fit_rows(wanted, Z * c, r, metric)
    return r, _fit_rows(wanted.T, (r[:, None] * Z).T, c, metric.transposed)


def _fit_rows(wanted: Tensor, Y: Tensor, r: Tensor, metric: Metric) -> Tensor:
    """r of least error of ``diag(r) Y``; `wanted` is ``A W B``."""
    A = metric.input
    weighted = Metric(None, metric.output).apply(Y)
    if A is None or A.dim() != 2:
        squares = (Metric(A).apply(weighted) * Y).sum(dim=1, dtype=torch.float64)
        missing = (wanted * Y).sum(dim=1, dtype=torch.float64) - squares * r
        if A is None or A.dim() == 1:
            fitted: Tensor = r + missing / squares.clamp(min=torch.finfo(torch.float32).tiny)
            return fitted.float()
        A = whole(A)
    M = A.double() * (weighted @ Y.T)
    missing = (wanted * Y).sum(dim=1, dtype=torch.float64) - M @ r.double()
    M.diagonal().add_(_RIDGE * M.diagonal().mean() + torch.finfo(torch.float32).tiny)
    fitted = r + torch.linalg.solve(M, missing)
    return fitted.float()
