"""Files and directories that are complete or absent, on a disk or in an object store.

On a disk: temporary name, fsync, rename. In an object store there is no rename, and none is
needed: an object appears whole when its upload ends, and an upload that is given up leaves nothing.

A place is named by an `AnyPath`: a plain `pathlib.Path`, or for ``s3://`` and ``gs://`` a `UPath`,
which has the same methods over fsspec. What the two do differently is in this file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import posixpath
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from upath import UPath

from lestd_kernels.errors import LestdError, OutOfSpaceError, first_line

AnyPath = Path | UPath

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Stores whose objects appear whole and are listed at once: protocol -> extra of lestd.
_STORES = {"s3": "s3", "gs": "gcs"}
_GLOB_CHARACTERS = "*?[]{}"
_CHUNK_BYTES = 8 * 2**20
_AT_ONCE = 8

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


def as_path(text: str) -> AnyPath:
    """The place that a user names: a local path, ``file://``, ``s3://`` or ``gs://``.

    Returns:
        An absolute path without ``..``; unlike `Path.resolve`, a link at its end is kept.

    Raises:
        LestdError: another protocol, an extra that is not installed, or a URL that names no
            directory in a bucket.
    """
    protocol, separator, rest = text.partition("://")
    if protocol == "file" and rest.startswith("/"):
        separator, text = "", rest
    if not separator:
        return Path(os.path.abspath(text))  # noqa: PTH100
    if protocol not in _STORES:
        raise LestdError(
            f"{text} cannot be written to: expected a local path, or a URL that begins with "
            f"file:///, {' or '.join(f'{known}://' for known in _STORES)}"
        )
    key = posixpath.normpath(rest).lstrip("/")
    if "/" not in key or key.startswith(".."):
        raise LestdError(f"{text} must name a directory in a bucket: {protocol}://BUCKET/DIRECTORY")
    if set(key) & set(_GLOB_CHARACTERS):
        raise LestdError(f"{text} has one of {_GLOB_CHARACTERS} in it; choose another name")
    # Other processes write there too: what was listed a moment ago says nothing.
    path = UPath(f"{protocol}://{key}", use_listings_cache=False)
    try:
        _ = path.fs
    except ImportError as error:
        raise LestdError(
            f"{text} needs a package that is not installed ({first_line(error)}): pip install "
            f'"lestd[{_STORES[protocol]}]"'
        ) from error
    return path


def atomic_write(path: AnyPath, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that appears under `path`, complete and durable, or not at all.

    On a disk: temp file in the same directory, fsync, rename, fsync of the directory; permissions
    follow the umask. In an object store: one put, a multipart upload if it is large. An existing
    file is replaced.

    Args:
        path: the file; its directory must exist.
        write: gets the open file.

    Raises:
        LestdError: no space left, or the store refuses or does not answer.
    """
    if isinstance(path, UPath):
        _upload(path, write)
        return
    temp = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(8)}")
    with explain_os_errors(path):
        try:
            with temp.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temp.replace(path)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)


def _upload(path: UPath, write: Callable[[BinaryIO], object]) -> None:
    with _explain_store_errors(path):
        file = path.fs.open(path.path, "wb")
    try:
        write(cast(BinaryIO, _Upload(path, file)))
    except BaseException:
        # To close the file would be to publish what there is of it.
        file.closed = True
        with _explain_store_errors(path):
            file.discard()
        raise
    with _explain_store_errors(path):
        file.close()


class _Upload(io.RawIOBase):
    """Feeds an object's upload in small chunks: fsspec keeps a second copy of what it is given."""

    def __init__(self, path: UPath, file: Any) -> None:
        self._path = path
        self._file = file

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell())

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        with _explain_store_errors(self._path):
            for start in range(0, len(view), _CHUNK_BYTES):
                self._file.write(view[start : start + _CHUNK_BYTES])
        return len(view)


