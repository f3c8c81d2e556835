"""Objects of a store, for `workers.storage.files`: read, written, listed and deleted.

A request that another try may mend is made again: for some seconds where nothing is lost if it
fails, and for longer where it writes, because what is to be written took work.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, BinaryIO, cast

from upath import UPath

from lestd_kernels.errors import LestdError
from workers.storage.retries import TransientError, patiently
from workers.storage.untrusted_files import MAX_SMALL_BYTES

CHUNK_BYTES = 8 * 2**20
# About two minutes, as `workers.storage.ranges` bears a store that sends nothing.
_WRITE_TRIES = 9
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "DefaultCredentialsError",
}
# Of S3, where a condition does not hold.
_NOT_THAT_VERSION = ("PreconditionFailed", "ConditionalRequestConflict")
_EXTRAS = {"s3": "lestd[s3]", "s3a": "lestd[s3]", "gs": "lestd[gcs]", "gcs": "lestd[gcs]"}


@contextmanager
def explain_store_errors(place: UPath | str) -> Iterator[None]:
    """Turn whatever fsspec and the stores behind it say into a sentence.

    Raises:
        LestdError: `TransientError` where another try may help.
    """
    try:
        yield
    except LestdError:
        raise
    except ImportError as error:
        protocol = str(place).partition("://")[0]
        package = _EXTRAS.get(protocol)
        how = f"pip install {package!r}" if package else "install what it names"
        raise LestdError(
            f"{place} needs a package that is not installed ({error}); {how}"
        ) from error
    except FileNotFoundError as error:
        raise LestdError(
            f"{place} does not exist ({_said(error)}); check the spelling, and that endpoint and "
            "credentials are those of its store"
        ) from error
    except PermissionError as error:
        raise LestdError(
            f"access to {place} was refused ({_said(error)}); check the credentials in the "
            "environment, on every machine that uses it"
        ) from error
    except ValueError as error:
        raise LestdError(
            f"{place} cannot be read or written ({_said(error)}); expected a URL such as "
            "s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or hf://OWNER/NAME"
        ) from error
    except Exception as error:
        # Every store's client has errors of its own for a dead connection.
        if type(error).__name__ in _NO_CREDENTIALS:
            raise LestdError(
                f"{place} cannot be used without credentials ({_said(error)}); put them into the "
                "environment or the store's own configuration, on every machine that uses it"
            ) from error
        raise TransientError(
            f"{place} cannot be read or written ({type(error).__name__}: {_said(error)}); check "
            "the connection, and run the same command again"
        ) from error


def _said(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def ask(path: UPath, request: Callable[[], Any]) -> Any:
    """The answer to a request about `path`, which is made again if need be; None if it is absent.

    Raises:
        LestdError: the store refuses, or does not answer.
    """

    def once() -> Any:
        with explain_store_errors(path), suppress(FileNotFoundError):
            return request()
        return None

    return patiently(once)


def upload(path: UPath, write: Callable[[BinaryIO], object]) -> None:
    """Put an object that `write` fills; it is called anew for every try.

    Raises:
        LestdError: the store refuses, or does not answer; or what `write` raises.
    """
    patiently(partial(_upload, path, write), _WRITE_TRIES)


def _upload(path: UPath, write: Callable[[BinaryIO], object]) -> None:
    with explain_store_errors(path):
        file = path.fs.open(path.path, "wb")
    target = _Upload(path, file)
    try:
        try:
            write(cast(BinaryIO, target))
        except TransientError as error:
            # What `write` reads from has been tried for long by those who read.
            error.worth_a_try = target.failed
            raise
        with explain_store_errors(path):
            file.close()
    except BaseException:
        # To close the file would be to publish what there is of it.
        file.closed = True
        with suppress(Exception):
            file.discard()
        raise


class _Upload(io.RawIOBase):
    """Feeds an object's upload in small chunks: fsspec keeps a second copy of what it is given.

    Attributes:
        failed: whether the store did not take what it was given.
    """

    def __init__(self, path: UPath, file: Any) -> None:
        self._path = path
        self._file = file
        self.failed = False

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell())

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.failed = True
        with explain_store_errors(self._path):
            for start in range(0, len(view), CHUNK_BYTES):
                self._file.write(view[start : start + CHUNK_BYTES])
        self.failed = False
        return len(view)


def put_if(path: UPath, content: bytes, version: str | None) -> bool:
    """Put a small object where the store has this version of it; whether it was put.

    Of several who ask at once the store lets one.

    Args:
        path: the object.
        content: what to put.
        version: see `version_of`; None where there must be no object.

    Raises:
        LestdError: the store refuses, or does not answer.
    """
    fs = path.fs

    def put() -> bool:
        with explain_store_errors(path):
            try:
                if version is None:
                    fs.pipe_file(path.path, content, mode="create")
                elif path.protocol == "gs":  # gcsfs has no word for it.
                    bucket, key, _ = fs.split_path(path.path)
                    condition = {"uploadType": "media", "ifGenerationMatch": version}
                    where = f"{fs._location}/upload/storage/v1/b/{{}}/o"
                    fs.call("POST", where, bucket, name=key, data=content, **condition)
                else:
                    fs.pipe_file(path.path, content, IfMatch=version)
            except FileExistsError:
                return False
            except FileNotFoundError:
                if version is None:
                    raise
                return False
            except OSError as error:
                answer = getattr(error.__cause__, "response", None) or {}
                if answer.get("Error", {}).get("Code") in _NOT_THAT_VERSION:
                    return False
                raise
        return True

    return patiently(put)


def version_of(entry: dict[str, Any]) -> tuple[str, datetime]:
    """Of an object that `look_up` has found: its version, which another content has not, and when
    it was written, by the store's clock."""
    written: datetime = entry.get("LastModified") or entry["mtime"]
    version = str(entry.get("generation") or entry["ETag"])
    return version, written if written.tzinfo else written.replace(tzinfo=UTC)


