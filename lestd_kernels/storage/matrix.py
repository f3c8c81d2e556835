"""A matrix as it is stored: where its values stand (codec), and in how many bits (packing).

Names on disk, below the path of what holds it: ``weight`` (1-D: the values, or with few-bit values
their scales), ``codes`` (few-bit values), and ``mask`` and so on as the codec says.

A coded matrix, whose codec is ``rans``, is ``diag(r) Z diag(c)`` with whole numbers Z: its values
are r and then c, and ``stream`` has Z, see lestd_kernels.storage.rans. How many bytes that takes
its numbers decide, so that its description states them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lestd_kernels.options import MEMORY, Size
from lestd_kernels.storage import rans
from lestd_kernels.storage.bitmasks import count_bits, count_nonzeros
from lestd_kernels.storage.codecs import CODECS, UNSTRUCTURED, TensorSpec, cheapest_codec, csr_rows
from lestd_kernels.storage.few_bits import (
    FULL_BITS,
    code_bytes,
    dequantize,
    grid_has_zero,
    quantize,
    scale_count,
    unsaid_has_zero,
)
from lestd_kernels.storage.packed_integers import PackedIntegers

RANS = "rans"
"""Codec of a coded matrix. It is not among `CODECS`, whose sizes follow from shapes and counts."""


@dataclass(frozen=True)
class EncodedCore:
    """A matrix (rows x columns) as it is stored: a core, a factor, or a whole weight.

    ``tensors`` has the codec's tensor names; ``tensors["values"]`` has the value dtype. With
    `value_bits` below 16 there are ``tensors["codes"]`` (uint8) and ``tensors["scales"]`` (value
    dtype) in its place, see lestd_kernels.storage.few_bits, and ``exponent`` is that of the power
    of two by which the scales are divided. ``with_zero`` is set where values are on the grid that
    has a zero and `few_bits.unsaid_has_zero` does not say so. ``pattern`` says where non-zeros may
    stand (`codecs.PATTERNS`); every codec stores every one. ``memory_bytes`` is what the matrix
    takes when it is loaded: a coded one more than on disk, see
    lestd_kernels.storage.packed_integers. ``known`` are the numbers of a coded matrix, where they
    are at hand because it was just coded: decoding takes as long as coding.
    """

    codec: str
    rows: int
    columns: int
    nnz: int
    tensors: Mapping[str, Tensor]
    pattern: str = UNSTRUCTURED
    value_bits: int = FULL_BITS
    exponent: int = 0
    packed_bytes: int = 0
    with_zero: bool = False
    known: Tensor | None = field(default=None, repr=False, compare=False)

    @classmethod
    def coded(
        cls,
        matrices: Sequence[tuple[Tensor, Tensor]],
        value_bits: int,
        value_dtype: torch.dtype,
    ) -> list[EncodedCore]:
        """Store ``diag(r) Z diag(c)``, and Z by its entropy; several side by side.

        Args:
            matrices: of each Z ``(rows, columns)``, whole numbers below 2^15 in magnitude, any
                dtype, and its scales ``(rows + columns,)``, r and then c.
            value_bits: of a scale: 16 for the value dtype itself, or 8.
            value_dtype: of the scales, or of theirs.
        """
        numbers = [Z.to(torch.int16).cpu() for Z, _ in matrices]
        streams = rans.encode([Z.numpy() for Z in numbers])
        found = []
        for (_, scales), Z, stream in zip(matrices, numbers, streams, strict=True):
            own = cls.quantized(
                scales[None], value_bits, value_dtype, codec="dense", with_zero=False
            )
            found.append(
                cls(
                    RANS,
                    len(Z),
                    Z.shape[1],
                    int(Z.count_nonzero()),
                    dict(own.tensors) | {"stream": torch.from_numpy(stream).to(scales.device)},
                    value_bits=value_bits,
                    exponent=own.exponent,
                    packed_bytes=PackedIntegers.pack(Z).packed_bytes,
                    known=Z.to(scales.device),
                )
            )
        return found

    @classmethod
    def encode(cls, matrix: Tensor, pattern: str = UNSTRUCTURED) -> EncodedCore:
        """Store `matrix`, already in its value dtype, in the codec with the fewest bytes."""
        rows, columns = matrix.shape
        nnz = count_nonzeros(matrix)
        codec = cheapest_codec(rows, columns, nnz, matrix.element_size())
        return cls(codec.name, rows, columns, nnz, codec.encode(matrix), pattern)

    @classmethod
    def quantized(
        cls,
        matrix: Tensor,
        value_bits: int,
        value_dtype: torch.dtype,
        scales: Tensor | None = None,
        codec: str | None = None,
        mask: Tensor | None = None,
        with_zero: bool | None = None,
    ) -> EncodedCore:
        """Store the non-zeros of `matrix` in few bits, or rounded to the value dtype.

        Args:
            matrix: ``(rows, columns)``, any floating dtype.
            value_bits: 16 for the value dtype itself, or 8, 4, 3, 2.
            value_dtype: of values or scales.
            scales: one per group of the stored values, in their order, where they are chosen
                already.
            codec: default: the one with the fewest bytes. A dense codec stores zeros, too.
            mask: bool ``(rows, columns)``, which elements a sparse codec stores; default: those
                that are not zero.
            with_zero: whether to round to the grid that has a zero, and to say so in any bits;
                default: as `few_bits.grid_has_zero` has it.
        """
        if value_bits == FULL_BITS:
            matrix = matrix.to(value_dtype)
        mask = matrix != 0 if mask is None else mask
        rows, columns = matrix.shape
        nnz, exponent, said = int(mask.sum()), 0, False
        best = cheapest_codec(rows, columns, nnz, value_dtype.itemsize, value_bits)
        chosen = CODECS[codec or best.name]
        tensors = dict(chosen.encode(mask.to(torch.uint8)))
        tensors["values"] = matrix.reshape(-1) if chosen.name == "dense" else matrix[mask]
        if value_bits != FULL_BITS:
            dense = chosen.name == "dense"
            has_zero = grid_has_zero(dense, value_bits) if with_zero is None else with_zero
            said = with_zero or (has_zero and not unsaid_has_zero(dense, value_bits))
            codes, stored, exponent = quantize(
                tensors.pop("values"), value_bits, value_dtype, scales, has_zero
            )
            tensors = {"scales": stored, "codes": codes} | tensors
        return cls(
            chosen.name,
            rows,
            columns,
            nnz,
            tensors,
            value_bits=value_bits,
            exponent=exponent,
            with_zero=said,
        )

    @property
    def value_dtype(self) -> torch.dtype:
        """Dtype of the values or of the scales."""
        return self.tensors["values" if self.value_bits == FULL_BITS else "scales"].dtype

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.tensors.values())).device

    def unpacked(self) -> EncodedCore:
        """The same matrix with its values in the value dtype."""
        if self.value_bits == FULL_BITS:
            return self
        tensors = dict(self.tensors)
        codes, scales = tensors.pop("codes"), tensors.pop("scales")
        count = self._value_count()
        has_zero = self.with_zero or unsaid_has_zero(self.codec == "dense", self.value_bits)
        values = dequantize(codes, scales, count, self.value_bits, has_zero, self.exponent)
        return replace(self, tensors={"values": values} | tensors, value_bits=FULL_BITS, exponent=0)

    def _value_count(self) -> int:
        if self.codec == RANS:
            return self.rows + self.columns
        return self.rows * self.columns if self.codec == "dense" else self.nnz

    def scales(self) -> tuple[Tensor, Tensor]:
        """Of a coded matrix r ``(rows,)`` and c ``(columns,)``, in the value dtype."""
        r, c = torch.split(self.unpacked().tensors["values"], [self.rows, self.columns])
        return r, c

    def integers(self) -> Tensor:
        """Of a coded matrix Z ``(rows, columns)``, int16.

        Raises:
            ValueError: the stream is damaged.
        """
        if self.known is not None:
            return self.known
        stream = self.tensors["stream"]
        [Z] = rans.decode([(stream.cpu().numpy(), self.rows, self.columns)])
        return torch.from_numpy(Z).to(stream.device)

    def decode(self) -> Tensor:
        """The matrix (rows x columns), dense, in the value dtype."""
        if self.codec == RANS:
            r, c = self.scales()
            return (r.float()[:, None] * self.integers() * c.float()).to(r.dtype)
        return CODECS[self.codec].decode(self.unpacked().tensors, self.rows, self.columns)

    def check(self) -> None:
        """Compare the index tensors with each other and with the number of values.

        Decoding would notice an index that leads too far, but not every one that leads elsewhere;
        and what order or repetition of column indices mean, each backend would decide for itself.

        Raises:
            ValueError: they disagree, or a scale is not finite: the tensors are damaged.
        """
        if self.value_bits != FULL_BITS and not bool(self.tensors["scales"].isfinite().all()):
            raise ValueError("a scale is not finite")
        coded = "stream" in self.tensors
        if coded and (found := int(self.integers().count_nonzero())) != self.nnz:
            raise ValueError(f"{found} coded numbers are not zero, expected {self.nnz}")
        if self.codec == "bitmask":
            marked = count_bits(self.tensors["mask"], self.rows * self.columns)
            if marked != self.nnz:
                raise ValueError(f"the mask marks {marked} elements, expected {self.nnz}")
        if self.codec == "csr":
            ends = self.tensors["row_pointers"].to(torch.int64)
            columns = self.tensors["columns"].to(torch.int64)
            rises = (
                int(ends[0]) == 0 and int(ends[-1]) == self.nnz and bool((ends.diff() >= 0).all())
            )
            if not rises:
                raise ValueError(f"the row pointers do not rise from 0 to {self.nnz}")
            if bool(((columns < 0) | (columns >= self.columns)).any()):
                raise ValueError(f"a column index is outside of the core's {self.columns} columns")
            positions = csr_rows(ends, self.nnz).mul_(self.columns).add_(columns)
            before = positions.roll(1)
            before[:1] = -1
            if not bool((positions > before).all()):
                raise ValueError("the column indices of a row do not rise")

    @property
    def stored_bytes(self) -> int:
        """Bytes of the matrix' tensors, indices and scales included."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def memory_bytes(self) -> int:
        """Bytes of the matrix once it is loaded."""
        if self.codec != RANS:
            return self.stored_bytes
        return self.stored_bytes - self.tensors["stream"].numel() + self.packed_bytes

    def named_tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under their names on disk."""
        return {f"{prefix}.{disk_name(name)}": tensor for name, tensor in self.tensors.items()}

    def describe(self) -> dict[str, Any]:
        """Description that a loader needs before it sees the tensors, beside rows and columns."""
        entry: dict[str, Any] = {"codec": self.codec, "nnz": self.nnz}
        if self.pattern != UNSTRUCTURED:
            entry["pattern"] = self.pattern
        if self.value_bits != FULL_BITS:
            entry["value_bits"] = self.value_bits
        if self.exponent:
            entry["exponent"] = self.exponent
        if self.with_zero:
            entry["with_zero"] = True
        if self.codec == RANS:
            entry["bytes"], entry["packed_bytes"] = (
                self.tensors["stream"].numel(),
                self.packed_bytes,
            )
        return entry


class HasBytes(Protocol):
    """A matrix, or several."""

    @property
    def stored_bytes(self) -> int:
        """Bytes on disk."""

    @property
    def memory_bytes(self) -> int:
        """Bytes once it is loaded."""


def counted_bytes(one: HasBytes, size: Size) -> int:
    """Which of its bytes a budget counts: in memory not fewer than on disk."""
    return max(one.stored_bytes, one.memory_bytes) if size == MEMORY else one.stored_bytes


def packed_specs(
    codec: str,
    rows: int,
    columns: int,
    nnz: int,
    value_bits: int = FULL_BITS,
    stream_bytes: int = 0,
) -> dict[str, TensorSpec]:
    """Name, shape and dtype of each tensor of an `EncodedCore`, without data.

    Raises:
        KeyError: there is no such codec.
    """
    specs: dict[str, TensorSpec]
    if codec == RANS:
        specs = {"values": ((rows + columns,), None), "stream": ((stream_bytes,), torch.uint8)}
    else:
        specs = dict(CODECS[codec].tensor_specs(rows, columns, nnz))
    if value_bits != FULL_BITS:
        (count,), _ = specs.pop("values")
        packed: dict[str, TensorSpec] = {
            "scales": ((scale_count(count),), None),
            "codes": ((code_bytes(count, value_bits),), torch.uint8),
        }
        specs = packed | specs
    return specs


def core_specs(
    path: str, entry: Mapping[str, Any], rows: int, columns: int
) -> dict[str, TensorSpec]:
    """`packed_specs` by names on disk, from what `EncodedCore.describe` wrote."""
    bits = entry.get("value_bits", FULL_BITS)
    size = entry.get("bytes", 0)
    specs = packed_specs(entry["codec"], rows, columns, entry["nnz"], bits, size)
    return {f"{path}.{disk_name(name)}": spec for name, spec in specs.items()}


def stored_core(
    path: str, entry: Mapping[str, Any], rows: int, columns: int, tensors: Mapping[str, Tensor]
) -> EncodedCore:
    """The matrix at `path`, from what `EncodedCore.describe` and `named_tensors` wrote."""
    bits = entry.get("value_bits", FULL_BITS)
    codec, nnz = entry["codec"], entry["nnz"]
    names = packed_specs(codec, rows, columns, nnz, bits)
    parts = {name: tensors[f"{path}.{disk_name(name)}"] for name in names}
    pattern, exponent = entry.get("pattern", UNSTRUCTURED), entry.get("exponent", 0)
    packed_bytes, with_zero = entry.get("packed_bytes", 0), entry.get("with_zero", False)
    return EncodedCore(
        codec, rows, columns, nnz, parts, pattern, bits, exponent, packed_bytes, with_zero
    )


def disk_name(name: str) -> str:
    """Name of a tensor of a packed matrix below its module."""
    if name == "stream":
        return "numbers.stream"
    return "weight" if name in ("values", "scales") else name
