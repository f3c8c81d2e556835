"""Rounding whose error is fed back along the outputs as well as along the inputs.

Shapes: W (in, out), y = x W; U (in, in) and V (k, p, p) the factors of the inverses of A and B, see
lestd_kernels.linalg.error_feedback.

Where the metric has an output side, ``tr(A (W - Q) B (W - Q)^T)``, the outputs of an input are
fixed in turn as well as the inputs: the Cholesky factor of A (x) B is that of A (x) that of B, so
that an input's error goes to the inputs after it, ``x_j -= (U_ij / U_ii) (x_i - q_i)``, and within
an input what an output was rounded by goes to the outputs after it (two-sided LDLQ). The latter
goes along the diagonal blocks of B: those of the heads, or 64 outputs each.

An element waits only for those before it in its row and in its column. So all elements (i, j) with
the same i + j, a wave, are rounded at once, in every block of outputs: as many steps as there are
diagonals, not elements. Rows lie skewed, 64 of them at a time, so that a wave is a slice and what
it passes on are two products.

Scales are there before the first step: when the first element of a row is rounded, its last ones
have not got all errors of the rows before. Those of the weights as they are lose less, measured on
trained attention, than scales chosen row by row.

References: Tseng, Sun, De Sa, "Model-preserving adaptive rounding" (YAQA), arXiv 2505.22988,
section 3, for the two sides; Lamport, "The parallel execution of DO loops", Communications of the
ACM 17(2), 1974, for the waves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from lestd_kernels.linalg.error_feedback import (
    DAMPING,
    inverse_factor,
    nearest,
    round_with_feedback,
)
from lestd_kernels.storage.few_bits import (
    FULL_BITS,
    GROUP,
    grid_has_zero,
    group_scales,
    spread_scales,
)

# Rows that lie skewed together.
_ROWS = 64

_Level = Callable[[Tensor, Tensor], Tensor]


def output_factor(
    B: Tensor | None,
    damping: float = DAMPING,
    unit: float | None = None,
    together: int | None = GROUP,
) -> Tensor | None:
    """V of the metric of the outputs.

    Args:
        B: in one of the forms of lestd_kernels.linalg.metric.
        damping: see `inverse_factor`.
        unit: likewise; one for all blocks, so that their factors are of one scale.
        together: outputs of a diagonal block of a full B; None for all of them.

    Returns:
        ``(k, p, p)``, float32: of the k blocks of B, or of the diagonal blocks of a full one, the
        last of them with ones to its end. None where outputs cannot make up for each
        other.
    """
    if B is None or B.dim() == 1:
        return None
    if B.dim() == 2:
        size = min(together or len(B), len(B))
        parts = [B[i : i + size, i : i + size] for i in range(0, len(B), size)]
        missing = len(parts) * size - len(B)
        last = functional.pad(parts[-1], (0, missing, 0, missing))
        last.diagonal()[size - missing :] = 1
        B = torch.stack([*parts[:-1], last])
    return inverse_factor(B, damping, unit)


def round_both_ways(
    W: Tensor,
    U: Tensor,
    V: Tensor | None,
    bits: int,
    value_dtype: torch.dtype,
    mask: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Round with feedback along both sides, or where there is no V along the inputs.

    Args:
        W: ``(in, out)``, float32.
        U: see `lestd_kernels.linalg.error_feedback.inverse_factor`; or a diagonal ``(in,)``.
        V: see `output_factor`.
        bits: 16 for the value dtype, or 8, 4, 3, 2.
        value_dtype: of values or scales.
        mask: bool ``(in, out)``, which elements are stored; default: all.
        scales: float32, one per group of stored elements; default: those of W.

    Returns:
        As `lestd_kernels.linalg.error_feedback.round_with_feedback`.
    """
    if V is None:
        return round_with_feedback(W, U, bits, value_dtype, mask)
    has_zero = grid_has_zero(mask is None, bits)
    given = torch.ones_like(W) if mask is None else mask.float()
    if bits != FULL_BITS:
        stored = W.reshape(-1) if mask is None else W[mask]
        if scales is None:
            scales = group_scales(stored, bits, value_dtype, has_zero)
        spread = spread_scales(scales, len(stored))
        given = spread.view_as(W) if mask is None else given.masked_scatter(mask, spread)

    def level(values: Tensor, given: Tensor) -> Tensor:
        if bits == FULL_BITS:
            return values.to(value_dtype).float().masked_fill(given == 0, 0)
        return nearest(values, given, bits, value_dtype, has_zero)

    return _in_waves(W, U, V, given, level), scales


def round_to_scales(
    W: Tensor,
    U: Tensor,
    V: Tensor | None,
    scales: Tensor,
    bits: int,
    value_dtype: torch.dtype,
) -> Tensor:
    """Round to the grid with a zero and given scales, in groups of whatever form.

    Args:
        W: ``(in, out)``, float32.
        U: see `lestd_kernels.linalg.error_feedback.inverse_factor`.
        V: see `output_factor`.
        scales: ``(in, out)``, float32, that of each element.
        bits: 8, 4, 3 or 2.
        value_dtype: to whose precision values are rounded.

    Returns:
        The rounded weights ``(in, out)``, float32.
    """
    if V is None:  # Blocks of one output have nothing to pass on.
        V = W.new_ones(W.shape[1], 1, 1)

    def level(values: Tensor, given: Tensor) -> Tensor:
        return nearest(values, given, bits, value_dtype, has_zero=True)

    return _in_waves(W, U, V, scales, level)


