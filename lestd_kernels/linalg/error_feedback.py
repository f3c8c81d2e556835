"""Rounding and pruning whose error is fed back into what is not rounded yet.

Shapes: W (in, out), y = x W; G = X^T X (in, in) the Gram matrix of the inputs; U (in, in).

The error of an output is ``(w - q)^T C (w - q)`` with ``C = G / mean(diag G) + 0.01 I``. Inputs
are fixed in turn, for all outputs at once; whatever input i loses, e = w_i - q_i, the inputs after
it make up for as well as they can: ``w_j -= (U_ij / U_ii) e_i``, where U is the upper Cholesky
factor of the inverse, ``C^-1 = U^T U``. Its row i is, up to that factor, the row of the inverse of
what is left of C, so that no inverse is ever updated.

Groups that share a scale lie along the outputs, in storage order. A scale is chosen when the first
member of its group is rounded, from all members as they are by then.

References: Frantar et al., "GPTQ: Accurate post-training quantization for generative pre-trained
transformers", ICLR 2023, section 3 and algorithm 1; Frantar, Alistarh, "SparseGPT: Massive language
models can be accurately pruned in one-shot", ICML 2023, section 3 and algorithm 1.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

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

DAMPING = 0.01
# Inputs between which errors are passed on one by one; to those after them they go together.
_BLOCK = 32


def inverse_factor(gram: Tensor, damping: float = DAMPING, unit: float | None = None) -> Tensor:
    """U of a Gram matrix, or of each of several.

    Args:
        gram: ``(..., in, in)``, symmetric, positive semi-definite; zero for inputs that never came.
        damping: what is added to it, relative to the unit.
        unit: what it is divided by; default: the mean diagonal of each.

    Returns:
        Upper triangular ``(..., in, in)``, float32.
    """
    C = gram.double()
    mean = C.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    if unit is not None:
        mean = torch.full_like(mean, unit)
    C = torch.where(mean > 0, C / mean, torch.zeros_like(C))
    C.diagonal(dim1=-2, dim2=-1).add_(damping)
    C = torch.cholesky_inverse(torch.linalg.cholesky(C))
    factor: Tensor = torch.linalg.cholesky(C, upper=True).float()
    return factor


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
) -> tuple[Tensor, Tensor | None]:
    """Round weights to few bits, and those outside of the mask to zero.

    Args:
        W: ``(in, out)``, float32.
        U: see `inverse_factor`; a diagonal ``(in,)`` where inputs cannot make up for each other.
        bits: 16 for the value dtype, or 8, 4, 3, 2.
        value_dtype: of values or scales.
        mask: bool ``(in, out)``, which elements are stored; default: all. It decides the grid,
            see `grid_has_zero`.

    Returns:
        The rounded weights ``(in, out)``, float32, exact in the value dtype, and their scales,
        float32, one per group of stored elements in row-major order; None with 16 bits.
    """
    W = W.clone(memory_format=torch.contiguous_format)
    groups = None if bits == FULL_BITS else _Groups(W, mask, bits, value_dtype)

    def round_rows(first: int, stop: int) -> None:
        if groups is not None:
            groups.round_rows(first, stop)
            return
        rounded = W[first:stop].to(value_dtype).float()
        W[first:stop] = rounded if mask is None else rounded.masked_fill(~mask[first:stop], 0)

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


class _Groups:
    """The groups of a matrix that is rounded in place, and their scales as they are chosen.

    Args:
        W: ``(in, out)``, contiguous.
        mask: which of its elements are stored; None for all.
        bits: of a code.
        dtype: to whose precision values and scales are rounded.
    """

    def __init__(self, W: Tensor, mask: Tensor | None, bits: int, dtype: torch.dtype) -> None:
        rows, columns = W.shape
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
        rounded = nearest(values[own], spread, self._bits, self._dtype, self._has_zero)
        if self._positions is not None:
            rows.zero_()
        rows[inside] = rounded


def nearest(
    values: Tensor, scales: Tensor, bits: int, dtype: torch.dtype, has_zero: bool
) -> Tensor:
    """The level nearest to each value, float32, as it is in the value dtype; any shape."""
    codes = nearest_codes(values, scales, bits, has_zero)
    return levels(codes, scales, bits, has_zero).to(dtype).float()
