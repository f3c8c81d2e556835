"""``python -m orchestrator`` is ``lestd``."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point of the command."""
    _open_closed_streams()
    try:
        # Imported here: torch and transformers take seconds, in which Ctrl-C is to end it quietly.
        from orchestrator import cli
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        cli.main()
    except SystemExit as end:
        if end.code == 130:
            # At once: threads that still compute would be waited for.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)
        raise


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
