"""Evaluating models on a text by the command: two beside each other, and after a kill."""

from __future__ import annotations

import json
import math
import shutil
import signal
import statistics
import time
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLE
from support.cli import lestd, start_lestd
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.manifest.manifest import Manifest

MODEL = EXAMPLE / "model"


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "short.txt"
    path.write_bytes((EXAMPLE / "wikitext-2-test.txt").read_bytes()[:2000])
    return path


@pytest.fixture
def copied_model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def test_two_models_and_the_difference(text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    result = lestd("compress", MODEL, "--keep", 0.4, "--out", out, "--executor", "serial")
    assert result.code == 0, result.err
    options = ("--text", text_file, "--window", 100, "--executor", "serial")
    result = lestd("evaluate", out, "--against", MODEL, *options, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found.keys() == {"text", "models", "difference"}
    assert found["text"] == str(text_file)
    dense, small = found["models"]
    assert (dense["model"], small["model"]) == (str(MODEL), str(out))
    assert dense["weights_in_scope"] is None
    assert small["window_length"] == 100
    assert dense["nll"] == pytest.approx(sum(plain_losses(text_file, 100)), rel=0.01)

    # The jackknife by its definition, from what the pieces on disk hold.
    without = []
    for one in (dense, small):
        pieces = [
            json.loads(path.read_text())
            for path in (tmp_path / "small.eval" / one["evaluation_id"] / "pieces").iterdir()
        ]
        scores = sorted(
            score
            for piece in pieces
            for score in zip(piece["windows"], piece["nll"], piece["tokens"], strict=True)
        )
        assert [window for window, _, _ in scores] == list(range(one["windows"]))
        assert math.fsum(nll for _, nll, _ in scores) == one["nll"]
        without.append(
            [
                math.exp(sum(n for _, n, _ in rest) / sum(t for _, _, t in rest))
                for i in range(len(scores))
                if (rest := scores[:i] + scores[i + 1 :])
            ]
        )
    changes = [b - a for a, b in zip(*without, strict=True)]
    count = len(changes)
    for figures, entry in ((without[0], dense), (without[1], small), (changes, None)):
        stderr = math.sqrt((count - 1) ** 2 / count) * statistics.stdev(figures)
        told = entry or found["difference"]
        assert told["token_perplexity_stderr"] == pytest.approx(stderr, rel=1e-6)
    for name in ("token_perplexity", "word_perplexity"):
        assert found["difference"][name] == small[name] - dense[name]
    rows = {(row["model"], row["metric"]): row for row in Manifest(out).evaluations().to_pylist()}
    assert rows[str(out), "token_perplexity"]["stderr"] == small["token_perplexity_stderr"]
    assert rows[str(out), "word_perplexity"]["stderr"] is None

    told = lestd("evaluate", out, "--against", MODEL, *options)
    (row,) = (line for line in told.out.splitlines() if "│ difference" in line)
    error = found["difference"]["token_perplexity_stderr"]
    assert f"{found['difference']['token_perplexity']:+.4f} ± {error:.4f}" in row
    assert "were already finished" in told.err


def plain_losses(text: Path, length: int) -> list[float]:
    """NLL of each window, by Transformers' own loss in float32."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    losses = []
    for start in range(0, len(ids) - 1, length):
        window = torch.tensor([ids[start : start + length + 1]])
        with torch.no_grad():
            # As it averages over what follows the first token of the window.
            mean = model(window, labels=window).loss
        losses.append(float(mean) * (window.shape[1] - 1))
    return losses


def test_models_of_other_tokens_have_no_paired_error(text_file: Path, copied_model: Path) -> None:
    """Windows of other tokens are other samples."""
    config = json.loads((copied_model / "config.json").read_text())
    (copied_model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 60}))
    options = ("--text", text_file, "--executor", "serial", "--json")
    result = lestd("evaluate", copied_model, "--against", MODEL, *options)
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert [one["window_length"] for one in found["models"]] == [512, 60]
    assert found["difference"]["token_perplexity_stderr"] is None


def test_a_killed_evaluation_continues(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes((EXAMPLE / "wikitext-2-test.txt").read_bytes()[:40_000])
    options = ("--text", text, "--window", 64, "--max-windows", 120, "--executor", "serial")
    options = ("evaluate", MODEL, *options, "--json", "--run-dir")

    def pieces(run_dir: Path) -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in run_dir.glob("*/pieces/*.json")}

    process = start_lestd(*options, tmp_path / "run")
    while len(pieces(tmp_path / "run")) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = pieces(tmp_path / "run")
    assert 3 <= len(kept) < 30
    torn = next(path for path in (tmp_path / "run").glob("*/pieces/*.json"))
    torn.write_bytes(torn.read_bytes()[:50])
    del kept[torn.name]

    again = lestd(*options, tmp_path / "run")
    assert again.code == 0, again.err
    assert f"{4 * len(kept)} of 120 windows were already finished" in again.err
    assert "windows/s" in again.err
    done = pieces(tmp_path / "run")
    assert len(done) == 30
    assert kept.items() <= done.items()  # Not scored again.
    whole = lestd(*options, tmp_path / "whole")
    timing = ("seconds", "workers")
    resumed, straight = (json.loads(result.out)["models"][0] for result in (again, whole))
    assert {k: v for k, v in resumed.items() if k not in timing} == {
        k: v for k, v in straight.items() if k not in timing
    }

    # What is finished is not computed again: the weights are not even read.
    third = lestd(*options, tmp_path / "run")
    assert third.out == again.out
    assert pieces(tmp_path / "run") == done
    assert "windows/s" not in third.err


def test_a_run_dir_that_is_a_file(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    options = ("--text", text_file, "--run-dir", tmp_path / "run", "--executor", "serial")
    result = lestd("evaluate", MODEL, *options)
    assert (result.code, result.out) == (2, "")
    assert "cannot be written" in result.err
    assert "choose another place by --run-dir" in result.err


@pytest.mark.parametrize("absent", ["config.json", "tokenizer.json", "model.safetensors", "window"])
def test_a_second_model_is_looked_at_before_the_first_is_evaluated(
    absent: str, copied_model: Path, text_file: Path
) -> None:
    if absent == "window":
        config = json.loads((copied_model / "config.json").read_text())
        config["max_position_embeddings"] = 50
        (copied_model / "config.json").write_text(json.dumps(config))
    else:
        (copied_model / absent).unlink()
    if absent == "tokenizer.json":
        (copied_model / "tokenizer_config.json").unlink()
    options = ("--text", text_file, "--window", 100, "--executor", "serial", "--json")
    result = lestd("evaluate", copied_model, "--against", MODEL, *options)
    assert (result.code, result.out) == (2, "")
    assert str(copied_model) in result.err
    assert "%" not in result.err  # No progress: nothing was begun.
