"""Expected loss held against measured divergence, on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli import lestd
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.manifest.manifest import Manifest
from workers.evaluation.divergence import DivergenceWorker


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, wikitext: Path) -> Path:
    out = tmp_path_factory.mktemp("divergence") / "out"
    command: list[object] = ["compress", tiny_llama, "--keep", 0.3, "--method", "svd_llm"]
    command += ["--metric", "loss", "--calibrate-on", wikitext, "--samples", 8]
    command += ["--sample-tokens", 64, "--executor", "serial", "--out", out]
    finished = lestd(*command)
    assert finished.code == 0, finished.err
    return out


def by_hand(dense_dir: Path, out: Path, block: str | None, text: str) -> float:
    """KL of two windows of 64 tokens, by the weights as they are when they are expanded."""
    dense, other = (
        AutoModelForCausalLM.from_pretrained(dense_dir, dtype=torch.float32) for _ in range(2)
    )
    stored = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for layer in range(4):
        own, made = (m.model.layers[layer].self_attn for m in (other, stored))
        if block in (None, f"model.layers.{layer}.self_attn"):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                module = getattr(made, name)
                identity = torch.eye(module.in_features)
                getattr(own, name).weight.data = module(identity).T.clone()
    ids = AutoTokenizer.from_pretrained(dense_dir)(text, add_special_tokens=False)["input_ids"]
    tokens, total = torch.tensor(ids[:128]).view(2, 64), 0.0
    for window in tokens:
        log_p, log_q = (
            m(window[None]).logits[0].double().log_softmax(dim=-1) for m in (dense, other)
        )
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / 128


@torch.no_grad()
def test_blocks_are_measured_each_as_the_only_one(
    compressed: Path, tiny_llama: Path, wikitext: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command: list[object] = ["evaluate", compressed, "--against", tiny_llama, "--text", wikitext]
    command += ["--window", 64, "--max-windows", 2, "--sensitivity", 3, "--executor", "serial"]
    finished = lestd(*command, "--json")
    assert finished.code == 0, finished.err
    found = json.loads(finished.out)["divergence"]
    text = wikitext.read_text(encoding="utf-8")[:2000]
    assert [one["name"] for one in found["blocks"]] == [
        f"model.layers.{layer}.self_attn" for layer in (0, 1, 2)
    ]
    for one in (*found["blocks"], found["whole"]):
        block = None if one["name"] == "model" else one["name"]
        measured = by_hand(tiny_llama, compressed, block, text)
        assert one["measured"] == pytest.approx(measured, rel=1e-2)
    assert found["whole"]["measured"] > max(one["measured"] for one in found["blocks"])
    manifest = Manifest(compressed / "manifest")
    losses = {row["block"]: row["expected_loss"] for row in manifest.groups().to_pylist()}
    assert found["whole"]["expected"] == pytest.approx(sum(losses.values()))
    assert all(one["expected"] == losses[one["name"]] for one in found["blocks"])
    rows = {
        (row["metric"], row["answer_filter"]): row["value"]
        for row in manifest.evaluations().to_pylist()
        if row["task"] == "divergence"
    }
    assert rows["kl", "model"] == found["whole"]["measured"]
    assert rows["correlation", "model"] == found["correlation"]
    assert len(rows) == 5

    def never(*_: Any) -> Iterator[Any]:
        raise AssertionError("finished pieces are scored again")

    monkeypatch.setattr(DivergenceWorker, "_score", never)
    assert json.loads(lestd(*command, "--json").out)["divergence"] == found
    assert "correlation of the blocks' expected" in lestd(*command).out


def test_what_cannot_be_checked_is_refused(
    compressed: Path, tiny_llama: Path, wikitext: Path
) -> None:
    alone = lestd("evaluate", compressed, "--text", wikitext, "--sensitivity", 2)
    assert alone.code == 2
    assert "needs the dense model and a text" in " ".join(alone.err.split())
    command: list[object] = ["evaluate", tiny_llama, "--against", tiny_llama, "--text", wikitext]
    command += ["--window", 8, "--max-windows", 1, "--executor", "serial", "--sensitivity", 2]
    dense = lestd(*command)
    assert dense.code == 2
    assert "has no expected loss to check" in " ".join(dense.err.split())
