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

_DAMPING = 0.01
# Inputs between which errors are passed on one by one; to those after them they go together.
_BLOCK = 32


def inverse_factor(gram: Tensor) -> Tensor:
    """U of a Gram matrix.

    Args:
        gram: ``(in, in)``, symmetric, positive semi-definite; zero for inputs that never came.

    Returns:
        Upper triangular ``(in, in)``, float32.
    """
    C = gram.double()
    mean = C.diagonal().mean()
    C = C / mean if mean > 0 else torch.zeros_like(C)
    C.diagonal().add_(_DAMPING)
    C = torch.cholesky_inverse(torch.linalg.cholesky(C))
    factor: Tensor = torch.linalg.cholesky(C, upper=True).float()
    return factor


def largest(scores: Tensor, count: int) -> Tensor:
    """Where the `count` largest elements stand, bool, in the shape of `scores`."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.reshape(-1).topk(count, sorted=False).indices] = True
    return mask.view_as(scores)


def prune(W: Tensor, U: Tensor, count: int) -> Tensor:
    """Choose which weights to keep, with error feedback and without rounding.

    The weights of each block of inputs are chosen by ``(w / U_ii)^2``, the error that removing
    one causes, as they are after the errors of the blocks before. How many a block keeps is what
    it would keep if all were chosen at once, before any error: blocks differ, other than in the
    paper, which keeps the same share of each.

    Args:
        W: ``(in, out)``, float32.
        U: see `inverse_factor`.
        count: of weights to keep.

    Returns:
        Mask ``(in, out)``, bool, with `count` elements set.
    """
    diagonal = U.diagonal()[:, None]
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
    W: Tensor, U: Tensor, bits: int, value_dtype: torch.dtype, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Round weights to few bits, and those outside of the mask to zero.

    Args:
        W: ``(in, out)``, float32.
        U: see `inverse_factor`.
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
    for start in range(0, len(W), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(W)))
        errors = W[block].clone()
        for i in range(len(errors)):
            row = start + i
            exact = W[row].clone()
            if groups is not None:
                groups.round_row(row)
            else:
                W[row] = exact.to(value_dtype)
                if mask is not None:
                    W[row].masked_fill_(~mask[row], 0)
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

    def round_row(self, row: int) -> None:
        """Round the stored elements of a row, set its others to zero."""
        first, stop = self._ends[row], self._ends[row + 1]
        groups = slice(first // GROUP, scale_count(stop))
        begin = groups.start * GROUP
        members = slice(begin, min(groups.stop * GROUP, self._ends[-1]))
        where = members if self._positions is None else self._positions[members]
        values = self._flat[where]
        fresh = group_scales(values, self._bits, self._dtype, self._has_zero)
        scales = torch.where(self._chosen[groups], self.scales[groups], fresh)
        self.scales[groups], self._chosen[groups] = scales, True
        own = slice(first - begin, stop - begin)
        spread = spread_scales(scales, len(values))[own]
        codes = nearest_codes(values[own], spread, self._bits, self._has_zero)
        rounded = levels(codes, spread, self._bits, self._has_zero).to(self._dtype).float()
        if self._positions is None:
            self._flat[first:stop] = rounded
        else:
            self._flat[row * self._columns : (row + 1) * self._columns] = 0
            self._flat[self._positions[first:stop]] = rounded
