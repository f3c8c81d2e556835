"""A whole run on a made checkpoint: how much of it is decomposition, and what memory it takes.

    python benchmarks/run.py --shape llama-1b --layers 8      prints tables in Markdown

Writes the checkpoint (benchmarks/make_checkpoint.py) and compresses it by `lestd compress`, on a
local Ray with one and with two workers. What `--work DIR` holds of the checkpoint is used again.

    decomposing      seconds inside `Method.decompose`, over workers x wall time
    of the command   wall time from its start to its end: Ray starts, the model is assembled
    of the tasks     wall time from the first task's start to the last one's commit
    worker memory    largest resident set of a worker; without that of its libraries, over the
                     float32 bytes of a group
    driver memory    largest resident set of the command's own process
    speed-up         wall time of one worker over that of two, of the tasks
    load             runnable threads of the machine per CPU before the command: above 0, others
                     compute too, and the times are theirs as well

On a GPU worker memory is that of the device, and the libraries' share of it is not seen.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from orchestrator.manifest.manifest import Manifest

MAKE_CHECKPOINT = Path(__file__).with_name("make_checkpoint.py")
DECOMPOSING = ("seconds_stage1", "seconds_rank_search", "seconds_stage2", "seconds_error")
MIB = 2**20


@dataclass(frozen=True)
class Run:
    """One compression: bytes and seconds, as in the head of this file."""

    load: float
    command_seconds: float
    tasks_seconds: float
    decomposing_seconds: float
    worker_bytes: int
    driver_bytes: int
    predicted_bytes: int
    group_bytes: int


def peak_bytes(process: int) -> int:
    """Largest resident set of a process so far (Linux); 0 when it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def library_bytes() -> int:
    """Resident set of a process that has loaded what a worker loads, and done nothing."""
    code = (
        "import ray, torch, workers.decompose\n"
        "from workers.host.devices import peak_memory_bytes\n"
        "print(peak_memory_bytes(torch.device('cpu')))"
    )
    return int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE).stdout)


def compress(model: Path, out: Path, options: list[str], workers: int) -> Run:
    """Compress by the real command, and watch it."""
    load = psutil.getloadavg()[0] / (os.cpu_count() or 1)
    command = [sys.executable, "-m", "orchestrator", "compress", str(model), "--out", str(out)]
    command += ["--executor", "ray", "--workers", str(workers), "--json", *options]
    # A Ray of its own, whatever cluster runs on this machine.
    environment = os.environ | {"RAY_ADDRESS": "local"}
    began = time.time()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    driver = 0
    while process.poll() is None:
        driver = max(driver, peak_bytes(process.pid))
        time.sleep(0.02)
    ended = time.time()
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} ended with {process.returncode}")
    run_dir = out.with_name(out.name + ".run")
    rows = Manifest(run_dir / "manifest").groups().to_pylist()
    commits = [path.stat().st_mtime for path in (run_dir / "manifest" / "groups").iterdir()]
    plan: dict[str, Any] = json.loads((run_dir / "plan.json").read_text())
    return Run(
        load=load,
        command_seconds=ended - began,
        tasks_seconds=max(commits) - min(row["started_at"].timestamp() for row in rows),
        decomposing_seconds=sum(row[stage] for row in rows for stage in DECOMPOSING),
        worker_bytes=max(row["peak_memory_bytes"] for row in rows),
        driver_bytes=driver,
        predicted_bytes=plan["total"]["worker_memory_bytes"],
        group_bytes=max(2 * row["dense_bytes"] for row in rows),  # Made in 16 bits.
    )


def show(*cells: str) -> None:
    """Print one row of a table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def report(model: Path, runs: dict[int, Run]) -> None:
    """Print the figures of the runs, one column each, and the speed-up."""
    libraries = library_bytes()
    group_bytes = next(iter(runs.values())).group_bytes
    show(model.name, *(f"{n} worker{'s' * (n > 1)}" for n in runs))
    show("---", *["---:"] * len(runs))
    rows = {
        "decomposing, of the tasks": lambda n, r: r.decomposing_seconds / (n * r.tasks_seconds),
        "decomposing, of the command": lambda n, r: r.decomposing_seconds / (n * r.command_seconds),
        "tasks, s": lambda n, r: r.tasks_seconds,
        "command, s": lambda n, r: r.command_seconds,
        "worker memory, MiB": lambda n, r: r.worker_bytes / MIB,
        "worker memory predicted, MiB": lambda n, r: r.predicted_bytes / MIB,
        "worker memory / float32 group": lambda n, r: (r.worker_bytes - libraries) / group_bytes,
        "driver memory, MiB": lambda n, r: r.driver_bytes / MIB,
        "load": lambda n, r: r.load,
    }
    for title, figure in rows.items():
        show(title, *(f"{figure(n, run):,.2f}" for n, run in runs.items()))
    if 1 in runs:
        show(
            "speed-up",
            *(f"{runs[1].tasks_seconds / run.tasks_seconds:.2f}" for run in runs.values()),
        )
    print(
        f"\na group has {group_bytes / MIB:,.1f} MiB in float32, the checkpoint "
        f"{sum(p.stat().st_size for p in model.glob('*.safetensors')) / MIB:,.0f} MiB on disk; "
        f"the libraries alone take {libraries / MIB:,.0f} MiB"
    )


def main() -> None:
    """Make the checkpoint if it is not there, compress it, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="llama-1b", help="of make_checkpoint.py")
    parser.add_argument("--layers", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--keep", type=float, default=0.4, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--threads", type=int, default=1, help="of a worker (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="(default: a directory that is deleted)")
    options = parser.parse_args()

    with ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = work / f"{options.shape}-{options.layers}"
        if not model.exists():
            shape = ["--shape", options.shape, "--layers", str(options.layers)]
            command = [sys.executable, str(MAKE_CHECKPOINT), *shape, "--out", str(model)]
            subprocess.run(command, check=True, stdout=sys.stderr)
        settings = [
            "--metric",
            "weight",
            "--keep",
            options.keep,
            "--threads",
            options.threads,
            "--device",
            options.device,
        ]
        runs = {}
        for workers in options.workers:
            with tempfile.TemporaryDirectory(dir=work) as directory:
                out = Path(directory, "out")
                runs[workers] = compress(model, out, [str(x) for x in settings], workers)
        report(model, runs)


if __name__ == "__main__":
    main()
