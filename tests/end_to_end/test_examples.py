"""examples/*.py: each runs to its end, and says what it is there to show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support.cli import PATIENCE
from support.paths import ROOT

# What a reader is to see, as a pattern.
SHOWN = {
    "first_compression": r"perplexity, dense: \d+\.\d+\nperplexity, compressed: \d+\.\d+\n",
    "compare_methods": r"keep 0\.6: \w+, perplexity .*\nkeep 0\.4: \w+, perplexity .*\ndense: ",
    "resume_after_kill": r"killed: exit status -9, [1-9].*blocks kept\n(.*\n)*.*in both",
    "query_manifest": r"duckdb: .*'q'.*\npandas: .*'q'.*\npolars: .*'q'",
    "two_ray_workers": r"layer 0: worker .*\nlayer 1: worker",
    "serve_and_ask": r"\w",
}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "examples").glob("*.py")))
def test_an_example_runs_as_it_says(name: str, tmp_path: Path) -> None:
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", tmp_path],
        cwd=tmp_path,
        env=os.environ | {"PATH": scripts, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert re.search(SHOWN[name], run.stdout), run.stdout
