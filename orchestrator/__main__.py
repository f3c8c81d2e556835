"""``python -m orchestrator`` is ``lestd``."""

from __future__ import annotations

import os
import re
import sys
from typing import NoReturn

# Of Python, of the system, and of the loader of libraries.
_NO_MEMORY = re.compile("can't start new thread|annot allocate memory|failed to map segment")


def main() -> None:
    """Entry point of the command."""
    _open_closed_streams()
    try:
        _run()
    except Exception as error:
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        sys.stderr.write(
            f"error: the system refuses this process more memory or threads ({error!r}); end "
            "others, or raise its limits (ulimit -a, or those of its container), then run the same "
            "command again\n"
        )
        sys.exit(2)


def _run() -> None:
    try:
        # Imported here: torch and transformers take seconds, in which Ctrl-C is to end it quietly.
        from orchestrator import cli
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        _end_without(error)
    try:
        cli.main()
    except ModuleNotFoundError as error:  # Most libraries are imported where they are needed.
        _end_without(error)
    except SystemExit as end:
        if end.code == 130:
            # At once: threads that still compute would be waited for.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)
        raise


def _end_without(error: ModuleNotFoundError) -> NoReturn:
    """End: a job brings our code to the cluster, and what it needs must be there."""
    sys.stderr.write(
        f"error: {sys.executable} has no module {error.name}, which lestd needs; install lestd in "
        "the environment of this python (of a Ray job: in that which Ray runs in on the nodes)\n"
    )
    sys.exit(2)


def _open_closed_streams() -> None:
    """Put the null device where the shell has closed a standard stream (``>&-``).

    The next file that is opened would else have its number, and be written to or read.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        name, mode = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))[handle]
        os.set_inheritable(handle, True)  # By the processes that we start.
        setattr(sys, name, os.fdopen(handle, mode))
    os.close(handle)


if __name__ == "__main__":
    main()
