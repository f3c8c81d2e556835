"""Pickled ``.bin`` weights -> safetensors, shard by shard, without running code.

A PyTorch pickle is a program. `torch.load(weights_only=True)` runs only the few steps that build
tensors and refuses every other; memory-mapped, a shard's tensors stay on disk until they are
written. The new directory is built beside its name, where finished shards survive an
interruption, and renamed when it is complete. A marker in it says what it is made of, is locked
by the process that builds it, and is removed last.
"""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lestd_kernels.errors import LestdError
from orchestrator.source.checkpoint import BIN_FILE, BIN_INDEX_FILE, check_pointers
from orchestrator.source.location import (
    download,
    hub_id,
    list_repository,
    local_directory,
    store_url,
)
from orchestrator.source.side_files import copy_side_files, fetch_side_files
from workers.checkpoint.headers import DTYPE_NAMES
from workers.checkpoint.tensors import (
    INDEX_FILE,
    WEIGHTS_FILE,
    ShardIndex,
    read_header,
    read_weight_map,
    write_safetensors,
)
from workers.storage.building import is_free, open_own_file
from workers.storage.files import atomic_write, explain_os_errors, fsync_directory, require_content
from workers.storage.names import TEMPORARY
from workers.storage.untrusted_files import read_regular

_MARKER = "lestd-convert.json"

Progress = Callable[[int, int], None]
"""Called with (shards done, shards in all) after each shard."""


def convert(
    model: str, out: Path, revision: str | None = None, progress: Progress | None = None
) -> ShardIndex:
    """Rewrite a pickled checkpoint as safetensors; run again after an interruption, continue.

    Args:
        model: directory or Hub id; of a Hub model only the pickled weights and the small files
            beside them are downloaded.
        out: the new directory; must not exist, or be empty.
        revision: of a Hub model.
        progress: told of every finished shard.

    Returns:
        The tensors of the new checkpoint.

    Raises:
        LestdError: there is nothing to convert, a file is damaged or asks to run code, the index
            and the shards disagree, `out` is taken, another process converts into it, or no space
            is left.
    """
    out = out.absolute()
    if not (out / _MARKER).is_file():
        _require_free(out)
    source, weight_map = _open_pickled(model, revision)
    bins = sorted(set(weight_map.values())) or [BIN_FILE]
    shards = [f"model-{i + 1:05d}-of-{len(bins):05d}.safetensors" for i in range(len(bins))]
    if len(bins) == 1:
        shards = [WEIGHTS_FILE]
    building = out.with_name(out.name + ".converting")
    marker = _describe(source, bins)
    with explain_os_errors(building):
        if not _is_finished(out, marker):
            _require_free(out)
            with _claimed(building, marker, out):
                for done, (bin_name, shard) in enumerate(zip(bins, shards, strict=True), start=1):
                    if not (building / shard).exists():
                        _convert_shard(source / bin_name, bin_name, weight_map, building / shard)
                    if progress is not None:
                        progress(done, len(bins))
                if len(bins) > 1:
                    _write_index(building, shards)
                copy_side_files(source, building)
                ShardIndex.from_directory(building)
                building.replace(out)
                fsync_directory(out.parent)
        (out / _MARKER).unlink(missing_ok=True)
        fsync_directory(out)
    return ShardIndex.from_directory(out)


def _require_free(out: Path) -> None:
    if not is_free(out):
        raise LestdError(f"{out} exists and is not empty; choose another directory or remove it")


def _is_finished(out: Path, marker: bytes) -> bool:
    """Whether `out` is this very conversion, cut off when only the marker was left to remove."""
    path = out / _MARKER
    return path.is_file() and read_regular(path) == marker


def _open_pickled(model: str, revision: str | None) -> tuple[Path, dict[str, str]]:
    """The local directory of a pickled checkpoint, and its weight map: empty for a single file."""
    directory = local_directory(model, revision)
    if directory is not None:
        names = {path.name for path in directory.iterdir()}
        _check_convertible(model, names)
        check_pointers(directory)
        return directory, _bin_weight_map(directory, names)
    if store_url(model, revision) is not None:
        raise LestdError(f"{model} cannot be converted where it lies; copy it to a directory here")
    model, revision = hub_id(model, revision)
    remote = list_repository(model, revision)
    if remote is None:
        raise LestdError(
            f"{model} is not a directory here, and the Hub cannot be reached; check the "
            "connection, or download the model and give its directory"
        )
    _check_convertible(model, remote)
    directory = fetch_side_files(remote, partial(download, model, revision))
    directory = download(model, directory.name, {BIN_INDEX_FILE} & remote)
    weight_map = _bin_weight_map(directory, remote)
    bins = set(weight_map.values()) or {BIN_FILE}
    return download(model, directory.name, bins, limit=sys.maxsize), weight_map


def _check_convertible(model: str, names: set[str]) -> None:
    if {WEIGHTS_FILE, INDEX_FILE} & names:
        raise LestdError(f"{model} has safetensors weights already; compress it as it is")
    if not {BIN_FILE, BIN_INDEX_FILE} & names:
        raise LestdError(
            f"{model} has no pickled weights: expected {BIN_FILE}, or {BIN_INDEX_FILE} and the "
            "shards it names"
        )


def _bin_weight_map(directory: Path, names: set[str]) -> dict[str, str]:
    # A single file goes before an index, as when Transformers loads the directory.
    return {} if BIN_FILE in names else read_weight_map(directory / BIN_INDEX_FILE)


