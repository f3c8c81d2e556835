"""End to end through the real command: the files on disk, not what the program says of them."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.cli import digest_tree, lestd, run_lestd
from support.families import FAMILIES, MHA_FAMILIES, save_tiny
from support.hub import hub_environment, serve_hub
from support.put_back import all_tensors, put_back
from transformers import AutoModelForCausalLM, AutoTokenizer

import lestd_kernels  # noqa: F401 - registers the format

SERIAL = ("--executor", "serial")

WEIGHT = ("--metric", "weight")
"""One Tucker decomposition of Q, K, V and O."""


def compress(model: Path, out: Path, *options: object) -> Path:
    result = lestd("compress", model, "--out", out, *SERIAL, *options)
    assert result.code == 0, result.err
    return out


def groups(out: Path) -> list[dict[str, object]]:
    return pq.read_table(out / "manifest" / "groups.parquet").to_pylist()


@pytest.mark.parametrize("keep", [0.8, 0.6, 0.4, 0.2])
def test_the_demo_model_meets_its_budget_on_disk_and_loads(
    tiny_llama: Path, tmp_path: Path, keep: float
) -> None:
    out = compress(tiny_llama, tmp_path / "out", "--keep", keep)
    dense = sum(t.numel() * 2 for n, t in all_tensors(tiny_llama).items() if "self_attn" in n)
    stored = 0
    for shard in sorted(out.glob("lestd-*.safetensors")):
        with safe_open(shard, "pt") as file:
            tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
        one = sum(t.numel() * t.element_size() for t in tensors)
        budget = int(keep * dense / 4)
        assert 0.995 * budget <= one <= budget
        stored += one
    assert 0.995 * keep * dense <= stored <= keep * dense
    assert sum(row["stored_bytes"] for row in groups(out)) == stored
    files = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert files < sum(path.stat().st_size for path in tiny_llama.glob("*.safetensors"))
    if keep == 0.6:
        code = (
            "import sys, torch, lestd_kernels; from transformers import AutoModelForCausalLM as M\n"
            "m = M.from_pretrained(sys.argv[1]); x = torch.arange(20)[None]\n"
            "print(m(x).logits.isfinite().all().item(), m.dtype)"
        )
        run = subprocess.run(
            [sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=True
        )
        assert run.stdout.split() == ["True", "torch.bfloat16"]


@pytest.mark.parametrize(
    ("family", "options"),
    [(family, ("--keep", "0.6", *WEIGHT)) for family in FAMILIES]
    + [(family, ("--keep", "0.5", "--type-mode", "learned")) for family in MHA_FAMILIES]
    + [
        ("qwen3", ("--keep", "0.7", "--method", "tucker")),
        ("llama-gqa", ("--keep", "0.3", *WEIGHT)),
    ],
)
def test_logits_equal_those_of_the_dense_model_with_the_reconstruction(
    tmp_path: Path, family: str, options: tuple[str, ...]
) -> None:
    source = save_tiny(family, tmp_path / "source")
    out = compress(source, tmp_path / "out", *options)
    reference, replaced = put_back(source, out)
    compressed = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.randint(3, 90, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, actual = reference(ids).logits, compressed(ids).logits
    scale = expected.abs().max()
    assert (expected - actual).abs().max() <= 2e-5 * scale
    original = all_tensors(source)
    assert any((original[name] - W).norm() > 0.01 * W.norm() for name, W in replaced.items())


def test_a_checkpoint_without_the_base_models_prefix(tmp_path: Path) -> None:
    """As OPT lies on the Hub: ``decoder.layers...`` on disk, ``model.decoder.layers...`` loaded."""
    source = save_tiny("opt", tmp_path / "source", max_shard_size="10GB")
    tensors = load_file(source / "model.safetensors")
    without = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    assert without.keys() != tensors.keys()
    save_file(without, source / "model.safetensors", {"format": "pt"})
    out = compress(source, tmp_path / "out", "--keep", 0.6)
    assert "decoder.layers.0.self_attn.lestd_u1.weight" in all_tensors(out)

    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    expected = compress(source, tmp_path / "expected", "--keep", 0.6)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        models = [AutoModelForCausalLM.from_pretrained(d).eval() for d in (out, expected)]
        logits = [model(ids).logits for model in models]
    assert torch.equal(*logits)


@pytest.mark.slow
def test_a_model_of_the_hub(tmp_path: Path) -> None:
    local = save_tiny("qwen2", tmp_path / "hub" / "owner" / "name")
    expected = compress(local, tmp_path / "expected", "--keep", 0.5)
    out = tmp_path / "out"
    with serve_hub(tmp_path / "hub") as hub:
        environment = hub_environment(hub.url, tmp_path / "cache")
        command = ("compress", "owner/name", "--out", out, "--keep", 0.5, *SERIAL)
        result = run_lestd(*command, "--revision", "v1", env=environment)
        assert result.code == 0, result.err
        missing = run_lestd("compress", "owner/none", "--out", out, *SERIAL, env=environment)
        commit = hub.commit("owner/name")
    assert missing.code == 2
    card = (out / "README.md").read_text()
    assert 'base_model: "owner/name"' in card
    assert commit in card
    ours, theirs = digest_tree(out), digest_tree(expected)
    assert {k: v for k, v in ours.items() if k != "README.md"} == {
        k: v for k, v in theirs.items() if k != "README.md"
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", [WEIGHT, ("--type-mode", "learned")])
def test_the_manifest_states_what_is_on_disk(
    tmp_path: Path, dtype: torch.dtype, options: tuple[object, ...]
) -> None:
    source = save_tiny("gptj", tmp_path / "source", dtype=dtype)
    out = compress(source, tmp_path / "out", "--keep", 0.5, *options)
    original, (_, replaced) = all_tensors(source), put_back(source, out)
    slices = pq.read_table(out / "manifest" / "slices.parquet").to_pylist()
    for row in groups(out):
        W = {name: original[name].double() for name in row["tensors"]}
        norm = sum(w.square().sum().item() for w in W.values())
        error = sum((w - replaced[name]).square().sum().item() for name, w in W.items())
        assert row["squared_norm"] == pytest.approx(norm, rel=1e-6)
        assert row["squared_error"] == pytest.approx(error, rel=1e-4)
        assert row["relative_error"] == pytest.approx(math.sqrt(error / norm), rel=1e-4)
        assert row["squared_energy_stage2"] <= row["squared_energy_stage1"] <= norm * (1 + 1e-6)

        mine = [s for s in slices if s["task_id"] == row["task_id"]]
        assert [(s["projection"], s["head"]) for s in mine] == [
            (p, h) for p in "qkvo" for h in range(4)
        ]
        assert sum(s["squared_norm"] for s in mine) == pytest.approx(norm, rel=1e-6)
        squared = sum(s["relative_error"] ** 2 * s["squared_norm"] for s in mine)
        assert squared == pytest.approx(error, rel=1e-4)
        name = f"transformer.h.{row['layer']}.attn.k_proj.weight"
        head = slice(20, 30)
        by_hand = (W[name][head] - replaced[name][head]).norm() / W[name][head].norm()
        k2 = next(s for s in mine if (s["projection"], s["head"]) == ("k", 2))
        assert k2["relative_error"] == pytest.approx(by_hand.item(), rel=1e-4)
        if "learned" not in options:
            assert sum(s["nnz"] for s in mine) == row["nnz"]


def test_everything_else_is_the_sources_byte_for_byte(tiny_llama: Path, tmp_path: Path) -> None:
    out = compress(tiny_llama, tmp_path / "out", "--keep", 0.4, "--include", "1-2")
    source, stored = all_tensors(tiny_llama), all_tensors(out)
    untouched = [n for n in source if not any(f"layers.{i}.self_attn." in n for i in (1, 2))]
    assert len(untouched) == len(source) - 8
    for name in untouched:
        assert torch.equal(source[name].view(torch.int16), stored[name].view(torch.int16))
    assert "lm_head.weight" not in stored
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (tiny_llama / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(out)("words").input_ids
    card = (out / "README.md").read_text()
    for word in ("cc-by-sa-4.0", "import lestd_kernels", "lestd", "0.40"):
        assert word in card


def test_save_pretrained_writes_the_same_tensors(tiny_llama: Path, tmp_path: Path) -> None:
    out = compress(tiny_llama, tmp_path / "out", "--keep", 0.4)
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "again")
    first, second = all_tensors(out), all_tensors(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_file_gives_what_the_options_give(tiny_llama: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(f"model: {tiny_llama}\nkeep: 0.9\nexclude: '0'\nlayer_keep: {{'2-3': 0.3}}\n")
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("executor: serial\n")
    out = tmp_path / "out"
    result = lestd(
        "compress", "--config", run, "--cluster", cluster, "--keep", 0.5, "--out", out, "--json"
    )
    assert result.code == 0, result.err
    figures = json.loads(result.out)
    rows = groups(out)
    assert [row["layer"] for row in rows] == [1, 2, 3]
    assert [row["byte_budget"] / row["dense_bytes"] for row in rows] == pytest.approx(
        [0.5, 0.3, 0.3], abs=1e-5
    )
    assert figures["stored_bytes"] == sum(row["stored_bytes"] for row in rows)


def test_keep_model_is_met_by_the_whole_model(tiny_llama: Path, tmp_path: Path) -> None:
    out = compress(tiny_llama, tmp_path / "out", "--keep-model", 0.85)
    stored = sum(t.numel() * t.element_size() for t in all_tensors(out).values())
    dense = sum(t.numel() * t.element_size() for t in all_tensors(tiny_llama).values())
    assert 0.845 * dense <= stored <= 0.85 * dense


def test_plan_states_what_compress_then_does(tiny_llama: Path, tmp_path: Path) -> None:
    planned = json.loads(lestd("plan", tiny_llama, "--keep", 0.4, *WEIGHT, "--json").out)
    out = compress(tiny_llama, tmp_path / "out", "--keep", 0.4, *WEIGHT)
    rows = groups(out)
    assert [p["task_id"] for p in planned["layers"]] == [row["task_id"] for row in rows]
    for layer, row in zip(planned["layers"], rows, strict=True):
        assert layer["byte_budget"] == row["byte_budget"]
        assert row["R1"] <= layer["max_R1"]
        assert row["R2"] <= layer["max_R2"]
        assert row["nnz"] <= layer["max_nnz"]
    total = planned["total"]
    assert total["dense_bytes"] == sum(row["dense_bytes"] for row in rows)
    run = tmp_path / "out.run"
    inodes = {p.stat().st_ino: p.stat().st_size for d in (out, run) for p in d.rglob("*")}
    assert sum(inodes.values()) <= total["disk_bytes"] + 2**20
    table = lestd("plan", tiny_llama, "--keep", 0.4)
    assert table.code == 0
    assert "4 tasks" in table.out
    assert "│ 0-3 " in table.out  # Layers that are alike have one row.


def test_dry_run_writes_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    result = lestd("compress", tiny_llama, "--keep", 0.4, "--out", tmp_path / "out", "--dry-run")
    assert result.code == 0
    assert "4 tasks" in result.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
# One worker: in the fast suite test_submit.py compares its bytes too.
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_serial_and_ray_give_the_same_bytes(tiny_llama: Path, tmp_path: Path, workers: int) -> None:
    serial = compress(tiny_llama, tmp_path / "serial", "--keep", 0.4)
    out = tmp_path / "ray"
    result = run_lestd("compress", tiny_llama, "--out", out, "--keep", 0.4, "--workers", workers)
    assert result.code == 0, result.err
    assert digest_tree(out) == digest_tree(serial)
    # How many of them get a task is for the machine's load to decide.
    assert 1 <= len({row["worker"] for row in groups(out)}) <= workers


def test_status_verify_and_clean(tiny_llama: Path, tmp_path: Path) -> None:
    out = compress(tiny_llama, tmp_path / "out", "--keep", 0.4)
    state = json.loads(lestd("status", out, "--json").out)
    assert state["state"] == "complete"
    assert state["done"] == 4
    assert lestd("verify", out).code == 0
    assert json.loads(lestd("verify", out, "--json").out) == {"checked": 8, "problems": []}
    assert lestd("clean", out).code == 0
    assert not (tmp_path / "out.run").exists()
    assert json.loads(lestd("verify", out, "--json").out) == {"checked": 4, "problems": []}
    shard = next(out.glob("lestd-00002-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    broken = lestd("verify", out)
    assert broken.code == 1
    assert str(shard) in broken.out


def test_help_teaches() -> None:
    text = lestd("--help").out
    for word in ("plan", "compress", "status", "verify", "clean", "evaluate", "convert", "130"):
        assert word in text
    for command in ("plan", "compress", "status", "verify", "clean", "evaluate", "convert"):
        result = lestd(command, "--help")
        assert result.code == 0
        assert "Usage" in result.out
