"""The entropy coder: every stream is decoded here a second time, by its description alone."""

from __future__ import annotations

import struct
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest

from lestd_kernels.backends import bitmask, rans_lanes
from lestd_kernels.storage import rans
from lestd_kernels.storage.rans_stream import Bytes, Lanes

Integers = npt.NDArray[np.int64]


@pytest.fixture(params=["numpy", "fastest", "portable"])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Lanes | None:
    """All decoders of lanes that this machine has."""
    if request.param == "numpy":
        return None
    found = rans_lanes.compiled()
    if found is None:
        pytest.skip("needs a C++ compiler")
    if request.param == "portable":
        monkeypatch.setattr(bitmask, "path", lambda: "portable")
    return found


def normal(scale: float, rows: int = 120, columns: int = 110, seed: int = 0) -> Integers:
    values = np.random.default_rng(seed).normal(size=(rows, columns)) * scale
    return np.round(values).astype(np.int64)


def uneven(scale: float) -> Integers:
    """Rows and columns of very different sizes."""
    generator = np.random.default_rng(1)
    sides = np.exp(generator.normal(size=(120, 1))) * np.exp(generator.normal(size=(1, 110)))
    return np.round(generator.normal(size=(120, 110)) * scale * sides).astype(np.int64)


def with_outliers() -> Integers:
    Z = normal(0.4)
    Z.reshape(-1)[::411] = np.linspace(-32767, 32767, len(Z.reshape(-1)[::411])).astype(np.int64)
    return Z


MATRICES = {
    **{f"normal {scale}": normal(scale) for scale in (0.25, 0.5, 1, 4, 60)},
    "uneven": uneven(0.7),
    "outliers": with_outliers(),
    "zeros": np.zeros((50, 70), np.int64),
    "constant": np.full((9, 7), -5),
    "one": np.array([[7]]),
    "no rows": np.zeros((0, 5), np.int64),
    "anything": np.random.default_rng(2).integers(-32767, 32768, (20, 33)),
}


def entropy(Z: Integers) -> float:
    """Bits, by the definition."""
    _, counts = np.unique(Z, return_counts=True)
    return float(-(counts * np.log2(counts / Z.size)).sum())


