"""`lestd recover`: adapters and values in place, trained, killed, continued, written and loaded."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.cli import PATIENCE, digest_tree, lestd, start_lestd
from transformers import AutoModelForCausalLM

from lestd_kernels.peft_plugin import register
from orchestrator.manifest.manifest import Manifest
from orchestrator.model.reader import open_compressed
from workers.recover import _rows_of_step, _schedule

SMALL = ("--window", 64, "--batch", 8, "--max-windows", 8, "--steps", 10, "--save-every", 2)


@pytest.fixture(scope="module")
def compressed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recover") / "compressed"
    options = ("--metric", "weight", "--keep", 0.2, "--executor", "serial")
    result = lestd("compress", tiny_llama, *options, "--out", out)
    assert result.code == 0, result.err
    return out


@pytest.fixture(scope="module")
def text(wikitext: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(wikitext.read_bytes()[:60_000])
    return path


@pytest.fixture(scope="module")
def recovered(compressed: Path, text: Path, tmp_path_factory: pytest.TempPathFactory):
    """How to train -> its directory and what the command said."""
    root = tmp_path_factory.mktemp("recovered")
    found = {}
    for train in ("lora", "factors"):
        out = root / train
        result = lestd(
            *("recover", compressed, "--text", text, "--out", out, "--train", train),
            *(*SMALL, "--lr", 3e-3, "--json"),
        )
        assert result.code == 0, result.err
        found[train] = (out, json.loads(result.out))
    return found


@pytest.mark.parametrize("train", ["lora", "factors"])
def test_held_out_loss_falls_and_the_result_is_a_model_of_lestd(recovered, compressed, train):
    out, said = recovered[train]
    before, after = said["evaluations"]["models"]
    assert (before["model"], after["model"]) == (str(compressed), str(out))
    assert after["token_perplexity"] < 0.95 * before["token_perplexity"]
    assert said["evaluations"]["difference"]["token_perplexity"] < 0
    checked = lestd("verify", out)
    assert checked.code == 0, checked.out
    page = compressed.parent / f"{train}.md"
    report = ("report", out, "--format", "md", "--out", page)
    for command in (("status", out), report, ("diff", compressed, out)):
        assert lestd(*command).code == 0
    rows = Manifest(out).evaluations().to_pylist()
    assert {row["model"] for row in rows} == {str(compressed), str(out)}
    assert len({row["model_id"] for row in rows}) == 2
    assert "## Recovery" in (out / "README.md").read_text()


def scope_bytes(directory: Path) -> int:
    model = open_compressed(directory)
    return sum(ref.stored_bytes for ref in model.stored.values())


def test_an_adapter_is_counted_and_leaves_the_rest_alone(recovered, compressed):
    out, said = recovered["lora"]
    old, new = digest_tree(compressed), digest_tree(out)
    assert new.keys() - old.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert {name for name in old if old[name] != new[name]} == {"README.md"}
    tensors = load_file(out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    data = sum(tensor.numel() * 2 for tensor in tensors.values())
    # A (256, r) and B (r, 256) for q, k, v and o of four layers.
    assert data == said["adapter_bytes"] == 4 * 4 * 2 * 256 * 8 * 2
    before, after = (one["weights_in_scope"] for one in said["evaluations"]["models"])
    assert after["stored_bytes"] == before["stored_bytes"] + data
    on_disk = [one["model_bytes_on_disk"] for one in said["evaluations"]["models"]]
    assert on_disk[1] - on_disk[0] == (out / "adapter_model.safetensors").stat().st_size
    assert str(compressed.parent) not in (out / "adapter_config.json").read_text()


def test_values_in_place_keep_positions_shapes_and_bytes(recovered, compressed):
    out, said = recovered["factors"]
    assert said["adapter_bytes"] == 0
    old, new = open_compressed(compressed), open_compressed(out)
    assert scope_bytes(out) == scope_bytes(compressed)
    sizes = [one["model_bytes_on_disk"] for one in said["evaluations"]["models"]]
    assert sizes[0] == sizes[1]
    assert (out / "config.json").read_bytes() == (compressed / "config.json").read_bytes()
    changed, trainable = set(), 0
    for shard in old.index.shards:
        before, after = load_file(compressed / shard), load_file(out / shard)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape)
            if not torch.equal(tensor, after[name]):
                changed.add(name)
                trainable += tensor.numel()
    # Every float of the groups, factors and values, and no index.
    assert changed == {n for n, ref in new.stored.items() if ref.dtype == "BF16"}
    assert trainable == said["trainable"]
    # Where a weight was pruned, it still is.
    for one, other in zip(old.groups, new.groups, strict=True):
        assert one.entry == other.entry
    rows = Manifest(out).groups().to_pylist()
    assert {row["relative_error"] for row in rows} == {None}
    assert [row["nnz"] for row in rows] == [
        row["nnz"] for row in Manifest(compressed).groups().to_pylist()
    ]


_LOAD = """
import sys, torch, lestd_kernels
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.arange(40)[None] * 7 + 3
print(model(ids, labels=ids).loss.item())
"""


@pytest.mark.slow
@pytest.mark.parametrize("train", ["lora", "factors"])
def test_a_fresh_process_loads_it_as_the_mathematics_says(recovered, compressed, train):
    out, _ = recovered[train]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", _LOAD, str(out)], capture_output=True, text=True, env=env
    )
    assert run.returncode == 0, run.stderr
    # The dense twin: W-hat of the tensors on disk, and by hand the adapter.
    dense = out.parent / f"{train}-dense"
    result = lestd("export", out if train == "factors" else compressed, "--dense", dense)
    assert result.code == 0, result.err
    twin = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    if train == "lora":
        adapter = load_file(out / "adapter_model.safetensors")
        for group in open_compressed(compressed).groups:
            for name, weight in group.to_dense().items():
                prefix = "base_model.model." + name.removesuffix("weight")
                A, B = (adapter[f"{prefix}lora_{side}.weight"].double().numpy() for side in "AB")
                delta = torch.from_numpy((16 / 8) * np.matmul(B, A))
                twin.get_parameter(name).data.copy_(weight + delta)
    else:
        for group in open_compressed(out).groups:
            for name, weight in group.to_dense().items():
                twin.get_parameter(name).data.copy_(weight)
    ids = torch.arange(40)[None] * 7 + 3
    expected = twin(ids, labels=ids).loss.item()
    assert math.isclose(float(run.stdout), expected, rel_tol=1e-4)


def test_export_merges_the_adapter(recovered, tmp_path):
    out, _ = recovered["lora"]
    assert lestd("export", out, "--dense", tmp_path / "d", "--dtype", "float32").code == 0
    assert not list((tmp_path / "d").glob("adapter*"))
    register()
    ids = torch.arange(40)[None] * 7 + 3
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "d", dtype=torch.float32)(ids)
        adapted = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids)
    torch.testing.assert_close(merged.logits, adapted.logits, rtol=1e-3, atol=1e-3)


def test_peft_loads_the_directory_as_an_adapter(recovered, compressed):
    from peft import PeftModel

    register()
    out, _ = recovered["lora"]
    ids = torch.arange(40)[None] * 7 + 3
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
        base = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32)
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, str(out))(ids).logits
    assert torch.equal(whole, adapted)
    assert not torch.equal(whole, plain)


@pytest.mark.slow
@pytest.mark.parametrize("train", ["factors", "lora"])
def test_a_killed_recovery_continues_to_the_same_bytes(
    recovered, compressed, text, tmp_path, train
):
    whole, _ = recovered[train]
    out = tmp_path / train
    command = ("recover", compressed, "--text", text, "--out", out, "--train", train, *SMALL)
    command += ("--lr", 3e-3)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = start_lestd(*command, env=env)
    state = Path(f"{out}.recover") / "state.json"
    deadline = time.monotonic() + PATIENCE
    while not state.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    done = len(json.loads(state.read_bytes())["losses"])
    assert 0 < done < 10
    # What a kill leaves of a write, and of the model.
    (state.parent / ".tmp-1-dead").write_bytes(b"x")
    result = lestd(*command)
    assert result.code == 0, result.err
    assert digest_tree(out) == digest_tree(whole)
    assert lestd("verify", out).code == 0
    again = lestd(*command)  # Complete: nothing is trained or written.
    assert again.code == 0
    assert again.out == result.out


def test_a_damaged_state_is_refused(compressed, text, tmp_path):
    out = tmp_path / "out"
    command = ("recover", compressed, "--text", text, "--out", out, "--train", "factors", *SMALL)
    process = lestd(*command, "--steps", 2)
    assert process.code == 0
    other = lestd(*command, "--steps", 3)
    assert other.code == 2
    assert "steps (was 2, is 3)" in other.err
    [tensors] = Path(f"{out}.recover").glob("step-*.safetensors")
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    assert "is damaged" in lestd(*command, "--steps", 2).err
    fresh = lestd(*command, "--steps", 2, "--fresh")
    assert fresh.code == 0, fresh.err


def test_refusals_are_one_sentence(recovered, compressed, tiny_llama, text, tmp_path, monkeypatch):
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("")

    def refused(*options: object) -> str:
        result = lestd("recover", *options, "--window", 64, "--steps", 1)
        assert result.code == 2
        assert result.err.startswith("error: ")
        assert result.err.count("\n") == 1
        return result.err

    out = tmp_path / "out"
    assert "not a model compressed by lestd" in refused(tiny_llama, "--text", text, "--out", out)
    assert "fewer than the 65 of one window" in refused(compressed, "--text", short, "--out", out)
    assert f"{taken} already exists" in refused(compressed, "--text", text, "--out", taken)
    adapted = recovered["lora"][0]
    assert "has an adapter already" in refused(adapted, "--text", text, "--out", out)
    assert "above 0" in refused(compressed, "--text", text, "--out", out, "--lr", 0)
    monkeypatch.setattr("orchestrator.cli.recover.find_spec", lambda name: None)
    assert 'pip install "lestd[recover]"' in refused(compressed, "--text", text, "--out", out)


def test_every_epoch_takes_every_window_once():
    steps = [_rows_of_step(step, windows=10, batch=4, seed=3) for step in range(5)]
    taken = [row for rows in steps for row in rows]
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))
    assert taken[:10] != taken[10:]


def test_the_learning_rate_rises_and_falls_to_nothing():
    rates = [_schedule(step, 40) for step in range(40)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.03
    assert _schedule(0, 1) == 1


@pytest.mark.parametrize(
    "method",
    [
        ("svd", "--factor-bits", 4),
        pytest.param(("lestd", "--value-bits", 4), marks=pytest.mark.slow),
    ],
)
def test_of_few_bit_values_the_scales_are_trained(tiny_llama, text, tmp_path, method):
    before, after = tmp_path / "before", tmp_path / "after"
    options = ("--method", *method, "--metric", "weight", "--include", "1", "--keep", 0.2)
    result = lestd("compress", tiny_llama, *options, "--executor", "serial", "--out", before)
    assert result.code == 0, result.err
    command = ("recover", before, "--text", text, "--out", after, "--train", "factors")
    result = lestd(*command, "--window", 32, "--batch", 2, "--steps", 2, "--max-windows", 2)
    assert result.code == 0, result.err
    assert lestd("verify", after).code == 0
    for shard in before.glob("lestd-*.safetensors"):
        old, new = load_file(shard), load_file(after / shard.name)
        assert any(name.endswith("codes") for name in old)
        for name, tensor in old.items():
            assert torch.equal(tensor, new[name]) != tensor.is_floating_point(), name
