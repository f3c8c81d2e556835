"""Rounding whose error is fed back along the outputs as well as along the inputs.

Shapes: W (in, out), y = x W; U (in, in) and V (k, p, p) the factors of the inverses of A and B, see
lestd_kernels.linalg.error_feedback.

Where the metric has an output side, ``tr(A (W - Q) B (W - Q)^T)``, the outputs of an input are
fixed in turn as well as the inputs: the Cholesky factor of A (x) B is that of A (x) that of B, so
that an input's error goes to the inputs after it, ``x_j -= (U_ij / U_ii) (x_i - q_i)``, and within
an input what an output was rounded by goes to the outputs after it (two-sided LDLQ). The latter
goes along the diagonal blocks of B: those of the heads, or 64 outputs each. Along all outputs the
error that a full B expects falls by a quarter, but what a few thousand tokens say of far outputs is
mostly chance: measured on a real model, perplexity does not gain (docs/compare.md).

An element waits only for those before it in its row and in its column. So all elements (i, j) with
the same i + j, a wave, are rounded at once: as many steps as there are diagonals, not elements. A
matrix is rounded in tiles, which wait for one another in the same way; within a tile errors are
passed on wave by wave, and from tile to tile by products.

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

# Of a tile.
_ROWS, _OUTPUTS = 64, 64

_Level = Callable[[Tensor, Tensor], Tensor]


def output_factor(
    B: Tensor | None, damping: float = DAMPING, unit: float | None = None
) -> Tensor | None:
    """V of the metric of the outputs.

    Args:
        B: in one of the forms of lestd_kernels.linalg.metric.
        damping: see `inverse_factor`.
        unit: likewise; one for all blocks, so that their factors are of one scale.

    Returns:
        ``(k, p, p)``, float32: of the k blocks of B, or of the diagonal blocks of 64 outputs of a
        full one, the last of them with ones to its end. None where outputs cannot make up for each
        other.
    """
    if B is None or B.dim() == 1:
        return None
    if B.dim() == 2:
        size = min(GROUP, len(B))
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

    return in_tiles(W[None], U[None], V[None], given[None], level)[0], scales


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

    return in_tiles(W[None], U[None], V[None], scales[None], level)[0]


def in_tiles(W: Tensor, U: Tensor, V: Tensor, given: Tensor, level: _Level) -> Tensor:
    """Round in both orders, b matrices of one shape side by side.

    Args:
        W: ``(b, in, out)``, float32.
        U: ``(b, in, in)``; diagonals ``(b, in)`` where inputs cannot make up for each other.
        V: ``(b, k, p, p)``, with k p outputs or some more.
        given: ``(b, in, out)``, what `level` must know of each element.
        level: ``(values, given)``, of any shape: what they round to.

    Returns:
        The rounded weights ``(b, in, out)``.
    """
    matrices, rows, outputs = W.shape
    blocks, size = V.shape[1:3]
    height, width = min(_ROWS, rows), min(_OUTPUTS, size)
    down, across = -(-rows // height), -(-size // width)
    more_rows, more_outputs = down * height - rows, across * width - size

    def tiles(X: Tensor) -> Tensor:
        """``(b, in, out) -> (across, down, b, k, height, width)``, filled up with ones."""
        if blocks * size > outputs:
            X = functional.pad(X, (0, blocks * size - outputs), value=1.0)
        X = X.reshape(matrices, rows, blocks, size)
        if more_rows or more_outputs:
            X = functional.pad(X, (0, more_outputs, 0, 0, 0, more_rows), value=1.0)
        X = X.view(matrices, down, height, blocks, across, width)
        return X.permute(4, 1, 0, 3, 2, 5).clone(memory_format=torch.contiguous_format)

    # Of tiles that are done they hold the errors, and what is left over for outputs to the right.
    left, given = tiles(W), tiles(given)
    rounded = torch.empty_like(left)
    own = left.new_zeros(down, matrices, height, height)
    if U.dim() == 3:
        U = (U / U.diagonal(dim1=1, dim2=2)[..., None]).triu_(1)
        if more_rows:
            U = functional.pad(U, (0, more_rows, 0, more_rows))
        starts = range(0, down * height, height)
        own = torch.stack([U[:, i : i + height, i : i + height] for i in starts])
    along = (V / V.diagonal(dim1=2, dim2=3)[..., None]).triu_(1)
    if more_outputs:
        along = functional.pad(along, (0, more_outputs, 0, more_outputs))
    along = along.view(matrices, blocks, across, width, across, width)
    for time in range(down + across - 1):
        at = list(range(max(0, time - across + 1), min(down, time + 1)))
        parts = [time - row for row in at]
        made_up = torch.zeros_like(left[0, : len(at)])
        for place, (part, row) in enumerate(zip(parts, at, strict=True)):
            if row and U.dim() == 3:
                above = left[part, :row].permute(1, 2, 0, 3, 4).flatten(2, 3)
                shares = U[:, None, : row * height, row * height : (row + 1) * height]
                left[part, row] -= shares.mT @ above
            if part:
                before = given[:part, row].permute(1, 2, 3, 0, 4).flatten(3)
                made_up[place] = before @ along[:, :, :part, :, part].flatten(2, 3)
        here = torch.tensor(parts), torch.tensor(at)
        rounded[here], left[here], given[here] = _round_tiles(
            left[here],
            made_up,
            given[here],
            own[at[0] : at[-1] + 1],
            torch.stack([along[:, :, part, :, part] for part in parts]),
            level,
        )
    rounded = rounded.permute(2, 1, 4, 3, 0, 5).reshape(matrices, down * height, blocks, -1)
    return rounded[:, :rows, :, :size].reshape(matrices, rows, -1)[..., :outputs]


def _round_tiles(
    left: Tensor, made_up: Tensor, given: Tensor, own: Tensor, along: Tensor, level: _Level
) -> tuple[Tensor, ...]:
    """Round tiles of n rows and m outputs in waves.

    Args:
        left: ``(a, b, k, n, m)``, weights with the errors of the rows above.
        made_up: ``(a, b, k, n, m)``, what outputs to the left have left over for these.
        given: ``(a, b, k, n, m)``.
        own: ``(a, b, n, n)``, strictly upper triangular: what of an error goes to later rows.
        along: ``(a, b, k, m, m)``, likewise: what of it outputs to the right make up for.
        level: what they round to.

    Returns:
        The rounded values, their errors, and what is left over for outputs to the right.
    """
    rows, size = left.shape[-2:]

    def apart(X: Tensor) -> Tensor:
        """``(n, m, a, b, k)``, the last output first, so that a wave is a diagonal."""
        return X.flip(-1).movedim((-2, -1), (0, 1)).contiguous()

    left, made_up, given = apart(left), apart(made_up), apart(given)
    own = own.movedim((-1, -2), (0, 1))[..., None].contiguous()
    along = apart(along.flip(-2))
    rounded, errors, left_over = (torch.empty_like(left) for _ in range(3))
    for time in range(rows + size - 1):
        # Element (i, m - 1 - c) is number i - first of the wave i + m - 1 - c.
        first, stop = max(0, time - size + 1), min(rows, time + 1)
        outputs = slice(size - 1 - time + first, size - 1 - time + stop)

        def wave(
            X: Tensor, first: int = first, stop: int = stop, outputs: slice = outputs
        ) -> Tensor:
            return X[first:stop, outputs].diagonal(dim1=0, dim2=1).movedim(-1, 0)

        exact = wave(left)
        wanted = exact - wave(made_up)
        found = level(wanted, wave(given))
        error, over = exact - found, wanted - found
        for known, new in ((rounded, found), (errors, error), (left_over, over)):
            wave(known).copy_(new)
        left[first:, outputs].addcmul_(own[first:, first:stop], error, value=-1)
        made_up[first:stop].addcmul_(along[outputs], over[:, None])
    return tuple(X.movedim((0, 1), (-2, -1)).flip(-1) for X in (rounded, errors, left_over))
