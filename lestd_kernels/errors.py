"""The one exception of the project that is meant to be read by its user."""


class LestdError(Exception):
    """A problem that the user can act on.

    The message is one sentence that names the file or tensor, what was found, what was
    expected, and what to do. The command line prints it without a traceback and exits non-zero.
    """


class OutOfSpaceError(LestdError):
    """The disk is full: no other task can do better, so a run stops at the first."""
