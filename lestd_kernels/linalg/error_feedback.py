"""Rounding and pruning whose error is fed back into what is not rounded yet.

Shapes: W (in, out), y = x W; G = X^T X (in, in) the Gram matrix of the inputs; U (in, in).

The error of an output is ``(w - q)^T C (w - q)`` with ``C = G / mean(diag G) + 0.01 I``. Inputs
are fixed in turn, for all outputs at once; whatever input i loses, e = w_i - q_i, the inputs after
it make up for as well as they can: ``w_j -= (U_ij / U_ii) e_i``, where U is the upper Cholesky
factor of the inverse, ``C^-1 = U^T U``. Its row i is, up to that factor, the row of the inverse of
what is left of C, so that no inverse is ever updated.

Where the metric has an output side, ``tr(A (W - Q) B (W - Q)^T)``, the outputs of an input are
fixed in turn as well, with the upper factor V of B's inverse: the Cholesky factor of A (x) B is
that of A (x) that of B, so that the two feedbacks go one after the other (two-sided LDLQ). They go
along the diagonal blocks of B: those of the heads, or 64 outputs each.

Groups that share a scale lie along the outputs, in storage order. A scale is chosen when the first
member of its group is rounded, from all members as they are by then.

References: Frantar et al., "GPTQ: Accurate post-training quantization for generative pre-trained
transformers", ICLR 2023, section 3 and algorithm 1; Frantar, Alistarh, "SparseGPT: Massive language
models can be accurately pruned in one-shot", ICML 2023, section 3 and algorithm 1; Tseng, Sun, De
Sa, "Model-preserving adaptive rounding" (YAQA), arXiv 2505.22988, section 3, for the two sides.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from lestd_kernels.storage.few_bits import (
    FULL_BITS,
    GROUP,
    grid_has_zero,
    group_scales,
    levels,
    nearest_codes,
    scale_count,
    spread_scales,
)

_DAMPING = 0.01
# Inputs between which errors are passed on one by one; to those after them they go together.
_BLOCK = 32


def inverse_factor(gram: Tensor, damping: float = _DAMPING) -> Tensor:
    """U of a Gram matrix, or of each of several.

    Args:
        gram: ``(..., in, in)``, symmetric, positive semi-definite; zero for inputs that never came.
        damping: what is added to it, relative to its mean diagonal.

    Returns:
        Upper triangular ``(..., in, in)``, float32.
    """
    C = gram.double()
    mean = C.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    C = torch.where(mean > 0, C / mean, torch.zeros_like(C))
    C.diagonal(dim1=-2, dim2=-1).add_(damping)
    C = torch.cholesky_inverse(torch.linalg.cholesky(C))
    factor: Tensor = torch.linalg.cholesky(C, upper=True).float()
    return factor


def output_factor(B: Tensor | None, damping: float = _DAMPING) -> Tensor | None:
    """V of the metric of the outputs.

    Args:
        B: in one of the forms of lestd_kernels.linalg.metric.
        damping: see `inverse_factor`.

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
    return inverse_factor(B, damping)


def largest(scores: Tensor, count: int) -> Tensor:
    """Where the `count` largest elements stand, bool, in the shape of `scores`."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.reshape(-1).topk(count, sorted=False).indices] = True
    return mask.view_as(scores)


def prune(W: Tensor, U: Tensor, count: int, outputs: Tensor | None = None) -> Tensor:
    """Choose which weights to keep, with error feedback and without rounding.

    The weights of each block of inputs are chosen by ``(w / U_ii)^2``, the error that removing one
    causes, times what its output counts, as they are after the errors of the blocks before. How
    many a block keeps is what it would keep if all were chosen at once, before any error: blocks
    differ, other than in the paper, which keeps the same share of each.

    Args:
        W: ``(in, out)``, float32.
        U: see `inverse_factor`.
        count: of weights to keep.
        outputs: ``(out,)``, what the error of each output counts; default: the same.

    Returns:
        Mask ``(in, out)``, bool, with `count` elements set.
    """
    diagonal = U.diagonal()[:, None]
    if outputs is not None:
        diagonal = diagonal / outputs.clamp(min=torch.finfo(outputs.dtype).tiny).sqrt()
    initial = largest((W / diagonal).square(), count)
    quotas = [int(part.sum()) for part in torch.split(initial, _BLOCK)]
    W, mask = W.clone(), torch.empty(W.shape, dtype=torch.bool, device=W.device)
    for start, quota in zip(range(0, len(W), _BLOCK), quotas, strict=True):
        block = slice(start, start + _BLOCK)
        mask[block] = largest((W[block] / diagonal[block]).square(), quota)
        errors = W[block].clone()
        for i in range(len(errors)):
            row = start + i
            errors[i] = W[row].masked_fill(mask[row], 0) / U[row, row]
            W[row + 1 : block.stop] -= U[row, row + 1 : block.stop, None] * errors[i]
        W[block.stop :] -= U[block, block.stop :].T @ errors
    return mask


def round_with_feedback(
    W: Tensor,
    U: Tensor,
    bits: int,
    value_dtype: torch.dtype,
    mask: Tensor | None = None,
    V: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Round weights to few bits, and those outside of the mask to zero.

    Args:
        W: ``(in, out)``, float32.
        U: see `inverse_factor`; a diagonal ``(in,)`` where inputs cannot make up for each other.
        bits: 16 for the value dtype, or 8, 4, 3, 2.
        value_dtype: of values or scales.
        mask: bool ``(in, out)``, which elements are stored; default: all. It decides the grid,
            see `grid_has_zero`.
        V: see `output_factor`.

    Returns:
        The rounded weights ``(in, out)``, float32, exact in the value dtype, and their scales,
        float32, one per group of stored elements in row-major order; None with 16 bits.
    """
    W = W.clone(memory_format=torch.contiguous_format)
    groups = None if bits == FULL_BITS else _Groups(W, mask, bits, value_dtype, V)
    kept = None if mask is None else mask.float()

    def round_rows(first: int, stop: int) -> None:
        if groups is not None:
            groups.round_rows(first, stop)
        else:
            own = None if kept is None else kept[first:stop]
            W[first:stop] = _sixteen_bits(W[first:stop], own, value_dtype, V)

    if U.dim() == 1:
        round_rows(0, len(W))
        return W, None if groups is None else groups.scales
    for start in range(0, len(W), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(W)))
        errors = W[block].clone()
        for i in range(len(errors)):
            row = start + i
            exact = W[row].clone()
            round_rows(row, row + 1)
            errors[i] = (exact - W[row]) / U[row, row]
            W[row + 1 : block.stop] -= U[row, row + 1 : block.stop, None] * errors[i]
        W[block.stop :] -= U[block, block.stop :].T @ errors
    return W, None if groups is None else groups.scales


