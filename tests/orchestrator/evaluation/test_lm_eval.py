"""Evaluating by tasks of lm-eval, against `lm_eval.simple_evaluate` in one process."""

from __future__ import annotations

import json
import math
import shutil
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXAMPLE
from support.cli import PATIENCE, Finished, lestd, start_lestd
from support.lm_eval_data import DATA, MODEL, TASKS, score_by_lm_eval, write_oracle_tasks

from orchestrator.evaluation import lm_eval_tasks
from orchestrator.manifest.manifest import Manifest

LIMIT = 2
ALL = ("--tasks", ",".join(TASKS), "--data", DATA, "--limit", LIMIT, "--fewshot", 0)
SERIAL = ("--executor", "serial", "--json")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As a worker computes: the number of threads decides the order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document per piece, so that there is something to divide and to merge."""
    monkeypatch.setattr(lm_eval_tasks, "_DOCUMENTS", {})
    monkeypatch.setattr(lm_eval_tasks, "_DOCUMENTS_OF_CHOICE", 1)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "small"
    result = lestd("compress", MODEL, "--keep", 0.4, "--out", out, "--executor", "serial")
    assert result.code == 0, result.err
    return out


@pytest.fixture(scope="module")
def oracle(compressed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Any]:
    folder = tmp_path_factory.mktemp("oracle")
    write_oracle_tasks(folder)
    models = (MODEL, compressed)
    return {model: score_by_lm_eval(model, folder, LIMIT, num_fewshot=0) for model in models}


def evaluate(model: Path, *options: object) -> Finished:
    result = lestd("evaluate", model, *options)
    assert result.code == 0, result.err
    return result


def figures(result: Finished, place: int = -1) -> dict[tuple[str, str, str], Any]:
    """(task, metric, filter) -> value and standard error."""
    return {
        (one["task"], one["metric"], one["answer_filter"]): (
            one["models"][place]["value"],
            one["models"][place]["stderr"],
        )
        for one in json.loads(result.out)["tasks"]
    }


def oracle_figures(found: dict[str, Any]) -> dict[tuple[str, str, str], Any]:
    figures = {}
    for task, results in found["results"].items():
        for key, value in results.items():
            metric, comma, name = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                stderr = results[f"{metric}_stderr,{name}"]
                figures[task, metric, name] = (value, None if stderr == "N/A" else stderr)
    assert {task for task, _, _ in figures} == set(TASKS)
    return figures


@pytest.fixture(scope="module")
def evaluated(compressed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """Both models by the real command, in this process."""
    run_dir = tmp_path_factory.mktemp("evaluated")
    options = ("--against", MODEL, "--run-dir", run_dir, "--log-samples")
    return run_dir, evaluate(compressed, *ALL, *options, *SERIAL)


def test_figures_are_lm_evals_to_the_last_digit(
    evaluated: tuple[Path, Finished], oracle: dict[Path, Any], compressed: Path
) -> None:
    for place, model in enumerate((MODEL, compressed)):
        assert figures(evaluated[1], place) == oracle_figures(oracle[model])
    # The models differ, so nothing was evaluated twice.
    assert figures(evaluated[1], 0) != figures(evaluated[1], 1)


def test_samples_are_lm_evals(
    evaluated: tuple[Path, Finished], oracle: dict[Path, Any], compressed: Path
) -> None:
    run_dir, result = evaluated
    for one in json.loads(result.out)["tasks"]:
        path = run_dir / one["models"][1]["evaluation_id"] / "samples.jsonl"
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        expected = json.loads(json.dumps(oracle[compressed]["samples"][one["task"]], default=float))
        for samples in (found, expected):
            samples.sort(key=lambda sample: (sample["filter"], sample["doc_id"]))
            for sample in samples:
                sample["metrics"].sort()
        assert found == expected


def test_figures_are_recorded_with_the_compressed_model(
    evaluated: tuple[Path, Finished], compressed: Path
) -> None:
    entries = json.loads(evaluated[1].out)["tasks"]
    rows = {
        (row["model"], row["task"], row["metric"], row["answer_filter"]): row
        for row in Manifest(compressed).evaluations().to_pylist()
    }
    assert len(rows) == 2 * len(entries)
    for entry in entries:
        for one in entry["models"]:
            row = rows[one["model"], entry["task"], entry["metric"], entry["answer_filter"]]
            assert (row["value"], row["stderr"]) == (one["value"], one["stderr"])
            assert row["evaluation_id"] == one["evaluation_id"]
            assert row["compressed"] is (one["model"] == str(compressed))
            assert row["higher_is_better"] is (entry["task"] != "wikitext")
            assert (row["samples"], row["fewshot"], row["device"]) == (LIMIT, 0, "cpu")
            assert row["task_version"] == str(entry["task_version"])
            assert row["workers"] == 1
            assert json.loads(row["versions"]).keys() == {
                "lestd",
                "lm_eval",
                "torch",
                "transformers",
            }


def test_differences_and_their_standard_errors(evaluated: tuple[Path, Finished]) -> None:
    run_dir, result = evaluated
    for entry in json.loads(result.out)["tasks"]:
        before, after = entry["models"]
        assert entry["difference"] == after["value"] - before["value"]
        if entry["task"] == "wikitext":
            continue  # See `test_jackknife_of_a_perplexity`.
        answers = []
        for one in entry["models"]:
            path = run_dir / one["evaluation_id"] / "samples.jsonl"
            samples = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            answers.append(
                [s[entry["metric"]] for s in samples if s["filter"] == entry["answer_filter"]]
            )
        by_document = [b - a for a, b in zip(*answers, strict=True)]
        expected = statistics.stdev(by_document) / math.sqrt(len(by_document))
        assert entry["difference_stderr"] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_pool_gives_lm_evals_figures(
    workers: int, evaluated: tuple[Path, Finished], oracle: dict[Path, Any], tmp_path: Path
) -> None:
    options = ("--run-dir", tmp_path / "run", "--workers", workers, "--json")
    pooled = evaluate(MODEL, *ALL, *options)
    assert figures(pooled) == oracle_figures(oracle[MODEL])
    rows = Manifest(tmp_path / "run").evaluations().to_pylist()
    ids = {one["models"][0]["evaluation_id"] for one in json.loads(evaluated[1].out)["tasks"]}
    assert {row["evaluation_id"] for row in rows} == ids
    assert max(row["workers"] for row in rows) <= workers


def wait_for_pieces(run_dir: Path, count: int, process: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(list(run_dir.glob("*/pieces/*.json"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_evaluation_continues(
    oracle: dict[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # The pieces that a process of its own makes: here a document of wikitext.
    options = (*ALL, "--run-dir", tmp_path / "run")
    process = start_lestd("evaluate", MODEL, *options, *SERIAL)
    wait_for_pieces(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*/pieces/*.json")}
    assert len(kept) < 6
    torn = min(kept)
    torn.write_bytes(torn.read_bytes()[:100])
    again = evaluate(MODEL, *options, *SERIAL)
    assert figures(again) == oracle_figures(oracle[MODEL])
    for path, time_ns in kept.items():
        if path != torn:
            assert path.stat().st_mtime_ns == time_ns  # Not evaluated again.
    # All is there: the weights are not needed any more.
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*/pieces/*.json")}
    third = evaluate(MODEL, *options, *SERIAL)
    assert third.out == again.out
    assert {path: path.stat().st_mtime_ns for path in done} == done


@pytest.mark.parametrize(
    "other",
    [("--limit", 2), ("--dtype", "float16"), ("--batch-size", 3), ("--threads", 2)],
)
def test_other_settings_are_another_evaluation(other: tuple[object, ...], tmp_path: Path) -> None:
    common = ("--tasks", "mathqa", "--data", DATA, "--run-dir", tmp_path / "run", *SERIAL)
    ids = []
    for options in (("--limit", 1), ("--limit", 1, *other)):
        entries = json.loads(evaluate(MODEL, *common, *options).out)["tasks"]
        ids.append({one["models"][0]["evaluation_id"] for one in entries})
    assert not ids[0] & ids[1]
    assert len(list((tmp_path / "run" / "manifest" / "evaluations").iterdir())) == 2


def test_batches_change_the_last_digits_at_most(tmp_path: Path) -> None:
    common = ("--tasks", "truthfulqa_mc2", "--data", DATA, "--limit", 4, "--dtype", "float32")
    found = [
        figures(
            evaluate(MODEL, *common, "--batch-size", size, "--run-dir", tmp_path / "r", *SERIAL)
        )
        for size in (1, 4)
    ]
    key = ("truthfulqa_mc2", "acc", "none")
    assert found[1][key] == pytest.approx(found[0][key], rel=1e-4)


def test_examples_before_questions_are_those_of_one_process(tmp_path: Path) -> None:
    """lm-eval draws them with one generator, question after question."""
    data = tmp_path / "data"
    shutil.copytree(DATA / "mathqa", data / "mathqa")
    lines = (data / "mathqa" / "test.jsonl").read_text().splitlines(keepends=True)
    (data / "mathqa" / "test.jsonl").write_text("".join(lines[:20]))
    (data / "mathqa" / "train.jsonl").write_text("".join(lines[20:]))
    folder = tmp_path / "oracle"
    folder.mkdir()
    write_oracle_tasks(folder, data, train="mathqa")
    expected = score_by_lm_eval(MODEL, folder, 4, tasks=("mathqa",), num_fewshot=2)
    options = ("--tasks", "mathqa", "--data", data, "--limit", 4, "--fewshot", 2)
    run = tmp_path / "run"
    found = evaluate(MODEL, *options, "--run-dir", run, "--log-samples", *SERIAL)
    entry = json.loads(found.out)["tasks"][0]
    assert entry["fewshot"] == 2
    path = run / entry["models"][0]["evaluation_id"] / "samples.jsonl"
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    asked = [[list(a) for a in one["arguments"]] for one in expected["samples"]["mathqa"]]
    assert [one["arguments"] for one in samples] == asked
    assert len({one["arguments"][0][0].split("\n")[0] for one in samples}) > 1


def test_text_and_tasks_together(tmp_path: Path) -> None:
    text = EXAMPLE / "wikitext-2-test.txt"
    options = ("--text", text, "--max-windows", 1, "--tasks", "mathqa", "--data", DATA)
    result = evaluate(MODEL, *options, "--limit", 1, "--run-dir", tmp_path / "run", *SERIAL)
    found = json.loads(result.out)
    assert found.keys() == {"text", "models", "tasks"}
    rows = Manifest(tmp_path / "run").evaluations().to_pylist()
    assert {row["task"] for row in rows} == {"text", "mathqa"}


def test_a_table_for_people(compressed: Path, tmp_path: Path) -> None:
    options = ("--tasks", "mathqa,truthfulqa_mc1", "--data", DATA, "--limit", 2, "--run-dir")
    options = (*options, tmp_path / "run", "--executor", "serial")
    result = evaluate(compressed, *options, "--against", MODEL)
    assert f"{compressed} against {MODEL}" in result.out
    row = next(line for line in result.out.splitlines() if "acc_norm" in line)
    assert row.count("±") == 3
    assert "samples/s" in result.err
