"""What a command prints: tables for people, one JSON object for programs.

Results go to standard output, progress and problems to standard error, so that output can be
piped.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

# Piped output has no width of its own; a table must not be cut because of that.
_PIPED_WIDTH = 160

out = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)
err = Console(stderr=True, width=None if sys.stderr.isatty() else _PIPED_WIDTH, highlight=False)


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


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a title, and a table whose first column stands left and whose others stand right."""
    result = Table()
    for number, column in enumerate(columns):
        result.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        result.add_row(*row)
    # Not as the table's own title: that would be wrapped to the table's width.
    out.print(title, style="bold", markup=False, soft_wrap=True)
    out.print(result)


def ranks(row: dict[str, Any]) -> str:
    """Ranks of a group row, ``R1 x R2`` or ``R1 x R2 x R3``."""
    return " x ".join(str(row[name]) for name in ("R1", "R2", "R3") if row.get(name) is not None)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        if not task.speed:
            return Text("")
        amount = size(task.speed) if self._unit == "bytes" else f"{task.speed:.2f} {self._unit}"
        return Text(f"{amount}/s")


class Meter:
    """Progress on standard error: a bar with rate and time left, or plain lines in a log.

    Args:
        title: what is going on.
        unit: of the amounts: ``"bytes"``, or a plural noun.
    """

    def __init__(self, title: str, unit: str) -> None:
        self._title = title
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._began: tuple[float, float] | None = None
        self._said = -math.inf
        if err.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                _Rate(unit),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=err,
                transient=True,
            )

    def __enter__(self) -> Meter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def restart(self, title: str) -> None:
        """Go on with something else: its amounts are counted anew."""
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
        self._title, self._task, self._began = title, None, None

    def update(self, done: float, total: float, line: str | None = None) -> None:
        """Show that `done` of `total` is done, and a line that stays.

        What is done at the first call was done before: it counts for no rate.
        """
        if self._bar is None:
            self._log(done, total, line)
            return
        if line is not None:
            self._bar.console.print(line, markup=False)
        if self._task is None:
            self._task = self._bar.add_task(self._title, total=total, completed=int(done))
        self._bar.update(self._task, completed=done, total=total)

    def _log(self, done: float, total: float, line: str | None) -> None:
        now = time.monotonic()
        self._began = self._began or (now, done)
        # A line that says something of its own is never held back; bare progress every 10 s.
        if line is None and now - self._said < 10 and done < total:
            return
        self._said = now
        head = f"{self._title}: {100 * done / max(total, 1):.0f} %"
        began, first = self._began
        if first < done < total:
            head += f", {(now - began) / (done - first) * (total - done):.0f} s left"
        err.print(head if line is None else f"{head} | {line}", markup=False)
