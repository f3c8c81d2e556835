"""How a sparse core is stored: ``dense``, ``bitmask`` or ``csr``, and the exact bytes of each.

A codec is a pure function pair on a core unfolding M (rows x columns): `encode` gives a
dictionary of 1-D tensors, `decode` gives M back. The codec stores *where* the values stand; what
a value is stored as is not its business: it keeps values in the dtype of the matrix it is given
(see lestd_kernels.storage.few_bits for fewer bits).

    codec     tensors besides ``values``                                  cheapest at density
    dense     none (every element is a value)                             near 1
    bitmask   ``mask`` uint8 (ceil(rows columns / 8))                     above about 1/16
    csr       ``columns`` uint16 or int32 (nnz), ``row_pointers`` int32   below that
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lestd_kernels.storage.bitmasks import count_bits, pack_bits, unpack_bits
from lestd_kernels.storage.few_bits import FULL_BITS, values_bytes

TensorSpec = tuple[tuple[int, ...], torch.dtype | None]
"""Shape and dtype of a stored tensor; dtype None stands for the value dtype."""

UNSTRUCTURED, TWO_OF_FOUR = "unstructured", "2:4"
PATTERNS = (UNSTRUCTURED, TWO_OF_FOUR)
"""Where the non-zeros of a core may stand: anywhere, or see lestd_kernels.search.two_of_four."""

_UINT16_COLUMNS = 65_536


@dataclass(frozen=True)
class Codec:
    """One way to store a core.

    Attributes:
        name: how configuration and manifest call it.
        encode: ``(matrix (rows, columns)) -> {tensor name: 1-D tensor}``; element order is row
            major, and a stored value is never dropped unless it is zero.
        decode: ``(tensors, rows, columns) -> matrix``, in the dtype and on the device of
            ``tensors["values"]``.
        tensor_specs: ``(rows, columns, nnz) -> {tensor name: (shape, dtype)}``, without data.
    """

    name: str
    encode: Callable[[Tensor], dict[str, Tensor]]
    decode: Callable[[Mapping[str, Tensor], int, int], Tensor]
    tensor_specs: Callable[[int, int, int], dict[str, TensorSpec]]

    def stored_bytes(
        self, rows: int, columns: int, nnz: int, value_bytes: int, value_bits: int = FULL_BITS
    ) -> int:
        """Bytes of data that a core with `nnz` non-zeros takes, indices and scales included."""
        total = 0
        for shape, dtype in self.tensor_specs(rows, columns, nnz).values():
            if dtype is None:
                total += values_bytes(shape[0], value_bits, value_bytes)
            else:
                total += shape[0] * dtype.itemsize
        return total


def _encode_dense(matrix: Tensor) -> dict[str, Tensor]:
    return {"values": matrix.reshape(-1).contiguous()}


def _decode_dense(tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
    return tensors["values"].reshape(rows, columns)


def _specs_dense(rows: int, columns: int, nnz: int) -> dict[str, TensorSpec]:
    return {"values": ((rows * columns,), None)}


_GATHER_ELEMENTS = 1 << 16


def _encode_bitmask(matrix: Tensor) -> dict[str, Tensor]:
    flat = matrix.reshape(-1)
    flags = flat != 0
    mask = pack_bits(flags)
    values = flat.new_empty(count_bits(mask, flat.numel()))
    first = 0
    # In parts: the positions of the non-zeros take 8 bytes each.
    for part, chosen in zip(
        torch.split(flat, _GATHER_ELEMENTS), torch.split(flags, _GATHER_ELEMENTS), strict=True
    ):
        found = part[chosen]
        values[first : first + len(found)] = found
        first += len(found)
    return {"values": values, "mask": mask}


def _decode_bitmask(tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
    values = tensors["values"]
    flags = unpack_bits(tensors["mask"], rows * columns)
    matrix = torch.zeros(rows * columns, dtype=values.dtype, device=values.device)
    return matrix.masked_scatter(flags, values).reshape(rows, columns)


def _specs_bitmask(rows: int, columns: int, nnz: int) -> dict[str, TensorSpec]:
    return {"values": ((nnz,), None), "mask": (((rows * columns + 7) // 8,), torch.uint8)}


def _encode_csr(matrix: Tensor) -> dict[str, Tensor]:
    row, column = matrix.nonzero(as_tuple=True)
    return csr_tensors(matrix[row, column], row, column, *matrix.shape)


def csr_tensors(
    values: Tensor, row: Tensor, column: Tensor, rows: int, columns: int
) -> dict[str, Tensor]:
    """The tensors of a csr core with these values ``(nnz,)``, row major, at int64 positions."""
    row_pointers = torch.zeros(rows + 1, dtype=torch.int64, device=values.device)
    row_pointers[1:] = torch.bincount(row, minlength=rows).cumsum(0)
    index_dtype = torch.uint16 if columns <= _UINT16_COLUMNS else torch.int32
    return {
        "values": values,
        "columns": column.to(torch.int32).to(index_dtype),
        "row_pointers": row_pointers.to(torch.int32),
    }


def csr_rows(row_pointers: Tensor, nnz: int) -> Tensor:
    """Row of each value of a csr core, int64 ``(nnz,)``.

    Raises:
        RuntimeError: damaged pointers, which do not rise from 0 to `nnz` (on CPU).
    """
    # Without the clamp, rows before a falling pointer are written beyond the result. With it their
    # sum is too large, which PyTorch checks before it writes.
    counts = row_pointers.to(torch.int64).diff().clamp(min=0)
    return torch.repeat_interleave(counts, output_size=nnz)


def _decode_csr(tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
    values = tensors["values"]
    row = csr_rows(tensors["row_pointers"], values.numel())
    matrix = torch.zeros(rows * columns, dtype=values.dtype, device=values.device)
    position = row * columns + tensors["columns"].to(torch.int64)
    return matrix.scatter(0, position, values).reshape(rows, columns)


def _specs_csr(rows: int, columns: int, nnz: int) -> dict[str, TensorSpec]:
    index_dtype = torch.uint16 if columns <= _UINT16_COLUMNS else torch.int32
    return {
        "values": ((nnz,), None),
        "columns": ((nnz,), index_dtype),
        "row_pointers": ((rows + 1,), torch.int32),
    }


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("dense", _encode_dense, _decode_dense, _specs_dense),
        Codec("bitmask", _encode_bitmask, _decode_bitmask, _specs_bitmask),
        Codec("csr", _encode_csr, _decode_csr, _specs_csr),
    )
}


def cheapest_codec(
    rows: int, columns: int, nnz: int, value_bytes: int, value_bits: int = FULL_BITS
) -> Codec:
    """The codec with the fewest bytes for this core; on a tie the first in `CODECS`."""

    def stored(codec: Codec) -> int:
        return codec.stored_bytes(rows, columns, nnz, value_bytes, value_bits)

    return min(CODECS.values(), key=stored)
