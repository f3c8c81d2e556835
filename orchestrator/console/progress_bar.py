"""Progress on standard error: a bar in a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Task as BarTask
from rich.table import Column
from rich.text import Text

from orchestrator.console import logs, output

# Lines of bare progress come at least this far apart,
PAUSE_SECONDS = 10.0
# and when nothing was said for so long, one comes whether or not anything is finished.
SILENCE_SECONDS = 30.0
_SHOWN_RUNNING = 3


def duration(seconds: float) -> str:
    """Seconds as text."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Pace:
    """How much is done, how fast it goes, and how long the rest will take.

    The rate is the mean since work began; what was done at the first update was done before.
    Between two updates the time left counts down, by at most what the last step took; so it
    stands, and does not grow, while a step takes longer than the last one.
    """

    def __init__(self) -> None:
        self.done = self.total = 0.0
        self._first: tuple[float, float] | None = None
        self._last = self._step = 0.0

    def update(self, done: float, total: float) -> None:
        """So much of so much is done now."""
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        elif done > self.done:
            self._last, self._step = now, done - self.done
        self.done, self.total = done, total

    def begin(self) -> None:
        """Work begins now: before, workers had to be started."""
        if self._first is not None:
            self._first = (time.monotonic(), self._first[1])

    def rate(self) -> float | None:
        """Amount per second; None before anything is done."""
        if self._first is None or self.done <= self._first[1] or self._last <= self._first[0]:
            return None
        return (self.done - self._first[1]) / (self._last - self._first[0])

    def seconds_left(self) -> float | None:
        """None if unknown, or if all is done."""
        rate = self.rate()
        if rate is None or self.done >= self.total:
            return None
        ahead = min(rate * (time.monotonic() - self._last), self._step)
        return max(self.total - self.done - ahead, 0.0) / rate


@dataclass(frozen=True)
class _Running:
    """A task that a worker has.

    Attributes:
        task_id: the task's.
        block: the task's.
        attempt: 1 for the first.
        worker: who has it; it works on one of its tasks after the other.
        since: when it was given to the worker, or the worker was done with the one before; of the
            monotonic clock.
    """

    task_id: str
    block: str
    attempt: int
    worker: str
    since: float

    def describe(self) -> str:
        again = f", attempt {self.attempt}" if self.attempt > 1 else ""
        seconds = duration(time.monotonic() - self.since)
        return f"{self.block} ({logs.short(self.task_id)}{again}) {seconds}"


