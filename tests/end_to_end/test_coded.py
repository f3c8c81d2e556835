"""Numbers coded by their entropy, through the real command: sizes, loading, export, damage."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli import digest_tree, lestd, start_lestd
from support.kills import committed, wait_for_progress
from support.put_back import all_tensors
from transformers import AutoModelForCausalLM

from lestd_kernels.errors import LestdError

KEEP = 0.12


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A compressed model, and what the command said of it."""
    out = tmp_path_factory.mktemp("coded") / "out"
    result = lestd(
        *("compress", tiny_llama, "--out", out, "--method", "watersic", "--metric", "weight"),
        *("--keep", KEEP, "--executor", "serial"),
    )
    assert result.code == 0, result.err
    return out, result.out


def in_memory(model: torch.nn.Module) -> int:
    """Bytes of all tensors of the attention blocks."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(t.numel() * t.element_size() for name, t in tensors if "self_attn" in name)


def test_both_sizes_are_said_everywhere(made: tuple[Path, str], tiny_llama: Path) -> None:
    out, said = made
    model = AutoModelForCausalLM.from_pretrained(out)
    rows = json.loads(lestd("query", out, "select * from current", "--json").out)
    rows = rows["rows"] if isinstance(rows, dict) else rows
    stored = sum(row["stored_bytes"] for row in rows)
    memory = sum(row["memory_bytes"] for row in rows)
    dense = sum(t.numel() * 2 for name, t in all_tensors(tiny_llama).items() if "self_attn" in name)
    assert 0.995 * KEEP * dense <= stored <= KEEP * dense
    assert memory == in_memory(model) > 1.2 * stored
    assert {row["coding"] for row in rows} == {"entropy"}
    assert {row["value_bits"] for row in rows} == {None}
    for row in rows:
        assert row["bits_per_weight"] == pytest.approx(
            16 * row["stored_bytes"] / row["dense_bytes"]
        )
    sentence = r"weights in scope take (about )?\d.* of memory"
    assert re.search(sentence, said)
    assert re.search(sentence, (out / "README.md").read_text())
    options = ("--method", "watersic", "--metric", "weight", "--keep", KEEP)
    plan = json.loads(lestd("plan", tiny_llama, *options, "--json").out)
    assert 0.7 * memory < plan["total"]["memory_bytes"] < 1.4 * memory
    assert re.search(sentence, lestd("plan", tiny_llama, *options).out)
    assert not re.search(sentence, lestd("plan", tiny_llama, "--keep", KEEP).out)


def test_a_budget_of_memory(tiny_llama: Path, tmp_path: Path) -> None:
    out, keep = tmp_path / "out", 0.2
    how = ("--method", "watersic", "--metric", "weight", "--keep", keep, "--size", "memory")
    result = lestd("compress", tiny_llama, "--out", out, *how, "--executor", "serial")
    assert result.code == 0, result.err
    model = AutoModelForCausalLM.from_pretrained(out)
    rows = json.loads(lestd("query", out, "select * from current", "--json").out)["rows"]
    dense, stored, memory = (
        sum(row[f"{name}_bytes"] for row in rows) for name in ("dense", "stored", "memory")
    )
    assert 0.995 * keep * dense <= memory == in_memory(model) <= keep * dense
    assert stored < 0.9 * memory
    assert {row["size"] for row in rows} == {"memory"}
    assert lestd("verify", out).code == 0
    text = rf"that is what (the budget|keep) counts.* {memory / dense:.4f}"
    assert re.search(text, " ".join(result.out.split()))
    assert re.search(text, (out / "README.md").read_text())
    lestd("report", out, "--format", "md", "--out", tmp_path / "report.md")
    assert "that is what the budget counts" in (tmp_path / "report.md").read_text()
    plan = json.loads(lestd("plan", tiny_llama, *how, "--json").out)
    total = plan["total"]
    assert (plan["size"], total["memory_bytes"]) == ("memory", total["byte_budget"])
    assert 0.7 * stored < total["stored_bytes"] < 1.4 * stored
    assert "in memory, about" in lestd("plan", tiny_llama, *how).out
    answer = json.loads(lestd("query", out, "--name", "plan-vs-actual", "--json").out)["rows"]
    figures = {row["quantity"]: row for row in answer}
    assert figures["bytes of all groups"]["actual"] == memory
    refused = lestd("compress", tiny_llama, "--out", out, *how[:-1], "disk", "--executor", "serial")
    assert refused.code != 0
    assert 'config.size (was "memory", is "disk")' in " ".join(refused.err.split())


@pytest.fixture(scope="module")
def in_bases(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer in shared bases, which are coded as well."""
    out = tmp_path_factory.mktemp("bases") / "out"
    result = lestd(
        *("compress", tiny_llama, "--out", out, "--coding", "entropy", "--keep", 0.05),
        *("--executor", "serial", "--include", 1),
    )
    assert result.code == 0, result.err
    [group] = json.loads((out / "config.json").read_text())["quantization_config"]["groups"]
    assert {one["codec"] for one in group["shared"].values()} == {"rans"}
    [row] = json.loads(lestd("query", out, "select * from current", "--json").out)["rows"]
    assert 0.995 * row["byte_budget"] <= row["stored_bytes"] <= row["byte_budget"]
    assert (row["coding"], row["value_bits"]) == ("entropy", None)
    assert row["R1"] == group["ranks"]["R1"]
    return out


