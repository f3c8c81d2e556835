"""Prune and round a matrix row by row, each row's error made up for by the rows after it.

Shapes: M (m, n); C (m, m) a metric of its rows, ``C = R R^T`` with R upper triangular.

The error of a row e_i is spread over the later rows j by ``-U[i, j] / U[i, i] e_i``, ``U = R^-1``,
which is the least-squares choice given the rows before. With a diagonal metric there is nothing
to make up: plain rounding.

References: Frantar et al., "GPTQ", ICLR 2023, section 3; Frantar and Alistarh, "SparseGPT",
ICML 2023, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lestd_kernels.codecs import cheapest_codec
from lestd_kernels.packed import EncodedCore
from lestd_kernels.packing import FULL_BITS, GROUP, group_scales, levels, nearest_codes

_BLOCK_ROWS = 128


def store_with_feedback(
    M: Tensor, mask: Tensor, R: Tensor, value_bits: int, value_dtype: torch.dtype
) -> EncodedCore:
    """Store the chosen elements of a matrix, which change to make up for what is lost.

    Args:
        M: ``(m, n)``, float32; used up.
        mask: the elements to store; of these none may be zero.
        R: of the metric, see `lestd_kernels.metric.feedback_root`.
        value_bits: 16, 8, 4, 3 or 2.
        value_dtype: of values or scales.
    """
    rows, columns = M.shape
    nnz, value_bytes = int(mask.sum()), value_dtype.itemsize
    codec = cheapest_codec(rows, columns, nnz, value_bytes, value_bits).name
    if codec == "dense":
        mask = torch.ones_like(mask)
    scales: Tensor | None = None
    if value_bits != FULL_BITS:
        scales = group_scales(M[mask], value_bits, value_dtype)
    ends = mask.sum(dim=1).cumsum(0).tolist()

    def stored_row(i: int, row: Tensor) -> Tensor:
        if scales is None:
            return row.to(value_dtype).float() * mask[i]
        first = ends[i - 1] if i else 0
        own = scales[torch.arange(first, ends[i], device=row.device) // GROUP]
        rounded = levels(nearest_codes(row[mask[i]], own, value_bits), own, value_bits)
        return torch.zeros_like(row).masked_scatter_(mask[i], rounded)

    if R.dim() == 1:
        for i in range(len(M)):
            M[i] = stored_row(i, M[i])
        return EncodedCore.quantized(M, value_bits, value_dtype, scales, codec)
    identity = torch.eye(len(R), device=R.device)
    U = torch.linalg.solve_triangular(R, identity, upper=True)
    for start in range(0, len(M), _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, len(M))
        errors = M.new_empty(stop - start, M.shape[1])
        for i in range(start, stop):
            stored = stored_row(i, M[i])
            errors[i - start] = (M[i] - stored) / U[i, i]
            M[i] = stored
            M[i + 1 : stop] -= torch.outer(U[i, i + 1 : stop], errors[i - start])
        M[stop:] -= U[start:stop, stop:].T @ errors
    return EncodedCore.quantized(M, value_bits, value_dtype, scales, codec)
