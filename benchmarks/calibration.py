"""Calibration: what the way back, for the metric `loss`, costs beside the forward walk.

    OMP_NUM_THREADS=1 python benchmarks/calibration.py --model MODEL --text TEXT [--scope all]

Calibrates a model for the metric `loss` by one worker of one thread, and prints a line of Markdown:
CPU seconds of the layers alone, with nothing watched; of the forward walk with the Gram
matrices of all inputs, which is the whole calibration of the metric `activation`; of the head, with
its loss and gradient; and of the way back through the layers. Then all of them as multiples of the
first two. CPU time, so that another's work beside it matters little.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from orchestrator.compression.calibration import calibrate_for
from orchestrator.config.run import RunConfig
from orchestrator.execution.serial import SerialExecutor
from orchestrator.planning.calibration_costs import blocks_of
from orchestrator.planning.plan import make_plan
from orchestrator.source.checkpoint import resolve_source
from orchestrator.source.texts import samples_of
from workers.calibration.contracts import CalibrationPiece
from workers.calibration.layerwise import LayerwiseModel


def walk_seconds(model: LayerwiseModel, windows: list[list[int]]) -> float:
    """CPU seconds of the windows through all layers, as the model alone computes them."""
    start = time.process_time()
    states = [torch.tensor(ids) for ids in windows]
    with torch.no_grad():
        for layer in range(model.layers):
            model.load(layer)
            states = [model.run(window) for window in states]
    return time.process_time() - start


def main() -> None:
    """Calibrate one model, print its row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--scope", default="attention", help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, default=16, help="(default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = resolve_source(options.model)
    config = RunConfig(
        keep=0.5,
        method="svd_llm",
        metric="loss",
        scope=options.scope,
        calibrate_on=options.text,
        samples=options.samples,
        threads=1,
        device="cpu",
    )
    layers = int(source.config_json["num_hidden_layers"])
    tasks = [planned.task for planned in make_plan(source, config).tasks]
    kinds: dict[str, str] = {}
    seconds: dict[str, float] = defaultdict(float)
    clock = [0.0]

    def on_start(name: str, items: Any, done: set[str]) -> None:
        for item in items:
            is_head = isinstance(item, CalibrationPiece) and item.layer == layers
            kinds[item.task_id] = "head" if is_head else "back" if item.back else "forward"
        clock[0] = time.process_time()

    def on_progress(outcome: Any, done: int, of: int) -> None:
        now = time.process_time()
        seconds[kinds[outcome.task_id]] += now - clock[0]
        clock[0] = now

    with tempfile.TemporaryDirectory(prefix="lestd-calibration-") as directory:
        calibrate_for(
            tasks,
            source,
            config,
            "cpu",
            SerialExecutor(),
            Path(directory),
            on_start=on_start,
            on_progress=on_progress,
        )
    path = blocks_of(tasks)[0].layers
    model = LayerwiseModel(source.config_json, source.index.tensors, path, torch.device("cpu"))
    alone = walk_seconds(model, list(samples_of(source, config).token_ids))
    forward, total = seconds["forward"], sum(seconds.values())
    print("| model, scope | layers alone | forward | head | back | all / forward | all / alone |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    cells = [f"{part:.1f}" for part in (alone, forward, seconds["head"], seconds["back"])]
    cells += [f"{total / forward:.2f}", f"{total / alone:.2f}"]
    print(f"| {options.model}, {options.scope} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
