"""Entropy coding of whole numbers: rANS in lanes that are decoded side by side.

A matrix Z (rows, columns) of numbers within int16 becomes one stream of bytes. Every element
belongs to a class, and every class has a table of frequencies. Rows and columns whose numbers are
large have levels, 4 bits each; the class of an element follows from the sum of both, so that a
matrix whose parts differ in scale takes less than the entropy of its histogram.

Elements are dealt to the lanes in turn, element e to lane ``e mod lanes``; a lane has its own state
and its own words, so that one step decodes an element of every lane, by vector operations or on as
many cores. Missing elements of the last step are coded as the commonest of the first table.

How a stream is laid out stands in lestd_kernels.storage.rans_stream.

Reference: J. Duda, "Asymmetric numeral systems: entropy coding combining speed of Huffman coding
with compression rate of arithmetic coding", arXiv 1311.2540; F. Giesen, "Interleaved entropy
coders", arXiv 1402.3392, for lanes. A state is in [2^16, 2^32) and is refilled by words of 16 bits,
of which a step then needs one at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lestd_kernels.storage.frequency_tables import (
    ESCAPE,
    Classes,
    Table,
    choose_classes,
    pack_levels,
)
from lestd_kernels.storage.rans_stream import (
    HEADER,
    LANE_ELEMENTS,
    LOW,
    PRECISIONS,
    Bytes,
    Integers,
    Lanes,
    Numbers,
    Parsed,
    parse,
)

_FEW_SYMBOLS = 256
# A lane costs 6 bytes. Fewer elements in each are fewer steps.
_LANE_BITS = 8192
_BATCH_ELEMENTS = 1 << 24
MOST_ELEMENTS_PER_BYTE = 1 << 14
"""No stream holds more: every lane has bytes of its own."""


@dataclass(frozen=True)
class _Layout:
    """How a matrix is coded: all but its lanes."""

    precision: int
    classes: Classes
    tables: Sequence[Table]
    lanes: int
    steps: int
    code_bits: float

    @classmethod
    def of(cls, Z: Integers) -> _Layout:
        """That of the fewest bytes; ValueError where a number is beyond 2^15 - 1."""
        if Z.size and int(np.abs(Z).max()) >= 1 << 15:
            raise ValueError("a number to be coded is beyond 2^15 - 1")
        classes, counted = choose_classes(Z)
        widest = max((len(table.counts) for table in counted), default=0)
        precision = PRECISIONS[0] if widest <= _FEW_SYMBOLS else PRECISIONS[1]
        tables = [table.normalized(precision) for table in counted]
        bits = _code_bits(counted, tables)
        lanes = max(-(-Z.size // LANE_ELEMENTS), min(int(bits) // _LANE_BITS, Z.size))
        return cls(precision, classes, tables, lanes, -(-Z.size // max(lanes, 1)), bits)

    def head(self, escapes: int) -> bytes:
        """The stream up to the words of each lane."""
        parts = [HEADER.pack(self.precision, len(self.tables), 0, self.lanes, escapes)]
        if len(self.tables) > 1:
            parts += [pack_levels(self.classes.rows), pack_levels(self.classes.columns)]
            parts.append(bytes(self.classes.first_sums))
        return b"".join([*parts, *(table.packed() for table in self.tables)])


def encode(matrices: Sequence[npt.NDArray[np.integer[Any]]]) -> list[Bytes]:
    """Code matrices, their lanes side by side.

    Args:
        matrices: each ``(rows, columns)``.

    Returns:
        Their streams; the same for the same matrix, wherever and beside whatever it is coded.

    Raises:
        ValueError: a number is beyond 2^15 - 1, either way.
    """
    layouts = [_Layout.of(Z.astype(np.int64)) for Z in matrices]
    found: list[Bytes] = [np.empty(0, np.uint8)] * len(layouts)
    for batch in _batches(layouts):
        escapes, pushed = [], _Pushed([layouts[i] for i in batch])
        for place, i in enumerate(batch):
            of_element = layouts[i].classes.of_elements()
            Z = matrices[i].astype(np.int64)
            symbols, escaped = _symbol_indices(Z, of_element, layouts[i].tables)
            pushed.put(place, symbols, of_element.reshape(-1))
            escapes.append(escaped)
        for i, escaped, lanes in zip(batch, escapes, pushed.lanes(), strict=True):
            words, counts, states = lanes
            parts = [layouts[i].head(len(escaped)), counts.astype("<u2"), states.astype("<u4")]
            parts += [words.astype("<u2"), escaped.astype("<i2")]
            found[i] = np.frombuffer(b"".join(map(bytes, parts)), np.uint8).copy()
    return found


def coded_bytes(Z: Integers) -> int:
    """About as many bytes as `encode` makes, some times as fast."""
    layout = _Layout.of(Z)
    # A last state holds 8 bits of its lane's, as a rule.
    return len(layout.head(0)) + int(5 * layout.lanes + layout.code_bits / 8)


def least_coded_bytes(elements: int) -> int:
    """Bytes of a matrix of so many zeros, which no other takes fewer than."""
    return HEADER.size + 5 + 6 * -(-elements // LANE_ELEMENTS)


def _code_bits(counted: Sequence[Table], tables: Sequence[Table]) -> float:
    """Bits of all words and escapes, about."""
    total = 0.0
    for found, table in zip(counted, tables, strict=True):
        there = table.counts > 0
        shares = table.counts[there] / table.counts.sum()
        total -= float((found.counts[there] * np.log2(shares)).sum())
        total += 16 * float(found.counts[-1])
    return total


def _symbol_indices(
    Z: Integers, of_element: npt.NDArray[np.uint8], tables: Sequence[Table]
) -> tuple[Integers, Integers]:
    """The place of each element in its class' table, flat, and the numbers that escape."""
    least = np.array([table.least for table in tables], np.int64)
    size = np.array([len(table.counts) - 1 for table in tables], np.int64)
    places = Z - least[of_element]
    inside = (places >= 0) & (places < size[of_element])
    frequency = np.zeros((len(tables), int(size.max(initial=0)) + 1), np.int64)
    for row, table in zip(frequency, tables, strict=True):
        row[: len(table.counts)] = table.counts
    places = np.where(inside, places, size[of_element])
    inside &= frequency[of_element, places] > 0
    places = np.where(inside, places, size[of_element])
    return places.reshape(-1), Z[~inside]


