"""The one exception of the project that is meant to be read by its user."""

from __future__ import annotations


class LestdError(Exception):
    """A problem that the user can act on.

    The message is one sentence that names the file or tensor, what was found, what was
    expected, and what to do. The command line prints it without a traceback and exits non-zero.
    """


class OutOfSpaceError(LestdError):
    """The disk is full: no other task can do better, so a run stops at the first."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that is not empty; else the name of its type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
