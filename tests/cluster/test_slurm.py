"""cluster_configs/slurm/lestd.sbatch: the script itself, where this machine plays Slurm."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.cli import PATIENCE, digest_tree, lestd
from support.paths import ROOT

from orchestrator.manifest.manifest import Manifest

SBATCH = ROOT / "cluster_configs" / "slurm" / "lestd.sbatch"

SHIMS = {
    "scontrol": """
echo "scontrol $*" >> "$LOG"
if [[ $1 == show ]]; then printf '%s\\n' $NODES; fi
""",
    # Runs on this machine what it would run on others.
    "srun": """
echo "srun $*" >> "$LOG"
while [[ $1 == --* ]]; do shift; done
exec "$@"
""",
}
PRETENDED = {
    "ray": """
if [[ $1 == start ]]; then trap 'kill $!; echo "ray ended" >> "$LOG"; exit 0' TERM; fi
echo "ray $*" >> "$LOG"
if [[ $1 == health-check ]]; then exit 0; fi
sleep 100 > /dev/null 2>&1 & wait
""",
    # Waits for all nodes, as the real one does; one `ray start` here stands for all but the head.
    "python": """
echo "python $*" >> "$LOG"
cat > /dev/null
until (($(grep -c '^ray start' "$LOG") == ($3 > 1 ? 2 : 1))); do sleep 0.05; done
exit "${JOINED:-0}"
""",
    "lestd": """
echo "lestd $*" >> "$LOG"
trap 'kill $!; sleep 0.2; echo "lestd ended" >> "$LOG"; exit 130' TERM
if [[ -n ${CODE:-} ]]; then exit "$CODE"; fi
touch "$LOG.runs"
sleep 100 > /dev/null 2>&1 & wait
""",
}


def slurm_job(directory: Path, shims: dict[str, str], *arguments: str, **more: str) -> Any:
    """Start the script as Slurm would start it on the first of its nodes."""
    binaries = directory / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "activate").write_text(f'PATH="{binaries}:$PATH"\n')
    for name, body in shims.items():
        (binaries / name).write_text(f"#!/bin/bash{body}")
        (binaries / name).chmod(0o755)
    environment = os.environ | {
        "LOG": str(directory / "log"),
        "NODES": "n1 n2 n3",
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_CPUS_PER_TASK": "2",
    }
    return subprocess.Popen(
        ["bash", SBATCH, *arguments],
        cwd=directory,
        env=environment | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_bash_accepts_the_slurm_script() -> None:
    done = subprocess.run(["bash", "-n", SBATCH], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    options = dict(
        re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", SBATCH.read_text(), flags=re.MULTILINE)
    )
    assert options["requeue"] == ""
    assert re.fullmatch(r"B:USR1@\d+", options["signal"])
    assert options["open-mode"] == "append"


@pytest.mark.parametrize("code", [0, 1, 2])
def test_slurm_starts_all_nodes_and_passes_the_exit_code_on(tmp_path: Path, code: int) -> None:
    shims = SHIMS | PRETENDED
    job = slurm_job(tmp_path, shims, "my model", "--out", "o", CODE=str(code))
    out, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == code, out
    log = (tmp_path / "log").read_text().splitlines()
    assert log[0] == "scontrol show hostnames n[1-3]"
    assert "srun --nodes=1 --ntasks=1 --nodelist=n1 ray start --head" in "\n".join(log)
    (others,) = (line for line in log if "--nodes=2 --ntasks=2 --exclude=n1" in line)
    assert "ray start --block --address=n1:24567 --num-cpus=2" in others
    assert "python - n1:24567 3" in log
    assert "lestd compress my model --out o --address n1:24567" in log
    assert log.count("ray ended") == 2
    assert not [line for line in log if "requeue" in line]


def test_slurm_needs_all_nodes(tmp_path: Path) -> None:
    job = slurm_job(tmp_path, SHIMS | PRETENDED, "m", JOINED="1")
    job.communicate(timeout=PATIENCE)
    assert job.returncode == 1
    assert "lestd" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)], ids=["USR1", "TERM"]
)
def test_slurm_ends_the_driver_and_queues_again_only_for_time(
    tmp_path: Path, number: signal.Signals, requeued: bool
) -> None:
    job = slurm_job(tmp_path, SHIMS | PRETENDED, "m", NODES="n1")
    while not (tmp_path / "log.runs").exists():
        assert job.poll() is None
    job.send_signal(number)
    job.communicate(timeout=PATIENCE)
    assert job.returncode == 130
    log = (tmp_path / "log").read_text().splitlines()
    assert ("scontrol requeue 1234567" in log) == requeued
    assert log.index("lestd ended") < log.index("ray ended")


REAL = SHIMS | {
    name: f'\nexec "{Path(sys.executable).parent / name}" "$@"\n' for name in ("ray", "python")
}
REAL["lestd"] = f'\nexec "{sys.executable}" -m orchestrator "$@"\n'


@pytest.mark.slow
@pytest.mark.ray
def test_slurm_out_of_time_and_queued_again(tmp_path: Path, many_layers: Path) -> None:
    """A real Ray of two nodes, both on this machine; the second turn finishes the first one's."""
    arguments = [str(many_layers), "--keep", "0.4", "--device", "cpu", "--out"]
    undisturbed = tmp_path / "undisturbed"
    assert lestd("compress", *arguments, undisturbed, "--executor", "serial").code == 0
    out, number = tmp_path / "out", str(10**6 + os.getpid())
    turn = {"NODES": "127.0.0.1 127.0.0.1", "SLURM_JOB_ID": number, "SLURM_CPUS_PER_TASK": "1"}
    try:
        job = slurm_job(tmp_path / "first", REAL, *arguments, str(out), **turn)
        payloads = tmp_path / "out.run" / "payloads"
        while len(list(payloads.glob("*.safetensors"))) < 3:
            assert job.poll() is None, job.communicate()
            time.sleep(0.01)
        job.send_signal(signal.SIGUSR1)
        said, _ = job.communicate(timeout=PATIENCE)
        assert job.returncode == 130, said
        assert f"scontrol requeue {number}" in (tmp_path / "first" / "log").read_text()
        assert not out.exists()
        rows = Manifest(payloads.with_name("manifest")).groups().to_pylist()
        kept = {row["payload"]: (payloads / row["payload"]).stat().st_mtime_ns for row in rows}
        assert kept
        job = slurm_job(tmp_path / "second", REAL, *arguments, str(out), **turn)
        said, _ = job.communicate(timeout=PATIENCE)
        assert job.returncode == 0, said
        assert "requeue" not in (tmp_path / "second" / "log").read_text()
    finally:
        shutil.rmtree(f"/tmp/lestd-{number}", ignore_errors=True)
    assert kept.items() <= {p.name: p.stat().st_mtime_ns for p in payloads.iterdir()}.items()
    assert digest_tree(out) == digest_tree(undisturbed)
