"""The safetensors header: parsed strictly before anything is read, and built for what is written.

A file is ``u64 little-endian n | n bytes of JSON | data``. The JSON maps each tensor name to its
dtype, shape and ``data_offsets`` (start, stop) relative to the first data byte; the tensors fill
the data without overlap or hole. Every figure of a header is checked against the others and
against the size of the file, so that a later range read can trust it.

Reference: "Format" in the safetensors documentation; `safetensors/src/tensor.rs`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from lestd_kernels.errors import LestdError
from workers.contracts import TensorRef
from workers.storage.files import is_lfs_pointer, lfs_pointer

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""Longest header that safetensors accepts."""

DTYPES: dict[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' dtype name -> torch dtype, in the order in which safetensors lays tensors out:
widest first, so that every tensor is aligned."""

DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
_LAYOUT_ORDER = {name: position for position, name in enumerate(DTYPES)}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is to be written: its name, safetensors dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes of data of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def layout_key(tensor: TensorSpec | TensorRef) -> tuple[int, str]:
    """Sort key of safetensors' own layout: dtype, widest first, then name."""
    return _LAYOUT_ORDER[tensor.dtype], tensor.name


def build_header(tensors: Iterable[TensorSpec | TensorRef]) -> bytes:
    """The bytes before the data of a file that holds `tensors` in this order.

    The bytes are those that safetensors itself writes for tensors sorted by `layout_key` with
    the metadata ``{"format": "pt"}``.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        stop = start + tensor.stored_bytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def header_length(prefix: bytes, shard: str, file_bytes: int) -> int:
    """Length of the JSON in bytes, from the first 8 bytes of a file.

    Args:
        prefix: the first 8 bytes, fewer if the file is shorter.
        shard: name of the file, for the message.
        file_bytes: size of the whole file.

    Raises:
        LestdError: the file is too short for a header, or its length cannot be true.
    """
    if len(prefix) < LENGTH_BYTES:
        raise LestdError(
            f"{shard} is truncated: it has {file_bytes} bytes, and the header of a safetensors "
            "file alone takes more; download it again"
        )
    if is_lfs_pointer(prefix):
        raise LestdError(lfs_pointer(shard))
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise LestdError(
            f"{shard} is not a safetensors file: its header claims {length} bytes, and at most "
            f"{MAX_HEADER_BYTES} are allowed; download it again"
        )
    if LENGTH_BYTES + length > file_bytes:
        raise LestdError(
            f"{shard} is truncated: its header takes {LENGTH_BYTES + length} bytes and the file "
            f"has {file_bytes}; download it again"
        )
    return length


def parse_header(text: bytes, shard: str, file_bytes: int) -> dict[str, TensorRef]:
    """Parse and check the JSON of a safetensors header.

    Args:
        text: the JSON, without the 8 bytes before it.
        shard: path of the file, as it shall stand in the `TensorRef`.
        file_bytes: size of the whole file.

    Returns:
        Tensor name -> where it lies, in the order of the data.

    Raises:
        LestdError: the JSON is invalid, a dtype unknown, or offsets, shapes and the size of the
            file disagree.
    """
    entries = _load_object(text, shard)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(shard, "its __metadata__ is not a map of strings")
    data_start = LENGTH_BYTES + len(text)
    refs = [_parse_entry(name, entry, shard, data_start) for name, entry in entries.items()]
    refs.sort(key=lambda ref: ref.byte_range)
    position = data_start
    for ref in refs:
        start, stop = ref.byte_range
        if start != position:
            what = "overlaps the tensor before it" if start < position else "leaves a hole"
            raise _damaged(
                shard, f"tensor {ref.name} {what}: it starts at byte {start}, expected {position}"
            )
        position = stop
    if position > file_bytes:
        last = next(ref for ref in refs if ref.byte_range[1] > file_bytes)
        raise LestdError(
            f"{shard} is truncated: tensor {last.name} ends at byte {last.byte_range[1]} and the "
            f"file has {file_bytes} bytes; download it again"
        )
    if position < file_bytes:
        raise _damaged(
            shard, f"the header accounts for {position} bytes and the file has {file_bytes}"
        )
    return {ref.name: ref for ref in refs}


def _damaged(shard: str, what: str) -> LestdError:
    return LestdError(f"{shard} has a damaged safetensors header: {what}; download it again")


def _load_object(text: bytes, shard: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for name, value in pairs:
            if name in entries:
                raise _damaged(shard, f"it names {name!r} twice")
            entries[name] = value
        return entries

    try:
        entries = json.loads(text.decode(), object_pairs_hook=unique)
        if not isinstance(entries, dict):
            raise _damaged(shard, "it is not a JSON object")
        # A lone surrogate is valid in Python's JSON, but is no text and cannot be written again.
        "".join(entries).encode()
    except (ValueError, RecursionError) as error:
        raise _damaged(shard, f"it is not valid JSON ({error})") from error
    return entries


def _parse_entry(name: str, entry: Any, shard: str, data_start: int) -> TensorRef:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _damaged(shard, f"tensor {name} lacks its dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise LestdError(
            f"{shard}: tensor {name} has the unknown dtype {dtype!r}; known are "
            f"{', '.join(DTYPES)}; use a checkpoint in BF16, F16 or F32"
        )
    if not _are_sizes(shape):
        raise _damaged(shard, f"tensor {name} has the shape {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(shard, f"tensor {name} has the data_offsets {offsets!r}")
    expected = TensorSpec(name, dtype, tuple(shape)).stored_bytes
    found = offsets[1] - offsets[0]
    if found != expected:
        raise _damaged(
            shard,
            f"tensor {name} takes {found} bytes, but {dtype} of shape {shape} takes {expected}",
        )
    byte_range = (data_start + offsets[0], data_start + offsets[1])
    return TensorRef(name, shard, tuple(shape), dtype, byte_range)


def _are_sizes(values: Any) -> bool:
    """Whether this is a list of at most 64 integers that fit a signed 64-bit size."""
    if not isinstance(values, list) or len(values) > 64:
        return False
    return all(type(v) is int and 0 <= v < 2**63 for v in values)
