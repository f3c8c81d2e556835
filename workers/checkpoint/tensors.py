"""A checkpoint: the location of each tensor, exact range reads, atomic writes.

Everything about the tensors comes from the headers (`workers.checkpoint.headers`); data are read
only by byte range, from a path or a URL (`workers.storage.ranges`), and every file is written
beside its name and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import torch
from torch import Tensor

from lestd_kernels.errors import LestdError
from workers.checkpoint.headers import (
    DTYPE_NAMES,
    DTYPES,
    LENGTH_BYTES,
    TensorSpec,
    build_header,
    header_length,
    layout_key,
    parse_header,
)
from workers.checkpoint.packed import dequantized, matrices
from workers.contracts import TensorRef
from workers.storage import ranges
from workers.storage.files import AnyPath, in_parallel, open_binary, read_file
from workers.storage.names import is_inside
from workers.storage.untrusted_files import parse_json

if TYPE_CHECKING:
    from hashlib import _Hash

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_COPY_BYTES = 16 * 1024 * 1024
# In one system call, which a signal may have to wait for.
_KERNEL_COPY_BYTES = 256 * 1024 * 1024
# Several chunks of `workers.storage.ranges`, which are fetched at the same time.
_FETCH_BYTES = 128 * 1024 * 1024
_FIRST_FETCH_BYTES = 256 * 1024


def read_header(path: AnyPath | str) -> dict[str, TensorRef]:
    """Read the header of one safetensors file: tensor name -> its location, in data order.

    Args:
        path: of the file, or its URL.

    Raises:
        LestdError: the file cannot be read, is truncated, or its header is damaged.
    """
    if not isinstance(path, Path):
        return _fetch_header(str(path))
    try:
        with open_binary(path) as file:
            file_bytes = path.stat().st_size
            length = header_length(file.read(LENGTH_BYTES), str(path), file_bytes)
            return parse_header(file.read(length), str(path), file_bytes)
    except OSError as error:
        raise LestdError(f"{path} cannot be read ({error.strerror or error})") from error


def _fetch_header(url: str) -> dict[str, TensorRef]:
    size, etag = ranges.stat(url)
    version = ranges.file_version(size, etag)
    content = bytearray(min(_FIRST_FETCH_BYTES, size))
    ranges.read_ranges(url, version, [(0, memoryview(content))])
    stop = LENGTH_BYTES + header_length(bytes(content[:LENGTH_BYTES]), url, size)
    if stop > len(content):
        rest = bytearray(stop - len(content))
        ranges.read_ranges(url, version, [(len(content), memoryview(rest))])
        content += rest
    header = parse_header(bytes(content[LENGTH_BYTES:stop]), url, size)
    return {name: replace(ref, version=version) for name, ref in header.items()}


@dataclass(frozen=True)
class ShardIndex:
    """Contents of a checkpoint by the headers of its shards.

    Attributes:
        location: path or URL of the directory that the shards lie in.
        shards: paths of the shards relative to `location`, sorted.
        tensors: tensor name -> where it lies, sorted by name.
    """

    location: str
    shards: tuple[str, ...]
    tensors: dict[str, TensorRef]

    @classmethod
    def from_directory(cls, directory: Path) -> ShardIndex:
        """Read the headers of ``model.safetensors``, or of the shards its index names.

        Symbolic links are followed: the cache of the Hub is made of them.

        Raises:
            LestdError: there is no safetensors checkpoint, the index is invalid or leaves the
                directory, a shard or a tensor it names is absent, or a shard is damaged.
        """
        directory = directory.absolute()
        # A single file goes before an index, as when Transformers loads the directory.
        if (directory / WEIGHTS_FILE).is_file():
            header = read_header(directory / WEIGHTS_FILE)
            return cls._from_headers(str(directory), {WEIGHTS_FILE: header}, {})
        if not (directory / INDEX_FILE).is_file():
            raise LestdError(
                f"{directory} holds no safetensors checkpoint: expected {WEIGHTS_FILE}, or "
                f"{INDEX_FILE} and the shards it names; download it again"
            )
        weight_map = read_weight_map(directory / INDEX_FILE)
        headers = {}
        for shard in sorted(set(weight_map.values())):
            if not (directory / shard).is_file():
                raise LestdError(
                    f"{directory / shard} is absent, but {directory / INDEX_FILE} names it; "
                    "download it again"
                )
            headers[shard] = read_header(directory / shard)
        return cls._from_headers(str(directory), headers, weight_map)

    @classmethod
    def from_url(cls, url: str, weight_map: Mapping[str, str]) -> ShardIndex:
        """Read the headers of shards that lie elsewhere, several at a time.

        Args:
            url: of the directory.
            weight_map: tensor name -> shard as the index says; empty for a single file.

        Raises:
            LestdError: a shard cannot be read or is damaged, or a tensor is absent from its shard.
        """
        shards = sorted(set(weight_map.values())) or [WEIGHTS_FILE]
        found = in_parallel(read_header, [f"{url}/{shard}" for shard in shards])
        return cls._from_headers(url, dict(zip(shards, found, strict=True)), weight_map)

    @classmethod
    def _from_headers(
        cls,
        location: str,
        headers: Mapping[str, Mapping[str, TensorRef]],
        weight_map: Mapping[str, str],
    ) -> ShardIndex:
        """Join the headers of all shards, and check them against the index."""
        for name, shard in weight_map.items():
            if name not in headers[shard]:
                raise LestdError(
                    f"tensor {name} is absent from {location}/{shard}, where {INDEX_FILE} says "
                    "it lies; download both again"
                )
        # Of two copies the index names the one that counts; what it does not name is left out.
        tensors = {name: headers[shard][name] for name, shard in weight_map.items()}
        if not weight_map:
            [tensors] = map(dict, headers.values())
        return cls(location, tuple(sorted(headers)), dict(sorted(tensors.items())))

    @property
    def stored_bytes(self) -> int:
        """Bytes of data of all tensors; headers are not counted."""
        return sum(ref.stored_bytes for ref in self.tensors.values())


def read_weight_map(path: AnyPath) -> dict[str, str]:
    """Read the ``weight_map`` of an index file: tensor name -> shard, relative to the file.

    Raises:
        LestdError: the file is not an index, or names a shard outside its directory.
    """
    try:
        weight_map = parse_json(read_file(path))["weight_map"]
        shards = set(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LestdError(
            f"{path} is not a valid index: expected JSON with a weight_map from tensor names to "
            f"shards ({type(error).__name__}: {error}); download it again"
        ) from error
    for shard in shards:
        if not is_inside(shard):
            raise LestdError(
                f"{path} names the shard {shard!r}, which is not a path inside its directory; "
                "the index is damaged or malicious, get it from a source you trust"
            )
    return dict(weight_map)


def read_tensor(ref: TensorRef, digest: _Hash | None = None, *, pinned: bool = False) -> Tensor:
    """Read one tensor: exactly its bytes, straight into its memory.

    Args:
        ref: the tensor.
        digest: takes the bytes as they were read.
        pinned: into page-locked memory, which a GPU copies from at full speed.

    Returns:
        Tensor of the shape and dtype of `ref`, on the CPU.

    Raises:
        LestdError: the file ends early, has changed or cannot be read, or what is packed does
            not unpack.
    """
    buffer = torch.empty(ref.stored_bytes, dtype=torch.uint8, pin_memory=pinned)
    view = buffer.numpy().data
    if ref.packing is not None:
        done = 0
        for rows in dequantized(ref, lambda part: read_tensor(part, digest)):
            piece = rows.reshape(-1).view(torch.uint8)
            buffer[done : done + len(piece)] = piece
            done += len(piece)
        return buffer.view(DTYPES[ref.dtype]).reshape(ref.shape)
    if ranges.is_url(ref.shard):
        ranges.read_ranges(ref.shard, ref.version, [(ref.byte_range[0], view)])
    else:
        with open_shard(ref.shard) as file:
            read_exactly(file, ref, ref.byte_range[0], view)
    if digest is not None:
        digest.update(view)
    return buffer.view(DTYPES[ref.dtype]).reshape(ref.shape)


def open_shard(shard: str) -> io.FileIO:
    """Open a shard on this machine.

    Raises:
        LestdError: it cannot be read.
    """
    try:
        return io.FileIO(shard)
    except OSError as error:
        raise LestdError(f"{shard} cannot be read ({error.strerror or error})") from error


def read_exactly(file: io.FileIO, ref: TensorRef, start: int, view: memoryview) -> None:
    """Fill `view` from byte `start` of the shard of `ref` on.

    Raises:
        LestdError: the file ends early or cannot be read.
    """
    done = 0  # One system call may return less than it was asked for.
    while done < len(view):
        try:
            count = os.preadv(file.fileno(), [view[done:]], start + done)
        except OSError as error:
            raise LestdError(
                f"tensor {ref.name} cannot be read from {ref.shard} ({error.strerror or error})"
            ) from error
        if count == 0:
            raise LestdError(
                f"{ref.shard} ends at byte {start + done}, but tensor {ref.name} goes up to byte "
                f"{ref.byte_range[1]}; the file has changed since its header was read"
            )
        done += count


class _Sink(Protocol):
    """Sink of bytes in order: a file, or a digest."""

    def write(self, data: bytes | memoryview, /) -> object: ...


def write_safetensors(file: _Sink, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in the safetensors format, one after the other; same tensors, same bytes.

    Raises:
        KeyError: safetensors has no name for a tensor's dtype.
    """
    specs = [
        TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]
    specs.sort(key=layout_key)
    file.write(build_header(specs))
    for spec in specs:
        flat = tensors[spec.name].detach().cpu().contiguous().reshape(-1)
        file.write(flat.view(torch.uint8).numpy().data)


