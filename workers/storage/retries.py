"""Another try where it may help: a dropped connection, a busy server, a timeout."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from lestd_kernels.errors import LestdError

T = TypeVar("T")

_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 60.0
_LONGEST_WAIT_SECONDS = 300.0
_TRIES = 4


class TransientError(LestdError):
    """A failure that another try may mend.

    Attributes:
        wait_seconds: how long the server asks to be left alone.
        worth_a_try: false where it is known that the next try would end the same.
    """

    worth_a_try = True

    def __init__(self, message: str, wait_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.wait_seconds = wait_seconds

    def pause_seconds(self, failures: int) -> float:
        """How long to wait before the next try, after this many that failed in a row."""
        pause = min(_FIRST_PAUSE_SECONDS * (1 << (failures - 1)), _LONGEST_PAUSE_SECONDS)
        return max(pause, min(self.wait_seconds, _LONGEST_WAIT_SECONDS))


def is_transient_status(status: int) -> bool:
    """Whether an HTTP status tells of a server that is busy or ill, not of a wrong request."""
    return status in (408, 429) or status >= 500


def patiently(call: Callable[[], T], tries: int = _TRIES) -> T:
    """Make a short request, again if need be.

    Raises:
        LestdError: what `call` raised, the last time.
    """
    for failures in range(1, tries):
        try:
            return call()
        except TransientError as error:
            if not error.worth_a_try:
                raise
            time.sleep(error.pause_seconds(failures))
    return call()
