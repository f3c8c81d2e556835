"""Global allocation from the command line: two passes, never worse than uniform, resumable."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli import digest_tree, lestd, start_lestd
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.manifest.manifest import Manifest
from orchestrator.manifest.part_files import write_part
from orchestrator.manifest.schemas import CURVES

LAYERS = 12
GLOBAL = ("--allocation", "global", "--executor", "serial")


def save_model(directory: Path, decays: list[float], scales: list[float]) -> Path:
    """A Llama whose layers have singular values that fall as ``k ** -decay``, times a scale."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96,
        intermediate_size=16,
        num_hidden_layers=len(decays),
        num_attention_heads=6,
        num_key_value_heads=3,
        vocab_size=32,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    for layer, decay, scale in zip(model.model.layers, decays, scales, strict=True):
        basis = torch.linalg.qr(torch.randn(96, 96, generator=generator))[0]
        values = torch.arange(1, 97) ** -decay * scale
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = getattr(layer.self_attn, name).weight
            noise = torch.randn(max(weight.shape), 96, generator=generator)[: min(weight.shape)]
            shared = noise * values @ basis.T
            weight.data = (shared if name != "o_proj" else shared.T).contiguous()
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size="100KB")
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of different spectra and magnitudes."""
    decays = [0.1 * (i % 6) for i in range(LAYERS)]
    scales = [2.0 ** ((5 * i) % 4 - 1) for i in range(LAYERS)]
    return save_model(tmp_path_factory.mktemp("spectra") / "model", decays, scales)


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    result = lestd("compress", model, "--out", out, "--keep", 0.4, *GLOBAL)
    assert result.code == 0, result.err
    return out


def groups(out: Path) -> list[dict[str, Any]]:
    return Manifest(out / "manifest").groups().to_pylist()


def sums(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Squared errors, relative and absolute, summed over the groups."""
    absolute = math.fsum(row["squared_error"] for row in rows)
    return math.fsum(row["squared_error"] / row["squared_norm"] for row in rows), absolute


@pytest.mark.parametrize(
    ("keep", "options", "gain"),
    [
        (0.4, (), 0.97),
        (0.15, (), 0.999),
        (0.4, ("--method", "tucker"), 0.985),
        (0.4, ("--pattern", "2:4"), 0.97),
    ],
)
def test_never_worse_than_uniform_at_the_same_bytes(
    model: Path, tmp_path: Path, keep: float, options: tuple[str, ...], gain: float
) -> None:
    common = ("compress", model, "--metric", "weight", "--keep", keep)
    common += ("--executor", "serial", *options)
    assert lestd(*common, "--out", tmp_path / "uniform").code == 0
    result = lestd(*common, "--out", tmp_path / "global", "--allocation", "global", "--json")
    assert result.code == 0, result.err
    uniform, found = groups(tmp_path / "uniform"), groups(tmp_path / "global")
    total = sum(row["byte_budget"] for row in uniform)
    stored = sum(row["stored_bytes"] for row in found)
    assert sum(row["byte_budget"] for row in found) <= total
    assert json.loads(result.out)["stored_bytes"] == stored <= total
    if not options:  # The others come as near as their ranks allow.
        assert total - stored <= max(total - sum(row["stored_bytes"] for row in uniform), 64)
    for better, before in zip(sums(found), sums(uniform), strict=True):
        assert better <= before
    # These layers are so unlike that there is something to gain.
    assert sums(found)[0] < gain * sums(uniform)[0]
    assert lestd("verify", tmp_path / "global").code == 0
    # What uniform allocation would have given was measured, not predicted.
    curves = Manifest(tmp_path / "global" / "manifest").curves().to_pylist()
    measured = {row["block"]: row["uniform_squared_error"] for row in curves}
    assert measured == {row["block"]: row["squared_error"] for row in uniform}
    budgets = {row["block"]: row["byte_budget"] for row in uniform}
    assert budgets == {row["block"]: row["uniform_byte_budget"] for row in curves}


def test_the_model_says_how_bytes_were_divided(undisturbed: Path) -> None:
    assert "Allocation is global: bytes went" in (undisturbed / "README.md").read_text()
    curves = pq.read_table(undisturbed / "manifest" / "curves.parquet").to_pylist()
    assert {row["layer"] for row in curves} == set(range(LAYERS))
    for layer in range(LAYERS):
        errors = [row["predicted_squared_error"] for row in curves if row["layer"] == layer]
        assert len(errors) > 20
        assert errors == sorted(errors, reverse=True)
    state = json.loads(lestd("status", undisturbed, "--json").out)
    assert state["state"] == "complete"
    assert state["curves"]["done"] == LAYERS


