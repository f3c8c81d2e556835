"""Whole numbers in memory: packed in as few bits as most of them need, the others beside them.

A coded matrix (see lestd_kernels.storage.rans) is decoded once, when it is loaded, and from then on
is two matrices that every backend multiplies: one of numbers in 2, 3, 4 or 8 bits, ``dense`` or
with a ``bitmask``, and where some do not fit in these a second one of them, ``csr``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lestd_kernels.storage.bitmasks import pack_bits
from lestd_kernels.storage.codecs import CODECS, csr_tensors
from lestd_kernels.storage.few_bits import QUANTIZED_BITS, code_bytes, pack_codes, unpack_codes

_CODECS = ("dense", "bitmask")
_REST_VALUE_BYTES = 2


class Packer(NamedTuple):
    """What packing looks at all numbers for.

    Attributes:
        counts: flat int16 and some numbers of bits -> how many are not zero, and for each how many
            do not fit in so many bits.
        pack: flat int16, the bits and whether zeros are left out -> codes, a mask (empty where
            there is none), how many codes there are, and int64 where numbers do not fit: they are
            zeros among the codes.
    """

    counts: Callable[[Tensor, Sequence[int]], list[int]]
    pack: Callable[[Tensor, int, bool], tuple[Tensor, Tensor, int, Tensor]]


def _reach(flat: Tensor) -> Tensor:
    """Which bits hold a number: those whose 2^(bits - 1) is above this."""
    return torch.maximum(flat, ~flat)


def _counts(flat: Tensor, bits: Sequence[int]) -> list[int]:
    widest = 2 ** (max(bits) - 1)
    counts = torch.bincount(_reach(flat).clamp_(max=widest), minlength=widest + 1)
    above = counts.flip(0).cumsum(0).flip(0).tolist()
    return [int(flat.count_nonzero()), *(above[2 ** (one - 1)] for one in bits)]


def _pack(flat: Tensor, bits: int, masked: bool) -> tuple[Tensor, Tensor, int, Tensor]:
    outside = _reach(flat) >= 2 ** (bits - 1)
    inside = flat.masked_fill(outside, 0)
    codes = (inside + 2 ** (bits - 1)).to(torch.uint8)
    mask = torch.empty(0, dtype=torch.uint8)
    if masked:
        there = inside != 0
        # Ten times as fast as PyTorch takes elements by a mask.
        codes = torch.from_numpy(np.compress(there.numpy(), codes.numpy()))
        mask = pack_bits(there)
    return pack_codes(codes, bits), mask, len(codes), outside.nonzero().view(-1)


PLAIN = Packer(_counts, _pack)
"""By PyTorch and numpy, which is the specification."""


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
    def pack(cls, Z: Tensor, packer: Packer | None = None) -> PackedIntegers:
        """Pack ``Z (rows, columns)``, int16, in the fewest bytes; the tensors are where Z is.

        Args:
            Z: the matrix.
            packer: does what is slow here, with the same result.
        """
        rows, columns = Z.shape
        packer = packer or PLAIN
        flat = Z.cpu().contiguous().view(-1)
        _, bits, codec = _fewest_bytes(flat, rows, columns, packer)
        codes, mask, count, outside = packer.pack(flat, bits, codec == "bitmask")
        tensors = {"codes": codes}
        if codec == "bitmask":
            tensors["mask"] = mask
        if len(outside):
            row = outside.div(columns, rounding_mode="floor")
            rest = csr_tensors(flat[outside], row, outside - row * columns, rows, columns)
            tensors |= {f"rest_{name}": tensor for name, tensor in rest.items()}
        tensors = {name: tensor.to(Z.device) for name, tensor in tensors.items()}
        return cls(codec, bits, rows, columns, count, tensors)

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
    rows, columns = Z.shape
    return _fewest_bytes(Z.cpu().contiguous().view(-1), rows, columns, PLAIN)[0]


def least_packed_bytes(rows: int, columns: int) -> int:
    """Bytes of a matrix of zeros, which no other takes fewer than."""
    return min(_packed_bytes(rows, columns, 0, 0, min(QUANTIZED_BITS), codec) for codec in _CODECS)


def _fewest_bytes(flat: Tensor, rows: int, columns: int, packer: Packer) -> tuple[int, int, str]:
    """Bytes, bits and codec of the smallest form; of equal ones the more bits, and no mask."""
    nonzero, *others = packer.counts(flat, QUANTIZED_BITS)
    forms = [
        (_packed_bytes(rows, columns, nonzero, outside, bits, codec), bits, codec)
        for bits, outside in zip(QUANTIZED_BITS, others, strict=True)
        for codec in _CODECS
    ]
    return min(forms, key=lambda form: form[0])


def _packed_bytes(rows: int, columns: int, nonzero: int, others: int, bits: int, codec: str) -> int:
    count = rows * columns if codec == "dense" else nonzero - others
    size = code_bytes(count, bits) + (0 if codec == "dense" else (rows * columns + 7) // 8)
    if others:
        size += CODECS["csr"].stored_bytes(rows, columns, others, _REST_VALUE_BYTES)
    return size
