"""`make dist`: what it builds installs in an empty environment, and works outside of the tree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.paths import ROOT

PACKAGES = ("lestd", "lestd_kernels", "orchestrator", "workers")
TEXT = "examples/tiny-llama-wikitext2/wikitext-2-test.txt"
CACHES = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "demo-out")


def run(directory: Path, *command: object) -> str:
    # Nothing of this environment, and no cluster of this machine.
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=directory,
        env=clean | {"RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def data_files(tree: Path) -> set[str]:
    """All files of the packages, such as ``orchestrator/query/named/densest-heads.sql``."""
    found = (path for name in PACKAGES for path in (tree / name).rglob("*") if path.is_file())
    return {path.relative_to(tree).as_posix() for path in found}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(7200)  # It installs torch.
def test_a_wheel_runs_the_demo_in_an_empty_environment(tmp_path: Path) -> None:
    tree, away = tmp_path / "tree", tmp_path / "away"
    shutil.copytree(ROOT, tree, ignore=CACHES)
    expected = data_files(tree)
    run(tree, "make", "dist", f"PYTHON={sys.executable}")
    [wheel], [sdist] = (list((tree / "dist").glob(f"*{end}")) for end in (".whl", ".tar.gz"))
    assert expected <= set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        unpacked = {name.partition("/")[2] for name in archive.getnames()}
    assert expected | {"Makefile", "tests/test_rooms.py", TEXT} <= unpacked

    away.mkdir()
    run(away, sys.executable, "-m", "venv", "empty")
    binaries = away / "empty" / "bin"
    run(away, binaries / "pip", "install", "-q", "-c", tree / "constraints.txt", wheel)
    model, text = away / "model", away / "text.txt"
    shutil.copytree(tree / "examples/tiny-llama-wikitext2/model", model)
    shutil.copy(tree / TEXT, text)
    shutil.rmtree(tree)
    lestd = binaries / "lestd"
    run(away, lestd, "compress", model, "--keep", "0.6", "--out", "small")
    shown = run(
        away, lestd, "evaluate", "small", "--against", model, "--text", text, "--max-windows", 4,
        "--json",
    )  # fmt: skip
    assert json.loads(shown)
    assert run(away, lestd, "query", "small", "--name", "densest-heads")
    run(away, lestd, "report", "small", "--format", "md", "--out", "report.md")
    script = "import lestd; print(type(lestd.load('small')[0]).__name__)"
    assert "LlamaForCausalLM" in run(away, binaries / "python", "-c", script)
