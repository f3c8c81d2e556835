"""`lestd audit`: verdicts on known weights, the command, resuming, and its bounds."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli import lestd, start_lestd
from support.groups import mha, orthonormal
from support.weights import feed_forward, normal
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lestd_kernels.tensorize import GroupLayout, fold_weights
from orchestrator.audit.verdict import margin_of, verdict
from orchestrator.planning.calibration_costs import WORKER_BASE_BYTES
from workers.audit import AuditResult, AuditTask, AuditWorker, memory_bytes, reference_bytes
from workers.checkpoint.tensors import ShardIndex
from workers.contracts import Failure

SERIAL = ("--executor", "serial")


def task(
    unfolding: Tensor, layout: GroupLayout, directory: Path, name: str = "block", **more: Any
) -> AuditTask:
    """A task on a block that lies on disk."""
    directory = directory / name
    directory.mkdir()
    folded = fold_weights(unfolding.bfloat16(), layout)
    weights = {f"{module}.weight": weight for module, weight in folded.items()}
    save_file(weights, directory / "model.safetensors")
    index = ShardIndex.from_directory(directory)
    refs = {m.name: index.tensors[f"{m.name}.weight"] for m in layout.modules}
    return AuditTask(
        **{
            "task_id": name,
            "place": 0,
            "layer": 0,
            "block": name,
            "scope": "attention",
            "tensors": refs,
            "layout": layout,
            "value_dtype": "bfloat16",
            "keeps": (0.4,),
            "whole": True,
        }
        | more
    )


def audited(asked: AuditTask) -> AuditResult:
    result = AuditWorker().run(asked)
    assert isinstance(result, AuditResult), result
    return result


def verdict_on(result: AuditResult) -> dict[str, Any]:
    assert result.findings is not None
    return verdict(result.findings["predictions"], margin_of(result.findings))


# Verdicts flip with the weights.


def test_one_subspace_for_all_heads_pays(tmp_path: Path) -> None:
    layout = mha(64, 16, 4)
    W = orthonormal(64, 16) @ normal(16, 256)
    found = verdict_on(audited(task(W, layout, tmp_path, keeps=(0.2,))))
    assert found["margin"] == pytest.approx(1, abs=0.01)
    assert found["sharing"] == "shared"
    assert found["text"] == "shared basis pays"
    assert found["pays"] == {"svd": [0.2], "16 bits": [0.2], "any": [0.2]}
    [at] = found["at"]
    assert at["shared"]["relative_error"] < 0.01 < 0.1 < at["other"]["relative_error"]


def test_a_subspace_for_each_projection_does_not_pay(tmp_path: Path) -> None:
    """Each matrix has rank 6, but together they span 24 directions: pairs are the better."""
    layout = mha(64, 16, 4)
    basis = orthonormal(64, 24)
    parts = [basis[:, 6 * t : 6 * t + 6] @ normal(6, 64, seed=t) for t in range(4)]
    found = verdict_on(audited(task(torch.cat(parts, dim=1), layout, tmp_path)))
    assert found["pays"] == {"svd": [], "16 bits": [], "any": []}
    assert found["text"] == "shared basis does not pay: use svd (0.4)"
    assert found["at"][0]["use"] == "svd"


def test_a_subspace_for_each_head_is_not_shared(tmp_path: Path) -> None:
    layout = mha(64, 16, 4)
    basis = orthonormal(64, 64)
    columns = [
        basis[:, 16 * head : 16 * head + 16] @ normal(16, 16, seed=4 * t + head)
        for t in range(4)
        for head in range(4)
    ]
    found = verdict_on(audited(task(torch.cat(columns, dim=1), layout, tmp_path)))
    assert found["sharing"] == "not shared"
    assert found["margin"] < 0


def test_experts_and_feed_forward_blocks(tmp_path: Path) -> None:
    layout = feed_forward(48, 24, 4)
    W = orthonormal(48, 12) @ normal(12, 288)
    result = audited(task(W, layout, tmp_path, scope="experts", keeps=(0.2,)))
    assert result.findings is not None
    assert (result.findings["unit"], result.findings["units"]) == ("expert", 4)
    assert verdict_on(result)["text"] == "shared basis pays"
    # The hidden units of one expert have nothing to do with those of another.
    assert abs(margin_of(result.findings, "columns")) < 0.15
    assert [one["mode"] for one in result.findings["spectra"]] == [1, 2, 3]
    assert result.findings["spectra"][0]["rank_99"] <= 12
    one = audited(task(W[:, :72], feed_forward(48, 24, 1), tmp_path, "ffn"))
    assert one.findings is not None
    assert (one.findings["unit"], one.findings["units"]) == ("block", 8)
    assert math.isnan(margin_of(one.findings, "columns"))


def test_the_rule_by_hand() -> None:
    def predictions(**errors: float) -> list[dict[str, Any]]:
        return [
            {"method": name.replace("_", " ").replace(" bit", "-bit"), "keep": 0.5}
            | {"relative_error": error}
            for name, error in errors.items()
        ]

    found = verdict(predictions(svd=0.4, lestd=0.3, magnitude=0.35, rtn_8_bit=0.1), 0.6)
    assert found["pays"] == {"svd": [0.5], "16 bits": [0.5], "any": []}
    assert found["text"] == "shared basis does not pay: use rtn 8-bit (0.5)"
    found = verdict(predictions(svd=0.4, lestd=0.3, magnitude=0.2), 0.6)
    assert found["pays"] == {"svd": [0.5], "16 bits": [], "any": []}
    # Less than one per cent apart, and then the plainest of the equal ones.
    found = verdict(predictions(svd=0.4, lestd=0.397, rtn_4_bit=0.402), 0.6)
    assert found["pays"]["any"] == []
    assert found["at"][0]["use"] == "rtn 4-bit"
    found = verdict(predictions(svd=0.4, lestd=0.395), 0.6)
    assert found["pays"]["any"] == [0.5]
    assert "; narrowly at 0.5" in found["text"]
    # Nothing is left to gain.
    assert verdict(predictions(rtn_8_bit=0.006, lestd_8_bit=0.004), 0.6)["pays"]["any"] == []
    found = verdict(predictions(svd=0.4, lestd=0.3), 0.1)
    assert found["text"].endswith("it is the sparse core that pays, the subspace is not shared")


# Other layers.


def test_bases_of_other_layers(tmp_path: Path) -> None:
    layout = mha(64, 16, 4)
    shared, other = orthonormal(64, 16), orthonormal(64, 32, seed=3)[:, 16:]
    other = torch.linalg.qr(other - shared @ (shared.T @ other))[0]
    bases = str(tmp_path / "bases.safetensors")
    first = task(shared @ normal(16, 256), layout, tmp_path, "first", bases=bases)
    assert audited(first).across == []
    kept = load_file(bases)
    assert {name: tuple(one.shape) for name, one in kept.items()} == {
        "layer": (64, 16),
        **{f"unit_{i}": (64, 16) for i in range(4)},
    }
    assert sum(one.numel() * 4 for one in kept.values()) == reference_bytes(layout)
    for name, W, energy in (
        ("same", shared @ normal(16, 256, seed=1), 1.0),
        ("other", other @ normal(16, 256, seed=1), 0.0),
    ):
        held = task(W, layout, tmp_path, name, references=((5, bases),), whole=False)
        result = audited(held)
        assert result.findings is None
        found = {(row["kind"], row["rank"]): row for row in result.across}
        assert found.keys() == {("layer", 8), ("layer", 16), ("unit", 16)}
        assert {row["reference"] for row in found.values()} == {5}
        for key in (("layer", 16), ("unit", 16)):
            assert found[key]["energy"] == pytest.approx(energy, abs=1e-4)
            assert found[key]["baseline"] == 0.25
    W = normal(64, 256).bfloat16().float()
    [row] = [
        row
        for row in audited(task(W, layout, tmp_path, "any", references=((5, bases),))).across
        if (row["kind"], row["rank"]) == ("layer", 8)
    ]
    expected = float((kept["layer"][:, :8].T @ W).square().sum() / W.square().sum())
    assert row["energy"] == pytest.approx(expected, rel=1e-4)


def test_bases_that_cannot_be_seen(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.safetensors")
    asked = task(normal(64, 256), mha(64, 16, 4), tmp_path, references=((1, gone),))
    failure = AuditWorker().run(asked)
    assert isinstance(failure, Failure)
    assert gone in failure.message
    assert "mount the same disk" in failure.message


# The command.


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[dict[str, Any], Path]:
    """The example, audited; figures and directory."""
    directory = tmp_path_factory.mktemp("audit")
    files = ("--html", directory / "a.html", "--markdown", directory / "a.md")
    options = ("--run-dir", directory / "run", "--json", *files, *SERIAL)
    result = lestd("audit", tiny_llama, *options)
    assert result.code == 0, result.err
    return json.loads(result.out), directory


def test_the_figures_of_the_example(done: tuple[dict[str, Any], Path]) -> None:
    found, _ = done
    assert found["keeps"] == [0.8, 0.6, 0.4, 0.2]
    assert found["complete"]
    assert [block["layer"] for block in found["blocks"]] == [0, 1, 2, 3]
    for block in found["blocks"]:
        assert block["findings"]["compared"] == [f"head {i}" for i in range(8)]
        assert {len(row) for one in block["findings"]["explained"] for row in one["energy"]} == {8}
        references = {row["reference"] for row in block["across"]}
        assert references == {0, 1, 2, 3} - {block["layer"]}
        assert all(0 < row["energy"] <= row["optimum"] + 1e-3 for row in block["across"])
        assert len(block["findings"]["entries"]) == 4
    [scope] = found["scopes"]
    assert scope["verdict"]["pays"]["svd"] == [0.8, 0.6, 0.4, 0.2]
    # All layers together are between the best and the worst of them.
    for one in scope["predictions"]:
        errors = [
            other["relative_error"]
            for block in found["blocks"]
            for other in block["findings"]["predictions"]
            if (other["method"], other["keep"]) == (one["method"], one["keep"])
        ]
        assert min(errors) <= one["relative_error"] <= max(errors)


def test_tables_in_terminal_and_markdown(
    done: tuple[dict[str, Any], Path], tiny_llama: Path
) -> None:
    found, directory = done
    told = lestd("audit", tiny_llama, "--run-dir", directory / "run", *SERIAL)
    assert told.code == 0
    assert "blocks/s" not in told.err  # Nothing is computed again.
    text = (directory / "a.md").read_text()
    for title in ("does a shared basis pay?", "predicted error", "shared subspace?", "spectra"):
        assert title in told.out
        assert title in text
    [scope] = found["scopes"]
    assert scope["verdict"]["text"] in told.out
    assert scope["verdict"]["text"] in text
    lestd_row = next(line for line in text.splitlines() if line.startswith("| lestd |"))
    errors = [o for o in scope["predictions"] if o["method"] == "lestd"]
    assert [f"{one['relative_error']:.3f}" in lestd_row for one in errors] == [True] * 4


def test_the_page_is_whole_and_escaped(done: tuple[dict[str, Any], Path]) -> None:
    from orchestrator.audit.page import render

    found, directory = done
    page = (directory / "a.html").read_text()
    assert page == render(found)
    evil = "</script><img src=x onerror=alert(1)>"
    hostile = json.loads(json.dumps(found))
    hostile["model"] = f"dir/{evil}"
    hostile["blocks"][0]["block"] = evil
    for one in hostile["blocks"][0]["findings"]["entries"]:
        one["largest"] = [{"tensor": evil, "row": 0, "column": 0, "value": 1.0, "sigmas": 9.0}]
    assert evil not in render(hostile)
    assert "candidates for super weights" in render(hostile)


def test_layers_and_keeps_are_chosen(tiny_llama: Path, tmp_path: Path) -> None:
    options = ("--run-dir", tmp_path / "run", "--json", *SERIAL)
    result = lestd("audit", tiny_llama, "--include", "1", "--keep", "0.1,0.5", *options)
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["keeps"] == [0.5, 0.1]
    [block] = found["blocks"]
    assert (block["layer"], block["across"]) == (1, [])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--keep", "0.5,1.5"), "between 0 and 1"),
        (("--keep", "half"), "must be numbers"),
        (("--include", "9"), "names layer 9"),
        (("--html", "absent/page.html"), "there is no directory"),
        (("--markdown", "absent/page.md"), "there is no directory"),
    ],
)
def test_refusals(
    options: tuple[str, ...], sentence: str, tiny_llama: Path, tmp_path: Path
) -> None:
    result = lestd("audit", tiny_llama, *options, "--run-dir", tmp_path / "run", *SERIAL)
    assert (result.code, result.out) == (2, "")
    assert sentence in result.err


def test_a_damaged_block_does_not_hide_the_others(tiny_llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["model.layers.2.self_attn.k_proj.weight"][3, 4] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    result = lestd("audit", model, "--json", *SERIAL)
    assert result.code == 1
    assert "model.layers.2.self_attn.k_proj.weight" in result.err
    assert "[3, 4]" in result.err
    found = json.loads(result.out)
    assert [block["layer"] for block in found["blocks"]] == [0, 1, 3]
    assert {failure["block"].split(",")[0] for failure in found["failures"]} == {
        "model.layers.2.self_attn"
    }
    assert not found["complete"]
    assert (tmp_path / "model.audit").is_dir()


def pieces(run: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in run.glob("*/pieces/*.json")}


def comparable(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    del found["run_dir"]
    return found


@pytest.mark.slow
def test_a_killed_audit_continues(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=20,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    options = ("audit", tmp_path / "model", "--keep", "0.5", "--json", *SERIAL)
    process = start_lestd(*options, "--run-dir", tmp_path / "run")
    while len(pieces(tmp_path / "run")) < 6:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = pieces(tmp_path / "run")
    assert 6 <= len(kept) < 24
    torn = next(path for path in (tmp_path / "run").glob("*/pieces/4-5.json"))
    torn.write_bytes(torn.read_bytes()[:50])
    # Without its bases, a reference layer is not finished.
    next(path for path in (tmp_path / "run").glob("*/bases/1.safetensors")).unlink()
    del kept["4-5.json"], kept["1-2.json"]
    again = lestd(*options, "--run-dir", tmp_path / "run")
    assert again.code == 0, again.err
    assert f"{len(kept)} of 24 blocks were already finished" in again.err
    done = pieces(tmp_path / "run")
    assert len(done) == 24  # The four reference layers are read once more.
    assert kept.items() <= done.items()
    whole = lestd(*options, "--run-dir", tmp_path / "whole")
    assert comparable(again.out) == comparable(whole.out)


@pytest.mark.slow
@pytest.mark.ray
def test_ray_finds_the_same(tiny_llama: Path, tmp_path: Path, done) -> None:
    options = ("--run-dir", tmp_path / "run", "--json", "--executor", "ray", "--workers", 2)
    result = lestd("audit", tiny_llama, *options)
    assert result.code == 0, result.err
    expected = dict(done[0])
    del expected["run_dir"]
    assert comparable(result.out) == expected


# Memory.


@pytest.mark.slow
def test_a_worker_needs_no_more_than_is_asked_for(tmp_path: Path) -> None:
    layout = mha(640, 64, 10)
    asked = task(normal(640, 4 * 640), layout, tmp_path, keeps=(0.8, 0.5, 0.2))
    worker = AuditWorker()
    small = audited(task(normal(64, 256), mha(64, 16, 4), tmp_path, "small"))
    result = worker.run(asked)
    assert isinstance(result, AuditResult)
    # What the process had before is not the task's.
    assert result.peak_memory_bytes - small.peak_memory_bytes < memory_bytes(asked)
    assert memory_bytes(asked) < WORKER_BASE_BYTES