class Meter:
    """Progress of a command, with rate, time left, and what runs.

    Args:
        title: what is going on.
        unit: of the amounts: ``"bytes"``, or a plural noun.
        fields: what every JSON line has besides.
    """

    def __init__(self, title: str, unit: str, **fields: Any) -> None:
        self._title = title
        self._unit = unit
        self._fields = fields
        self._pace = Pace()
        self._note = ""
        # Replaced, never changed: the bar's thread reads it, and must not wait for this lock while
        # it holds the terminal, for which the holder of this lock may wait.
        self._running: dict[str, _Running] = {}
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._reminder = threading.Thread(target=self._remind, daemon=True)
        self._said = -PAUSE_SECONDS
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if output.err.is_terminal and not logs.in_json():
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                _Shown(self._percent_text),
                _Shown(self.rate_text),
                TimeElapsedColumn(),
                _Shown(self._left_text),
                _Shown(self._running_text, Column(no_wrap=True, overflow="ellipsis", ratio=1)),
                console=output.err,
                transient=True,
                expand=True,
            )

    def __enter__(self) -> Meter:
        if self._bar is not None:
            self._bar.start()
        else:
            self._reminder.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            self._ended.set()
            self._reminder.join()

    def restart(self, title: str) -> None:
        """Go on with something else: its amounts are counted anew, and nothing runs."""
        with self._lock:
            if self._bar is not None and self._task is not None:
                self._bar.remove_task(self._task)
            self._title, self._task, self._pace = title, None, Pace()
            self._running = {}

    def work_begins(self) -> None:
        """Workers have been started; the time before counts for no rate."""
        with self._lock:
            if self._pace.rate() is None:
                self._pace.begin()

    def begin(self, task_id: str, block: str, attempt: int, worker: str = "") -> None:
        """A task was given to a worker, which may have others to work on first."""
        with self._lock:
            if not self._running:
                self.work_begins()
            task = _Running(task_id, block, attempt, worker, time.monotonic())
            self._running = self._running | {task_id: task}

    def end(self, task_id: str) -> None:
        """No worker has the task any more; the one that had it goes on with its next."""
        with self._lock:
            now = time.monotonic()
            turns = {task.worker for task in self._at_work() if task.task_id == task_id}
            self._running = {
                k: replace(v, since=now) if v.worker in turns else v
                for k, v in self._running.items()
                if k != task_id
            }

    def _at_work(self) -> list[_Running]:
        """The first of the tasks of each worker, those that have been longest at work first."""
        first: dict[str, _Running] = {}
        for task in self._running.values():
            first.setdefault(task.worker, task)
        return sorted(first.values(), key=lambda task: task.since)

    def update(self, done: float, total: float, note: str = "") -> None:
        """Show that `done` of `total` is done.

        What is done at the first call was done before: it counts for no rate. `note` says how
        it goes, as a loss does.
        """
        with self._lock:
            self._pace.update(done, total)
            self._note = note
            if self._bar is None:
                if done >= total or time.monotonic() - self._said >= PAUSE_SECONDS:
                    self._say_progress()
                return
            if self._task is None:
                self._task = self._bar.add_task(self._title, total=total or None)
            told = f"{self._title}, {note}" if note else self._title
            self._bar.update(self._task, description=told, completed=done, total=total or None)

    def say(
        self,
        event: str,
        line: str,
        level: int = logging.INFO,
        *,
        done: float | None = None,
        **fields: Any,
    ) -> None:
        """Log a line that stays; in a log for people the progress stands before it.

        Args:
            event: see `logs.log`.
            line: the line.
            level: of `logging`.
            done: how much is done now; None for as much as before.
            fields: see `logs.log`.
        """
        with self._lock:
            if done is not None:
                self._pace.update(done, self._pace.total)
            if self._bar is None and not logs.in_json():
                self._said = time.monotonic()
                line = f"{self._head()} | {line}"
            logs.log(event, line, level, **self._fields, **fields)
            # The bar moves, and a program is told the figures apart from the line.
            if done is not None and (self._bar is not None or logs.in_json()):
                self.update(done, self._pace.total)

    def _remind(self) -> None:
        """Log the state after a long silence, which in a log looks like a dead run."""
        began = time.monotonic()
        while not self._ended.wait(SILENCE_SECONDS / 30):
            with self._lock:
                if time.monotonic() - max(self._said, began) >= SILENCE_SECONDS:
                    self._say_progress()

    def _say_progress(self) -> None:
        self._said = time.monotonic()
        pace = self._pace
        oldest = self._at_work()[:_SHOWN_RUNNING]
        line = self._head()
        if running := self._running_text():
            line += f" | {running}"
        logs.log(
            "progress",
            line,
            **self._fields,
            doing=self._title,
            done=pace.done,
            total=pace.total,
            unit=self._unit,
            rate_per_second=pace.rate(),
            seconds_left=pace.seconds_left(),
            in_flight=len(self._running),
            oldest=[
                {
                    "task_id": task.task_id,
                    "block": task.block,
                    "attempt": task.attempt,
                    "seconds": self._said - task.since,
                }
                for task in oldest
            ],
        )

    def _head(self) -> str:
        if not self._pace.total:
            return self._title
        parts = [f"{self._title}: {self._percent_text().lstrip()}"]
        if self._pace.done < self._pace.total:
            parts += filter(None, (self.rate_text(), self._left_text()))
        parts += filter(None, [self._note])
        return ", ".join(parts)

    def _percent_text(self) -> str:
        """Empty while the amount of work is unknown."""
        pace = self._pace
        return f"{100 * pace.done / pace.total:>3.0f} %" if pace.total else ""

    def rate_text(self) -> str:
        """The mean rate as text; empty before anything is done."""
        rate = self._pace.rate()
        if rate is None:
            return ""
        return f"{output.size(rate) if self._unit == 'bytes' else f'{rate:.2f} {self._unit}'}/s"

    def _left_text(self) -> str:
        seconds = self._pace.seconds_left()
        return "" if seconds is None else f"{duration(seconds)} left"

    def _running_text(self) -> str:
        at_work = self._at_work()
        if not at_work:
            return ""
        names = ", ".join(task.describe() for task in at_work[:_SHOWN_RUNNING])
        more, waiting = len(at_work) - _SHOWN_RUNNING, len(self._running) - len(at_work)
        names += f" and {more} more" if more > 0 else ""
        return f"{len(at_work)} at work: {names}" + (f"; {waiting} wait" if waiting else "")


class _Shown(ProgressColumn):
    """A column of the bar whose text a function gives."""

    def __init__(self, text: Callable[[], str], column: Column | None = None) -> None:
        super().__init__(column)
        self._text = text

    def render(self, task: BarTask) -> Text:
        return Text(output.visible(self._text()), no_wrap=True, overflow="ellipsis")
