"""Words that a report has in HTML and in Markdown alike."""

from __future__ import annotations

from pathlib import PurePosixPath

from orchestrator.report_data import Row


def model_name(summary: Row) -> str | None:
    """The model's name for a headline: of a path its last two parts, the rest is private."""
    name = summary["model"]
    if name is None:
        return None
    parts = [part for part in PurePosixPath(name).parts if part != "/"]
    return "/".join(parts[-2:])


def calls_in_words(summary: Row) -> str:
    """How many calls the wall time is of, and how many have none."""
    ended, without = summary["ended_calls"], summary["calls"] - summary["ended_calls"]
    said = f"{ended} call{'s' if ended != 1 else ''}"
    if without:
        said += f" that ended; {without} {'have' if without != 1 else 'has'} no end"
    return said