def _in_waves(W: Tensor, U: Tensor, V: Tensor, given: Tensor, level: _Level) -> Tensor:
    """Round W in both orders.

    Args:
        W: ``(in, out)``.
        U: ``(in, in)``, or a diagonal.
        V: ``(k, p, p)``.
        given: ``(in, out)``, what `level` must know of each element; zero rounds to zero.
        level: ``(values, given)``, of any shape: what they round to.
    """
    blocks, size, _ = V.shape
    rows, columns = W.shape

    def by_output(X: Tensor) -> Tensor:
        """``(in, p, k)``, the last output of each block first."""
        X = functional.pad(X, (0, blocks * size - columns))
        return X.view(rows, blocks, size).permute(0, 2, 1).flip(1).contiguous()

    left, given, rounded = by_output(W), by_output(given), []
    shares = (V / V.diagonal(dim1=1, dim2=2)[:, :, None]).flip(1, 2)
    # Of the error of output c + d what goes to output c, which comes d later: (d, c, k).
    onward = shares.new_zeros(size, size, blocks)
    for d in range(1, size):
        onward[d, : size - d] = shares.diagonal(-d, 1, 2).T
    if U.dim() == 1:
        rounded.append(_in_turn(left, given, onward, level))
    else:
        shares = U / U.diagonal()[:, None]
        for start in range(0, rows, _ROWS):
            block, rest = slice(start, min(start + _ROWS, rows)), slice(start + _ROWS, rows)
            own, errors = _round_block(
                left[block], given[block], shares[block, block], onward, level
            )
            rounded.append(own)
            left[rest] -= (shares[block, rest].T @ errors.flatten(1)).view_as(left[rest])
    return torch.cat(rounded).flip(1).permute(0, 2, 1).reshape(rows, -1)[:, :columns]


def _in_turn(left: Tensor, given: Tensor, onward: Tensor, level: _Level) -> Tensor:
    """Round rows ``(in, p, k)`` that have nothing to do with one another."""
    rounded = torch.empty_like(left)
    for c in range(left.shape[1] - 1, -1, -1):
        rounded[:, c] = level(left[:, c], given[:, c])
        # Outputs c - 1 to 0, which come 1 to c later.
        passed_on = onward[1 : c + 1].flip(0).diagonal(dim1=0, dim2=1).T
        left[:, :c].addcmul_(passed_on, (left[:, c] - rounded[:, c])[:, None], value=-1)
    return rounded


def _round_block(
    left: Tensor, given: Tensor, inputs: Tensor, onward: Tensor, level: _Level
) -> tuple[Tensor, Tensor]:
    """Round a block of rows in waves.

    Element (i, c), whose output is number p - 1 - c of its block, is in wave i + p - 1 - c.

    Args:
        left: ``(n, p, k)``.
        given: ``(n, p, k)``, see `_in_waves`.
        inputs: ``(n, n)``: the share of row i's error that goes to row j, i < j.
        onward: ``(p, p, k)``: of the error of output c + d what goes to c, at ``[d, c]``.

    Returns:
        The rounded rows, and what they were less before their own outputs passed anything on.
    """
    rows, size, blocks = left.shape
    waves = rows + size - 1
    row = torch.arange(rows, device=left.device)[:, None]
    output = torch.arange(size, device=left.device)
    place = (row + size - 1 - output, output.expand(rows, size))

    def skewed(X: Tensor) -> Tensor:
        """``(waves and those after the last, p, k)``, zero where there is no element."""
        found = X.new_zeros(waves + max(rows, size), size, blocks)
        found[place] = X
        return found

    # Exact values with the errors of the rows before; what the outputs before add to them.
    exact, added, given = skewed(left), skewed(torch.zeros_like(left)), skewed(given)
    rounded = torch.zeros_like(exact)
    # What wave t passes on to row i + d: shares[d, t + c], with i = t - (p - 1) + c.
    shares = left.new_zeros(rows, rows + 2 * (size - 1))
    for d in range(1, rows):
        shares[d, size - 1 : size - 1 + rows - d] = inputs.diagonal(d)
    # With zeros behind them, so that errors.unfold has at [d, c] the error of output c + d.
    errors = left.new_zeros(2 * size, blocks)
    by_output = errors.unfold(0, size, 1).transpose(1, 2)[1:size]
    onward = onward[1:]
    for t in range(waves):
        values = exact[t] + added[t]
        rounded[t] = level(values, given[t])
        torch.sub(values, rounded[t], out=errors[:size])
        added[t + 1 : t + size].addcmul_(onward, by_output, value=-1)
        lost = exact[t] - rounded[t]
        exact[t + 1 : t + rows].addcmul_(shares[1:, t : t + size, None], lost, value=-1)
    rounded = rounded[place]
    return rounded, exact[place] - rounded
