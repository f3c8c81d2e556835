"""``python -m orchestrator`` is ``lestd``."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point of the command."""
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


if __name__ == "__main__":
    main()
