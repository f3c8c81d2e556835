"""Figures of the models of an experiment: sizes, errors, quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.evaluation.perplexity import PERPLEXITIES, TEXT_TASK, Evaluation
from orchestrator.evaluation.perplexity_table import describe_evaluations

if TYPE_CHECKING:  # They import lm_eval.
    from orchestrator.evaluation.lm_eval_scores import TaskScores
    from orchestrator.evaluation.lm_eval_tasks import Examination

_MAIN = (
    ("acc", "none"),
    ("exact_match", "strict-match"),
    ("exact_match", "none"),
    ("word_perplexity", "none"),
)
"""A task's main figure is the first of these that it has, otherwise its own first."""


@dataclass(frozen=True)
class Quality:
    """One figure of a model.

    Attributes:
        task: ``"text"``, or a task of lm-eval.
        metric: its metric.
        answer_filter: lm-eval's filter of the answers; ``"none"`` where there is none.
        value: the figure.
        stderr: its standard error; None where it has none.
        difference: to the dense model, whose own is 0.
        difference_stderr: paired standard error of the difference; None where it has none.
        higher_is_better: None where nobody says.
        main: whether it is shown in the table; JSON has all.
    """

    task: str
    metric: str
    answer_filter: str
    value: float
    stderr: float | None
    difference: float
    difference_stderr: float | None
    higher_is_better: bool | None
    main: bool

    @property
    def title(self) -> str:
        """Name to show."""
        if self.task == TEXT_TASK:
            return self.metric.replace("_perplexity", " ppl")
        return f"{self.task} {self.metric}".replace("_perplexity", " ppl")


@dataclass(frozen=True)
class Point:
    """A model of an experiment.

    Attributes:
        keep: what was asked for; None for the dense model.
        model: its directory, or how the dense one was named.
        stored_bytes: bytes of its weights in scope.
        model_bytes_on_disk: bytes of its safetensors files, headers included.
        relative_error: ``||W - W_hat|| / ||W||`` over the weights in scope.
        quality: its figures, of each model the same ones; empty where it was not evaluated.
    """

    keep: float | None
    model: str
    stored_bytes: int
    model_bytes_on_disk: int
    relative_error: float
    quality: tuple[Quality, ...]


def text_qualities(evaluations: Sequence[Evaluation]) -> list[tuple[Quality, ...]]:
    """The perplexities of models on a text; the first model is the dense one."""
    qualities = []
    for evaluation in evaluations:
        described = describe_evaluations([evaluations[0], evaluation])
        entry, difference = described["models"][1], described["difference"]
        qualities.append(
            tuple(
                Quality(
                    TEXT_TASK,
                    metric,
                    "none",
                    entry[metric],
                    entry.get(f"{metric}_stderr"),
                    difference[metric],
                    difference.get(f"{metric}_stderr"),
                    higher_is_better=False,
                    main=True,
                )
                for metric in PERPLEXITIES
            )
        )
    return qualities


def task_qualities(
    evaluated: Sequence[Sequence[TaskScores]], examination: Examination
) -> list[tuple[Quality, ...]]:
    """The figures of models in tasks.

    Args:
        evaluated: the scores of each model; the first model is the dense one.
        examination: the tasks.

    Returns:
        Of each model all of its figures.
    """
    from orchestrator.evaluation.lm_eval_table import describe_scores

    qualities = []
    for scores in evaluated:
        entries = describe_scores([evaluated[0], scores], examination)
        main = _main_figures(entries)
        qualities.append(
            tuple(
                Quality(
                    entry["task"],
                    entry["metric"],
                    entry["answer_filter"],
                    entry["models"][1]["value"],
                    entry["models"][1]["stderr"],
                    entry["difference"],
                    entry["difference_stderr"],
                    entry["higher_is_better"],
                    main=main[entry["task"]] == (entry["metric"], entry["answer_filter"]),
                )
                for entry in entries
            )
        )
    return qualities


def _main_figures(entries: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """The metric and filter by which each task is shown."""
    figures: dict[str, list[tuple[str, str]]] = {}
    for entry in entries:
        figures.setdefault(entry["task"], []).append((entry["metric"], entry["answer_filter"]))
    return {
        task: next((one for one in _MAIN if one in found), found[0])
        for task, found in figures.items()
    }
