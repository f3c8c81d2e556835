"""What `lestd query` says beside an answer, or to one who has none: what may have been meant."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from orchestrator.manifest.manifest import Manifest
from orchestrator.query.sql import run_names
from workers.storage.files import AnyPath

_IN_QUOTES = re.compile(r"'[^']*'|\"[^\"]*\"|--[^\n]*")
_COLUMNS_LIKE_WORDS = {
    "group": re.compile(r"\bgroup\b(?!\s+by\b)", re.IGNORECASE),
    "at": re.compile(r"\bat\b(?!\s+time\b)", re.IGNORECASE),
    "filter": re.compile(r"\bfilter\b(?!\s*\()", re.IGNORECASE),
}
_STATEMENT = re.compile(
    r"\s*(-\s*$|(select|from|with|describe|summarize|show|pivot|unpivot)\s.*)",
    re.IGNORECASE | re.DOTALL,
)
_SINCE_FORMAT_2 = {
    "groups": ("singular_values_1", "singular_values_2"),
    "events": ("layer", "group", "worker", "node"),
}


def is_statement(argument: str) -> bool:
    """Whether an argument is SQL, or stands for it, and not the name of a run."""
    return _STATEMENT.fullmatch(argument) is not None


def unquoted_columns(sql: str) -> str:
    """A sentence about columns that are words of SQL and stand without quotes; may be empty."""
    rest = _IN_QUOTES.sub("''", sql)
    found = [f'"{name}"' for name, word in _COLUMNS_LIKE_WORDS.items() if word.search(rest)]
    return f"as a column write {', '.join(found)} with its quotes" if found else ""


def not_recorded(places: Sequence[AnyPath], sql: str) -> Iterator[str]:
    """A sentence for each table or column in a query that a manifest of format 1 does not have.

    It has no rows of `runs`, which every later one begins with.

    Raises:
        LestdError: there is no manifest, or the object store does not answer.
    """
    words = set(re.findall(r"\w+", sql.lower()))
    tables = ["runs"] if "runs" in words else []
    columns = [
        (table, name)
        for table, names in _SINCE_FORMAT_2.items()
        for name in names
        if {table, name} <= words
    ]
    if not tables and not columns:
        return
    for place, run in zip(places, run_names(places), strict=True):
        manifest = Manifest(place)
        calls = manifest.read("runs")
        if len(calls.rows) or calls.damaged or not _has_rows(manifest):
            continue
        absent = [f"the table {table}" for table in tables]
        for table, name in columns:
            column = manifest.table(table)[name]
            if column.null_count == len(column):
                absent.append(f"the column {name} of {table}")
        if absent:
            yield f"{run} was recorded by an earlier lestd, without {', '.join(absent)}"


def _has_rows(manifest: Manifest) -> bool:
    return any(len(manifest.table(name)) for name in ("groups", "events"))
