"""Figures of a run for Prometheus, exported by Ray's agent on the driver's node.

Prometheus sees every name with ``ray_`` before it. cluster_configs/grafana/ shows them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Literal

from orchestrator.execution.executor import Event
from workers.calibration.contracts import Calibrated, CalibrationItem
from workers.contracts import CurveResult, Failure, Result, Task

Kind = Literal["Counter", "Gauge", "Histogram"]

METRICS: dict[str, tuple[Kind, str]] = {
    "lestd_tasks_done_total": ("Counter", "Tasks that this driver finished"),
    "lestd_tasks_failed_total": ("Counter", "Tasks that failed for good"),
    "lestd_tasks_retried_total": ("Counter", "Attempts that ended with the loss of their worker"),
    "lestd_read_bytes_total": ("Counter", "Bytes of weights that finished tasks have read"),
    "lestd_written_bytes_total": ("Counter", "Bytes of payloads that finished tasks have written"),
    "lestd_stage_seconds_total": ("Counter", "Seconds that finished tasks spent, by stage"),
    "lestd_stage_duration_seconds": ("Histogram", "Seconds of a stage of a finished task"),
    "lestd_tasks_planned": ("Gauge", "Tasks of the pass"),
    "lestd_tasks_finished": ("Gauge", "Finished tasks of the pass, those of earlier runs as well"),
    "lestd_tasks_in_flight": ("Gauge", "Tasks that workers have"),
    "lestd_tasks_waiting": ("Gauge", "Tasks that wait for a worker"),
}
"""Name -> kind of `ray.util.metrics`, and description. All have the tags `run` and `pass`, those
of stages `stage` as well."""

# From a small group's read to the decomposition of a wide layer on a slow machine.
_SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]
# Ray drops a gauge that is not set again within two of its reporting intervals, 20 s or less.
_REFRESH_SECONDS = 1.0


class RunMetrics:
    """Records what `compress_model` tells its listeners. Ray is imported when a task is started.

    Args:
        run: name of the run, the tag of all metrics.
    """

    def __init__(self, run: str) -> None:
        self._tags = {"run": run, "pass": ""}
        self._metrics: dict[str, Any] = {}
        self._planned = self._finished = self._failed = 0
        self._in_flight: set[str] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._refresher = threading.Thread(target=self._refresh, daemon=True)

    def close(self) -> None:
        """Let the gauges lapse; counters stay as long as the node's agent runs."""
        self._closed.set()
        if self._metrics:
            self._refresher.join()

    def on_start(
        self, name: str, tasks: Sequence[Task | CalibrationItem], finished: set[str]
    ) -> None:
        """Begin a pass, see `CompressionProgress.on_start`."""
        if not tasks:  # The assembly: the figures of the last pass stand.
            return
        with self._lock:
            self._tags = self._tags | {"pass": name}
            self._planned, self._finished, self._failed = len(tasks), len(finished), 0
            self._in_flight = set()

    def on_event(self, event: Event) -> None:
        """A task was started, or is tried again."""
        if not self._metrics:
            self._open()
        if event.kind == "started":
            self._in_flight.add(event.task_id)
        elif event.kind == "retried":
            self._in_flight.discard(event.task_id)
            self._count("lestd_tasks_retried_total", 1)

    def on_progress(
        self, outcome: Result | CurveResult | Calibrated | Failure, finished: int, total: int
    ) -> None:
        """A task has ended."""
        if not self._metrics:  # It failed before any was started.
            self._open()
        self._finished, self._planned = finished, total
        self._in_flight.discard(outcome.task_id)
        if isinstance(outcome, Failure):
            self._failed += 1
            self._count("lestd_tasks_failed_total", 1)
            return
        self._count("lestd_tasks_done_total", 1)
        self._count("lestd_read_bytes_total", outcome.dense_bytes)
        if isinstance(outcome, Result):
            self._count("lestd_written_bytes_total", outcome.payload_bytes)
        for stage, seconds in outcome.seconds.items():
            # Ray rebuilds a histogram's sum from its buckets; the counter's is exact.
            tags = self._tags | {"stage": stage}
            self._count("lestd_stage_seconds_total", seconds, tags)
            self._metrics["lestd_stage_duration_seconds"].observe(seconds, tags=tags)

    def _count(self, name: str, amount: float, tags: dict[str, str] | None = None) -> None:
        if amount > 0:  # Ray refuses to count nothing.
            self._metrics[name].inc(amount, tags=tags or self._tags)

    def _open(self) -> None:
        from ray.util import metrics

        for name, (kind, description) in METRICS.items():
            stage = ("stage",) if name.startswith("lestd_stage_") else ()
            options: dict[str, Any] = {"tag_keys": ("run", "pass", *stage)}
            if kind == "Histogram":
                options["boundaries"] = _SECONDS
            self._metrics[name] = getattr(metrics, kind)(name, description, **options)
        self._refresher.start()

    def _refresh(self) -> None:
        ended = False
        while not ended:
            ended = self._closed.wait(_REFRESH_SECONDS)
            with self._lock:
                self._set_gauges()

    def _set_gauges(self) -> None:
        in_flight = len(self._in_flight)
        waiting = self._planned - self._finished - self._failed - in_flight
        for name, value in (
            ("lestd_tasks_planned", self._planned),
            ("lestd_tasks_finished", self._finished),
            ("lestd_tasks_in_flight", in_flight),
            ("lestd_tasks_waiting", max(waiting, 0)),
        ):
            self._metrics[name].set(value, tags=self._tags)
