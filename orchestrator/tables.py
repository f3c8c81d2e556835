"""What a command prints: tables for people, one JSON object for programs.

Results go to standard output, progress and problems to standard error, so that output can be
piped.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

# Piped output has no width of its own; a table must not be cut because of that.
_PIPED_WIDTH = 160

out = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)
err = Console(
    stderr=True, width=None if sys.stderr.isatty() else _PIPED_WIDTH, highlight=False
)


def size(count: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def print_json(value: Any) -> None:
    """One JSON object on standard output; numbers that JSON lacks become null."""
    print(json.dumps(_finite(value), indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose first column stands left and whose others stand right."""
    result = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        result.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        result.add_row(*row)
    return result


def ranks(row: dict[str, Any]) -> str:
    """Ranks of a group row, ``R1 x R2`` or ``R1 x R2 x R3``."""
    return " x ".join(str(row[name]) for name in ("R1", "R2", "R3") if row.get(name) is not None)


class Advance(Protocol):
    """Moves a progress display on."""

    def __call__(self, amount: float, line: str | None = None) -> None:
        """Count `amount` more as done, and say `line` about it."""


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        if not task.speed:
            return Text("")
        rate = f"{size(task.speed)}/s" if self._unit == "bytes" else f"{task.speed:.2f} {self._unit}/s"
        return Text(rate)


@contextmanager
def progress(title: str, total: float, done: float, unit: str) -> Iterator[Advance]:
    """Progress on standard error: a bar with rate and time left, or plain lines in a log.

    Args:
        title: what is going on.
        total: amount of work in all, in `unit`; for ``"bytes"`` rates are in bytes.
        done: amount that was done before.
        unit: ``"bytes"``, or a name in the plural.
    """
    if not err.is_terminal:
        yield _log_lines(title, total, done)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        _Rate(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(title, total=total, completed=done)

        def advance(amount: float, line: str | None = None) -> None:
            if line is not None:
                bar.console.print(line, markup=False)
            bar.advance(task, amount)

        yield advance


def _log_lines(title: str, total: float, done: float) -> Advance:
    began, first = time.monotonic(), done
    said = began

    def advance(amount: float, line: str | None = None) -> None:
        nonlocal done, said
        done += amount
        now = time.monotonic()
        # A line that says something of its own is never held back; bare progress every 10 s.
        if line is None and now - said < 10 and done < total:
            return
        said = now
        left = (now - began) / max(done - first, 1e-9) * (total - done)
        head = f"{title}: {100 * done / max(total, 1):3.0f} %, {left:.0f} s left"
        err.print(head if line is None else f"{head} | {line}", markup=False)

    return advance