def test_plan_says_that_budgets_are_decided_later(model: Path) -> None:
    shown = lestd("plan", model, "--keep", 0.4, "--allocation", "global")
    assert "decided after a first pass" in shown.out
    planned = json.loads(
        lestd("plan", model, "--keep", 0.4, "--allocation", "global", "--json").out
    )
    uniform = json.loads(lestd("plan", model, "--keep", 0.4, "--json").out)
    assert not planned["budgets_decided"]
    assert uniform["budgets_decided"]
    assert planned["total"]["byte_budget"] == uniform["total"]["byte_budget"]
    assert planned["total"]["max_bytes"] == uniform["total"]["max_bytes"]
    for layer, other in zip(planned["layers"], uniform["layers"], strict=True):
        least, most = layer["budget_range"]
        assert least < other["byte_budget"] < most == layer["dense_bytes"]
        assert layer["predicted_memory_bytes"] >= other["predicted_memory_bytes"]
        assert layer["max_R1"] >= other["max_R1"]
        assert other["budget_range"] is None


def wait_for(directory: Path, count: int, process: Any) -> None:
    while process.poll() is None and len(list(directory.glob("*.parquet"))) < count:
        time.sleep(0.002)


@pytest.mark.parametrize("table", [pytest.param("curves", marks=pytest.mark.slow), "groups"])
def test_a_kill_in_either_pass_changes_no_byte(
    model: Path, undisturbed: Path, tmp_path: Path, table: str
) -> None:
    out, run_dir = tmp_path / "out", tmp_path / "out.run"
    command = ("compress", model, "--out", out, "--keep", 0.4, *GLOBAL)
    process = start_lestd(*command)
    wait_for(run_dir / "manifest" / table, 3, process)
    process.kill()
    process.communicate()
    kept = {
        path.relative_to(run_dir): path.stat().st_ino
        for name in ("curves", "groups")
        for path in (run_dir / "manifest" / name).glob("*.parquet")
    }
    state = json.loads(lestd("status", out, "--json").out)
    assert state["state"] == "stopped"
    if table == "curves":
        assert 3 <= state["curves"]["done"] == len(kept) < LAYERS
        assert not state["budgets_decided"]
        assert "targets are decided when it is done" in lestd("status", out).out
    else:
        assert state["curves"]["done"] == LAYERS
        assert state["budgets_decided"]
        assert 3 <= state["done"] == len(kept) - LAYERS < LAYERS
    result = lestd(*command)
    assert result.code == 0, result.err
    assert {path: (run_dir / path).stat().st_ino for path in kept} == kept
    assert digest_tree(out) == digest_tree(undisturbed)
    assert groups(out)[3]["task_id"] == groups(undisturbed)[3]["task_id"]


