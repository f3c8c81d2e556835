"""What a calibration holds in memory, there and back, beside what the plan says of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from make_checkpoint import make_checkpoint, make_config

_PROGRAM = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from orchestrator.compression.calibration import calibrate
from orchestrator.config.run import RunConfig
from orchestrator.execution.serial import SerialExecutor
from orchestrator.planning.calibration_costs import blocks_of, calibration_costs
from orchestrator.planning.plan import make_plan
from orchestrator.source.checkpoint import resolve_source
from orchestrator.source.texts import Samples
from workers.host.devices import peak_memory_bytes

model, out, windows, tokens = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
source = resolve_source(model)
planned = make_plan(source, RunConfig(keep=0.5, scope="all", method="svd"))
tasks = [p.task for p in planned.tasks]
tasks = [replace(t, method_args=t.method_args | {"metric": "loss"}) for t in tasks]
blocks = blocks_of(tasks)
ids = tuple(tuple((7 * i + 3 * w) % 9973 for i in range(tokens)) for w in range(windows))
samples = Samples(ids, {"samples": windows, "sample_tokens": tokens})
calibrate(source, blocks, samples, SerialExecutor(), out)
# Not ru_maxrss, which begins at what the process that started this one had: a test run's gigabytes.
peak = peak_memory_bytes(torch.device("cpu"))
print(peak, calibration_costs(source, blocks, windows, tokens).memory_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_the_way_back_stays_within_the_plan(tmp_path: Path) -> None:
    """Of one layer and one window, however many there are."""
    changes = {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "head_dim": 64,
        "intermediate_size": 3072,
        "vocab_size": 10_000,
    }
    peaks = []
    for layers, windows in ((1, 1), (4, 3)):
        model = tmp_path / f"model-{layers}"
        make_checkpoint(make_config("tiny", layers, **changes), model, threads=2)
        command = [sys.executable, "-c", _PROGRAM, str(model), str(tmp_path / f"out-{layers}")]
        run = subprocess.run(
            [*command, str(windows), "256"], capture_output=True, text=True, check=True
        )
        peak, bound = map(int, run.stdout.split())
        assert peak <= bound
        peaks.append(peak)
    # Three more layers are 113 MB in float32, their matrices as much again.
    assert peaks[1] < peaks[0] + 60e6
