"""A lease: what a lock is on a disk, for a run directory in an object store.

An object that its holder writes again every few seconds. Whoever finds it unchanged for longer
than `LEASE_SECONDS`, by the store's own clock, takes the holder for dead and takes it over.

Every write of it names the version that it replaces, and the store refuses it where there is
another: of several drivers that take a lease over one gets it, and none that wakes up late writes
over its successor's. What a store cannot stop is what such a driver writes elsewhere: before it
writes what another must not find, the holder asks the store whether the lease is still its own.
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
from typing import Any

from upath import UPath

from lestd_kernels.errors import LestdError
from workers.storage.names import TEMPORARY
from workers.storage.objects import ask, delete, look_up, put_if, version_of

LEASE_SECONDS = 30.0
"""A lease that was not renewed for so long is nobody's."""
_HEARTBEAT_SECONDS = 5.0
_PAUSE_SECONDS = 1.0


@dataclass(frozen=True)
class _Seen:
    """A lease as the store has it: what it says, its version, and when it was written, by the
    store's clock."""

    says: dict[str, Any]
    version: str
    written: datetime


@dataclass
class _Mine:
    """Contents of a lease: its holder, and how often it was written, so that no two are alike."""

    lease: UPath
    token: str
    holder: str
    renewals: int = 0

    def put(self, over: _Seen | None) -> None:
        """Write it in the place of what was seen, if that is still there."""
        self.renewals += 1
        says = {"holder": self.holder, "token": self.token, "renewals": self.renewals}
        put_if(self.lease, json.dumps(says).encode(), None if over is None else over.version)

    def wrote(self, seen: _Seen | None) -> bool:
        """Whether what was seen is this one's."""
        return seen is not None and seen.says.get("token") == self.token


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
        LestdError: another driver holds it and renews it, or the store refuses or does not answer.
    """
    mine = _Mine(lease, secrets.token_hex(16), f"process {os.getpid()} on {socket.gethostname()}")
    _acquire(mine, directory)
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(mine, ended), daemon=True)
    renewing.start()

    def check() -> None:
        # Where the whole process slept, the thread that renews has not seen anything yet.
        if not mine.wrote(_look(lease)):
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
            if mine.wrote(_look(lease)):
                lease.unlink()


def is_held(lease: UPath) -> bool:
    """Whether a driver renews this lease, by the clock of this machine; writes nothing."""
    seen = _look(lease)
    return seen is not None and (datetime.now(UTC) - seen.written).total_seconds() < LEASE_SECONDS


def _acquire(mine: _Mine, directory: UPath) -> None:
    first: _Seen | None = None
    while not mine.wrote(seen := _look(mine.lease)):
        if seen is not None:
            if first is not None and seen != first:
                raise LestdError(
                    f"another driver ({seen.says.get('holder', 'unknown')}) works on {directory}; "
                    "wait for it to end, or stop it, then run the same command again"
                )
            first = seen
            if (_store_time(mine.lease) - seen.written).total_seconds() <= LEASE_SECONDS:
                time.sleep(_PAUSE_SECONDS)
                continue
        mine.put(over=seen)


def _renew(mine: _Mine, ended: threading.Event) -> None:
    while not ended.wait(_HEARTBEAT_SECONDS):
        # What a store does not answer now it may the next time.
        with suppress(Exception):
            seen = _look(mine.lease)
            if not mine.wrote(seen):
                return
            mine.put(over=seen)


def _look(lease: UPath) -> _Seen | None:
    # What is read may be later than its version: then nothing is written over that.
    found = look_up(lease)
    content = ask(lease, lambda: lease.fs.cat_file(lease.path))
    if found is None or content is None:
        return None
    says: Any = None
    with suppress(ValueError):
        says = json.loads(content)
    return _Seen(says if isinstance(says, dict) else {}, *version_of(found))


def _store_time(lease: UPath) -> datetime:
    """Time of the store's clock: when it says that a new object was written."""
    probe = lease.with_name(f"{TEMPORARY}clock-{secrets.token_hex(8)}")
    put_if(probe, b"-", None)
    try:
        found = look_up(probe)
        assert found is not None  # Nobody else knows its name.
        return version_of(found)[1]
    finally:
        delete(probe)
