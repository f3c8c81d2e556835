"""Headers that lie are refused, and what is accepted safetensors accepts too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from lestd_kernels.errors import LestdError
from workers.checkpoint.headers import parse_header
from workers.checkpoint.tensors import WEIGHTS_FILE, read_header

F32_PAIR = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
}


def with_b(**changes: Any) -> dict[str, Any]:
    return F32_PAIR | {"b": F32_PAIR["b"] | changes}


def shard_bytes(header: Any, data: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


LIES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "truncated: it has 0 bytes"),
    "seven bytes": (b"\2" + bytes(6), "truncated: it has 7 bytes"),
    "length beyond the file": ((99).to_bytes(8, "little") + b"{}", "its header takes 107 bytes"),
    "absurd length": ((2**63).to_bytes(8, "little") + b"{}", "claims 9223372036854775808 bytes"),
    "length over 100 MB": ((10**8 + 1).to_bytes(8, "little") + b"{}", "claims 100000001 bytes"),
    "html": (b"<!DOCTYPE html><html>", "claims"),
    "no JSON": (shard_bytes(b"{'a': 1}"), "not valid JSON"),
    "no UTF-8": (shard_bytes(b'{"\xff": 1}'), "not valid JSON"),
    "a list": (shard_bytes([1, 2]), "not a JSON object"),
    "deep nesting": (shard_bytes(b"[" * 200_000), "not valid JSON"),
    "lone surrogate": (shard_bytes(b'{"\\ud800": {}}'), "not valid JSON"),
    "huge number": (shard_bytes(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "twice the same name": (
        shard_bytes(b'{"a": %b, "a": %b}' % ((json.dumps(F32_PAIR["a"]).encode(),) * 2)),
        "names 'a' twice",
    ),
    "metadata no strings": (shard_bytes({"__metadata__": {"a": 1}} | F32_PAIR), "__metadata__"),
    "entry no object": (shard_bytes(F32_PAIR | {"b": 3}), "tensor b lacks"),
    "no offsets": (shard_bytes(F32_PAIR | {"b": {"dtype": "F32", "shape": [2]}}), "tensor b lacks"),
    "unknown dtype": (shard_bytes(with_b(dtype="F4")), "tensor b has the unknown dtype 'F4'"),
    "dtype no string": (shard_bytes(with_b(dtype=["F32"])), "tensor b has the unknown dtype"),
    "negative shape": (shard_bytes(with_b(shape=[-2])), r"tensor b has the shape \[-2\]"),
    "boolean shape": (shard_bytes(with_b(shape=[True, 2])), "tensor b has the shape"),
    "enormous shape": (shard_bytes(with_b(shape=[2**63])), "tensor b has the shape"),
    "many dimensions": (shard_bytes(with_b(shape=[2**62] * 64)), "tensor b takes 8 bytes"),
    "too many dimensions": (shard_bytes(with_b(shape=[1] * 65)), "tensor b has the shape"),
    "three offsets": (shard_bytes(with_b(data_offsets=[8, 12, 16])), "tensor b has the data_off"),
    "backward offsets": (shard_bytes(with_b(data_offsets=[16, 8])), "tensor b has the data_off"),
    "negative offset": (shard_bytes(with_b(data_offsets=[-8, 0])), "tensor b has the data_off"),
    "shape too large": (shard_bytes(with_b(shape=[3])), r"b takes 8 bytes, .* \[3\] takes 12"),
    "other dtype": (shard_bytes(with_b(dtype="BF16")), "b takes 8 bytes, but BF16 .* takes 4"),
    "overlap": (shard_bytes(with_b(data_offsets=[4, 12])), "tensor b overlaps .* at byte"),
    "same place": (shard_bytes(with_b(data_offsets=[0, 8])), "tensor b overlaps"),
    "hole": (shard_bytes(with_b(data_offsets=[12, 20]), bytes(20)), "tensor b leaves a hole"),
    "truncated data": (shard_bytes(F32_PAIR, bytes(15)), "truncated: tensor b ends at byte"),
    "beyond the file": (
        shard_bytes(with_b(shape=[10**9], data_offsets=[8, 8 + 4 * 10**9])),
        "truncated: tensor b ends at byte",
    ),
    "trailing bytes": (shard_bytes(F32_PAIR, bytes(17)), "the header accounts for"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path: Path, lie: str) -> None:
    content, message = LIES[lie]
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(content)
    with pytest.raises(LestdError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 3000


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_parsed_or_refused(content: bytes) -> None:
    try:
        parse_header(content, "shard", 8 + len(content))
    except LestdError:
        return
    assert set(json.loads(content)) <= {"__metadata__"}


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_what_is_accepted_is_accepted_by_safetensors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Offsets, shapes and dtypes drawn near valid ones: we may be stricter, never laxer."""
    sizes = st.integers(-1, 4)
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["U8", "BF16", "F32", "Q4"]),
            "shape": st.lists(sizes, max_size=2),
            "data_offsets": st.lists(st.integers(0, 8), min_size=2, max_size=2),
        }
    )
    header = data.draw(st.dictionaries(st.sampled_from(["a", "b"]), entry))
    content = shard_bytes(header, bytes(data.draw(st.integers(0, 8))))
    path = tmp_path_factory.mktemp("drawn") / WEIGHTS_FILE
    path.write_bytes(content)
    try:
        found = read_header(path)
    except LestdError:
        return
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == found.keys()


def test_safetensors_itself_refuses_the_lies_it_can_see(tmp_path: Path) -> None:
    """Guards the table above: a typo in it could make every entry invalid for another reason."""
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(shard_bytes(F32_PAIR))
    assert read_header(path).keys() == {"a", "b"}
    path.write_bytes(LIES["hole"][0])
    with pytest.raises(SafetensorError):
        safe_open(path, "pt")