@pytest.mark.ray
@pytest.mark.slow
def test_ray_gives_the_same_bytes(model: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("compress", model, "--out", out, "--keep", 0.4, "--allocation", "global")
    result = lestd(*command, "--workers", 2)
    assert result.code == 0, result.err
    assert digest_tree(out) == digest_tree(undisturbed)


def payloads(out: Path) -> dict[str, str]:
    return {name: sha for name, sha in digest_tree(out).items() if name.startswith("lestd-")}


def test_a_prediction_that_fails_costs_no_error(
    model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Curves that lie lead to worse budgets; the run notices, and encodes the uniform ones."""
    out, run_dir = tmp_path / "out", tmp_path / "out.run"
    shutil.copytree(undisturbed.with_name("out.run"), run_dir)
    for name in ("groups", "slices", "events"):
        shutil.rmtree(run_dir / "manifest" / name)
    path = sorted((run_dir / "manifest" / "curves").glob("*.parquet"))[0]
    rows = pq.read_table(path, partitioning=None).to_pylist()
    write_part(path, [row | {"predicted_squared_error": 0.0} for row in rows], CURVES)
    command = ("compress", model, "--out", out, "--keep", 0.4)
    result = lestd(*command, *GLOBAL)
    assert result.code == 0, result.err
    tried = Manifest(run_dir / "manifest").groups().to_pylist()
    assert len(tried) > LAYERS
    assert min(row["byte_budget"] for row in tried) == rows[0]["byte_budget"]
    uniform = tmp_path / "uniform"
    assert lestd(*command[:2], "--out", uniform, "--keep", 0.4, "--executor", "serial").code == 0
    assert payloads(out) == payloads(uniform)
    assert "which it kept" in (out / "README.md").read_text()
    # The same command finds the same decision, and nothing to do.
    assert "already complete" in lestd(*command, *GLOBAL).out
    assert lestd("status", out).code == 0


def test_a_damaged_curve_is_found_again_and_nothing_else(
    model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out, run_dir = tmp_path / "out", tmp_path / "out.run"
    for name in ("out", "out.run"):
        shutil.copytree(undisturbed.with_name(name), tmp_path / name)
    path = sorted((run_dir / "manifest" / "curves").glob("*.parquet"))[2]
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    verified = lestd("verify", out)
    assert verified.code == 1
    assert f"{path} is damaged" in verified.out
    before = Manifest(run_dir / "manifest").events()["task_id"].to_pylist()
    assert lestd("compress", model, "--out", out, "--keep", 0.4, *GLOBAL).code == 0
    after = Manifest(run_dir / "manifest").events()["task_id"].to_pylist()
    assert after[len(before) :] == [path.stem]
    assert lestd("verify", out).code == 0
    assert digest_tree(out) == digest_tree(undisturbed)


def test_layers_alike_keep_their_uniform_budgets(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", [0.3] * 2, [1.0] * 2)
    for allocation in ("global", "uniform"):
        options = ("--metric", "weight", "--keep", 0.5, "--allocation", allocation)
        command = ("compress", model, "--executor", "serial", *options)
        assert lestd(*command, "--out", tmp_path / allocation).code == 0
    assert payloads(tmp_path / "global") == payloads(tmp_path / "uniform")


def test_a_layer_with_a_keep_of_its_own_keeps_it(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text('{keep: 0.4, allocation: global, exclude: "6-11", layer_keep: {"1-2": 0.7}}')
    out = tmp_path / "out"
    result = lestd("compress", model, "--out", out, "--config", config, "--executor", "serial")
    assert result.code == 0, result.err
    rows = groups(out)
    assert [row["layer"] for row in rows] == list(range(6))
    dense = rows[0]["dense_bytes"]
    assert [rows[i]["byte_budget"] for i in (1, 2)] == [int(0.7 * dense)] * 2
    others = [rows[i]["byte_budget"] for i in (0, 3, 4, 5)]
    assert sum(others) == 4 * int(0.4 * dense)
    assert len(set(others)) > 1
    curves = Manifest(out / "manifest").curves().to_pylist()
    assert {row["layer"] for row in curves} == {0, 3, 4, 5}


def test_what_is_refused(model: Path, undisturbed: Path, tmp_path: Path) -> None:
    changed = lestd("compress", model, "--out", undisturbed, "--keep", 0.4, "--executor", "serial")
    assert changed.code == 2
    assert 'config.allocation (was "global", is "uniform")' in changed.err
    config = tmp_path / "run.yaml"
    config.write_text("{keep: 0.4, allocation: everywhere}")
    misspelt = lestd("plan", model, "--config", config)
    assert misspelt.code == 2
    assert "allocation: Input should be 'uniform' or 'global', got 'everywhere'" in misspelt.err
    little = lestd("plan", model, "--keep", 0.001, "--allocation", "global")
    assert little.code == 2
    assert "raise keep" in little.err


def test_a_group_that_fails_in_pass_one_is_named(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    name = "model.layers.5.self_attn.q_proj.weight"
    shard = (
        broken
        / json.loads((broken / "model.safetensors.index.json").read_text())["weight_map"][name]
    )
    tensors = load_file(shard)
    tensors[name][3, 4] = math.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    out = tmp_path / "out"
    result = lestd("compress", broken, "--out", out, "--keep", 0.4, *GLOBAL)
    assert result.code == 1
    assert name in result.err
    assert f"1 of {LAYERS} tasks failed; the other {LAYERS - 1} are kept" in result.err
    assert not out.exists()
    state = json.loads(lestd("status", out, "--json").out)
    assert state["curves"] == {"done": LAYERS - 1, "running": 0, "failed": 1, "remaining": 0}