def digest_safetensors(tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    """sha256 (hex) and size in bytes of what `write_safetensors` would write; copies nothing."""
    content = _Digest()
    write_safetensors(content, tensors)
    return content.sha256.hexdigest(), content.size


class _Digest:
    """Takes what a file would, and keeps its sha256 and its size."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        self.sha256.update(data)
        self.size += len(data)


def hash_tensor(ref: TensorRef, digest: _Hash) -> None:
    """Feed a tensor's bytes on disk to a digest; memory stays within 16 MiB, 128 MiB from a URL.

    Raises:
        LestdError: the file ends early, has changed or cannot be read.
    """
    if ref.packing is not None:  # In the order in which it is read.
        for matrix in matrices(ref):
            for part in matrix.on_disk:
                hash_tensor(part, digest)
        return
    for piece in _pieces(ref):
        digest.update(piece)


def write_safetensors_stream(file: BinaryIO, refs: Iterable[TensorRef]) -> None:
    """Write a new shard of tensors that lie in other shards, copied byte for byte, or unpacked.

    Raises:
        LestdError: as `copy_tensor`.
    """
    ordered = sorted(refs, key=layout_key)
    file.write(build_header(ordered))
    for ref in ordered:
        copy_tensor(ref, file)


def copy_tensor(ref: TensorRef, file: BinaryIO) -> None:
    """Append a tensor's bytes to a file.

    The system copies them where it can, from file to file; else memory stays as in `hash_tensor`,
    or `workers.checkpoint.packed`.

    Raises:
        LestdError: the source shard ends early, has changed or cannot be read.
    """
    done = 0
    if not ranges.is_url(ref.shard) and ref.packing is None:
        with open_shard(ref.shard) as source:
            done = _copy_in_kernel(source, *ref.byte_range, file)
    for piece in _pieces(ref, done):
        file.write(piece)


def _pieces(ref: TensorRef, done: int = 0) -> Iterator[memoryview]:
    """A tensor's bytes but the first `done`, in order; a piece is overwritten by the next."""
    if ref.packing is not None:
        for rows in dequantized(ref, read_tensor):
            yield rows.reshape(-1).view(torch.uint8).numpy().data
        return
    start, stop = ref.byte_range[0] + done, ref.byte_range[1]
    remote = ranges.is_url(ref.shard)
    buffer = memoryview(bytearray(min(_FETCH_BYTES if remote else _COPY_BYTES, stop - start)))
    with nullcontext() if remote or start == stop else open_shard(ref.shard) as source:
        while start < stop:
            piece = buffer[: min(len(buffer), stop - start)]
            if source is None:
                ranges.read_ranges(ref.shard, ref.version, [(start, piece)])
            else:
                read_exactly(source, ref, start, piece)
            yield piece
            start += len(piece)


def _copy_in_kernel(source: io.FileIO, start: int, stop: int, file: BinaryIO) -> int:
    """Append bytes of `source` to `file` with copy_file_range(2); how many it would copy.

    It stops at whatever goes wrong, and leaves that to the caller, who meets it again by read and
    write: a file system that cannot, a full disk, a source that ends early.
    """
    if not hasattr(os, "copy_file_range"):
        return 0
    file.flush()
    done = 0
    while start + done < stop:
        try:
            count = os.copy_file_range(
                source.fileno(),
                file.fileno(),
                min(stop - start - done, _KERNEL_COPY_BYTES),
                offset_src=start + done,
            )
        except OSError:
            break
        if count == 0:
            break
        done += count
    return done
