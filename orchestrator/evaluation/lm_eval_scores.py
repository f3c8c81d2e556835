"""Merged scores of documents: lm-eval's figures, and their rows in the manifest."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

from lm_eval.evaluator_utils import _process_results

from orchestrator.console import logs
from orchestrator.evaluation.records import ModelFacts, model_columns
from workers.evaluation.lm_eval_tasks import hushed

_BOOTSTRAP_ITERATIONS = 100_000  # simple_evaluate's default
RawMetrics = dict[tuple[str, str], list[Any]]
"""(metric, filter) -> value of each document, in order."""


@dataclass(frozen=True)
class Figure:
    """One metric of one task.

    Attributes:
        metric: its name.
        answer_filter: lm-eval's filter of the responses; ``"none"`` where there is none.
        value: the figure.
        stderr: its standard error; None where lm-eval gives none.
        higher_is_better: None where lm-eval does not say.
    """

    metric: str
    answer_filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskScores:
    """How a model did in one task, or in a group of tasks.

    Attributes:
        evaluation_id: hash of the model and of all that decides the figures.
        model: the model, as it was named.
        task: name of the task or group.
        version: the task's own version.
        fewshot: examples shown before each question; None for a group.
        documents: documents evaluated.
        figures: one per metric and filter.
        raw: what the figures are made of; empty for a group.
        cut: inputs that were longer than the model's positions, and lost their beginning.
    """

    evaluation_id: str
    model: str
    task: str
    version: str
    fewshot: int | None
    documents: int
    figures: tuple[Figure, ...]
    raw: RawMetrics = field(repr=False)
    cut: int


def aggregate(tasks: Mapping[str, tuple[Any, RawMetrics]], groups: Mapping[str, Any]) -> Any:
    """The documents' values in lm-eval's own result structure."""
    gathered = {
        name: {"task": task, "raw_metrics": raw, "logged_samples": []}
        for name, (task, raw) in tasks.items()
    }
    # Its bootstrap forks by default, which a process with threads had better not do; it draws the
    # same samples without. It prints on standard output, where only results belong.
    os.environ["DISABLE_MULTIPROC"] = "1"
    with hushed(), redirect_stdout(logs.Lines()):
        processed = _process_results(gathered, dict(groups), _BOOTSTRAP_ITERATIONS)
        return processed._to_eval_results()


def figures_of(found: Any, task: str) -> tuple[Figure, ...]:
    """The figures of one task or group, out of lm-eval's results."""
    better = found["higher_is_better"].get(task) or {}
    results = found["results"][task]
    figures = []
    for key, value in results.items():
        metric, comma, name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = results.get(f"{metric}_stderr,{name}")
        known = isinstance(stderr, (int, float))
        figures.append(
            Figure(metric, name, float(value), float(stderr) if known else None, better.get(metric))
        )
    # Not in the order that they came: it is another after pieces were read again.
    return tuple(sorted(figures, key=lambda figure: (figure.metric, figure.answer_filter)))


def figure_rows(
    facts: ModelFacts, score: TaskScores, columns: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The rows of `evaluations` for a score; `columns` are those that it does not know."""
    common = {
        **columns,
        **model_columns(facts),
        "evaluation_id": score.evaluation_id,
        "time": time.time_ns() // 1000,
        "samples": score.documents,
    }
    return [
        common
        | {
            "metric": figure.metric,
            "answer_filter": figure.answer_filter,
            "value": figure.value,
            "stderr": figure.stderr,
            "higher_is_better": figure.higher_is_better,
        }
        for figure in score.figures
    ]
