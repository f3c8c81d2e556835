"""Tables of frequencies for lestd_kernels.storage.rans, and which element has which.

Rows and columns have levels in half octaves of their mean magnitude, 0 to 15. The sum of both says
how large an element is to be expected; sums that follow each other share a table where that takes
fewer bytes, tables included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

ESCAPE = -(1 << 15)
"""Stands for a number that its table does not hold."""

_LEVELS = 16
_ESCAPE_BITS = 16
_MOST_SYMBOLS = 4096
_Integers = npt.NDArray[np.int64]


class Table(NamedTuple):
    """How often numbers are.

    Attributes:
        least: the smallest number that it holds.
        counts: of `least`, of the number after it, ..., and last of the escape.
    """

    least: int
    counts: _Integers

    @property
    def commonest(self) -> int:
        """Place of the symbol of largest count."""
        return int(self.counts.argmax())

    @property
    def is_certain(self) -> bool:
        """Whether it has one symbol, which then takes no bits."""
        return int(np.count_nonzero(self.counts)) == 1

    def normalized(self, precision: int) -> Table:
        """With counts that add up to 2^precision, at least 1 for every symbol that there is."""
        total, whole = int(self.counts.sum()), 1 << precision
        scaled = np.maximum((self.counts * whole + total // 2) // total, self.counts > 0)
        # What rounding left over goes to the largest, where it changes least.
        for place in np.argsort(-scaled, kind="stable"):
            change = max(whole - int(scaled.sum()), 1 - int(scaled[place]))
            scaled[place] += change
            if scaled.sum() == whole:
                break
        return Table(self.least, scaled)

    def packed(self) -> bytes:
        """As it is stored."""
        zigzag = 2 * self.least if self.least >= 0 else -2 * self.least - 1
        numbers = [zigzag, len(self.counts) - 1, *self.counts.tolist()]
        return b"".join(map(_varint, numbers))

    def of_slots(self) -> tuple[npt.NDArray[np.int16], _Integers, _Integers]:
        """By slot: its number or `ESCAPE`, that one's frequency, and the slot less the first."""
        numbers = np.append(np.arange(self.least, self.least + len(self.counts) - 1), ESCAPE)
        first = np.cumsum(self.counts) - self.counts
        slots = np.arange(int(self.counts.sum()))
        return (
            np.repeat(numbers, self.counts).astype(np.int16),
            np.repeat(self.counts, self.counts),
            slots - np.repeat(first, self.counts),
        )


def parse_table(varint: Callable[[], int], precision: int) -> Table:
    """Invert `Table.packed`.

    Raises:
        ValueError: it is none whose frequencies add up.
    """
    zigzag, size = varint(), varint()
    least = zigzag >> 1 if zigzag % 2 == 0 else -(zigzag >> 1) - 1
    if size > 1 << precision or least <= ESCAPE or least + size > 1 << 15:
        raise ValueError(f"a table of the coded numbers has {size} of them from {least}")
    counts = np.array([varint() for _ in range(size + 1)], np.int64)
    if counts.sum() != 1 << precision:
        raise ValueError(f"the frequencies of coded numbers add up to {counts.sum()}")
    return Table(least, counts)


def _varint(number: int) -> bytes:
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


class Classes(NamedTuple):
    """Which table an element has.

    Attributes:
        rows: level of each row, uint8.
        columns: of each column.
        first_sums: the smallest sum of levels of each class but the first, ascending.
    """

    rows: npt.NDArray[np.uint8]
    columns: npt.NDArray[np.uint8]
    first_sums: Sequence[int]

    def of_sums(self) -> npt.NDArray[np.uint8]:
        """The class of each sum of two levels ``(31,)``."""
        sums = np.arange(2 * _LEVELS - 1)
        found = np.searchsorted(np.array(self.first_sums, np.int64), sums, side="right")
        return found.astype(np.uint8)

    def of_elements(self) -> npt.NDArray[np.uint8]:
        """The class of each element ``(rows, columns)``."""
        found: npt.NDArray[np.uint8] = self.of_sums()[self.rows[:, None] + self.columns[None]]
        return found


