"""What tasks of lm-eval say of the models of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.evaluation.lm_eval_scores import Judgement
from orchestrator.evaluation.lm_eval_table import describe_judgements
from orchestrator.evaluation.lm_eval_tasks import Examination
from orchestrator.experiments.sweep_table import Quality

_MAIN = (
    ("acc", "none"),
    ("exact_match", "strict-match"),
    ("exact_match", "none"),
    ("word_perplexity", "none"),
)
"""A task's main figure is the first of these that it has, otherwise its own first."""


def task_qualities(
    judged: Sequence[Sequence[Judgement]], examination: Examination
) -> list[tuple[Quality, ...]]:
    """The figures of models in tasks.

    Args:
        judged: the judgements of each model; the first model is the dense one.
        examination: the tasks.

    Returns:
        Of each model all of its figures.
    """
    qualities = []
    for judgements in judged:
        entries = describe_judgements([judged[0], judgements], examination)
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
