"""A lease: what a lock is on a disk, for a run directory in an object store.

An object that its holder writes again every few seconds. Whoever finds it unchanged for longer
than `LEASE_SECONDS`, by the store's own clock, takes the holder for dead and takes it over.

A store cannot stop a driver that was only asleep: before it writes what another driver must not
find, the holder asks the store whether the lease is still its own.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import cast

from upath import UPath

from lestd_kernels.errors import LestdError
from workers.storage.names import TEMPORARY
from workers.storage.objects import ask, delete, explain_store_errors, undeletable
from workers.storage.retries import patiently

LEASE_SECONDS = 30.0
"""A lease that was not renewed for so long is nobody's."""
_HEARTBEAT_SECONDS = 5.0
_PAUSE_SECONDS = 1.0


@dataclass(frozen=True)
class _Seen:
    """A lease as the store has it: its content, and when that was written, by the store's clock."""

    content: bytes
    written: datetime

    @property
    def holder(self) -> str:
        with suppress(ValueError, KeyError, TypeError):
            return str(json.loads(self.content)["holder"])
        return "unknown"


@contextmanager
def leased(lease: UPath, directory: UPath) -> Iterator[Callable[[], None]]:
    """Hold the lease while the context lasts.

    Waits for the end of a lease that nobody renews, at most `LEASE_SECONDS`.

    Args:
        lease: the object.
        directory: what it is about, for messages.

    Yields:
        A function that asks the store, and raises LestdError when another driver has taken the
        lease over.

    Raises:
        LestdError: another driver holds it and renews it, it was left and cannot be deleted, or
            the store does not answer.
    """
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    content = json.dumps({"holder": holder, "token": secrets.token_hex(16)}).encode()
    with explain_store_errors(lease):
        _acquire(lease, content, directory)
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(lease, content, ended), daemon=True)
    renewing.start()

    def check() -> None:
        # Where the whole process slept, the thread that renews has not seen anything yet.
        seen = _look(lease)
        if seen is None or seen.content != content:
            raise LestdError(
                f"another driver has taken over {directory}, because this one was not heard of for "
                f"{LEASE_SECONDS:.0f} s; let it finish, or stop it and run the same command again"
            )

    try:
        yield check
    finally:
        ended.set()
        renewing.join()
        # A lease that cannot be given back ends by itself.
        with suppress(Exception):
            if (seen := _look(lease)) and seen.content == content:
                lease.unlink()


def is_held(lease: UPath) -> bool:
    """Whether a driver renews this lease, by the clock of this machine; writes nothing."""
    seen = _look(lease)
    return seen is not None and (datetime.now(UTC) - seen.written).total_seconds() < LEASE_SECONDS


def _acquire(lease: UPath, content: bytes, directory: UPath) -> None:
    first: _Seen | None = None
    while not _create(lease, content):
        seen = _look(lease)
        if seen is None:  # Given up a moment ago.
            time.sleep(_PAUSE_SECONDS)
            continue
        if seen.content == content:  # The answer to our put was lost, and it was put again.
            return
        if first is not None and seen != first:
            raise LestdError(
                f"another driver ({seen.holder}) works on {directory}; wait for it to end, or stop "
                "it, then run the same command again"
            )
        first = seen
        if (_store_time(lease) - seen.written).total_seconds() > LEASE_SECONDS:
            with suppress(FileNotFoundError, PermissionError):
                lease.fs.rm_file(lease.path)
            if _look(lease) == seen:  # Another driver's would be another.
                raise undeletable(lease)
        else:
            time.sleep(_PAUSE_SECONDS)


def _create(lease: UPath, content: bytes) -> bool:
    """Write the lease where there is none, which the store decides; whether it was written."""

    def create() -> bool:
        with explain_store_errors(lease):
            try:
                lease.fs.pipe_file(lease.path, content, mode="create")
            except FileExistsError:
                return False
            return True

    return patiently(create)


def _renew(lease: UPath, content: bytes, ended: threading.Event) -> None:
    while not ended.wait(_HEARTBEAT_SECONDS):
        # What a store does not answer now it may the next time.
        with suppress(Exception):
            seen = _look(lease)
            if seen is None or seen.content != content:
                return
            lease.fs.pipe_file(lease.path, content)


def _look(lease: UPath) -> _Seen | None:
    return cast(
        "_Seen | None",
        ask(lease, lambda: _Seen(lease.fs.cat_file(lease.path), _written(lease))),
    )


def _store_time(lease: UPath) -> datetime:
    """What time it is for the store: when it says that a new object was written."""
    probe = lease.with_name(f"{TEMPORARY}clock-{secrets.token_hex(8)}")
    probe.fs.pipe_file(probe.path, b"-")
    try:
        return _written(probe)
    finally:
        delete(probe)


def _written(path: UPath) -> datetime:
    written: datetime = path.fs.modified(path.path)
    return written if written.tzinfo else written.replace(tzinfo=UTC)
