"""Progress of several compressions that run as one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from orchestrator.compression.progress import _describe, _level
from orchestrator.console.progress_bar import Meter
from orchestrator.execution.executor import Event
from workers.calibration.contracts import Calibrated, CalibrationItem, CalibrationPiece
from workers.contracts import CurveResult, Failure, Result, Task


class SweepProgress:
    """Shows several compressions as one."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._done: dict[str, int] = {}
        self._total: dict[str, int] = {}
        # Tasks of one group run as one: the first stands for all.
        self._running: dict[str, str] = {}

    def listeners(self, name: str) -> dict[str, Any]:
        """Callbacks for `compress_model`, for the compression of that name."""
        tasks: dict[str, Task | CalibrationItem] = {}

        def on_start(
            what: str, planned: Sequence[Task | CalibrationItem], finished: set[str]
        ) -> None:
            if not planned:
                self._meter.say("assembling", f"{name}: {what}", run=name)
                return
            tasks.clear()
            tasks.update((task.task_id, task) for task in planned)
            self._done[name] = sum(tasks[task_id].dense_bytes for task_id in finished)
            self._total[name] = sum(task.dense_bytes for task in planned)
            self._meter.restart(what)
            self._meter.update(sum(self._done.values()), sum(self._total.values()))
            if finished:
                line = f"{name}: {len(finished)} of {len(planned)} tasks were already finished"
                self._meter.say("tasks_found", line, run=name, finished=len(finished))

        def on_event(event: Event) -> None:
            task = tasks[event.task_id]
            if event.kind == "started":
                if self._running.setdefault(task.block, task.task_id) == task.task_id:
                    self._meter.begin(task.task_id, task.block, event.attempt, event.worker)
                return
            self._end(task)
            line = f"{name}: {task.block}: attempt {event.attempt} is retried: "
            about: dict[str, Any] = {"run": name, "task_id": task.task_id, "block": task.block}
            self._meter.say(f"task_{event.kind}", line + event.message, logging.WARNING, **about)

        def on_progress(
            outcome: Result | CurveResult | Calibrated | Failure, finished: int, total: int
        ) -> None:
            task = tasks[outcome.task_id]
            self._end(task)
            head = f"[{name} {finished}/{total}] {task.block}"
            about: dict[str, Any] = {"run": name, "task_id": task.task_id, "block": task.block}
            if isinstance(outcome, Failure):
                line = f"{head} failed: {outcome.message}"
                self._meter.say("task_failed", line, logging.ERROR, **about)
                return
            self._done[name] += task.dense_bytes
            if isinstance(task, CalibrationPiece):
                self._meter.update(sum(self._done.values()), sum(self._total.values()))
                return
            seconds = sum(outcome.seconds.values())
            self._meter.say(
                "task_done",
                f"{head}: {_describe(outcome)}, {seconds:.1f} s",
                _level(outcome),
                done=sum(self._done.values()),
                **about,
            )

        return {"on_start": on_start, "on_event": on_event, "on_progress": on_progress}

    def _end(self, task: Task | CalibrationItem) -> None:
        if (task_id := self._running.pop(task.block, None)) is not None:
            self._meter.end(task_id)
