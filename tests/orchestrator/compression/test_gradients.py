"""Gradients of a model's outputs against autograd on the whole of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.activations import all_blocks, check, oracle, some_samples, tiny_source
from support.families import FAMILIES
from support.gradients import check_gradients, gradient_rows

from orchestrator.compression.calibration import calibrate
from orchestrator.execution.serial import SerialExecutor
from orchestrator.planning import calibration_costs
from workers.checkpoint.tensors import read_tensor


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_model(
    family: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not whole:
        monkeypatch.setattr(calibration_costs, "_WHOLE_WIDTH", 0)
    source = tiny_source(family, tmp_path / "model")
    blocks, samples = all_blocks(source, "loss"), some_samples()
    found = calibrate(source, blocks, samples, SerialExecutor(), tmp_path / "calibration")
    gradients = {name: ref for name, ref in found.refs.items() if name.endswith(".output")}
    rows = gradient_rows(source, blocks, samples)
    assert gradients.keys() == rows.keys()
    for name, ref in gradients.items():
        check_gradients(read_tensor(ref), rows[name], 11 * 13, name)
    rest = {name: ref for name, ref in found.refs.items() if name not in gradients}
    check(found.__class__(found.directory, found.digest, rest), oracle(source, blocks, samples))
    assert not (tmp_path / "calibration" / "pieces").exists()
