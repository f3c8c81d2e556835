"""The scores of the paper on local files: which files, and what lm-eval's tasks read in them.

    DIR/wikitext-2/test.txt         WikiText-2, the word-level text; articles become documents
    DIR/mathqa/test.jsonl           Problem, options, correct
    DIR/gsm8k/test.jsonl            question, answer
    DIR/truthfulqa/TruthfulQA.csv   Question, Best Answer, Correct Answers, Incorrect Answers

Examples before a question are taken from ``train.jsonl`` beside a ``test.jsonl``. Only the data is
local: prompts, metrics, filters and rules of few-shot examples are those of the installed lm-eval.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lestd_kernels.errors import LestdError
from workers.storage.untrusted_files import MAX_TEXT_BYTES, parse_json, read_regular

Document = dict[str, Any]
"""A row of a data set, by its columns' names."""


@dataclass(frozen=True)
class LocalTask:
    """Where a task of lm-eval finds its data in a local directory.

    Attributes:
        file: path of the documents' file in the directory.
        read: gives the rows of such a file, with the columns of the Hub's data set.
        split: name that lm-eval's task has for the documents.
        has_training: whether examples can be taken from ``train.jsonl`` beside it.
    """

    file: str
    read: Callable[[Path], list[Document]]
    split: str
    has_training: bool = False

    def rows(self, data: Path) -> dict[str, list[Document]]:
        """All splits, in a directory.

        Raises:
            LestdError: a file is missing or damaged.
        """
        path = data / self.file
        splits = {self.split: self.read(path)}
        training = path.with_name("train.jsonl")
        if self.has_training and training.exists():
            splits["train"] = self.read(training)
        return splits


def _text(path: Path) -> str:
    try:
        # Bytes first: text mode would turn "\r\n" into "\n".
        return read_regular(path, MAX_TEXT_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise LestdError(
            f"the data {path} cannot be read ({error.strerror}); expected the file that "
            "docs/evaluation.md describes, check --data"
        ) from error
    except UnicodeDecodeError as error:
        raise LestdError(f"the data {path} is not UTF-8; convert it to UTF-8") from error


def _require(path: Path, rows: list[Document]) -> list[Document]:
    if not rows:
        raise LestdError(f"the data {path} holds no document; get the file again")
    return rows


def _json_lines(*columns: str) -> Callable[[Path], list[Document]]:
    """A reader of files that hold a JSON object per line, with these columns, all of text."""

    def read(path: Path) -> list[Document]:
        rows = []
        for number, line in enumerate(_text(path).split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise LestdError(f"{path}, line {number}: not valid JSON ({error})") from error
            if not isinstance(row, dict) or not all(isinstance(row.get(c), str) for c in columns):
                raise LestdError(
                    f"{path}, line {number}: expected an object with the texts {', '.join(columns)}"
                )
            rows.append({column: row[column] for column in columns})
        return _require(path, rows)

    return read


def _pages(path: Path) -> list[Document]:
    """The articles of a WikiText file, divided as the Hub's document-level data set is.

    An article begins at a line such as ``" = Title = "``; a line of running text that happens to
    look so divides one, there as here.
    """
    pages: list[str] = []
    page: list[str] = []
    for line in _text(path).split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            pages.append("\n".join(page))
            page = []
        page.append(line)
    pages.append("\n".join(page))
    return _require(path, [{"page": page} for page in pages if page.strip()])


def _truthfulqa(path: Path) -> list[Document]:
    """Questions with mc1 (best answer, then wrong ones) and mc2 (right ones, then wrong ones)."""
    columns = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    if absent := [column for column in columns if column not in (reader.fieldnames or ())]:
        raise LestdError(f"{path} has no column {absent[0]!r}; expected TruthfulQA.csv")
    rows = []
    for row in reader:
        question, best, correct, incorrect = (row[column] or "" for column in columns)
        right, wrong = _answers(correct), _answers(incorrect)
        if not (question.strip() and best.strip() and right and wrong):
            raise LestdError(
                f"{path}, line {reader.line_num}: a question needs a best answer, correct answers "
                "and incorrect ones"
            )
        rows.append(
            {
                "question": question.strip(),
                "mc1_targets": _choices([best.strip()], wrong),
                "mc2_targets": _choices(right, wrong),
            }
        )
    return _require(path, rows)


def _answers(cell: str) -> list[str]:
    return [answer.strip() for answer in cell.split(";") if answer.strip()]


def _choices(right: list[str], wrong: list[str]) -> Document:
    return {"choices": right + wrong, "labels": [1] * len(right) + [0] * len(wrong)}


_TRUTHFULQA = LocalTask("truthfulqa/TruthfulQA.csv", _truthfulqa, "validation")
LOCAL_TASKS = {
    "wikitext": LocalTask("wikitext-2/test.txt", _pages, "test"),
    "mathqa": LocalTask(
        "mathqa/test.jsonl", _json_lines("Problem", "options", "correct"), "test", True
    ),
    "gsm8k": LocalTask("gsm8k/test.jsonl", _json_lines("question", "answer"), "test", True),
    "truthfulqa_mc1": _TRUTHFULQA,
    "truthfulqa_mc2": _TRUTHFULQA,
}
"""Tasks of lm-eval whose data may be local, by name."""
TASK_FOLDERS = ("wikitext", "mathqa", "gsm8k", "truthfulqa", "c4")
"""Folders of lm-eval's own task files that are looked into first: all of them take 8 s."""
