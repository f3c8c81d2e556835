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

from lestd_kernels.linalg.error_feedback import in_turn
from lestd_kernels.linalg.metric import Metric

_BLOCK = 32
_RIDGE = 1e-6
MOST_INTEGER = (1 << 15) - 1
"""The largest magnitude of a whole number, which the coder knows."""


def whole_numbers(
    W: Tensor, U: Tensor, r: Tensor, c: Tensor, value_dtype: torch.dtype, V: Tensor | None = None
) -> Tensor:
    """Round with feedback.

    Args:
        W: ``(in, out)``, float32.
        U: see `error_feedback.inverse_factor`; a diagonal ``(in,)`` where inputs cannot make up for
            each other.
        r: ``(in,)``, positive.
        c: ``(out,)``, positive.
        value_dtype: Z is exact in it.
        V: see `error_feedback.output_factor`.

    Returns:
        Z, float32.
    """

    def nearest(values: Tensor, steps: Tensor) -> Tensor:
        Z = (values / steps).round_().clamp_(-MOST_INTEGER, MOST_INTEGER)
        return Z.to(value_dtype).float()

    def rounded(rows: Tensor, steps: Tensor) -> Tensor:
        if V is None:
            return nearest(rows, steps)
        made = in_turn(rows, steps, V, lambda values, own: nearest(values, _positive(own)) * own)
        return (made / steps).round_()

    if U.dim() == 1:
        return rounded(W, r[:, None] * c)
    W, Z = W.clone(memory_format=torch.contiguous_format), torch.empty_like(W)
    passed_on = U / U.diagonal()[:, None]
    for start in range(0, len(W), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(W)))
        errors = W[block].clone()
        for row in range(start, block.stop):
            steps = r[row] * c
            Z[row] = rounded(W[row, None], steps[None])[0]
            error = W[row] - Z[row] * steps
            errors[row - start] = error
            W[row + 1 : block.stop].addcmul_(passed_on[row, row + 1 : block.stop, None], -error)
        W[block.stop :] -= passed_on[block, block.stop :].T @ errors
    return Z


def _positive(steps: Tensor) -> Tensor:
    """Steps, with ones for the outputs that fill up the last block."""
    return torch.where(steps == 0, torch.ones_like(steps), steps)


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
            return (r + missing / squares.clamp(min=torch.finfo(torch.float32).tiny)).float()
        A = torch.block_diag(*A)
    M = A.double() * (weighted @ Y.T)
    missing = (wanted * Y).sum(dim=1, dtype=torch.float64) - M @ r.double()
    M.diagonal().add_(_RIDGE * M.diagonal().mean() + torch.finfo(torch.float32).tiny)
    return (r + torch.linalg.solve(M, missing)).float()