def _sixteen_bits(
    rows: Tensor, kept: Tensor | None, dtype: torch.dtype, V: Tensor | None
) -> Tensor:
    """Rows ``(n, out)`` in the value dtype, zeros where `kept` is zero."""
    if V is not None:
        kept = torch.ones_like(rows) if kept is None else kept
        return _in_turn(rows, kept, V, lambda exact, own: exact.to(dtype).float() * own)
    rounded = rows.to(dtype).float()
    return rounded if kept is None else rounded.masked_fill(kept == 0, 0)


def _in_turn(
    rows: Tensor, given: Tensor, V: Tensor, nearest: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Round rows, feeding the error of each output back into those after it in its block.

    Args:
        rows: ``(n, out)``.
        given: ``(n, out)``, what `nearest` must know of each output; zero rounds to zero.
        V: ``(k, p, p)``.
        nearest: ``(values (k, n), given (k, n))``: what they round to.
    """
    blocks, size, _ = V.shape

    def by_output(X: Tensor) -> Tensor:
        X = functional.pad(X, (0, blocks * size - rows.shape[1]))
        return X.view(len(rows), blocks, size).permute(2, 1, 0).contiguous()

    left, given = by_output(rows), by_output(given)
    # Output j, block, output after it.
    passed_on = (
        (V / V.diagonal(dim1=1, dim2=2)[:, :, None]).permute(1, 2, 0)[..., None].contiguous()
    )
    for j in range(size):
        exact = left[j].clone()
        left[j] = nearest(exact, given[j])
        left[j + 1 :].addcmul_(passed_on[j, j + 1 :], exact - left[j], value=-1)
    return left.permute(2, 1, 0).reshape(len(rows), -1)[:, : rows.shape[1]]


class _Groups:
    """The groups of a matrix that is rounded in place, and their scales as they are chosen.

    Args:
        W: ``(in, out)``, contiguous.
        mask: which of its elements are stored; None for all.
        bits: of a code.
        dtype: to whose precision values and scales are rounded.
        V: see `output_factor`.
    """

    def __init__(
        self, W: Tensor, mask: Tensor | None, bits: int, dtype: torch.dtype, V: Tensor | None
    ) -> None:
        rows, columns = W.shape
        self._factor = V
        self._flat, self._columns = W.view(-1), columns
        self._bits, self._dtype, self._has_zero = bits, dtype, grid_has_zero(mask is None, bits)
        # Where the stored elements stand in W; None for everywhere.
        self._positions = None if mask is None else mask.view(-1).nonzero()[:, 0]
        counts = [columns] * rows if mask is None else mask.sum(dim=1).tolist()
        self._ends = [0, *accumulate(counts)]
        self.scales = W.new_zeros(scale_count(self._ends[-1]))
        self._chosen = torch.zeros_like(self.scales, dtype=torch.bool)

    def round_rows(self, begin: int, end: int) -> None:
        """Round the stored elements of rows, set their others to zero."""
        first, stop = self._ends[begin], self._ends[end]
        groups = slice(first // GROUP, scale_count(stop))
        before = groups.start * GROUP
        members = slice(before, min(groups.stop * GROUP, self._ends[-1]))
        where = members if self._positions is None else self._positions[members]
        values = self._flat[where]
        fresh = group_scales(values, self._bits, self._dtype, self._has_zero)
        scales = torch.where(self._chosen[groups], self.scales[groups], fresh)
        self.scales[groups], self._chosen[groups] = scales, True
        own = slice(first - before, stop - before)
        spread = spread_scales(scales, len(values))[own]
        whole = slice(begin * self._columns, end * self._columns)
        inside = (
            slice(None) if self._positions is None else self._positions[first:stop] - whole.start
        )
        rows = self._flat[whole]
        if self._factor is None:
            rounded = self._nearest(values[own], spread)
            if self._positions is not None:
                rows.zero_()
            rows[inside] = rounded
            return
        given = torch.zeros_like(rows)
        given[inside] = spread
        rounded = _in_turn(
            rows.view(-1, self._columns),
            given.view(-1, self._columns),
            self._factor,
            self._nearest,
        )
        rows.copy_(rounded.reshape(-1))

    def _nearest(self, values: Tensor, scales: Tensor) -> Tensor:
        codes = nearest_codes(values, scales, self._bits, self._has_zero)
        return levels(codes, scales, self._bits, self._has_zero).to(self._dtype).float()