@pytest.mark.parametrize("name", ["watersic", "lestd"])
def test_it_is_verified_exported_saved_and_computes_what_is_stored(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if name == "lestd":
        out = request.getfixturevalue("in_bases")
    else:
        out, _ = request.getfixturevalue("made")
    assert lestd("verify", out).code == 0
    assert lestd("export", out, "--dense", tmp_path / "dense").code == 0
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    x = torch.arange(40)[None]
    with torch.no_grad():
        found, expected = model(x).logits, dense(x).logits
    # The export is rounded to bfloat16.
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    model = AutoModelForCausalLM.from_pretrained(out)
    model.save_pretrained(tmp_path / "saved")
    saved, stored = all_tensors(tmp_path / "saved"), all_tensors(out)
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[name], stored[name]) for name in stored)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(
    made: tuple[Path, str], tiny_llama: Path, tmp_path: Path
) -> None:
    out, _ = made
    again = tmp_path / "out"
    command = ("compress", tiny_llama, "--out", again, "--method", "watersic", "--metric", "weight")
    command += ("--keep", KEEP, "--executor", "serial")
    process = start_lestd(*command)
    wait_for_progress(process, tmp_path / "out.run", more=2)
    process.kill()
    process.communicate()
    finished = committed(tmp_path / "out.run")
    assert len(finished) >= 2
    assert lestd(*command).code == 0
    assert finished.items() <= committed(tmp_path / "out.run").items()
    assert digest_tree(again) == digest_tree(out)


def test_a_damaged_stream_is_one_sentence(made: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = made
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in out.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    shard = sorted(copy.glob("lestd-*.safetensors"))[1]
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("v_proj.numbers.stream"))
    tensors[name][-9:] ^= 255
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(LestdError, match=r"v_proj.numbers is damaged, .*copy the model again"):
        AutoModelForCausalLM.from_pretrained(copy)
    failed = lestd("export", copy, "--dense", tmp_path / "dense")
    assert failed.code != 0
    assert "Traceback" not in failed.err
    config = json.loads((copy / "config.json").read_text())
    module = config["quantization_config"]["groups"][0]["modules"]["q_proj"]["own"][0]
    del config["quantization_config"]["groups_sha256"]
    for change, said in (({"bytes": 0}, "bytes"), ({"codec": "dense"}, "unknown key")):
        before = dict(module)
        module.update(change)
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(LestdError, match=said):
            AutoModelForCausalLM.from_pretrained(copy)
        module.update(before)