def open_object(path: UPath) -> BinaryIO:
    """Open an object to be read from its start, without fetching much more than is asked for.

    Raises:
        LestdError: it is absent, or cannot be read; so does every read.
    """

    def once() -> Any:
        with explain_store_errors(path):
            return path.fs.open(path.path, "rb", block_size=CHUNK_BYTES, cache_type="readahead")

    return cast(BinaryIO, _Download(path, patiently(once)))


class _Download(io.RawIOBase):
    """Reads an object with patience."""

    def __init__(self, path: UPath, file: Any) -> None:
        self._path = path
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        def once() -> int:
            with explain_store_errors(self._path):
                return int(self._file.readinto(buffer))

        return patiently(once)


def read_objects(paths: Sequence[UPath]) -> list[bytes | OSError]:
    """Contents of small objects of one store, many at a time; the error of one that is absent, or
    has more than `MAX_SMALL_BYTES`.

    Raises:
        LestdError: one cannot be read.
    """
    fs, names = paths[0].fs, [path.path for path in paths]
    stop = MAX_SMALL_BYTES + 1

    def read(name: str, content: bytes | Exception) -> bytes | OSError:
        if isinstance(content, bytes) and len(content) == stop:
            said = f"more than {MAX_SMALL_BYTES} bytes"
            return OSError(errno.EINVAL, said, name)
        if isinstance(content, bytes | FileNotFoundError):
            return content
        if fs.info(name)["size"] == 0:  # It has no range that could be asked for.
            return b""
        raise content

    def once() -> list[bytes | OSError]:
        with explain_store_errors(paths[0]):
            contents = fs.cat_ranges(names, 0, stop, on_error="return")
            return [read(*found) for found in zip(names, contents, strict=True)]

    return patiently(once)


def look_up(path: UPath) -> dict[str, Any] | None:
    """Metadata of an object or a directory; None if the store has neither.

    Raises:
        LestdError: the store does not say.
    """
    return cast("dict[str, Any] | None", ask(path, lambda: path.fs.info(path.path)))


def entries(directory: UPath) -> list[dict[str, Any]]:
    """Entries of a directory, not of those below it; none where there is no directory.

    Raises:
        LestdError: the store does not say.
    """

    def listed() -> Any:
        directory.fs.invalidate_cache()
        return directory.fs.ls(directory.path, detail=True)

    found = ask(directory, listed) or []
    # An object of the directory's own name would be in the list.
    return [entry for entry in found if entry["name"].rstrip("/") != directory.path.rstrip("/")]


def copy_object(source: UPath, target: UPath) -> None:
    """Copy an object within one store.

    Raises:
        LestdError: the store refuses, or does not answer.
    """

    def once() -> None:
        with explain_store_errors(target):
            source.fs.cp_file(source.path, target.path)

    patiently(once, _WRITE_TRIES)


def delete(path: UPath) -> None:
    """Delete an object, if it is there.

    Raises:
        LestdError: it is still there, or the store does not answer.
    """
    _ask_to_delete(path, lambda: path.fs.rm_file(path.path))
    # A store may refuse without a word.
    found = look_up(path)
    if found is not None and found["type"] == "file":
        raise undeletable(path)


def delete_tree(path: UPath) -> None:
    """Delete all objects below a directory.

    Raises:
        LestdError: one is still there, or the store does not answer.
    """
    _ask_to_delete(path, lambda: path.fs.rm(path.path, recursive=True))
    if left := ask(path, lambda: path.fs.find(path.path)):
        raise undeletable(f"{path.protocol}://{left[0]}")


def _ask_to_delete(path: UPath, request: Callable[[], Any]) -> None:
    try:
        ask(path, request)
    except LestdError as error:
        if isinstance(error.__cause__, PermissionError):
            raise undeletable(path) from error
        raise


def undeletable(path: UPath | str) -> LestdError:
    """The error for an object that stays whatever is done."""
    return LestdError(
        f"{path} cannot be deleted; grant permission to delete (s3:DeleteObject in S3, "
        "storage.objects.delete in GCS), then run the same command again"
    )