class _Pushed:
    """Lanes of several matrices of one precision, those of most steps first, as they are coded."""

    def __init__(self, layouts: Sequence[_Layout]) -> None:
        self._layouts = layouts
        self._first_lane = [0, *accumulate(one.lanes for one in layouts)]
        tables = [table for one in layouts for table in one.tables]
        self._first_table = [0, *accumulate(len(one.tables) for one in layouts)]
        self._width = max((len(table.counts) for table in tables), default=0)
        shape = len(tables), self._width
        self._frequency, self._start = (np.zeros(shape, np.uint64) for _ in range(2))
        for row, table in enumerate(tables):
            self._frequency[row, : len(table.counts)] = table.counts
            self._start[row, : len(table.counts)] = np.cumsum(table.counts) - table.counts
        self._are_certain = all(table.is_certain for table in tables)
        # Where frequency and start of an element stand.
        steps = 0 if self._are_certain else layouts[0].steps
        self._places = np.zeros((steps, self._first_lane[-1]), np.uint32)

    def put(self, place: int, symbols: Integers, of_element: npt.NDArray[np.uint8]) -> None:
        """Take in the elements of a matrix."""
        own = self._layouts[place]
        if self._are_certain:
            return
        first = self._first_table[place]
        places = (first + of_element.astype(np.int64)) * self._width + symbols
        missing = own.steps * own.lanes - len(symbols)
        fill = first * self._width + own.tables[0].commonest if missing else 0
        places = np.append(places, np.full(missing, fill))
        lanes = slice(self._first_lane[place], self._first_lane[place + 1])
        self._places[: own.steps, lanes] = places.reshape(own.steps, own.lanes)

    def lanes(self) -> Iterator[tuple[npt.NDArray[np.uint16], Integers, npt.NDArray[np.uint64]]]:
        """Of each matrix words of all lanes, how many each has, and the states that decoding
        starts from."""
        steps, count = self._places.shape
        states = np.full(count, LOW, np.uint64)
        words, emitted = np.zeros((steps, count), np.uint16), np.zeros((steps, count), bool)
        precision, sixteen = np.uint64(self._layouts[0].precision), np.uint64(16)
        frequency, start = self._frequency.reshape(-1), self._start.reshape(-1)
        active = _active(self._layouts)
        for step in range(steps - 1, -1, -1):
            here = slice(int(active[step]))
            place, x = self._places[step, here], states[here]
            own = frequency[place]
            full = x >= own << (np.uint64(32) - precision)
            words[step, here] = x & np.uint64(0xFFFF)
            emitted[step, here] = full
            x = np.where(full, x >> sixteen, x)
            quotient, rest = np.divmod(x, own)
            states[here] = (quotient << precision) + rest + start[place]
        for first, stop in pairwise(self._first_lane):
            own_words, own_emitted = words[:, first:stop].T, emitted[:, first:stop].T
            yield own_words[own_emitted], own_emitted.sum(axis=1), states[first:stop]


class _Lanes(Protocol):
    """What is coded or decoded: its lanes."""

    @property
    def precision(self) -> int: ...

    @property
    def tables(self) -> Sequence[Table]: ...

    @property
    def lanes(self) -> int: ...

    @property
    def steps(self) -> int: ...