def _levels(magnitudes: _Integers, count: int) -> npt.NDArray[np.uint8]:
    """Levels of rows or columns whose magnitudes add up to these, over so many elements."""
    if not magnitudes.size:
        return np.zeros(0, np.uint8)
    # No logarithm, whose last bit machines disagree about.
    bounds = np.array([2.0 ** (k // 2) * (1.5 if k % 2 else 1.0) for k in range(1, _LEVELS)])
    means = (magnitudes + 1) / count
    relative = means * (bounds[-1] / means.max())
    levels: npt.NDArray[np.uint8] = np.searchsorted(bounds, relative, side="right").astype(np.uint8)
    return levels


def choose_classes(Z: _Integers) -> tuple[Classes, list[Table]]:
    """Levels, classes and the counts of each, for the fewest bytes.

    Args:
        Z: ``(rows, columns)``, numbers within int16.

    Returns:
        The classes, and a table of counts for each; one class where more do not pay.
    """
    rows, columns = Z.shape
    if not Z.size:
        return Classes(np.zeros(rows, np.uint8), np.zeros(columns, np.uint8), ()), []
    magnitudes = np.abs(Z)
    classes = Classes(
        _levels(magnitudes.sum(axis=1), columns), _levels(magnitudes.sum(axis=0), rows), ()
    )
    least, most = int(Z.min()), int(Z.max())
    width = most - least + 1
    sums = classes.rows[:, None].astype(np.int64) + classes.columns[None]
    counts = np.bincount((sums * width + (Z - least)).reshape(-1), minlength=31 * width)
    counts = counts.reshape(-1, width)
    present = np.flatnonzero(counts.sum(axis=1))
    counts = counts[present]
    whole = _table(least, counts.sum(axis=0))
    first, cost = _best_partition(counts)
    levels_bits = 8 * (-(-rows // 2) - (-columns // 2) + len(first))
    if cost + levels_bits >= _cost(counts.sum(axis=0)):
        return Classes(np.zeros(rows, np.uint8), np.zeros(columns, np.uint8), ()), [whole]
    bounds = [*first, len(present)]
    tables = [
        _table(least, counts[a:b].sum(axis=0)) for a, b in zip(first, bounds[1:], strict=True)
    ]
    return classes._replace(first_sums=[int(present[a]) for a in first[1:]]), tables


def _cost(counts: _Integers) -> float:
    """Bits of numbers with one table, and of the table, about."""
    found = counts[counts > 0]
    width = np.flatnonzero(counts)
    table = 24 + 12 * min(int(width[-1] - width[0]) + 1, 2 * len(found)) if len(found) else 0
    total = found.sum()
    return float(total * np.log2(max(total, 1)) - (found * np.log2(found)).sum()) + table


def _best_partition(counts: _Integers) -> tuple[list[int], float]:
    """Where classes of consecutive sums begin, for the fewest bits; and these."""
    n = len(counts)
    upto = np.concatenate([np.zeros((1, counts.shape[1]), np.int64), counts.cumsum(axis=0)])
    best, begin = [0.0], [0]
    for stop in range(1, n + 1):
        costs = [best[start] + _cost(upto[stop] - upto[start]) for start in range(stop)]
        begin.append(int(np.argmin(costs)))
        best.append(costs[begin[-1]])
    first, stop = [], n
    while stop:
        stop = begin[stop]
        first.append(stop)
    return first[::-1], best[-1]


def _table(least: int, counts: _Integers) -> Table:
    """Counts without the ends that are cheaper as escapes than the gaps before them are to note."""
    places = np.flatnonzero(counts)
    first, last, escaped = 0, len(places) - 1, 0
    while last > first:
        gaps = places[first + 1] - places[first], places[last] - places[last - 1]
        wide = places[last] - places[first] >= _MOST_SYMBOLS
        lower = wide or gaps[0] * 8 > counts[places[first]] * _ESCAPE_BITS
        upper = wide or gaps[1] * 8 > counts[places[last]] * _ESCAPE_BITS
        if not lower and not upper:
            break
        # Of both the end that lies farther out.
        if lower and (not upper or gaps[0] >= gaps[1]):
            escaped += int(counts[places[first]])
            first += 1
        else:
            escaped += int(counts[places[last]])
            last -= 1
    low, high = int(places[first]), int(places[last])
    return Table(least + low, np.append(counts[low : high + 1], escaped))


def pack_levels(levels: npt.NDArray[np.uint8]) -> bytes:
    """Levels, two in a byte, the first in the lower half."""
    padded = np.append(levels, np.zeros(len(levels) % 2, np.uint8))
    return (padded[::2] | padded[1::2] << 4).astype(np.uint8).tobytes()


def unpack_levels(packed: bytes, count: int) -> npt.NDArray[np.uint8]:
    """Invert `pack_levels`: the first `count`."""
    both = np.frombuffer(packed, np.uint8)
    found: npt.NDArray[np.uint8] = np.stack([both & 15, both >> 4], axis=1).reshape(-1)[:count]
    return found
