"""Tensors that a checkpoint keeps in few bits, as the dense ones that they stand for.

A few rows are dequantized at a time, so memory stays within them, one matrix where it is kept
transposed, and its scales. With q a number as it is coded, s and z the scale and the zero point of
its block of a x b numbers, and w the dense weight, computed in float32 and rounded once:

    float8    weight ``(out, in)`` F8, scale ``(out / a, in / b)``, rounded up:  w = q s
    float4    weight ``(out, in / 2)`` U8, E2M1, the lower half of a byte first, scale
              ``(out, in / 32)`` U8, the exponent of two plus 127:  w = q s
    integer   weight ``(out, in)`` I8, or ``(out, in bits / 32)`` I32 with q + 2^(bits - 1), the
              lowest bits first, scale ``(out / a, in / b)``, zero_point likewise, packed along
              its rows where the weight is packed:  w = (q - z) s

``columns`` ``(in,)`` says of each column which one of the scale's it has, ``shape`` ``(2,)`` what
the weight's is. A stack of matrices has one more axis before these, in all parts.

Reference: DeepSeek-V3 (arXiv 2412.19437), section 3.3; OCP Microscaling Formats v1.0, section 5;
`compressed_tensors.compressors` of vLLM's compressed-tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lestd_kernels.errors import LestdError
from workers.checkpoint.checks import check_finite
from workers.contracts import Packing, TensorRef

E8M0 = ("U8", "F8_E8M0")
"""safetensors' names of dtypes of scales that are powers of two."""

_ELEMENTS = 2**20  # At a time.
_WORD = 32
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_FLOAT4 = torch.cat((_E2M1, -_E2M1))
_POWERS = torch.tensor([2.0 ** (i - 127) for i in range(255)] + [torch.inf])
_DENSE = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

_BYTES_OF_AN_ELEMENT = 40  # Words, numbers, scales and weights while they are dequantized.

Read = Callable[[TensorRef], Tensor]
"""Reads a tensor that lies on disk as it is."""


def matrices(ref: TensorRef) -> list[TensorRef]:
    """The matrices of a packed tensor, in order."""
    return [ref] if len(ref.shape) == 2 else [ref.matrix(i) for i in range(ref.shape[0])]


def working_bytes(ref: TensorRef) -> int:
    """About the memory that reading a tensor takes beside the tensor; 0 where nothing is packed."""
    if ref.packing is None:
        return 0
    one = matrices(ref)[0]
    others = sum(math.prod(part.shape) for part in one.on_disk[:-1])
    return (
        _BYTES_OF_AN_ELEMENT * (others + max(_ELEMENTS, *one.shape))
        + one.stored_bytes * ref.packing.transposed
    )


def dequantized(ref: TensorRef, read: Read) -> Iterator[Tensor]:
    """The contents of a packed tensor, in order.

    Args:
        ref: which has a packing.
        read: reads each part once, the weight last, by rows.

    Returns:
        Some whole rows after the other, contiguous, in the tensor's dtype, on the CPU.

    Raises:
        LestdError: a scale or a number is not finite, or a part contradicts another.
    """
    for matrix in matrices(ref):
        assert matrix.packing is not None
        rows = _rows(matrix, matrix.packing, read)
        if matrix.packing.transposed:
            yield torch.cat(list(rows)).T.contiguous()
        else:
            yield from rows


def _rows(ref: TensorRef, packing: Packing, read: Read) -> Iterator[Tensor]:
    rows, columns = ref.shape[::-1] if packing.transposed else ref.shape
    others = {name: read(part) for name, part in packing.parts.items() if name != "weight"}
    scale = others["scale"]
    scale = _POWERS[scale.int()] if scale.dtype == torch.uint8 else scale.float()
    check_finite(scale, packing.parts["scale"])
    zero = None
    if "zero_point" in others:
        zero = others["zero_point"]
        if zero.dtype == torch.int32:
            zero = _unpacked(zero.T, packing.bits).T
        zero = zero[: scale.shape[0]].float()
    if "shape" in others and others["shape"].tolist() != [rows, columns]:
        raise LestdError(
            f"tensor {packing.parts['shape'].name} says {others['shape'].tolist()}, and the packed "
            f"weight beside it in {ref.shard} has {[rows, columns]}; download both again"
        )
    column_blocks = torch.arange(columns) // packing.block[1]
    if "columns" in others:
        column_blocks = others["columns"].long()
        if not bool(((column_blocks >= 0) & (column_blocks < scale.shape[1])).all()):
            raise LestdError(
                f"tensor {packing.parts['columns'].name} in {ref.shard} names groups beyond the "
                f"{scale.shape[1]} that there are; download it again"
            )
    step = max(1, _ELEMENTS // columns)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        values = _numbers(read(_some_rows(packing.parts["weight"], first, count)), packing)
        values = values[:, :columns]
        row_blocks = torch.arange(first, first + count) // packing.block[0]
        if zero is not None:
            values = values - _spread(zero, row_blocks, column_blocks)
        dense = (values * _spread(scale, row_blocks, column_blocks)).to(_DENSE[ref.dtype])
        check_finite(dense, ref)
        yield dense


def _some_rows(ref: TensorRef, first: int, count: int) -> TensorRef:
    size = ref.stored_bytes // ref.shape[0]
    start = ref.byte_range[0] + first * size
    place = (start, start + count * size)
    return replace(ref, shape=(count, *ref.shape[1:]), byte_range=place)


def _numbers(weight: Tensor, packing: Packing) -> Tensor:
    """The numbers of some rows as they are coded, float32."""
    if packing.kind == "float4":
        halves = torch.stack((weight & 0xF, weight >> 4), dim=-1)
        return _FLOAT4[halves.int()].flatten(-2)
    if weight.dtype == torch.int32:
        return _unpacked(weight, packing.bits).float()
    return weight.float()


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """Numbers of some bits, int32, of words ``(n, m)`` -> ``(n, m 32 / bits)``."""
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
    unsigned = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return unsigned.flatten(-2) - (1 << bits - 1)


def _spread(grid: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The value of each number's block; one column stands for all that have the same."""
    by_row = grid[rows]
    return by_row if by_row.shape[1] == 1 else by_row[:, columns]