def _describe(source: Path, bins: list[str]) -> bytes:
    """The marker of a conversion: its files, their sizes and times.

    Raises:
        LestdError: a file is absent.
    """
    stats = {}
    for name in bins:
        if not (source / name).is_file():
            raise LestdError(
                f"{source / name} is absent, but {source / BIN_INDEX_FILE} names it; download it "
                "again"
            )
        require_content(source, [name])
        stat = (source / name).stat()
        stats[name] = [stat.st_size, stat.st_mtime_ns]
    return json.dumps({"source": str(source), "files": stats}, indent=2).encode()


@contextmanager
def _claimed(building: Path, marker: bytes, out: Path) -> Iterator[None]:
    """Make `building`, or accept what an interrupted conversion of these files left there.

    No other process can claim it while the context lasts; the lock ends with the process.

    Raises:
        LestdError: it cannot be made, belongs to something else, or is claimed.
    """
    foreign = LestdError(
        f"{building} was not left by a conversion of these files, or they have changed since; "
        "remove it and run the command again"
    )
    path = building / _MARKER
    try:
        building.mkdir(parents=True, exist_ok=True)
        if building.is_symlink() or (any(building.iterdir()) and not path.is_file()):
            raise foreign
        file = os.fdopen(open_own_file(path), "r+b")
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise LestdError(
            f"{building} cannot be made ({error.strerror}); choose another directory"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LestdError(
                f"another process converts into {building} ({error.strerror}); wait for it to "
                "end, or choose another directory"
            ) from error
        _require_free(out)  # By now the other process may have finished, and renamed `building`.
        file.seek(0)
        if file.read() != marker:
            if any(other != path for other in building.iterdir()):
                raise foreign
            file.seek(0)
            file.truncate()
            file.write(marker)
            file.flush()
            os.fsync(file.fileno())
            fsync_directory(building)
        for temp in building.glob(f"{TEMPORARY}*"):
            temp.unlink()
        yield


def _convert_shard(path: Path, bin_name: str, weight_map: dict[str, str], shard: Path) -> None:
    tensors = _load_pickle(path)
    for name, where in weight_map.items():
        if where == bin_name and name not in tensors:
            raise LestdError(
                f"tensor {name} is absent from {path}, where {BIN_INDEX_FILE} says it lies; "
                "download both again"
            )
    # A tied weight may lie in several shards: the index names the one that counts. What it does
    # not name is left out.
    if weight_map:
        tensors = {n: t for n, t in tensors.items() if weight_map.get(n) == bin_name}
    atomic_write(shard, lambda file: write_safetensors(file, tensors))


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of one pickled shard, memory-mapped where its format allows it."""
    records: set[int] | None = None
    try:
        # Files older than PyTorch 1.6 are not zip archives and cannot be mapped.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                records = {info.file_size for info in archive.infolist()}
        content: Any = torch.load(
            path, map_location="cpu", weights_only=True, mmap=records is not None
        )
    except pickle.UnpicklingError as error:
        raise LestdError(
            f"{path} holds more than tensors, or is damaged, and was not loaded; nothing in it was "
            f"run; get the weights from a source you trust ({_reason(error)})"
        ) from error
    except Exception as error:
        # A damaged pickle can fail in the unpickler, the zip reader or a tensor's constructor.
        raise LestdError(
            f"{path} cannot be read as a PyTorch checkpoint ({_reason(error)}); download it again"
        ) from error
    if not isinstance(content, dict):
        raise LestdError(
            f"{path} holds a {type(content).__name__}; expected a map from names to tensors"
        )
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise LestdError(
                f"{path} holds a {type(tensor).__name__} under {name!r}; expected only tensors "
                "under their names"
            )
        if why := _not_plain(name, tensor, path.stat().st_size, records):
            shown = name if name.isprintable() else repr(name)
            raise LestdError(
                f"tensor {shown} in {path} {why}, which safetensors cannot hold; expected a dense "
                "tensor of a plain dtype with every element in the file"
            )
    return {name: tensor.resolve_conj().resolve_neg() for name, tensor in content.items()}


def _not_plain(name: str, tensor: Tensor, file_bytes: int, records: set[int] | None) -> str | None:
    """Why a tensor has no bytes of its own to be written; None if it has.

    Args:
        name: its name.
        tensor: the tensor.
        file_bytes: size of its file.
        records: bytes of the records of the archive that it is mapped from, if it is.
    """
    # A nested tensor is strided by its layout.
    if tensor.is_nested or tensor.layout != torch.strided or tensor.dtype not in DTYPE_NAMES:
        return f"is {'nested' if tensor.is_nested else tensor.layout} of {tensor.dtype}"
    if tensor.device.type != "cpu":
        return f"is on the device {tensor.device.type}, without data"
    # Expanded by strides of 0: a few bytes that would be written as any number.
    if tensor.untyped_storage().nbytes() < tensor.nbytes > file_bytes:
        return f"has the shape {list(tensor.shape)}, and fewer elements than that"
    # PyTorch compares the two where it reads a record, but not where it maps the file.
    if records is not None and tensor.untyped_storage().nbytes() not in records:
        return f"claims {tensor.untyped_storage().nbytes()} bytes, as no record of the file has"
    if not name.isprintable() or name == "__metadata__":
        return "has a name that no tensor may have"
    return None


def _reason(error: Exception) -> str:
    """Problem in one line, without PyTorch's advice to turn the protection off."""
    text = " ".join(str(error.__context__ or error).split())
    return text.partition(". ")[0][:200] or type(error).__name__


def _write_index(building: Path, shards: list[str]) -> None:
    headers = {shard: read_header(building / shard) for shard in shards}
    weight_map = {name: shard for shard, header in headers.items() for name in header}
    total = sum(ref.stored_bytes for header in headers.values() for ref in header.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(index, indent=2) + "\n"
    atomic_write(building / INDEX_FILE, lambda file: file.write(text.encode()))
