"""Several models evaluated on the same text: progress, comparison, rows, and what is shown.

Standard errors of perplexities are the jackknife's, over the n windows:

    SE^2 = (n - 1) / n * sum_i (f_i - mean(f))^2,    f_i = the figure without window i.

That of a difference is paired: f_i is then the difference of two models' figures without window i,
and most of what makes windows differ is in both. Word perplexities have none: which words are a
window's is not defined where a window ends within a word.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.console import output
from orchestrator.evaluation.model import EvaluationModel
from orchestrator.evaluation.perplexity import PERPLEXITIES, Evaluation, evaluate
from orchestrator.evaluation.progress import PieceProgress
from orchestrator.evaluation.records import ModelFacts, model_columns
from orchestrator.evaluation.statistics import jackknife_stderr
from orchestrator.execution.executor import Executor
from orchestrator.model.verify import stored_scope_bytes
from workers.storage.files import AnyPath


def evaluate_models(
    models: Sequence[tuple[EvaluationModel, ModelFacts]],
    text: Path,
    executor: Executor,
    run_dir: AnyPath,
    record: Callable[[Sequence[dict[str, Any]]], None],
    settings: dict[str, Any],
) -> list[Evaluation]:
    """Evaluate models one after the other, with progress, and record what is found.

    Args:
        models: the models.
        text: see `evaluate`.
        executor: who runs the workers.
        run_dir: see `evaluate`.
        record: called with the rows of each model.
        settings: what `evaluate` takes by keyword.

    Raises:
        LestdError: see `evaluate`.
    """
    evaluations = []
    for model, facts in models:
        with PieceProgress(f"evaluate {model.directory.name}", "windows") as shown:
            evaluation, asked = evaluate(
                model,
                facts,
                text,
                executor,
                run_dir,
                progress=shown.update,
                on_event=shown.on_event,
                **settings,
            )
        record(_rows(facts, evaluation, asked))
        evaluations.append(evaluation)
    return evaluations


def _rows(facts: ModelFacts, evaluation: Evaluation, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of `evaluations`, one per convention."""
    common = asked | {
        "evaluation_id": evaluation.evaluation_id,
        "time": time.time_ns() // 1000,
        **model_columns(facts),
        "answer_filter": "none",
        "higher_is_better": False,
        "samples": evaluation.windows,
        "tokens": evaluation.tokens,
        "workers": evaluation.workers,
        "seconds": evaluation.seconds,
    }
    stderr = {"token_perplexity": jackknife_stderr(evaluation.without_each_window())}
    return [
        common
        | {"metric": metric, "value": getattr(evaluation, metric), "stderr": stderr.get(metric)}
        for metric in PERPLEXITIES
    ]


def describe_evaluations(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Evaluations on one text as plain values; the sizes are counted from the files.

    Args:
        evaluations: of one model; or of two, the second held against the first.

    Returns:
        ``text``, ``models``, and with two models ``difference`` (second minus first) with the
        perplexities' differences and their standard errors.
    """
    entries = []
    for one in evaluations:
        entry = asdict(one) | {"weights_in_scope": stored_scope_bytes(Path(one.model))}
        entry["token_perplexity_stderr"] = jackknife_stderr(one.without_each_window())
        del entry["text"], entry["window_scores"]
        entries.append(entry)
    described: dict[str, Any] = {"text": evaluations[0].text, "models": entries}
    if len(evaluations) == 2:
        before, after = evaluations
        described["difference"] = {
            **{name: getattr(after, name) - getattr(before, name) for name in PERPLEXITIES},
            "token_perplexity_stderr": _paired_stderr(before, after),
        }
    return described


def _paired_stderr(before: Evaluation, after: Evaluation) -> float | None:
    """Of the difference of token perplexities; None where the windows are not the same."""
    same = (before.token_ids_sha256, before.window_length)
    if same != (after.token_ids_sha256, after.window_length):
        return None
    pairs = zip(before.without_each_window(), after.without_each_window(), strict=True)
    return jackknife_stderr([b - a for a, b in pairs])


def print_evaluations(evaluations: Sequence[Evaluation]) -> None:
    """One table, a row per model, and one for their difference."""
    described = describe_evaluations(evaluations)
    text, entries = described["text"], described["models"]
    scopes = [entry["weights_in_scope"] for entry in entries if entry["weights_in_scope"]]
    rows: list[tuple[str, ...]] = []
    for entry in entries:
        scope = entry["weights_in_scope"]
        if scope is not None:
            in_scope = f"{output.size(scope['stored_bytes'])}"
            in_scope += f" ({scope['stored_bytes'] / scope['dense_bytes']:.4f})"
        else:
            in_scope = output.size(scopes[0]["dense_bytes"]) if scopes else ""
        rows.append(
            (
                entry["model"],
                in_scope,
                output.size(entry["model_bytes_on_disk"]),
                output.with_error(entry["token_perplexity"], entry["token_perplexity_stderr"]),
                f"{entry['word_perplexity']:.4f}",
            )
        )
    note = "± one standard error, by windows; word ppl has none"
    if "difference" in described:
        note = "± one standard error, by windows, paired for the difference; word ppl has none"
        found = described["difference"]
        token = output.with_error(found["token_perplexity"], found["token_perplexity_stderr"], "+")
        rows.append(("difference", "", "", token, f"{found['word_perplexity']:+.4f}"))
    columns = ("model", "weights in scope (keep)", "files on disk", "token ppl", "word ppl")
    one = evaluations[0]
    dtypes = " and ".join(dict.fromkeys(one.dtype for one in evaluations))
    title = f"{text}: {one.windows} windows of {one.window_length}, {one.tokens:,} tokens, {dtypes}"
    output.print_table(title, columns, rows)
    output.out.print(note)
