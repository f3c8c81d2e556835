"""A lease: what a lock is on a disk, for a run directory in an object store.

An object that its holder writes again every few seconds. Whoever finds it unchanged for longer
than `LEASE_SECONDS`, by the store's own clock, takes the holder for dead and takes it over.

It is a courtesy, not a guard. A store cannot stop a driver that was only asleep, and need not: two
drivers of one run write the same bytes under the same names. The lease saves them the work.
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

from upath import UPath

from lestd_kernels.errors import LestdError
from workers.files import explain_os_errors

LEASE_SECONDS = 30.0
"""A lease that was not renewed for so long is nobody's."""
_HEARTBEAT_SECONDS = 5.0


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
        A function that raises LestdError when another driver has taken the lease over.

    Raises:
        LestdError: another driver holds it and renews it, or the store does not answer.
    """
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    content = json.dumps({"holder": holder, "token": secrets.token_hex(16)}).encode()
    with explain_os_errors(lease):
        _acquire(lease, content, directory)
    ended, lost = threading.Event(), threading.Event()
    renewing = threading.Thread(target=_renew, args=(lease, content, ended, lost), daemon=True)
    renewing.start()

    def check() -> None:
        if lost.is_set():
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
    while True:
        try:
            # The store writes it only where there is none.
            lease.fs.pipe_file(lease.path, content, mode="create")
            return
        except FileExistsError:
            pass
        seen = _look(lease)
        if seen is None:
            continue
        if first is not None and seen != first:
            raise LestdError(
                f"another driver ({seen.holder}) works on {directory}; wait for it to end, or stop "
                "it, then run the same command again"
            )
        first = seen
        if (_store_time(lease) - seen.written).total_seconds() > LEASE_SECONDS:
            lease.unlink(missing_ok=True)
        else:
            time.sleep(1)


def _renew(lease: UPath, content: bytes, ended: threading.Event, lost: threading.Event) -> None:
    while not ended.wait(_HEARTBEAT_SECONDS):
        # What a store does not answer now it may the next time.
        with suppress(Exception):
            seen = _look(lease)
            if seen is None or seen.content != content:
                lost.set()
                return
            lease.fs.pipe_file(lease.path, content)


def _look(lease: UPath) -> _Seen | None:
    try:
        return _Seen(lease.fs.cat_file(lease.path), _written(lease))
    except FileNotFoundError:
        return None


def _store_time(lease: UPath) -> datetime:
    """What time it is for the store: when it says that a new object was written."""
    probe = lease.with_name(f".tmp-clock-{secrets.token_hex(8)}")
    probe.fs.pipe_file(probe.path, b"-")
    try:
        return _written(probe)
    finally:
        probe.unlink(missing_ok=True)


def _written(path: UPath) -> datetime:
    written: datetime = path.fs.modified(path.path)
    return written if written.tzinfo else written.replace(tzinfo=UTC)
