"""The command line: a file per part of the user's story, and the entry point.

Results go to standard output, progress and problems to standard error. Exit codes: 0 done;
1 the run ended with failed tasks, or verification found problems; 2 bad input or refused;
130 interrupted.
"""

from __future__ import annotations

import signal
import sys
from io import TextIOWrapper

from orchestrator.cli import (  # noqa: F401 - each registers its commands
    audit,
    compare,
    compress,
    evaluate,
    families,
    manifest,
    models,
    recipes,
    recover,
    serve,
    sweep,
)
from orchestrator.cli.application import app


def main() -> None:
    """Entry point of the command."""
    # A batch system ends a job with SIGTERM: end as with Ctrl-C, with all finished work kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # For terminals that know only ASCII.
    app(prog_name="lestd")