class Scalar:
    """A decoder of one number after the other."""

    def __init__(self, stream: bytes, rows: int, columns: int) -> None:
        self.at, self.stream = 0, stream
        precision, classes, _, lanes, escapes = struct.unpack("<BBHII", self.take(12))
        levels, firsts = ([0] * rows, [0] * columns), []
        if classes > 1:
            levels = (self.nibbles(rows), self.nibbles(columns))
            firsts = list(self.take(classes - 1))
        tables = [self.table() for _ in range(classes)]
        counts = struct.unpack(f"<{lanes}H", self.take(2 * lanes))
        states = list(struct.unpack(f"<{lanes}I", self.take(4 * lanes)))
        self.side_bytes = self.at + 2 * escapes
        words = [list(struct.unpack(f"<{n}H", self.take(2 * n))) for n in counts]
        self.word_bits = 16 * sum(counts)
        others = list(struct.unpack(f"<{escapes}h", self.take(2 * escapes)))
        assert self.at == len(stream)
        self.Z = np.zeros((rows, columns), np.int64)
        for element in range(rows * columns):
            i, j, lane = *divmod(element, columns), element % lanes
            own = sum(levels[0][i] + levels[1][j] >= first for first in firsts)
            symbol = self.step(states, words, lane, *tables[own], precision)
            self.Z[i, j] = others.pop(0) if symbol is None else symbol
        for lane in range(rows * columns % lanes if lanes else 0, lanes):
            if rows * columns % lanes:  # What fills up the last step.
                self.step(states, words, lane, *tables[0], precision)
        assert not others
        assert all(state == 1 << 16 for state in states)
        assert not any(words)

    def take(self, count: int) -> bytes:
        self.at += count
        return self.stream[self.at - count : self.at]

    def nibbles(self, count: int) -> list[int]:
        return [half for byte in self.take(-(-count // 2)) for half in (byte & 15, byte >> 4)]

    def varint(self) -> int:
        value, shift, byte = 0, 0, 0x80
        while byte >= 0x80:
            byte = self.take(1)[0]
            value, shift = value | (byte & 0x7F) << shift, shift + 7
        return value

    def table(self) -> tuple[int, list[int]]:
        zigzag, size = self.varint(), self.varint()
        return (-(zigzag + 1) // 2 if zigzag % 2 else zigzag // 2), [
            self.varint() for _ in range(size + 1)
        ]

    @staticmethod
    def step(
        states: list[int],
        words: list[list[int]],
        lane: int,
        least: int,
        counts: list[int],
        precision: int,
    ) -> int | None:
        slot, place, first = states[lane] & ((1 << precision) - 1), 0, 0
        while slot >= first + counts[place]:
            first += counts[place]
            place += 1
        state = counts[place] * (states[lane] >> precision) + slot - first
        states[lane] = (state << 16) | words[lane].pop(0) if state < 1 << 16 else state
        return None if place == len(counts) - 1 else least + place


@pytest.mark.parametrize("name", MATRICES)
def test_streams_decode_by_their_description(name: str, lanes: Lanes | None) -> None:
    Z = MATRICES[name]
    stream = rans.encode([Z])[0]
    [found] = rans.decode([(stream, *Z.shape)], lanes=lanes)
    assert found.dtype == np.int16
    assert np.array_equal(found, Z)
    assert np.array_equal(Scalar(stream.tobytes(), *Z.shape).Z, Z)
    assert np.array_equal(rans.encode([Z])[0], stream)
    assert abs(rans.coded_bytes(Z) - len(stream)) <= 8 + 0.002 * len(stream)


@pytest.mark.parametrize("scale", [0.25, 0.5, 1, 4, 60])
def test_code_lengths_are_the_entropy(scale: float) -> None:
    """From 0.3 bits to 8, with what stands beside the words apart."""
    Z = MATRICES[f"normal {scale}"]
    found = Scalar(rans.encode([Z])[0].tobytes(), *Z.shape)
    assert found.word_bits <= 1.01 * entropy(Z)
    assert 8 * found.side_bytes <= 0.01 * entropy(Z) + (8 * 1200 if scale > 10 else 300)


def test_parts_of_different_size_take_less_than_their_histogram() -> None:
    Z = MATRICES["uneven"]
    assert 8 * len(rans.encode([Z])[0]) < 0.85 * entropy(Z)


def test_few_large_numbers_cost_what_they_take() -> None:
    Z = MATRICES["outliers"]
    count = int((np.abs(Z) > 3).sum())
    plain = rans.encode([np.where(np.abs(Z) > 3, 0, Z)])[0]
    assert len(rans.encode([Z])[0]) <= len(plain) + 5 * count


def test_matrices_are_coded_side_by_side_as_alone(lanes: Lanes | None) -> None:
    streams = rans.encode(list(MATRICES.values()))
    for stream, Z in zip(streams, MATRICES.values(), strict=True):
        assert np.array_equal(stream, rans.encode([Z])[0])
    coded = [(stream, *Z.shape) for stream, Z in zip(streams, MATRICES.values(), strict=True)]
    for found, Z in zip(rans.decode(coded, 2, lanes), MATRICES.values(), strict=True):
        assert np.array_equal(found, Z)


def test_numbers_beyond_int16_are_refused() -> None:
    with pytest.raises(ValueError, match="beyond"):
        rans.encode([np.array([[1 << 15]])])


_DAMAGED_SHAPE = 30, 40


@cache
def damaged_streams(name: str) -> list[tuple[Bytes, str | list[list[int]]]]:
    """Streams cut off, one too long, and ones with a byte that is another; what NumPy says."""
    rows, columns = _DAMAGED_SHAPE
    stream = rans.encode([MATRICES[name][:rows, :columns]])[0]
    ends = (*range(0, min(len(stream), 200), 7), len(stream) - 1)
    streams = [*(stream[:end] for end in ends), np.append(stream, np.uint8(0))]
    generator = np.random.default_rng(3)
    for place in (*range(min(len(stream), 60)), *generator.integers(0, len(stream), 60)):
        damaged = stream.copy()
        damaged[place] ^= generator.integers(1, 256)
        streams.append(damaged)
    outcomes = [outcome(one, None) for one in streams]
    assert all("coded number" in one for one in outcomes[: len(ends)])
    assert "too many" in outcomes[len(ends)]
    others = outcomes[len(ends) + 1 :]
    assert sum(isinstance(one, str) for one in others) > 0.5 * len(others)
    return list(zip(streams, outcomes, strict=True))


def outcome(stream: Bytes, lanes: Lanes | None) -> str | list[list[int]]:
    """The numbers, or the sentence that they are refused in."""
    try:
        [found] = rans.decode([(stream, *_DAMAGED_SHAPE)], lanes=lanes)
    except ValueError as error:
        return str(error)
    assert found.shape == _DAMAGED_SHAPE
    return found.tolist()


@pytest.mark.parametrize("name", ["normal 1", "uneven", "outliers", "zeros"])
def test_damaged_streams_end_in_a_sentence(name: str, lanes: Lanes | None) -> None:
    for stream, expected in damaged_streams(name):
        if lanes is not None:  # NumPy's are what the others are held against.
            assert outcome(stream, lanes) == expected


def test_no_stream_holds_more_than_its_bytes_allow() -> None:
    stream = rans.encode([np.zeros((1, 1), np.int64)])[0]
    with pytest.raises(ValueError, match="lanes"):
        rans.decode([(stream, 1 << 20, 1 << 20)])
