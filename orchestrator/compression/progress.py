"""How `compress_model` is shown at work: progress, one line per finished task, metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from lestd_kernels.methods.common.slice_statistics import relative
from orchestrator.compression.pipeline import Outcome
from orchestrator.console import logs, output
from orchestrator.console.progress_bar import Meter
from orchestrator.execution.executor import Event
from orchestrator.execution.ray.metrics import RunMetrics
from orchestrator.manifest.result_rows import is_far
from workers.calibration.contracts import Calibrated, CalibrationItem, CalibrationPiece
from workers.contracts import CurveResult, Failure, Result, Task

# How a line goes on after "attempt 2"; other kinds speak for themselves.
_KINDS = {"retried": "is retried"}


class CompressionProgress:
    """Shows `compress_model` at work, and passes what happens on to the metrics.

    Args:
        run: name of the run in logs and metrics.
        metrics: None where nobody collects them.
    """

    def __init__(self, run: str, metrics: RunMetrics | None = None) -> None:
        self._run = run
        self._metrics = metrics
        self._meter = Meter("compress", "bytes", run=run)
        self._tasks: dict[str, Task | CalibrationItem] = {}
        self._pass = ""
        self._done = self._total = 0
        self._began = time.monotonic()
        self._outcome: Outcome | None = None

    def __enter__(self) -> CompressionProgress:
        logs.log("run_started", f"{self._run}: started", run=self._run)
        self._meter.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._meter.__exit__(kind, error, trace)
        if self._metrics is not None:
            self._metrics.close()
        figures: dict[str, Any] = {}
        state = "interrupted" if isinstance(error, KeyboardInterrupt) else "error"
        if self._outcome is not None:
            state = "complete" if self._outcome.complete else "failed"
            figures = {
                "tasks": len(self._outcome.plan.tasks),
                "finished": len(self._outcome.rows),
                "finished_before": self._outcome.skipped,
                "failed": len(self._outcome.failures),
                "dense_bytes": sum(row["dense_bytes"] for row in self._outcome.rows),
                "stored_bytes": sum(row["stored_bytes"] for row in self._outcome.rows),
            }
        logs.log(
            "run_ended",
            f"{self._run}: {state}",
            logging.INFO if state == "complete" else logging.ERROR,
            run=self._run,
            state=state,
            seconds=time.monotonic() - self._began,
            **figures,
        )

    def ended(self, outcome: Outcome) -> None:
        """The run came to its end, complete or with failed tasks."""
        self._outcome = outcome

    def on_start(
        self, name: str, tasks: Sequence[Task | CalibrationItem], finished: set[str]
    ) -> None:
        """Begin a pass: its tasks, and the ids of those that an earlier call has finished.

        The last thing that begins is the assembly, which has no tasks.
        """
        if self._metrics is not None:
            self._metrics.on_start(name, tasks, finished)
        self._pass = name
        self._tasks = {task.task_id: task for task in tasks}
        self._done = sum(self._tasks[task_id].dense_bytes for task_id in finished)
        self._meter.restart(name)
        self._total = sum(task.dense_bytes for task in tasks)
        self._meter.update(self._done, self._total)
        if finished:
            line = f"{len(finished)} of {len(tasks)} tasks were already finished"
            fields: dict[str, Any] = {"pass": name, "finished": len(finished)}
            self._meter.say("tasks_found", line, **fields)

    def on_event(self, event: Event) -> None:
        """A task was started, is tried again, or met with something else on its way."""
        if self._metrics is not None:
            self._metrics.on_event(event)
        task = self._tasks.get(event.task_id)
        what = _KINDS.get(event.kind, event.kind.replace("_", " "))
        line = f"{task.block} ({logs.short(event.task_id)}): " if task else ""
        line += f"attempt {event.attempt} {what}"
        line += f": {event.message}" if event.message else ""
        known = event.known() | self._known(event.task_id)
        if event.kind == "started":
            block = task.block if task else ""
            self._meter.begin(event.task_id, block, event.attempt, event.worker)
            logs.log("task_started", line, run=self._run, **known)
            return
        if event.kind == "retried":
            self._meter.end(event.task_id)
        self._meter.say(f"task_{event.kind}", line, logging.WARNING, **known)

    def on_progress(
        self, outcome: Result | CurveResult | Calibrated | Failure, finished: int, total: int
    ) -> None:
        """A task has ended."""
        if self._metrics is not None:
            self._metrics.on_progress(outcome, finished, total)
        self._meter.end(outcome.task_id)
        known = self._known(outcome.task_id) | {"attempt": outcome.attempt}
        head = f"[{finished}/{total}] {known['block']} ({logs.short(outcome.task_id)})"
        if isinstance(outcome, Failure):
            self._meter.say(
                "task_failed",
                f"{head} failed: {outcome.message}",
                logging.ERROR,
                **known,
                error_type=outcome.error_type,
                failure_kind=outcome.kind,
            )
            return
        self._done += outcome.dense_bytes
        if isinstance(self._tasks.get(outcome.task_id), CalibrationPiece):
            self._meter.update(self._done, self._total)  # Hundreds of a kind need no lines.
            return
        seconds = sum(outcome.seconds.values())
        self._meter.say(
            "task_done",
            f"{head}: {_describe(outcome)}, {seconds:.1f} s",
            _level(outcome),
            done=self._done,
            **known,
            worker=outcome.worker,
            seconds=seconds,
            dense_bytes=outcome.dense_bytes,
            stored_bytes=outcome.stored_bytes if isinstance(outcome, Result) else None,
            relative_error=outcome.relative_error if isinstance(outcome, Result) else None,
        )

    def _known(self, task_id: str) -> dict[str, Any]:
        """Fields of a task in JSON."""
        known = {"pass": self._pass, "task_id": task_id}
        task = self._tasks.get(task_id)
        return known if task is None else known | {"block": task.block, "layer": task.layer}


def _level(outcome: Result | CurveResult | Calibrated) -> int:
    far = isinstance(outcome, Result) and is_far(vars(outcome))
    return logging.WARNING if far else logging.INFO


def _describe(outcome: Result | CurveResult | Calibrated) -> str:
    return "done" if isinstance(outcome, Calibrated) else describe_result(outcome)


def describe_result(result: Result | CurveResult) -> str:
    """Text of a line about a result."""
    if isinstance(result, CurveResult):
        first, last = result.points[0], result.points[-1]
        return (
            "relative error from "
            f"{relative(first.squared_error, result.squared_norm):.4f} in "
            f"{output.size(first.byte_budget)} to "
            f"{relative(last.squared_error, result.squared_norm):.4f} in "
            f"{output.size(last.byte_budget)}"
        )
    ranks = f"ranks {output.ranks(result.ranks)}, " if result.ranks else ""
    ranks = f"{result.chosen}: {ranks}" if result.chosen else ranks
    return (
        f"{ranks}density {result.density:.4f} ({result.codec}), "
        f"{output.size(result.dense_bytes)} -> {output.size(result.stored_bytes)}, relative error "
        f"{result.relative_error:.4f}"
        + ("" if result.expected_loss is None else f", {result.expected_loss:.4f} nats per token")
        + (", far more than its ranks and bits explain" if is_far(vars(result)) else "")
    )
