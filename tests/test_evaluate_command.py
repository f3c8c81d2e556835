"""Evaluating two models beside each other, by the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli import lestd
from conftest import EXAMPLE

from orchestrator.evaluation import evaluate, open_model
from orchestrator.executor import SerialExecutor

MODEL = EXAMPLE / "model"


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "short.txt"
    path.write_bytes((EXAMPLE / "wikitext-2-test.txt").read_bytes()[:2000])
    return path


@pytest.fixture
def copied_model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def test_json_of_two_models_is_one_object(text_file: Path, copied_model: Path) -> None:
    options = ("--text", text_file, "--window", 100, "--executor", "serial", "--json")
    result = lestd("evaluate", copied_model, "--against", MODEL, *options)
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found.keys() == {"text", "models"}
    assert found["text"] == str(text_file)
    expected = evaluate(open_model(MODEL, 100), text_file, SerialExecutor())
    assert [one["model"] for one in found["models"]] == [str(MODEL), str(copied_model)]
    for one in found["models"]:
        assert one["nll"] == expected.nll
        assert one["window_length"] == 100
        assert one["weights_in_scope"] is None


@pytest.mark.parametrize("absent", ["config.json", "tokenizer.json", "model.safetensors", "window"])
def test_a_second_model_is_looked_at_before_the_first_is_judged(
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
