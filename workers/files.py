"""Files and directories that are complete or absent: temporary name, fsync, rename."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lestd_kernels.errors import LestdError, OutOfSpaceError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that appears under `path`, complete and on disk, or not at all.

    Temp file in the same directory, fsync, rename, fsync of the directory; an existing file is
    replaced. Permissions follow the umask.

    Args:
        path: the file; its directory must exist.
        write: gets the open temp file.

    Raises:
        LestdError: no space left.
    """
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
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or quota into a sentence; other errors pass.

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


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