def fsync_directory(directory: Path) -> None:
    """Make the names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def building_directory(path: Path, busy: str) -> Iterator[None]:
    """An empty directory that one process builds in and renames when it is whole.

    What a killed process left in it is removed first; what this one leaves under that name is
    removed at the end. The lock ends with the process.

    Raises:
        LestdError: another process builds there; `busy` is the sentence.
    """
    path.mkdir(exist_ok=True)
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LestdError(busy) from None
        for leftover in path.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        try:
            yield
        finally:
            if path.exists():
                shutil.rmtree(path)
    finally:
        os.close(handle)


@contextmanager
def explain_os_errors(path: AnyPath) -> Iterator[None]:
    """Turn a full disk or quota, and whatever an object store says, into a sentence.

    Raises:
        OutOfSpaceError: no space was left while writing `path`.
        LestdError: the object store of `path` refuses, or does not answer.
    """
    if isinstance(path, UPath):
        with _explain_store_errors(path):
            yield
        return
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        free = shutil.disk_usage(path.parent).free
        raise OutOfSpaceError(
            f"no space left while writing {path} ({error.strerror}; {free / 1e9:.2f} GB free "
            f"there); free some or write elsewhere, and give the same command again; compress and "
            "convert continue where they stopped"
        ) from error


@contextmanager
def _explain_store_errors(path: UPath) -> Iterator[None]:
    try:
        yield
    except LestdError:
        raise
    except Exception as error:
        # Every store's client has errors of its own for a dead connection or absent credentials.
        raise LestdError(
            f"{path} cannot be read or written ({type(error).__name__}: {first_line(error)}); "
            "check the address, the credentials and the network, then run the same command again"
        ) from error


def open_binary(path: AnyPath) -> BinaryIO:
    """Open a file to be read from its start, without fetching much more than is asked for."""
    if isinstance(path, UPath):
        opened = path.fs.open(path.path, "rb", block_size=_CHUNK_BYTES, cache_type="readahead")
        return cast(BinaryIO, opened)
    return path.open("rb")


def file_sha256(path: AnyPath) -> str:
    """sha256 (hex) of a file's content."""
    with open_binary(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def read_files(paths: Sequence[AnyPath]) -> list[bytes | OSError]:
    """Contents of small files in one directory, from an object store many at a time.

    Returns:
        As many as `paths`; the error of a local file that cannot be read.
    """
    if paths and isinstance(paths[0], UPath):
        objects = [cast(UPath, path).path for path in paths]
        contents = paths[0].fs.cat(objects)
        return [contents[name] for name in objects]
    return [_read_local(cast(Path, path)) for path in paths]


def _read_local(path: Path) -> bytes | OSError:
    try:
        return path.read_bytes()
    except OSError as error:
        return error


def list_files(directory: AnyPath) -> dict[str, int]:
    """Files in a directory, not below it: name -> bytes. None where there is no directory."""
    if isinstance(directory, UPath):
        try:
            entries = directory.fs.ls(directory.path, detail=True)
        except FileNotFoundError:
            return {}
        sizes = {e["name"].rpartition("/")[2]: e["size"] for e in entries if e["type"] == "file"}
    elif directory.is_dir():
        sizes = {p.name: p.stat().st_size for p in directory.iterdir() if p.is_file()}
    else:
        return {}
    return dict(sorted(sizes.items()))


def make_directory(path: AnyPath) -> None:
    """Make a directory and those above it; an object store has none, and makes buckets instead."""
    if isinstance(path, Path):
        path.mkdir(parents=True, exist_ok=True)


def remove_tree(path: AnyPath) -> None:
    """Delete whatever is below `path`, and `path`, as far as it is there."""
    if isinstance(path, UPath):
        with suppress(FileNotFoundError):
            path.fs.rm(path.path, recursive=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def copy_file(source: AnyPath, target: AnyPath) -> None:
    """Copy a file, complete or not at all; within one object store nothing passes through here.

    Raises:
        LestdError: as `atomic_write`.
    """
    if isinstance(source, UPath) and isinstance(target, UPath) and source.fs is target.fs:
        with explain_os_errors(target):
            source.fs.cp_file(source.path, target.path)
        return
    with open_binary(source) as original:
        atomic_write(target, partial(shutil.copyfileobj, original, length=_CHUNK_BYTES))


def in_parallel(function: Callable[[_Item], _Answer], items: Iterable[_Item]) -> list[_Answer]:
    """`function` of every item, a few at a time: each may wait for a disk or a store."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(function, items))


def unseen(paths: Sequence[str]) -> list[str]:
    """Those of some local paths that do not exist as this machine sees them."""
    return [path for path in paths if not Path(path).exists()]


def not_shared(nodes: Sequence[str], paths: Sequence[str]) -> str:
    """The sentence for nodes that do not see what the driver sees."""
    return (
        f"{', '.join(paths)} cannot be seen from {', '.join(nodes)}: mount the same disk at the "
        "same path on every node, or give the model and --run-dir by URL, for example "
        "s3://BUCKET/DIRECTORY"
    )
