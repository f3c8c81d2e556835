"""Byte ranges of files that lie elsewhere: on the Hub, in an object store, on a web server.

A file is named by a URL: ``hf://OWNER/NAME@COMMIT/PATH`` (`workers.storage.hub`), or any URL that
fsspec knows (``s3://``, ``gs://``, ...), whose credentials and endpoint come from the environment,
as the store's own tools take them. A range goes straight into memory that the caller gives, cut
into chunks that are fetched at the same time; a chunk whose connection drops goes on from the byte
it has reached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event
from typing import Any

from lestd_kernels.errors import LestdError
from workers.storage.objects import explain_store_errors
from workers.storage.retries import TransientError, patiently
from workers.storage.untrusted_files import MAX_SMALL_BYTES

_PARALLEL = 8
_CHUNK_BYTES = 32 * 1024 * 1024
# A store's answer passes through memory as a whole: _PARALLEL of them at a time.
_STORE_ANSWER_BYTES = 8 * 1024 * 1024
# Without a byte between them; about two minutes.
_TRIES = 9


def is_url(name: str) -> bool:
    """Whether this is the URL of a file, not a path on this machine."""
    return "://" in name


def stat(url: str) -> tuple[int, str]:
    """Size in bytes and ETag of a file; the ETag is empty where the store has none.

    Raises:
        LestdError: the file cannot be looked up.
    """
    return patiently(partial(_stat, url))


def file_version(size: int, etag: str) -> str:
    """Version of a file's contents, in words."""
    return f"{size} bytes" + (f" with ETag {etag}" if etag else "")


def check_unchanged(url: str, version: str) -> None:
    """Compare a file with what it was when its header was read.

    Raises:
        LestdError: it is another, or cannot be looked up.
    """
    found = file_version(*stat(url))
    if found != version:
        raise LestdError(
            f"{url} has changed since its header was read: it had {version}, and has {found}; "
            "restore it, or start over with --fresh"
        )


def read_ranges(url: str, version: str, parts: Iterable[tuple[int, memoryview]]) -> None:
    """Fill each buffer with the bytes of a file from its start on.

    What has been read belongs to the version: the Hub's files are pinned by their commit, the
    others are looked up once more in the end.

    Args:
        url: the file.
        version: `file_version` when its header was read.
        parts: first byte and buffer of each range.

    Raises:
        LestdError: the file is missing, access is refused, it has changed, or it could not be
            read for about two minutes.
    """
    chunks = [
        (start + at, view[at : at + _CHUNK_BYTES])
        for start, view in parts
        for at in range(0, len(view), _CHUNK_BYTES)
    ]
    if not chunks:
        return
    stopped = Event()
    with ThreadPoolExecutor(min(_PARALLEL, len(chunks)), "read") as pool:
        try:
            for done in [pool.submit(_fill, url, version, *chunk, stopped) for chunk in chunks]:
                done.result()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if not _is_hub(url):
        check_unchanged(url, version)


def _fill(url: str, version: str, start: int, view: memoryview, stopped: Event) -> None:
    """Read one chunk; as long as bytes come, any number of failures is borne."""
    done = failures = 0
    while done < len(view):
        before = done
        try:
            if failures and not _is_hub(url):
                check_unchanged(url, version)  # It may be gone, or shorter.
            for piece in _stream(url, start + done, start + len(view)):
                if stopped.is_set():
                    return
                if done + len(piece) > len(view):
                    raise _without_ranges(url)
                view[done : done + len(piece)] = piece
                done += len(piece)
            if done < len(view):
                check_unchanged(url, version)
                raise TransientError(
                    f"{url} was cut off at byte {start + done} again and again; check the "
                    "connection, and run the same command again to continue"
                )
        except TransientError as error:
            failures = 1 if done > before else failures + 1
            if failures == _TRIES or not error.worth_a_try:
                raise
            if stopped.wait(error.pause_seconds(failures)):
                return


def _is_hub(url: str) -> bool:
    return url.startswith("hf://")


def _stream(url: str, start: int, stop: int) -> Iterator[bytes]:
    if _is_hub(url):
        from workers.storage.hub import stream_hub_file

        yield from stream_hub_file(url, start, stop)
        return
    with explain_store_errors(url):
        store, path = open_store(url)
        read = partial(_read_http, store) if _is_http(url) else store.cat_file
        while start < stop:
            end = min(start + _STORE_ANSWER_BYTES, stop)
            answer = read(path, start=start, end=end)
            if not answer:
                return
            yield answer
            start += len(answer)


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _read_http(store: Any, url: str, start: int, end: int) -> bytes:
    """As the store's `cat_file`, which takes in a whole file where a server ignores the range."""
    import fsspec.asyn

    async def fetch() -> bytes:
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        options = dict(store.kwargs)
        headers = options.pop("headers", {}) | headers
        session = await store.set_session()
        async with session.get(store.encode_url(url), headers=headers, **options) as response:
            if response.status == 404:
                raise FileNotFoundError(url)
            response.raise_for_status()
            given = response.headers.get("Content-Range", "")
            if response.status != 206 or not given.startswith(f"bytes {start}-"):
                raise _without_ranges(url)  # The body is not read.
            answer = bytearray()  # A body may go on without end.
            while piece := await response.content.read(end - start - len(answer)):
                answer += piece
            return bytes(answer)

    return bytes(fsspec.asyn.sync(store.loop, fetch))


def _without_ranges(url: str) -> LestdError:
    return LestdError(
        f"the server of {url} does not answer range requests; copy the model to a directory and "
        "give that"
    )


def _stat(url: str) -> tuple[int, str]:
    if _is_hub(url):
        from workers.storage.hub import stat_hub_file

        return stat_hub_file(url)
    with explain_store_errors(url):
        store, path = open_store(url)
        store.invalidate_cache()
        info = store.info(path)
        if info.get("size") is None or info.get("partial") is False:
            raise _without_ranges(url)
        return int(info["size"]), str(info.get("ETag") or info.get("etag") or "").strip('"')


def read_small(url: str) -> bytes:
    """The content of a small file of a store.

    Raises:
        LestdError: it is missing, cannot be read, or has more than `MAX_SMALL_BYTES`.
    """
    size, etag = stat(url)
    if size > MAX_SMALL_BYTES:
        raise LestdError(
            f"{url} has {size} bytes, expected at most {MAX_SMALL_BYTES}; put the right file there"
        )
    content = bytearray(size)
    read_ranges(url, file_version(size, etag), [(0, memoryview(content))])
    return bytes(content)


def open_store(url: str) -> tuple[Any, str]:
    """fsspec's filesystem for a URL, and the path in it; imports what the protocol needs."""
    import fsspec.core

    store, path = fsspec.core.url_to_fs(url)
    return store, str(path)
