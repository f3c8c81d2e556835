"""What evaluations leave in the manifest."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import EXAMPLE
from support.cli import lestd

from orchestrator.manifest.manifest import Manifest, default_evaluation_dir

MODEL = EXAMPLE / "model"
QUICK = ("--window", 64, "--max-windows", 3, "--executor", "serial", "--json")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "model"
    result = lestd("compress", MODEL, "--keep", 0.5, "--out", out, "--executor", "serial")
    assert result.code == 0, result.err
    return out


@pytest.fixture
def model(compressed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compressed, tmp_path / "model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_bytes((EXAMPLE / "wikitext-2-test.txt").read_bytes()[:2000])
    return path


def evaluate(model: Path, text: Path, *options: object) -> list[dict[str, Any]]:
    result = lestd("evaluate", model, "--text", text, *QUICK, *options)
    assert result.code == 0, result.err
    assert not result.err.count("not recorded")
    return list(json.loads(result.out)["models"])


def test_both_models_are_recorded_with_the_compressed_one(model: Path, text: Path) -> None:
    dense, compressed = evaluate(model, text, "--against", MODEL)
    rows = Manifest(model).evaluations().to_pylist()
    assert len(list((model / "manifest" / "evaluations").iterdir())) == 2
    found = {(row["model"], row["metric"]): row for row in rows}
    assert len(found) == len(rows) == 4
    scope = compressed["weights_in_scope"]
    for one, is_compressed in ((dense, False), (compressed, True)):
        for metric in ("token_perplexity", "word_perplexity"):
            row = found[one["model"], metric]
            assert row["value"] == one[metric]
            assert (row["task"], row["answer_filter"], row["samples"]) == ("text", "none", 3)
            assert row["tokens"] == one["tokens"] == 3 * 64
            assert row["higher_is_better"] is False
            assert row["compressed"] is is_compressed
            assert row["model_bytes"] == one["model_bytes_on_disk"]
            assert row["stored_bytes"] == (scope["stored_bytes"] if is_compressed else None)
            assert row["dense_bytes"] == (scope["dense_bytes"] if is_compressed else None)
            assert (row["dtype"], row["device"], row["workers"]) == (one["dtype"], one["device"], 1)
            assert json.loads(row["versions"]).keys() == {"lestd", "torch", "transformers"}
            settings = json.loads(row["settings"])
            assert settings["text"] == "short.txt"
            assert settings["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
            assert (settings["window"], settings["windows"]) == (64, 3)
    # The model was copied with its tokenizer.
    assert len({json.loads(row["settings"])["tokenizer_sha256"] for row in rows}) == 1
    assert len({row["model_id"] for row in rows}) == 2


def test_the_same_again_replaces_and_another_setting_adds(model: Path, text: Path) -> None:
    evaluate(model, text)
    before = Manifest(model).evaluations().to_pylist()
    evaluate(model, text)
    again = Manifest(model).evaluations().to_pylist()
    assert [row["evaluation_id"] for row in again] == [row["evaluation_id"] for row in before]
    assert again[0]["time"] > before[0]["time"]
    evaluate(model, text, "--dtype", "float16")
    assert len({row["evaluation_id"] for row in Manifest(model).evaluations().to_pylist()}) == 2


def test_the_id_follows_contents_not_places(model: Path, text: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(model, tmp_path / "elsewhere"))
    same_text = Path(shutil.copy(text, tmp_path / "short.txt"))
    changed = Path(shutil.copytree(model, tmp_path / "changed"))
    config = json.loads((changed / "config.json").read_text())
    config["rms_norm_eps"] = 1e-2
    (changed / "config.json").write_text(json.dumps(config))
    retokenized = Path(shutil.copytree(model, tmp_path / "retokenized"))
    (retokenized / "tokenizer_config.json").write_text("{}")
    ids = []
    for one, its_text in (
        (model, text),
        (moved, same_text),
        (changed, text),
        (retokenized, text),
    ):
        evaluate(one, its_text)
        ids.append(Manifest(one).evaluations()["evaluation_id"][0].as_py())
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3


def test_a_dense_model_alone_is_recorded_beside_it(text: Path, tmp_path: Path) -> None:
    dense = Path(shutil.copytree(MODEL, tmp_path / "dense"))
    files = sorted(dense.rglob("*"))
    (one,) = evaluate(dense, text)
    assert sorted(dense.rglob("*")) == files
    assert default_evaluation_dir(dense) == tmp_path / "dense.eval"
    rows = Manifest(tmp_path / "dense.eval").evaluations().to_pylist()
    assert [row["value"] for row in rows] == [one["token_perplexity"], one["word_perplexity"]]


def test_a_manifest_that_cannot_be_written_costs_a_warning(model: Path, text: Path) -> None:
    (model / "manifest" / "evaluations").touch()  # For root nothing is read-only.
    result = lestd("evaluate", model, "--text", text, *QUICK)
    assert result.code == 0
    assert json.loads(result.out)["models"][0]["windows"] == 3
    assert result.err.count("is not recorded, because") == 1
    assert str(model / "manifest") in result.err


def test_a_model_that_is_made_again_keeps_its_evaluations(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "model"
    compress = ("compress", MODEL, "--keep", 0.5, "--out", out, "--executor", "serial")
    assert lestd(*compress).code == 0
    evaluate(out, text, "--against", MODEL)
    rows = Manifest(out).evaluations()
    assert Manifest(f"{out}.run").evaluations().equals(rows), "a run shows those of its model"
    damaged = next((tmp_path / "model.run" / "payloads").iterdir())
    damaged.unlink()  # The model's is a link to the same bytes, so the model stays whole.
    again = lestd(*compress)
    assert again.code == 0, again.err
    assert damaged.exists()
    assert Manifest(out).evaluations().equals(rows)
    assert lestd("verify", out).code == 0
    assert lestd(*compress, "--fresh").code == 0
    assert len(Manifest(out).evaluations()) == 0


def test_a_dense_models_evaluations_are_found_by_its_name(tmp_path: Path, text: Path) -> None:
    dense = Path(shutil.copytree(MODEL, tmp_path / "dense"))
    evaluate(dense, text)
    assert len(Manifest(dense).evaluations()) == 2
    asked = lestd("query", dense, "select count(*) as n from evaluations", "--json")
    assert json.loads(asked.out) == {"rows": [{"n": 2}]}
