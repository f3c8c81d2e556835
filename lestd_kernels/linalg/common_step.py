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
from torch.nn import functional

from lestd_kernels.linalg.metric import Metric, whole

# Rows, and outputs, that are rounded in one go; between such tiles errors are passed on by products.
_ROWS, _OUTPUTS = 32, 64
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
    if U.dim() == 2 and V is None:
        return _nearest(W, r[:, :, None] * c[:, None], value_dtype)
    passed_on = None
    if U.dim() == 3:
        passed_on = (U / U.diagonal(dim1=1, dim2=2)[..., None]).triu_(1)
    if V is not None:
        return _in_tiles(W, passed_on, r, c, value_dtype, V)
    assert passed_on is not None, "one of both sides has feedback"
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


def _in_tiles(
    W: Tensor,
    passed_on: Tensor | None,
    r: Tensor,
    c: Tensor,
    value_dtype: torch.dtype,
    V: Tensor,
) -> Tensor:
    """Round with feedback along both sides, a tile of rows and outputs at a time.

    A tile waits for those above it and those to its left; so all with the same sum of both places,
    and those of all blocks of V, are rounded at once.

    Args:
        W: ``(b, in, out)``.
        passed_on: ``(b, in, in)``, strictly upper triangular, see `_by_rows`; or None.
        r: ``(b, in)``.
        c: ``(b, out)``.
        value_dtype: see `whole_numbers`.
        V: ``(b, k, p, p)``.
    """
    matrices, rows, outputs = W.shape
    blocks, size = V.shape[1:3]
    width = min(_OUTPUTS, size)
    down, across = -(-rows // _ROWS), -(-size // width)
    more_rows, more_outputs = down * _ROWS - rows, across * width - size

    def tiles(X: Tensor, fill: float = 0.0) -> Tensor:
        """``(b, in, out) -> (across, down, b, k, rows, width)``."""
        X = functional.pad(X, (0, blocks * size - outputs), value=fill)
        X = X.view(matrices, rows, blocks, size)
        X = functional.pad(X, (0, more_outputs, 0, 0, 0, more_rows), value=fill)
        X = X.view(matrices, down, _ROWS, blocks, across, width)
        return X.permute(4, 1, 0, 3, 2, 5).contiguous()

    exact, steps = tiles(W), tiles(r[:, :, None] * c[:, None], 1.0)
    errors, left_over, Z = (torch.zeros_like(exact) for _ in range(3))
    own = exact.new_zeros(down, matrices, _ROWS, _ROWS)
    if passed_on is not None:
        passed_on = functional.pad(passed_on, (0, more_rows, 0, more_rows))
        starts = range(0, down * _ROWS, _ROWS)
        own = torch.stack([passed_on[:, i : i + _ROWS, i : i + _ROWS] for i in starts])
    along = (V / V.diagonal(dim1=2, dim2=3)[..., None]).triu(1)
    along = functional.pad(along, (0, more_outputs, 0, more_outputs))
    along = along.view(matrices, blocks, across, width, across, width)
    for time in range(down + across - 1):
        first, stop = max(0, time - across + 1), min(down, time + 1)
        places = [(time - row, row) for row in range(first, stop)]
        for part, row in places:
            if row and passed_on is not None:
                shares = passed_on[:, None, : row * _ROWS, row * _ROWS : (row + 1) * _ROWS]
                above = errors[part, :row].permute(1, 2, 0, 3, 4).flatten(2, 3)
                exact[part, row] -= shares.mT @ above
        made_up = torch.zeros_like(exact[0, first:stop])
        for place, (part, row) in enumerate(places):
            if part:
                before = left_over[:part, row].permute(1, 2, 3, 0, 4).flatten(3)
                made_up[place] = before @ along[:, :, :part, :, part].flatten(2, 3)
        here = tuple(zip(*places, strict=True))
        part = list(here[0])
        Z[here], errors[here], left_over[here] = _by_diagonals(
            exact[here],
            made_up,
            steps[here],
            own[first:stop],
            torch.stack([along[:, :, one, :, one] for one in part]),
            value_dtype,
        )
    Z = Z.permute(2, 1, 4, 3, 0, 5).reshape(matrices, down * _ROWS, blocks, across * width)
    return Z[:, :rows, :, :size].reshape(matrices, rows, -1)[..., :outputs]


def _by_diagonals(
    exact: Tensor,
    made_up: Tensor,
    steps: Tensor,
    passed_on: Tensor,
    along: Tensor,
    value_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round tiles of n rows and m outputs; a stands for all dimensions before the last ones.

    An element waits for those before it in its row and in its column: those of one antidiagonal,
    of all tiles, are rounded together.

    Args:
        exact: ``(a, k, n, m)``, with the errors of the rows above.
        made_up: ``(a, k, n, m)``, what outputs to the left have left over.
        steps: ``(a, k, n, m)``.
        passed_on: ``(a, n, n)``, strictly upper triangular: what of an error later rows make up
            for.
        along: ``(a, k, m, m)``, likewise: of what an output leaves over, later ones.
        value_dtype: see `whole_numbers`.

    Returns:
        Whole numbers, errors, and what is left over, which outputs to the right make up for.
    """
    rows, size = exact.shape[-2:]

    def apart(X: Tensor) -> Tensor:
        """Places first, and outputs last to first: antidiagonals are diagonals."""
        return X.flip(-1).movedim((-2, -1), (0, 1)).contiguous()

    exact, made_up, steps = apart(exact), apart(made_up), apart(steps)
    passed_on = passed_on.movedim((-1, -2), (0, 1))[..., None].contiguous()
    along = along.flip(-2, -1).movedim((-2, -1), (0, 1)).contiguous()
    Z, errors, left_over = (torch.empty_like(exact) for _ in range(3))

    def diagonal(X: Tensor) -> Tensor:
        return X[first:stop, left:right].diagonal(dim1=0, dim2=1).movedim(-1, 0)

    for time in range(rows + size - 1):
        first, stop = max(0, time - size + 1), min(rows, time + 1)
        left, right = size - 1 - time + first, size - 1 - time + stop
        value, step = diagonal(exact), diagonal(steps)
        wanted = value - diagonal(made_up)
        whole = _nearest(wanted, step, value_dtype)
        error, over = value - whole * step, wanted - whole * step
        diagonal(Z).copy_(whole)
        diagonal(errors).copy_(error)
        diagonal(left_over).copy_(over)
        exact[first:, left:right].addcmul_(passed_on[first:, first:stop], error, value=-1)
        made_up[first:stop].addcmul_(along[left:right], over[:, None])
    return tuple(X.movedim((0, 1), (-2, -1)).flip(-1) for X in (Z, errors, left_over))


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
