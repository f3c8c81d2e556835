"""Whole numbers in memory: packed in as few bits as most of them need, the others beside them.

A coded matrix (see lestd_kernels.storage.rans) is decoded once, when it is loaded, and from then on
is two matrices that every backend multiplies: one of numbers in 2, 3, 4 or 8 bits, ``dense`` or
with a ``bitmask``, and where some do not fit in these a second one of them, ``csr``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lestd_kernels.storage.bitmasks import pack_bits
from lestd_kernels.storage.codecs import CODECS, csr_tensors
from lestd_kernels.storage.few_bits import QUANTIZED_BITS, code_bytes, pack_codes, unpack_codes

_CODECS = ("dense", "bitmask")
_REST_VALUE_BYTES = 2


@dataclass(frozen=True)
class PackedIntegers:
    """A matrix of whole numbers ``(rows, columns)``.

    Attributes:
        codec: of the numbers in few bits.
        bits: of each of them; it is stored as what it is above -2^(bits - 1), see `few_bits`.
        rows: of the matrix.
        columns: of the matrix.
        count: of numbers in few bits.
        tensors: ``codes``, with a bitmask ``mask``; where there are others ``rest_values`` int16,
            ``rest_columns``, ``rest_row_pointers``.
    """

    codec: str
    bits: int
    rows: int
    columns: int
    count: int
    tensors: Mapping[str, Tensor]

    @classmethod
    def pack(cls, Z: Tensor) -> PackedIntegers:
        """Pack ``Z (rows, columns)``, int16, in the fewest bytes; the tensors are where Z is."""
        rows, columns = Z.shape
        flat = Z.cpu().contiguous().view(-1)
        _, bits, codec = _fewest_bytes(flat, rows, columns)
        outside = _reach(flat) >= 2 ** (bits - 1)
        inside = flat.masked_fill(outside, 0)
        mask = inside != 0
        codes = (inside + 2 ** (bits - 1)).to(torch.uint8)
        if codec == "bitmask":
            # Ten times as fast as PyTorch takes elements by a mask.
            codes = torch.from_numpy(np.compress(mask.numpy(), codes.numpy()))
        tensors = {"codes": pack_codes(codes, bits)}
        if codec == "bitmask":
            tensors["mask"] = pack_bits(mask)
        at = outside.nonzero().view(-1)
        if len(at):
            row = at.div(columns, rounding_mode="floor")
            rest = csr_tensors(flat[at], row, at - row * columns, rows, columns)
            tensors |= {f"rest_{name}": tensor for name, tensor in rest.items()}
        tensors = {name: tensor.to(Z.device) for name, tensor in tensors.items()}
        return cls(codec, bits, rows, columns, len(codes), tensors)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def parts(self, dtype: torch.dtype) -> list[tuple[str, dict[str, Tensor]]]:
        """Codec and tensors of the matrices, with values in a dtype, whose sum is the matrix."""
        codes = unpack_codes(self.tensors["codes"], self.count, self.bits)
        main = {"values": codes.to(dtype) - 2 ** (self.bits - 1)}
        if self.codec == "bitmask":
            main["mask"] = self.tensors["mask"]
        found = [(self.codec, main)]
        if "rest_values" in self.tensors:
            rest = {name: self.tensors[f"rest_{name}"] for name in ("columns", "row_pointers")}
            found.append(("csr", {"values": self.tensors["rest_values"].to(dtype)} | rest))
        return found

    def integers(self) -> Tensor:
        """Z ``(rows, columns)``, int16."""
        total = torch.zeros(
            self.rows, self.columns, dtype=torch.int16, device=self.tensors["codes"].device
        )
        for codec, tensors in self.parts(torch.int16):
            total += CODECS[codec].decode(tensors, self.rows, self.columns)
        return total


def packed_bytes(Z: Tensor) -> int:
    """Bytes of ``Z (rows, columns)``, int16, once it is packed, without packing it."""
    return _fewest_bytes(Z.cpu().contiguous().view(-1), *Z.shape)[0]


def least_packed_bytes(rows: int, columns: int) -> int:
    """Bytes of a matrix of zeros, which no other takes fewer than."""
    return min(_packed_bytes(rows, columns, 0, 0, min(QUANTIZED_BITS), codec) for codec in _CODECS)


def _reach(flat: Tensor) -> Tensor:
    """Which bits hold a number: those whose 2^(bits - 1) is above this."""
    return torch.maximum(flat, ~flat)


def _fewest_bytes(flat: Tensor, rows: int, columns: int) -> tuple[int, int, str]:
    """Bytes, bits and codec of the smallest form; of equal ones the more bits, and no mask."""
    widest = 2 ** (max(QUANTIZED_BITS) - 1)
    counts = torch.bincount(_reach(flat).clamp_(max=widest), minlength=widest + 1)
    above = counts.flip(0).cumsum(0).flip(0).tolist()
    nonzero = int(flat.count_nonzero())
    forms = [
        (_packed_bytes(rows, columns, nonzero, above[2 ** (bits - 1)], bits, codec), bits, codec)
        for bits in QUANTIZED_BITS
        for codec in _CODECS
    ]
    return min(forms, key=lambda form: form[0])


def _packed_bytes(rows: int, columns: int, nonzero: int, others: int, bits: int, codec: str) -> int:
    count = rows * columns if codec == "dense" else nonzero - others
    size = code_bytes(count, bits) + (0 if codec == "dense" else (rows * columns + 7) // 8)
    if others:
        size += CODECS["csr"].stored_bytes(rows, columns, others, _REST_VALUE_BYTES)
    return size
