"""Files and directories that are complete or absent, on a disk or in an object store.

On a disk: temporary name, fsync, rename. In an object store there is no rename, and none is
needed: an object appears whole when its upload ends, and an upload that is given up leaves nothing.

A place is named by an `AnyPath`: a plain `pathlib.Path`, or for ``s3://`` and ``gs://`` a `UPath`,
which has the same methods over fsspec. What the two do differently is in this file, and how
objects are read and written in `workers.storage.objects`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import posixpath
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from upath import UPath

from lestd_kernels.errors import LestdError, OutOfSpaceError
from workers.storage import objects, ranges
from workers.storage.names import TEMPORARY
from workers.storage.untrusted_files import open_regular, read_regular

AnyPath = Path | UPath

# Of flock: another process has the lock.
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Protocols of stores whose objects appear whole and are listed at once.
_STORES = ("s3", "gs")
_GLOB_CHARACTERS = "*?[]{}"
_AT_ONCE = 8
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

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
    with objects.explain_store_errors(path):
        _ = path.fs
    return path


def as_source(url: str) -> UPath:
    """The file or directory that any URL of fsspec's names, to be read.

    Raises:
        LestdError: there is no such protocol, or its package is not installed.
    """
    with objects.explain_store_errors(url):
        ranges.open_store(url)
        return UPath(url)


def atomic_write(path: AnyPath, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that appears under `path`, complete and durable, or not at all.

    On a disk: temp file in the same directory, fsync, rename, fsync of the directory; permissions
    follow the umask. In an object store: one put, a multipart upload if it is large. An existing
    file is replaced.

    Args:
        path: the file; its directory must exist.
        write: gets the open file; in an object store it is called again where a try has failed.

    Raises:
        LestdError: no space left, or the store refuses or does not answer.
    """
    if isinstance(path, UPath):
        objects.upload(path, write)
        return
    temp = path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}")
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


def fsync_directory(directory: Path) -> None:
    """Make the names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(handle: int, directory: Path) -> bool:
    """Lock an open file in `directory`; whether no other process has it locked.

    Raises:
        LestdError: the file system has no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise LestdError(
            f"{directory} is on a file system without locks ({error.strerror}); mount it with "
            "flock, or choose another --run-dir and --out"
        ) from error
    return True


@contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or quota into a sentence.

    Raises:
        OutOfSpaceError: no space was left while writing `path`.
    """
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


def open_binary(path: AnyPath) -> BinaryIO:
    """Open a file to be read from its start, without fetching much more than is asked for.

    Raises:
        OSError: a local file cannot be read.
        LestdError: one in an object store cannot be; so does every read.
    """
    return objects.open_object(path) if isinstance(path, UPath) else open_regular(path)


def file_sha256(path: AnyPath) -> str:
    """sha256 (hex) of a file's content."""
    with open_binary(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def require_content(directory: Path, names: Iterable[str]) -> None:
    """Refuse git-LFS pointers in the place of files of a directory.

    Raises:
        LestdError: one of these files is one.
    """
    for name in sorted(names):
        with (directory / name).open("rb") as file:
            if is_lfs_pointer(file.read(len(_LFS_POINTER))):
                raise LestdError(lfs_pointer(str(directory / name)))


def is_lfs_pointer(beginning: bytes) -> bool:
    """Whether a file that begins so, with 8 bytes or more, stands for one that git-LFS fetches."""
    return len(beginning) >= 8 and _LFS_POINTER.startswith(beginning[: len(_LFS_POINTER)])


def lfs_pointer(path: str) -> str:
    """The sentence for such a file."""
    return (
        f"{path} is a git-LFS pointer, not the file that it stands for: run `git lfs install` and "
        "`git lfs pull` in that directory (git-lfs must be installed), or download the model by "
        "`hf download`"
    )


def read_file(path: AnyPath) -> bytes:
    """The content of a small file.

    Raises:
        OSError: a local file cannot be read, or is too large.
        LestdError: one elsewhere is absent or too large, or cannot be read.
    """
    return ranges.read_small(str(path)) if isinstance(path, UPath) else read_regular(path)


def read_files(paths: Sequence[AnyPath]) -> list[bytes | OSError]:
    """Contents of small files in one directory, from an object store many at a time.

    Returns:
        As many as `paths`; the error of a local file that cannot be read, of an object that is
        absent or too large.

    Raises:
        LestdError: an object store does not answer.
    """
    if paths and isinstance(paths[0], UPath):
        return objects.read_objects([cast(UPath, path) for path in paths])
    return [_read_local(cast(Path, path)) for path in paths]


def _read_local(path: Path) -> bytes | OSError:
    try:
        return read_regular(path)
    except OSError as error:
        return error


def file_size(path: AnyPath) -> int | None:
    """Bytes of a file; None where there is none.

    Raises:
        LestdError: the object store does not say. (fsspec's own `is_file` takes that for absence.)
    """
    if isinstance(path, UPath):
        found = objects.look_up(path)
        return int(found["size"]) if found is not None and found["type"] == "file" else None
    return path.stat().st_size if path.is_file() else None


def is_file(path: AnyPath) -> bool:
    """Whether there is such a file.

    Raises:
        LestdError: the object store does not say.
    """
    return file_size(path) is not None


def is_directory(path: AnyPath) -> bool:
    """Whether there is such a directory; in an object store, whether it has objects below it.

    Raises:
        LestdError: the object store does not say.
    """
    return bool(objects.entries(path)) if isinstance(path, UPath) else path.is_dir()


def list_names(directory: AnyPath) -> list[str]:
    """Names of all entries of a directory, sorted; none where there is no directory.

    Raises:
        LestdError: the object store does not say.
    """
    if isinstance(directory, UPath):
        return sorted(_name(entry) for entry in objects.entries(directory))
    return sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []


def _name(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rpartition("/")[2]


def list_files(directory: AnyPath) -> dict[str, int]:
    """Files in a directory, not below it: name -> bytes. None where there is no directory."""
    return {name: size for name, size in _listed(directory) if size is not None}


def list_tree(directory: AnyPath, enter: Callable[[str], bool]) -> dict[str, int]:
    """Files in a directory and below it: path relative to it -> bytes, sorted.

    Args:
        directory: where to look; no link to a directory below it is followed.
        enter: asked of each directory below, by its relative path, whether to look into it.
    """
    found: dict[str, int] = {}

    def look(where: AnyPath, prefix: str) -> None:
        for name, size in _listed(where):
            if size is not None:
                found[prefix + name] = size
            elif enter(prefix + name):
                look(where / name, f"{prefix}{name}/")

    look(directory, "")
    return dict(sorted(found.items()))


def _listed(directory: AnyPath) -> list[tuple[str, int | None]]:
    """Files with their bytes and directories with None, by name; no link to a directory."""
    found: dict[str, int | None] = {}
    if isinstance(directory, UPath):
        for entry in objects.entries(directory):
            found[_name(entry)] = entry["size"] or 0 if entry["type"] == "file" else None
    elif directory.is_dir():
        for path in directory.iterdir():
            if path.is_file() or not path.is_symlink():
                found[path.name] = path.stat().st_size if path.is_file() else None
    return sorted(found.items())


def make_directory(path: AnyPath) -> None:
    """Make a directory and those above it; an object store has none, and makes buckets instead."""
    if isinstance(path, Path):
        path.mkdir(parents=True, exist_ok=True)


def remove_file(path: AnyPath) -> None:
    """Delete a file, if it is there.

    Raises:
        LestdError: the object store does not delete it.
    """
    objects.delete(path) if isinstance(path, UPath) else path.unlink(missing_ok=True)


def remove_tree(path: AnyPath) -> None:
    """Delete whatever is below `path`, and `path`, as far as it is there; of a link, the link.

    Raises:
        OSError: a local file cannot be deleted.
        LestdError: the object store does not delete it.
    """
    if isinstance(path, UPath):
        objects.delete_tree(path)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def copy_file(source: AnyPath, target: AnyPath) -> None:
    """Copy a file, complete or not at all; within one object store nothing passes through here.

    Raises:
        LestdError: as `atomic_write`.
    """
    if isinstance(source, UPath) and isinstance(target, UPath) and source.fs is target.fs:
        objects.copy_object(source, target)
        return

    def copy(file: BinaryIO) -> None:
        with open_binary(source) as original:
            shutil.copyfileobj(original, file, length=objects.CHUNK_BYTES)

    atomic_write(target, copy)


def link_or_copy(path: AnyPath, target: AnyPath) -> None:
    """The same file under a second name: a hard link, a copy where links are impossible."""
    try:
        if isinstance(path, UPath) or isinstance(target, UPath) or path.is_symlink():
            raise OSError("no links there")
        os.link(path, target)
    except OSError:  # Another file system, or one without links.
        copy_file(path, target)


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
