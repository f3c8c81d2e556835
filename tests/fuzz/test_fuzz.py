"""Every kind of damaged input, a few of each with fixed seeds; `make fuzz` tries new ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_damaged_inputs_are_refused_in_one_sentence_or_change_nothing() -> None:
    """In a process of its own: it forks, which one with threads must not."""
    run = subprocess.run(
        [sys.executable, str(HERE), "--inputs", "2"],
        env=os.environ | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
