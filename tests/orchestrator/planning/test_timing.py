"""Predicted seconds: from small groups of the same kind, by the method itself."""

import json
import math
from dataclasses import replace

import pytest
import torch
from support.cli import lestd
from support.groups import fused, gqa, mha

from lestd_kernels.errors import LestdError
from lestd_kernels.methods import METHODS, MethodArgs
from lestd_kernels.methods.common.shared_basis import group_shape
from orchestrator.config.run import RunConfig
from orchestrator.manifest.manifest import Manifest
from orchestrator.manifest.schemas import COMPUTING_STAGES
from orchestrator.planning.plan import make_plan
from orchestrator.planning.timing import _made_metrics, _scaled, predict_seconds
from orchestrator.source.checkpoint import resolve_source


@pytest.mark.parametrize(
    "layout", [mha(256, 8, 32), gqa(256, 8, 32, 4), fused(256, 8, 32)], ids=str
)
def test_a_scaled_group_has_fewer_heads_of_each_kind(layout):
    small = _scaled(layout, 64)
    assert (small.width, small.head_dim) == (64, 8)
    assert [m.name for m in small.modules] == [m.name for m in layout.modules]
    for projection in "qkvo":
        heads = [i for p, i in layout.slices if p == projection]
        fewer = [i for p, i in small.slices if p == projection]
        assert sorted(fewer) == list(range(len(heads) // 4))
    # As a group of its own it is whole, also for what needs all four projections of a head.
    learned = all(sum(p == t for p, _ in small.slices) == 8 for t in "qkvo")
    if learned:
        group_shape(small, torch.bfloat16, MethodArgs(type_mode="learned"))


def test_one_head_is_left_at_least():
    assert {p for p, _ in _scaled(gqa(256, 8, 32, 2), 16).slices} == set("qkvo")


def test_every_task_gets_seconds(tiny_llama):
    config = RunConfig(keep=0.4, layer_keep={"1": 0.6})
    plan = make_plan(resolve_source(str(tiny_llama)), config)
    threads = torch.get_num_threads()
    seconds = predict_seconds(plan, "cpu", 1)
    assert torch.get_num_threads() == threads
    assert seconds.keys() == {planned.task.block for planned in plan.tasks}
    assert all(0 < value < math.inf for value in seconds.values())
    assert len(set(seconds.values())) == 2  # one for each kind: the same layout at two budgets


@pytest.mark.parametrize("metric", ["activation", "loss"])
def test_a_calibrated_method_is_measured_with_made_metrics(tiny_llama, tmp_path, metric):
    (text := tmp_path / "text").write_text("words " * 500)
    config = RunConfig(keep=0.4, method="gptq", metric=metric, calibrate_on=str(text))
    plan = make_plan(resolve_source(str(tiny_llama)), config)
    seconds = predict_seconds(plan, "cpu", 1)
    assert seconds.keys() == {planned.task.block for planned in plan.tasks}


def test_made_metrics_of_a_wide_block_have_the_forms_of_its_calibration(tiny_llama, tmp_path):
    (text := tmp_path / "text").write_text("words " * 500)
    config = RunConfig(keep=0.4, method="auto", calibrate_on=str(text))
    task = make_plan(resolve_source(str(tiny_llama)), config).tasks[0].task
    wide = replace(task, layout=mha(4096, 64, 64))
    small = _scaled(wide.layout, 128)
    made = _made_metrics(wide, small, torch.Generator())
    shapes = [tuple(made[f"{module.name}.output"].shape) for module in small.modules]
    assert shapes == [(2, 64, 64)] * 3 + [(128, 128)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here_is_not_measured(tiny_llama):
    plan = make_plan(resolve_source(str(tiny_llama)), RunConfig(keep=0.4))
    with pytest.raises(LestdError, match="which has no GPU"):
        predict_seconds(plan, "cuda", 1)


def test_the_plan_says_seconds_and_the_end_sets_them_beside_the_actual_ones(tiny_llama, tmp_path):
    planned = json.loads(lestd("plan", tiny_llama, "--keep", 0.4, "--time", "--json").out)
    assert planned["total"]["predicted_seconds"] == pytest.approx(
        sum(layer["predicted_seconds"] for layer in planned["layers"])
    )
    assert "decomposing takes about" in lestd("plan", tiny_llama, "--keep", 0.4, "--time").out
    assert "decomposing" not in lestd("plan", tiny_llama, "--keep", 0.4).out
    command = ("compress", tiny_llama, "--keep", 0.4, "--out", tmp_path / "out")
    run = lestd(*command, "--executor", "serial", "--time", "--json")
    figures = json.loads(run.out)
    predicted, actual = figures["predicted"], figures["actual"]
    assert predicted["decomposition_seconds"] > 0
    assert actual["decomposition_seconds"] > 0
    assert 0 < actual["run_disk_bytes"] <= predicted["run_disk_bytes"]
    assert actual["worker_memory_bytes"] > 0
    shown = lestd(*command, "--executor", "serial").out  # complete already, and not timed
    assert "disk of the run, at most" in shown
    assert "decomposing" not in shown


def test_global_allocation_is_predicted_with_both_of_its_passes(tiny_llama, tmp_path):
    command = ("compress", tiny_llama, "--keep", 0.4, "--allocation", "global", "--time")
    run = lestd(*command, "--out", tmp_path / "out", "--executor", "serial", "--json")
    actual = json.loads(run.out)["actual"]["decomposition_seconds"]
    manifest = Manifest(tmp_path / "out" / "manifest")
    curves = {row["task_id"]: row for row in manifest.curves().to_pylist()}
    rows = [*manifest.groups().to_pylist(), *curves.values()]
    assert len(curves) * 2 == len(rows)
    assert actual == pytest.approx(
        sum(row[f"seconds_{stage}"] for row in rows for stage in COMPUTING_STAGES)
    )


def test_both_passes_of_global_allocation_are_measured(tiny_llama, monkeypatch):
    method, asked = METHODS["lestd"], []

    def spy(prepared, byte_budget, curve_budgets):
        asked.append((byte_budget, tuple(curve_budgets)))
        return method.encode(prepared, byte_budget, curve_budgets)

    monkeypatch.setitem(METHODS, "lestd", replace(method, encode=spy))
    plan = make_plan(resolve_source(str(tiny_llama)), RunConfig(keep=0.4, allocation="global"))
    predict_seconds(plan, "cpu", 1)
    first = plan.tasks[0]  # All layers are alike: one kind, measured once and warmed up before.
    curve, encode = (
        (first.task.byte_budget, first.curve.curve_budgets),
        (first.task.byte_budget, ()),
    )
    assert asked == [curve, curve, encode, encode]