def _batches(every: Sequence[_Lanes]) -> list[list[int]]:
    """Divide into those that go together: of one precision, and of about as many steps.

    In each the ones of most steps come first.
    """
    kinds = [(one.precision, all(table.is_certain for table in one.tables)) for one in every]
    order = sorted(range(len(every)), key=lambda i: (kinds[i], -every[i].steps))
    batches: list[list[int]] = []
    batch: list[int] = []
    for place, index in enumerate(order):
        batch.append(index)
        following = order[place + 1] if place + 1 < len(order) else None
        together = sum(every[i].lanes for i in batch)
        if (
            following is None
            or kinds[following] != kinds[index]
            or (together + every[following].lanes) * every[batch[0]].steps > _BATCH_ELEMENTS
            or sum(len(every[i].tables) for i in (*batch, following)) >= 1 << 16
        ):
            batches.append(batch)
            batch = []
    return batches


def _active(batch: Sequence[_Lanes]) -> npt.NDArray[np.intp]:
    """How many lanes have an element in each step."""
    going = np.repeat([one.steps for one in batch], [one.lanes for one in batch])
    return np.searchsorted(-going, -np.arange(batch[0].steps), side="left")


def decode(
    coded: Sequence[tuple[Bytes, int, int]], threads: int = 1, lanes: Lanes | None = None
) -> list[Numbers]:
    """Decode matrices, their lanes side by side.

    Args:
        coded: stream, rows and columns of each.
        threads: among which they are divided; they change nothing but the time.
        lanes: does what is slow here, with the same result.

    Returns:
        Each ``(rows, columns)``, int16.

    Raises:
        ValueError: a stream is damaged. Nothing is read or written out of bounds.
    """
    parsed = [parse(*one) for one in coded]
    if lanes is not None:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda one: _numbers(one, lanes(one)), parsed))
    found: list[Numbers] = [np.empty(0, np.int16)] * len(parsed)

    def decode_batch(batch: list[int]) -> None:
        for i, numbers in zip(batch, _decode_batch([parsed[i] for i in batch]), strict=True):
            found[i] = numbers

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(decode_batch, _batches(parsed)))
    return found


def _decode_batch(batch: Sequence[Parsed]) -> list[Numbers]:
    """Decode streams of one precision, those of most steps first."""
    precision, lanes = batch[0].precision, sum(one.lanes for one in batch)
    steps = batch[0].steps
    tables = [table for one in batch for table in one.tables]
    if not tables:
        return [np.zeros((one.rows, one.columns), np.int16) for one in batch]
    # By slot of each table: its symbol, the symbol's frequency, and the slot less its start.
    slots = [table.of_slots() for table in tables]
    symbols = np.concatenate([own[0] for own in slots])
    frequency = np.concatenate([own[1] for own in slots]).astype(np.uint32)
    offset = np.concatenate([own[2] for own in slots]).astype(np.uint32)

    bases = np.zeros((steps, lanes), np.uint16)
    first_lane, first_table = 0, 0
    for one in batch:
        flat = np.full(one.steps * one.lanes, first_table, np.uint16)
        flat[: one.rows * one.columns] += one.classes.of_elements().reshape(-1)
        bases[: one.steps, first_lane : first_lane + one.lanes] = flat.reshape(-1, one.lanes or 1)
        first_lane, first_table = first_lane + one.lanes, first_table + len(one.tables)

    words = np.concatenate([*(one.words for one in batch), np.zeros(1, np.uint16)])
    words = words.astype(np.uint32)
    states = np.concatenate([one.states for one in batch])
    ends = np.concatenate([one.counts for one in batch]).cumsum()
    at = ends - np.concatenate([one.counts for one in batch])
    numbers = np.zeros((steps, lanes), np.int16)
    mask, shift, sixteen = np.uint32((1 << precision) - 1), np.uint32(precision), np.uint32(16)
    active = _active(batch)
    if all(table.is_certain for table in tables):
        numbers, active = symbols[bases.astype(np.int64) << precision], active[:0]
    for step in range(len(active)):
        count = active[step]
        x = states[:count]
        slot = (bases[step, :count].astype(np.uint32) << shift) + (x & mask)
        numbers[step, :count] = symbols[slot]
        x = frequency[slot] * (x >> shift) + offset[slot]
        low = x < LOW
        # A damaged lane may want more words than there are: it gets any, and fails below.
        word = words.take(at[:count], mode="clip")
        states[:count] = np.where(low, (x << sixteen) | word, x)
        at[:count] += low
    ended = bool((at == ends).all()) and bool((states == LOW).all())
    found, first_lane = [], 0
    for one in batch:
        own = numbers[: one.steps, first_lane : first_lane + one.lanes].reshape(-1)
        own = own[: one.rows * one.columns].copy()
        found.append(_numbers(one, own if ended else None))
        first_lane += one.lanes
    return found


def _numbers(one: Parsed, numbers: Numbers | None) -> Numbers:
    """The numbers of decoded lanes, with those that escaped in their places."""
    if numbers is None:
        raise ValueError("the coded numbers do not end where they should")
    if len(one.escaped) or any(table.counts[-1] for table in one.tables):
        escapes = numbers == ESCAPE
        if int(escapes.sum()) != len(one.escaped):
            raise ValueError(f"{len(one.escaped)} coded numbers escape, found {int(escapes.sum())}")
        numbers[escapes] = one.escaped
    shaped: Numbers = numbers.reshape(one.rows, one.columns)
    return shaped
