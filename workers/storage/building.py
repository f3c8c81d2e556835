"""Paths that LeSTD owns by name: created, recognized, replaced and deleted.

A directory is built beside its name, and gets it when it is whole:

    .OUT.assembling/    made by the process that works in it and has it locked
        .lestd          the marker, made with it and removed last
        new/            what is being built
        old/            what OUT was, until `new` is there
        removed/        what is being deleted

Whoever comes next finds OUT, or gives it its name back, and deletes the rest. No link is followed:
not to a directory that would be built in or emptied, not to a file that would be locked or written.
What has such a name and lacks the marker is another's: it is refused, and stays as it is.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lestd_kernels.errors import LestdError
from workers.storage.files import (
    AnyPath,
    fsync_directory,
    list_names,
    make_directory,
    remove_tree,
    try_lock,
)
from workers.storage.names import TEMPORARY

MARKER = ".lestd"
# What open(2) says of a link, and of what is no directory or no file.
_ANOTHER_KIND = (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO)


def is_free(out: Path) -> bool:
    """Whether a finished directory can get this name: none has it, or a plain empty directory."""
    if out.is_symlink() or os.path.ismount(out):
        return False
    return not out.exists() or (out.is_dir() and not any(out.iterdir()))


def open_own_file(path: Path, flags: int = os.O_CREAT) -> int:
    """Open a file that is ours by its name, to be locked or written; returns the descriptor.

    Raises:
        LestdError: it is a link, has a second name, or is no file: what is written would be
            another's.
        OSError: it cannot be opened.
    """
    another = LestdError(
        f"{path} is a link or no plain file, and nothing that lestd has made; move it away, and "
        "run the same command again"
    )
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o666)
    except OSError as error:
        raise another if error.errno in _ANOTHER_KIND else error from None
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(handle)
        raise another
    return handle


def is_same(handle: int, path: Path) -> bool:
    """Whether an open file still has its name: one that was removed meanwhile locks nothing."""
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


def empty_own_directory(directory: Path, marker: str) -> None:
    """Delete what is in a directory of ours, and last the file that says so.

    Raises:
        LestdError: it has no such file, or is write-protected.
    """
    names = list_names(directory)
    others = [name for name in names if not name.startswith(TEMPORARY)]
    if others and marker not in names:
        raise LestdError(
            f"{directory} holds {others[0]}, but no {marker}, and is not deleted because lestd "
            "did not make it; move it away, and run the same command again"
        )
    require_removable(directory)
    for name in sorted(names, key=lambda name: name == marker):
        remove_tree(directory / name)


@contextmanager
def own_directory(path: Path, busy: str) -> Iterator[None]:
    """A directory of ours that one process works in; made, or found with the marker in it.

    The lock ends with the process.

    Raises:
        LestdError: another process works in it, `busy` is the sentence; or it is a link, a file or
            another's directory.
    """
    handle = _open_locked(path, busy)
    try:
        names = {entry.name for entry in path.iterdir()}
        if not names:
            (path / MARKER).touch(exist_ok=False)
        elif MARKER not in names:
            raise _anothers(path)
        yield
    finally:
        os.close(handle)


def _open_locked(path: Path, busy: str) -> int:
    while True:
        with suppress(FileExistsError):
            path.mkdir()
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # Removed since, by a process that has ended.
            continue
        except OSError as error:
            raise _anothers(path) if error.errno in _ANOTHER_KIND else error from None
        try:
            if not try_lock(handle, path.parent):
                raise LestdError(busy)
            if is_same(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _anothers(path: Path) -> LestdError:
    return LestdError(
        f"{path} is a link, a file or a directory that lestd has not made, and lestd works under "
        "that name; move it away, and run the same command again"
    )


def make_own_directory(path: AnyPath) -> None:
    """Make a directory that is ours by its name, in one of ours.

    Raises:
        LestdError: it is a link.
    """
    if isinstance(path, Path) and path.is_symlink():
        raise LestdError(f"{path} is a link, which lestd does not write through; move it away")
    make_directory(path)


@dataclass(frozen=True)
class Building:
    """A directory in the making.

    Attributes:
        out: the name that it is to get.
        place: the directory that it is built in.
    """

    out: Path
    place: Path

    @property
    def new(self) -> Path:
        """Where it is built."""
        return self.place / "new"

    @property
    def _old(self) -> Path:
        return self.place / "old"

    @property
    def _removed(self) -> Path:
        return self.place / "removed"

    def finish(self) -> None:
        """Give `new` its name; what had it is deleted, or keeps it if this fails.

        Raises:
            LestdError: the names cannot be changed.
        """
        try:
            if not is_free(self.out):
                require_removable(self.out)
                self.out.rename(self._old)
            self.new.rename(self.out)
            fsync_directory(self.out.parent)
        except OSError as error:
            raise self._unchanged(error) from error

    def remove_out(self) -> None:
        """Delete what has the name.

        Raises:
            LestdError: it cannot be deleted, and is as it was.
        """
        require_removable(self.out)
        try:
            self.out.rename(self._removed)
        except OSError as error:
            raise self._unchanged(error) from error

    def _unchanged(self, error: OSError) -> LestdError:
        return LestdError(
            f"{self.out} cannot be replaced ({error.strerror}), and stays as it was; check the "
            f"permissions of it and of {self.out.parent}, then run the same command again"
        )

    def clear(self) -> None:
        """Delete the rest, but first give what was at `out` its name back if nothing else has it.

        Raises:
            LestdError: it cannot get its name back.
        """
        if self._old.exists() and not is_free(self.out):
            self._old.rename(self._removed)  # Deleted in part, it is never to be OUT again.
        if self._old.exists():
            try:
                self._old.rename(self.out)
            except OSError as error:
                raise LestdError(
                    f"{self._old} is what {self.out} was, and cannot get its name back "
                    f"({error.strerror}); rename it, then run the same command again"
                ) from error
        for path in self.place.iterdir():
            if path.name != MARKER:
                remove_tree(path)


@contextmanager
def building_directory(out: Path, what: str, busy: str) -> Iterator[Building]:
    """An empty directory, ``.OUT.what/new``, that one process fills and gives the name `out`.

    Raises:
        LestdError: as `own_directory`.
    """
    building = Building(out, out.with_name(f".{out.name}.{what}"))
    with own_directory(building.place, busy):
        building.clear()
        building.new.mkdir()
        try:
            yield building
        finally:
            building.clear()
            (building.place / MARKER).unlink()
            building.place.rmdir()


def require_removable(directory: Path) -> None:
    """Refuse to delete what could be deleted in part only.

    Raises:
        LestdError: a directory in it, or it, is write-protected.
    """
    for folder, _, _ in os.walk(directory):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise LestdError(
                f"{folder} is write-protected, so {directory} cannot be replaced or deleted; allow "
                "it (chmod u+w), or choose another name"
            )
