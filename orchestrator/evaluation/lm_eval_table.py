"""Several models evaluated by the same tasks: progress, comparison, and what is shown.

The standard error of a difference is paired: both models answered the same documents, and most of
what makes documents differ is in both figures. It is the jackknife's
(`orchestrator.evaluation.perplexity_table`), which for means, accuracies for instance, is the
standard deviation of the documents' differences over sqrt(n), and which perplexities, being no
means, have as well.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.metrics import bits_per_byte, mean, perplexity, weighted_perplexity

from orchestrator.console import logs, output
from orchestrator.evaluation.lm_eval_scores import TaskScores
from orchestrator.evaluation.lm_eval_tasks import Examination, run_tasks
from orchestrator.evaluation.model import EvaluationModel
from orchestrator.evaluation.progress import PieceProgress
from orchestrator.evaluation.records import ModelFacts
from orchestrator.evaluation.statistics import jackknife_stderr
from orchestrator.execution.executor import Executor
from workers.storage.files import AnyPath


def evaluate_tasks(
    models: Sequence[tuple[EvaluationModel, ModelFacts]],
    examination: Examination,
    executor: Executor,
    run_dir: AnyPath,
    record: Callable[[Sequence[dict[str, Any]]], None],
    log_samples: bool = False,
) -> list[list[TaskScores]]:
    """Evaluate models one after the other, with progress, and record what is found.

    Args:
        models: the models.
        examination: the tasks.
        executor: who runs the workers.
        run_dir: see `run_tasks`.
        record: called with the rows of each task of each model.
        log_samples: see `run_tasks`.

    Returns:
        Of each model, its scores: those of the tasks in their order, then those of groups.

    Raises:
        LestdError: see `run_tasks`.
    """
    evaluated = []
    for model, facts in models:
        with PieceProgress(f"evaluate {model.directory.name}", "samples") as shown:
            found = run_tasks(
                model,
                facts,
                examination,
                executor,
                run_dir,
                record=record,
                log_samples=log_samples,
                progress=shown.update,
                on_event=shown.on_event,
            )
        for one in found:
            if one.cut:
                logs.log(
                    "inputs_cut",
                    f"{one.model}, {one.task}: {one.cut} inputs are longer than the model's "
                    "positions and lost their beginning",
                    logging.WARNING,
                )
        evaluated.append(found)
    return evaluated


def describe_scores(
    evaluated: Sequence[Sequence[TaskScores]], examination: Examination
) -> list[dict[str, Any]]:
    """Figures as plain values, one entry per task, metric and filter.

    Args:
        evaluated: the scores of one model; or of two, the second held against the first.
        examination: the tasks.

    Returns:
        Entries with what is common to the models, ``models`` with each one's figure, and with two
        models ``difference`` (second minus first) and ``difference_stderr``.
    """
    entries = []
    for scores in zip(*evaluated, strict=True):
        first = scores[0]
        for number, figure in enumerate(first.figures):
            key = (figure.metric, figure.answer_filter)
            figures = [score.figures[number] for score in scores]
            entry: dict[str, Any] = {
                "task": first.task,
                "task_version": first.version,
                "metric": figure.metric,
                "answer_filter": figure.answer_filter,
                "higher_is_better": figure.higher_is_better,
                "fewshot": first.fewshot,
                "samples": first.documents,
                "models": [
                    {
                        "model": score.model,
                        "evaluation_id": score.evaluation_id,
                        "value": one.value,
                        "stderr": one.stderr,
                        "inputs_cut": score.cut,
                    }
                    for score, one in zip(scores, figures, strict=True)
                ],
            }
            if len(scores) == 2:
                before, after = scores
                entry["difference"] = figures[1].value - figures[0].value
                entry["difference_stderr"] = None
                if key in before.raw and key in after.raw:
                    task = examination.tasks[first.task][1].task
                    entry["difference_stderr"] = paired_stderr(
                        before.raw[key], after.raw[key], task.aggregation().get(figure.metric, mean)
                    )
            entries.append(entry)
    return entries


def paired_stderr(
    before: Sequence[Any], after: Sequence[Any], aggregation: Callable[[Sequence[Any]], float]
) -> float | None:
    """Standard error of the difference of two figures over the same documents.

    Args:
        before: the first model's value of each document, as lm-eval's aggregation takes it.
        after: the second model's.
        aggregation: what makes the figure of the values.

    Returns:
        The paired jackknife's; None where the figure is neither a mean nor a perplexity, or of
        fewer than two documents.
    """
    if len(before) != len(after) or len(before) < 2:
        return None
    without = [_leave_one_out(values, aggregation) for values in (before, after)]
    if without[0] is None or without[1] is None:
        return None
    return jackknife_stderr([b - a for a, b in zip(without[0], without[1], strict=True)])


def _leave_one_out(
    values: Sequence[Any], aggregation: Callable[[Sequence[Any]], float]
) -> list[float] | None:
    """The figure without each document in turn, from sums over all of them."""
    if aggregation in (weighted_perplexity, bits_per_byte):  # of (log-likelihood, words)
        likelihood = math.fsum(value[0] for value in values)
        weight = math.fsum(value[1] for value in values)
        return [aggregation([(likelihood - one[0], weight - one[1])]) for one in values]
    if aggregation in (mean, perplexity):
        total = math.fsum(values)
        return [aggregation([(total - one) / (len(values) - 1)]) for one in values]
    return None


def print_scores(entries: Sequence[dict[str, Any]], run_dir: AnyPath | None) -> None:
    """One table, a row per task, metric and filter; `run_dir` is named where samples are kept."""
    models = [one["model"] for one in entries[0]["models"]]
    names = [Path(model).name for model in models]
    if len(set(names)) < len(names):
        names = models
    columns = ["task", "metric", "examples", "samples", *names]
    if len(models) == 2:
        columns.append("difference")
    rows = []
    for entry in entries:
        metric = entry["metric"]
        if entry["answer_filter"] != "none":
            metric += f" ({entry['answer_filter']})"
        metric += {True: " ↑", False: " ↓", None: ""}[entry["higher_is_better"]]
        shots = "" if entry["fewshot"] is None else str(entry["fewshot"])
        row = [entry["task"], metric, shots, f"{entry['samples']:,}"]
        row += [output.with_error(one["value"], one["stderr"]) for one in entry["models"]]
        if len(models) == 2:
            row.append(output.with_error(entry["difference"], entry["difference_stderr"], "+"))
        rows.append(row)
    title = models[-1] if len(models) == 1 else f"{models[1]} against {models[0]}"
    output.print_table(title, columns, rows)
    if len(models) == 2:
        output.out.print("± one standard error; that of a difference is paired, by documents")
    if run_dir is not None:
        for one in dict.fromkeys(m["evaluation_id"] for e in entries for m in e["models"]):
            output.out.print(f"samples {run_dir / one}/samples.jsonl", soft_wrap=True)
