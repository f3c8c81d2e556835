"""Task files of the user's, groups of tasks, and requests that are too long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from support.cli import lestd
from support.lm_eval_data import DATA, MODEL, load

from orchestrator.manifest.manifest import Manifest

SERIAL = ("--executor", "serial", "--json")


def write_task(folder: Path, name: str, prompt: str, **more: Any) -> None:
    data_files = {"test": str(DATA / "mathqa" / "test.jsonl")}
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": data_files, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": prompt,
        "doc_to_choice": ["a", "b", "c", "d", "e"],
        "doc_to_target": "{{['a', 'b', 'c', 'd', 'e'].index(correct)}}",
        "metadata": {"version": 3.0},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | more))


def evaluate(folder: Path, run_dir: Path, tasks: str, limit: int) -> tuple[list[Any], str]:
    options = ("--tasks", tasks, "--include-path", folder, "--limit", limit, "--run-dir", run_dir)
    result = lestd("evaluate", MODEL, *options, *SERIAL)
    assert result.code == 0, result.err
    return json.loads(result.out)["tasks"], result.err


def test_task_files_of_the_users(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task(folder, "letters", "{{Problem}} {{options}}\nAnswer:")
    (entry, _), _ = evaluate(folder, tmp_path / "run", "letters", 5)
    assert (entry["task"], entry["task_version"], entry["samples"]) == ("letters", "3.0", 5)
    (row, _) = Manifest(tmp_path / "run").evaluations().to_pylist()
    assert (row["task"], row["metric"], row["value"]) == (
        "letters",
        entry["metric"],
        entry["models"][0]["value"],
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"output_type": "sing"}, "task broken cannot be loaded (ValueError: Got invalid output"),
        ({"doc_to_target": "{{answer}}"}, "task broken cannot be loaded ("),
        ({"unsafe_code": True}, "task broken runs code that the model writes"),
    ],
)
def test_task_files_that_cannot_be_used(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_task(tmp_path, "broken", "{{Problem}}", **more)
    options = ("--tasks", "broken", "--include-path", tmp_path, "--run-dir", tmp_path / "run")
    result = lestd("evaluate", MODEL, *options, *SERIAL)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


def test_requests_that_lose_their_beginning_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task(folder, "long", "{% for _ in range(30) %}{{Problem}} {% endfor %}\nAnswer:")
    (entry, _), err = evaluate(folder, tmp_path / "run", "long", 3)
    cut = entry["models"][0]["inputs_cut"]
    assert cut == 3  # Answers of one letter share an input; the model reads 512 tokens.
    assert f"long: {cut} inputs are longer than the model's positions" in err


@pytest.mark.slow
def test_figures_of_groups_are_lm_evals(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task(folder, "with_options", "{{Problem}} {{options}}\nAnswer:")
    write_task(folder, "without_options", "{{Problem}}\nAnswer:")
    group = {
        "group": "both_ways",
        "task": ["with_options", "without_options"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 1.0},
    }
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = lm_eval.simple_evaluate(
        model=load(MODEL),
        tasks=["both_ways"],
        limit=12,
        task_manager=TaskManager(include_path=str(folder)),
    )["results"]
    torch.set_num_threads(threads)
    entries, _ = evaluate(folder, tmp_path / "run", "both_ways", 12)
    assert {entry["task"] for entry in entries} == set(group["task"]) | {"both_ways"}
    for entry in entries:
        found = expected[entry["task"]]
        key = f"{entry['metric']},{entry['answer_filter']}"
        stderr = found[f"{entry['metric']}_stderr,{entry['answer_filter']}"]
        assert entry["models"][0]["value"] == found[key]
        assert entry["models"][0]["stderr"] == stderr
    rows = Manifest(tmp_path / "run").evaluations().to_pylist()
    assert {row["task"] for row in rows} == {entry["task"] for entry in entries}
    assert {row["samples"] for row in rows if row["task"] == "both_ways"} == {24}
