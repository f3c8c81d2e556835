"""Runs that are killed."""

import subprocess
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

from orchestrator.manifest.manifest import Manifest

KEEP = ("--keep", 0.5)


def committed(run_dir: Path) -> dict[str, datetime]:
    """Finished tasks: when each began, which a repetition would change."""
    rows = Manifest(run_dir / "manifest").groups().to_pylist()
    return {row["task_id"]: row["started_at"] for row in rows}


def starts(run_dir: Path) -> Counter[str]:
    events = Manifest(run_dir / "manifest").events().to_pylist()
    return Counter(e["task_id"] for e in events if e["kind"] == "started")


def wait_for_progress(process: subprocess.Popen[str], run_dir: Path, more: int) -> None:
    """Until `more` tasks have been finished since now, or the run has ended."""
    goal = len(committed(run_dir)) + more
    while process.poll() is None and len(committed(run_dir)) < goal:
        time.sleep(0.002)
