"""What sharing saves: one sweep over several keeps against as many separate compressions.

    python benchmarks/sweep.py                 prints the table of docs/sweep.md
    python benchmarks/sweep.py --width 4096    layers of another width

Makes a checkpoint of OPT's shape (benchmarks/make_checkpoint.py) with heads of 128 and a small
rest, so that attention is what is compressed and copied. It is compressed to every keep in turn,
then by one sweep, on one worker in this process. Payloads must be the same to the last byte.

    compress       wall time of compress_model for all keeps, planning and assembling included
    compress, CPU  the same as this process' CPU time, which others on the machine touch less
    stage1, ...    of the wall time, what the manifests state, summed over the keeps
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from make_checkpoint import make_checkpoint, make_config

from orchestrator.compression.pipeline import compress_model
from orchestrator.config.run import RunConfig
from orchestrator.execution.serial import SerialExecutor
from orchestrator.experiments.engine import compress_all, model_dir
from orchestrator.experiments.variants import Contender
from orchestrator.manifest.manifest import Manifest, default_run_dir
from orchestrator.manifest.schemas import STAGES
from orchestrator.source.checkpoint import resolve_source

HEAD_DIM = 128


def separately(source: Any, configs: dict[float, RunConfig], out: Path) -> None:
    """One compression after the other."""
    for keep, config in configs.items():
        model = model_dir(out, keep)
        compress_model(source, config, SerialExecutor(), model, default_run_dir(model))


def together(source: Any, configs: dict[float, RunConfig], out: Path) -> None:
    """The sweep."""
    compress_all(source, {Contender("", {}): configs}, SerialExecutor(), out)


def group_rows(out: Path, keeps: list[float]) -> list[dict[str, Any]]:
    """The group rows of all keeps."""
    return [row for k in keeps for row in Manifest(model_dir(out, k)).groups().to_pylist()]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=2048, help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.6, 0.4, 0.2])
    parser.add_argument("--method", default="lestd", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    options = parser.parse_args()
    settings = {"method": options.method, "threads": options.threads, "device": "cpu"}
    configs = {keep: RunConfig(keep=keep, **settings) for keep in options.keeps}
    small = {"ffn_dim": options.width, "word_embed_proj_dim": options.width, "vocab_size": 512}
    heads = {"hidden_size": options.width, "num_attention_heads": options.width // HEAD_DIM}

    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        make_checkpoint(make_config("opt-30b", options.layers, **heads, **small), work / "model")
        source = resolve_source(str(work / "model"))
        warm = {options.keeps[-1]: configs[options.keeps[-1]]}
        separately(source, warm, work / "warm")
        rows, seconds, cpu_seconds = {}, {}, {}
        for name, run in (("separate", separately), ("sweep", together)):
            (work / name).mkdir()
            start, cpu_start = time.perf_counter(), time.process_time()
            run(source, configs, work / name)
            seconds[name] = time.perf_counter() - start
            cpu_seconds[name] = time.process_time() - cpu_start
            rows[name] = group_rows(work / name, options.keeps)
    payloads = {name: [row["sha256"] for row in found] for name, found in rows.items()}
    if payloads["separate"] != payloads["sweep"]:
        raise SystemExit("the payloads of the sweep are not those of separate compressions")

    print(
        f"{options.method}, d {options.width}, {options.layers} layers, keeps {options.keeps}, "
        f"{options.threads} threads, torch {torch.__version__}\n"
    )
    print("| seconds | separate | sweep | ratio |\n| --- | ---: | ---: | ---: |")

    def show(name: str, separate: float, sweep: float) -> None:
        print(f"| {name} | {separate:.2f} | {sweep:.2f} | {sweep / separate:.2f} |")

    show("compress", seconds["separate"], seconds["sweep"])
    show("compress, CPU", cpu_seconds["separate"], cpu_seconds["sweep"])
    for stage in STAGES:
        sums = [sum(row[f"seconds_{stage}"] for row in found) for found in rows.values()]
        show(stage, *sums)


if __name__ == "__main__":
    main()
