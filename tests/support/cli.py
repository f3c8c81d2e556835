"""The real command line, called in this process or in one of its own."""

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from typer import testing

from orchestrator.cli import app

# Typer's runner makes all commands anew for each call, of which tests make thousands.
testing._get_command = cache(testing._get_command)

PATIENCE = 600
"""Seconds until what a test waits for counts as hung; on no machine is anything that slow."""

STARTED: list[subprocess.Popen[str]] = []
"""What `start_lestd` started in this test; what is left of it is killed at its end."""


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str


def lestd(*args: object) -> Finished:
    """Run the command in this process; an unexpected exception is raised, not swallowed."""
    result = testing.CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Finished(result.exit_code, result.stdout, result.stderr)


IMPATIENT = """
from orchestrator.__main__ import main
from workers.storage import retries
retries._FIRST_PAUSE_SECONDS = 0.01
main()
"""
"""The command as a program that does not leave a failing server alone for long."""


def start_lestd(
    *args: object, program: str | None = None, **options: object
) -> subprocess.Popen[str]:
    """Start the command, or a program that calls it, in a process of its own."""
    run = ["-c", program] if program else ["-m", "orchestrator"]
    command = [sys.executable, *run, *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    STARTED.append(subprocess.Popen(command, **(pipes | options)))
    return STARTED[-1]


def run_lestd(*args: object, **options: object) -> Finished:
    """Run the command in a process of its own, to its end."""
    process = start_lestd(*args, **options)
    out, err = process.communicate(timeout=PATIENCE)
    return Finished(process.returncode, out, err)


def digest_tree(directory: Path) -> dict[str, str]:
    """sha256 of every file below a directory but the manifest, which holds timings."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.relative_to(directory).parts[0] != "manifest"
    }
