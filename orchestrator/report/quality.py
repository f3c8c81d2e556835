"""Figures of quality: each before beside after, and what it was measured on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from orchestrator.manifest.schemas import Row

SAME_QUESTION = ("task", "task_version", "metric", "answer_filter", "fewshot", "settings", "dtype")
"""Columns in which measurements agree that may be held against each other."""
_NEVER = datetime.min.replace(tzinfo=UTC)
_DIGITS_OF_A_HASH = 8


def before_and_after(rows: Sequence[Row]) -> list[Row]:
    """Each metric of each compressed model, beside the dense model's where that was measured alike.

    Of a model that was measured again in the same way, the later figure counts.

    Args:
        rows: of `evaluations`, oldest first.

    Returns:
        Keys: those of `evaluations` for the metric, ``before`` and ``after`` (values),
        ``before_stderr``, ``after_stderr``, ``before_model``, ``after_model``, ``at``, ``change``
        (after / before - 1), and ``measured_on``, which tells rows of one metric apart. A metric
        that only the dense model has stands there without ``after``.
    """
    latest: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        models = latest.setdefault(tuple(row[name] for name in SAME_QUESTION), {})
        name = str(row["model"]) if row["compressed"] else ""
        for other in [key for key, known in models.items() if key and name and _same(known, row)]:
            del models[other]  # The same model, which lies elsewhere by now.
        models[name] = row
    found = []
    for models in latest.values():
        before = models.get("", {})
        for after in [row for key, row in models.items() if key] or [{}]:
            one = after or before
            old, new = before.get("value"), after.get("value")
            found.append(
                {
                    name: one[name]
                    for name in (*SAME_QUESTION, "higher_is_better", "samples", "tokens")
                }
                | {
                    "before": old,
                    "after": new,
                    "change": new / old - 1 if old and new is not None else None,
                    "before_stderr": before.get("stderr"),
                    "after_stderr": after.get("stderr"),
                    "before_model": before.get("model"),
                    "after_model": after.get("model"),
                    "time": one["time"],
                    "measured_on": _measured_on(one),
                }
            )
    _tell_apart(found)
    return found


def headline(evaluations: Sequence[Row]) -> Row | None:
    """The latest of the figures that are known before and after; None if none is."""
    known = [row for row in evaluations if row["change"] is not None]
    # Of one moment the first: an evaluation of a text has its perplexity per token first.
    return max(known, key=lambda row: row["time"] or _NEVER, default=None)


def _same(one: Row, other: Row) -> bool:
    return one["model_id"] is not None and one["model_id"] == other["model_id"]


def _settings(row: Row) -> Row:
    try:
        found = json.loads(row["settings"] or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _measured_on(row: Row) -> str:
    """Basis of a figure: the text and how much of it, or the number of questions."""
    settings = _settings(row)
    parts = []
    if settings.get("text"):
        parts.append(str(settings["text"]))
    if settings.get("windows") is not None:
        # Of a text of which no more was asked for, these are all.
        length = settings.get("window", "unknown")
        parts.append(f"the first {settings['windows']} windows of {length} tokens")
    elif row["samples"] is not None:
        parts.append(f"{row['samples']:,} samples")
    if row["tokens"] is not None:
        parts.append(f"{row['tokens']:,} tokens predicted")
    if row["fewshot"] is not None:
        parts.append(f"{row['fewshot']}-shot")
    return ", ".join(parts)


def _tell_apart(found: Sequence[Row]) -> None:
    """Add to what rows were measured on what else they differ in."""
    alike: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        names = ("task", "metric", "answer_filter", "measured_on", "after_model")
        alike.setdefault(tuple(row[name] for name in names), []).append(row)
    for rows in alike.values():
        all_settings = [
            {"dtype": row["dtype"], "version": row["task_version"]} | _settings(row) for row in rows
        ]
        differing = [name for name in _keys(all_settings) if len(_values(all_settings, name)) > 1]
        for row, settings in zip(rows, all_settings, strict=True):
            more = [f"{name} {_short(settings.get(name))}" for name in differing]
            row["measured_on"] = ", ".join(filter(None, (row["measured_on"], *more)))


def _keys(dicts: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for one in dicts for name in one))


def _values(dicts: Iterable[Row], name: str) -> set[str]:
    return {json.dumps(one.get(name), sort_keys=True) for one in dicts}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) < 40 else text[:_DIGITS_OF_A_HASH]
