"""The stream that a matrix of whole numbers is coded in, taken apart.

The stream, little-endian:

    precision, classes, reserved   uint8, uint8, uint16   frequencies add up to 2^precision
    lanes, escapes                 uint32, uint32
    with several classes           row levels, then column levels, two in a byte, the first in the
                                   lower half; the classes' first sums, uint8 (classes - 1)
    a table for each class         varints: smallest symbol (zigzag), how many symbols, the
                                   frequency of each, that of the escape
    words of each lane             uint16 (lanes)
    states                         uint32 (lanes)
    words                          uint16, those of the first lane, of the second, ...
    escapes                        int16, row major: numbers that their table does not hold
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lestd_kernels.storage.frequency_tables import Classes, Table, parse_table, unpack_levels

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int16]

HEADER = struct.Struct("<BBHII")
PRECISIONS = (12, 15)
LOW = 1 << 16
"""The least state, in which every lane begins to be coded and ends to be decoded."""
LANE_ELEMENTS = 1 << 16
"""The most that a lane has."""


@dataclass(frozen=True)
class Parsed:
    """A stream, taken apart; see the module's docstring.

    Attributes:
        precision: frequencies add up to 2^precision.
        classes: levels of the rows and of the columns.
        tables: one for each class; none where there are no elements.
        counts: words of each lane.
        states: of each lane.
        words: those of the first lane, of the second, ...
        escaped: numbers that their table does not hold.
    """

    precision: int
    classes: Classes
    tables: Sequence[Table]
    counts: Integers
    states: npt.NDArray[np.uint32]
    words: npt.NDArray[np.uint16]
    escaped: Numbers

    @property
    def rows(self) -> int:
        """Of the matrix."""
        return len(self.classes.rows)

    @property
    def columns(self) -> int:
        """Of the matrix."""
        return len(self.classes.columns)

    @property
    def lanes(self) -> int:
        """How many there are."""
        return len(self.states)

    @property
    def steps(self) -> int:
        """Elements of each lane, of some one less."""
        return -(-self.rows * self.columns // self.lanes) if self.lanes else 0


Lanes = Callable[[Parsed], Numbers | None]
"""Decodes the lanes of one stream: numbers and escapes, flat; None where they do not end as they
should."""


class _Reader:
    """Takes what a stream holds, in turn."""

    def __init__(self, stream: Bytes) -> None:
        self._bytes, self.position = stream.tobytes(), 0

    def take(self, count: int) -> bytes:
        """The next bytes.

        Raises:
            ValueError: there are fewer.
        """
        if count > len(self._bytes) - self.position:
            raise ValueError("the coded numbers end too early")
        self.position += count
        return self._bytes[self.position - count : self.position]

    def array(self, dtype: str, count: int) -> npt.NDArray[np.generic]:
        """The next numbers; ValueError as `take`."""
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype)

    def varint(self) -> int:
        """The next number of up to 21 bits; ValueError as `take`."""
        value = 0
        for shift in (0, 7, 14):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a frequency of the coded numbers has no end")

    @property
    def left(self) -> int:
        """Bytes that are left."""
        return len(self._bytes) - self.position


def parse(stream: Bytes, rows: int, columns: int) -> Parsed:
    """Take a stream apart; its lanes are not looked at.

    Args:
        stream: of `rans.encode`.
        rows: of the matrix.
        columns: of the matrix.

    Raises:
        ValueError: it is none of such a matrix.
    """
    reader = _Reader(stream)
    precision, count, reserved, lanes, escapes = HEADER.unpack(reader.take(HEADER.size))
    elements = rows * columns
    if precision not in PRECISIONS or reserved or (count == 0) != (elements == 0):
        raise ValueError("the coded numbers begin with no header of theirs")
    if lanes > elements or lanes * LANE_ELEMENTS < elements or escapes > elements:
        raise ValueError(f"{elements} coded numbers cannot have {lanes} lanes, {escapes} escapes")
    classes = Classes(np.zeros(rows, np.uint8), np.zeros(columns, np.uint8), ())
    if count > 1:
        levels = [unpack_levels(reader.take(-(-size // 2)), size) for size in (rows, columns)]
        first_sums = tuple(reader.take(count - 1))
        if list(first_sums) != sorted(first_sums):
            raise ValueError("the classes of the coded numbers are not in order")
        classes = Classes(levels[0], levels[1], first_sums)
    tables = [parse_table(reader.varint, precision) for _ in range(count)]
    counts = reader.array("<u2", lanes).astype(np.int64)
    states = reader.array("<u4", lanes).astype(np.uint32)
    words = reader.array("<u2", int(counts.sum())).astype(np.uint16)
    escaped = reader.array("<i2", escapes).astype(np.int16)
    if reader.left:
        raise ValueError(f"the coded numbers have {reader.left} bytes too many")
    return Parsed(precision, classes, tables, counts, states, words, escaped)
