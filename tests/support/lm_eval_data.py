"""Local scores for tests, and what lm-eval itself makes of them in one process."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.tasks
import yaml
from conftest import EXAMPLE
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import lestd_kernels  # noqa: F401 - registers the format, for lm-eval loads models itself
from workers.host.loading import auto_dtype

MODEL = EXAMPLE / "model"
DATA = EXAMPLE.parent / "tasks"
TASKS = ("wikitext", "mathqa", "gsm8k", "truthfulqa_mc1", "truthfulqa_mc2")


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def truthfulqa_rows() -> list[dict[str, Any]]:
    """The sample's questions in the columns of the Hub's data set."""
    rows = []
    with (DATA / "truthfulqa" / "TruthfulQA.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            wrong = re.findall(r"[^;\s][^;]*(?<!\s)", row["Incorrect Answers"])
            right = re.findall(r"[^;\s][^;]*(?<!\s)", row["Correct Answers"])
            rows.append(
                {
                    "question": row["Question"].strip(),
                    "mc1_targets": {
                        "choices": [row["Best Answer"].strip(), *wrong],
                        "labels": [1, *[0] * len(wrong)],
                    },
                    "mc2_targets": {
                        "choices": right + wrong,
                        "labels": [1] * len(right) + [0] * len(wrong),
                    },
                }
            )
    return rows


def wikitext_rows(count: int) -> list[dict[str, Any]]:
    """The first articles, divided where a line has one equals sign on either side."""
    text = (DATA / "wikitext-2" / "test.txt").read_bytes().decode()
    starts = [match.start() for match in re.finditer(r"(?m)^ = [^=\n]+ = $", text)]
    ends = starts[1 : count + 1]
    # What a newline joins is not in either part: the one before a title is in neither.
    pages = [text[a : b - 1] for a, b in zip(starts, ends, strict=False)]
    return [{"page": page} for page in pages]


def write_oracle_tasks(folder: Path, data: Path = DATA, train: str = "") -> None:
    """lm-eval's own task files on local JSON lines, by its own means.

    The task `train` takes examples from the train.jsonl that it has.
    """
    files = {
        "wikitext": ("wikitext", write_json_lines(folder / "w.jsonl", wikitext_rows(8)), "test"),
        "mathqa": ("mathqa", data / "mathqa" / "test.jsonl", "test"),
        "gsm8k": ("gsm8k", data / "gsm8k" / "test.jsonl", "test"),
    }
    questions = write_json_lines(folder / "t.jsonl", truthfulqa_rows())
    for name in ("truthfulqa_mc1", "truthfulqa_mc2"):
        files[name] = ("truthfulqa", questions, "validation")
    for name, (where, file, split) in files.items():
        own = Path(lm_eval.tasks.__file__).parent / where / f"{name}.yaml"
        found = {split: str(file)}
        if name == train:
            found["train"] = str(file.with_name("train.jsonl"))
        task = {
            "include": str(own),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": found, "cache_dir": str(folder / "cache")},
            "training_split": "train" if name == train else None,
            "validation_split": None,
            "test_split": None,
        }
        task[f"{split}_split"] = split
        if name == "gsm8k":
            task["fewshot_split"] = "test"
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def load(model: Path) -> HFLM:
    """A model as lm-eval loads it, in the compute dtype of `auto`."""
    dtype, _ = auto_dtype(str(model), "cpu")
    return HFLM(pretrained=str(model), device="cpu", batch_size=1, dtype=dtype)


def score_by_lm_eval(
    model: Path, folder: Path, limit: int, tasks: Sequence[str] = TASKS, **options: Any
) -> dict[str, Any]:
    """`simple_evaluate` of all tasks in this process."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=load(model), tasks=list(tasks), limit=limit, task_manager=manager, **options
    )
