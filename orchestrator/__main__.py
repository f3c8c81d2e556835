"""``python -m orchestrator`` is ``lestd``."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the command."""
    try:
        # Imported here: torch and transformers take seconds, in which Ctrl-C is to end it quietly.
        from orchestrator import cli
    except KeyboardInterrupt:
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
