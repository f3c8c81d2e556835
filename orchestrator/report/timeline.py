"""Where the time of a run went: tasks on their workers, attempts that were lost, stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from orchestrator.manifest.schemas import COMPUTING_STAGES, STAGES


def stage_seconds(work: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Worker seconds of each stage over rows of `groups` and of `curves`, in order."""
    return [
        {
            "stage": stage,
            "seconds": math.fsum(row[f"seconds_{stage}"] or 0.0 for row in work),
        }
        for stage in STAGES
    ]


def timeline(
    groups: Sequence[Mapping[str, Any]], curves: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Tasks as their workers did them, by worker and start.

    The manifest has the start of each task and how long each stage took, but not how long it
    waited in between: a worker computes one task at a time, while it reads the next and writes the
    last. So a task's computing begins when it is read and the task before it is computed, and its
    writing likewise; that is what `workers.decompose` does.

    Args:
        groups: rows of `groups`.
        curves: one row of `curves` per task.

    Returns:
        One row per task: ``kind`` (compress or curves), ``worker``, ``node``, ``layer``, ``block``,
        ``task_id``, ``attempt``, ``read_at``, ``computed_at``, ``written_at``, ``ended_at``
        (when reading, computing and writing began and the task ended) and ``seconds_<stage>``.
    """
    tasks = [("compress", row) for row in groups] + [("curves", row) for row in curves]
    tasks = [(kind, row) for kind, row in tasks if row["started_at"] is not None]
    tasks.sort(key=lambda task: (task[1]["worker"] or "", task[1]["started_at"]))
    free: dict[str, tuple[datetime, datetime]] = {}
    rows = []
    for kind, row in tasks:
        read_at = row["started_at"]
        worker = row["worker"] or ""
        computing_free, writing_free = free.get(worker, (read_at, read_at))
        computed_at = max(read_at + _duration(row, ("read",)), computing_free)
        written_at = max(computed_at + _duration(row, COMPUTING_STAGES), writing_free)
        ended_at = written_at + _duration(row, ("write",))
        free[worker] = (computed_at + _duration(row, COMPUTING_STAGES), ended_at)
        times = {"read_at": read_at, "computed_at": computed_at}
        times |= {"written_at": written_at, "ended_at": ended_at}
        names = ("worker", "node", "layer", "block", "task_id", "attempt")
        rows.append(
            {"kind": kind}
            | {name: row[name] for name in names}
            | times
            | {f"seconds_{stage}": row[f"seconds_{stage}"] or 0.0 for stage in STAGES}
        )
    return rows


def _duration(row: Mapping[str, Any], stages: Sequence[str]) -> timedelta:
    return timedelta(seconds=math.fsum(row[f"seconds_{stage}"] or 0.0 for stage in stages))


def lost_attempts(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Attempts that were retried or failed, by their end.

    Args:
        events: rows of `events`.

    Returns:
        One row per attempt: ``kind`` (retried or failed), ``started_at`` (None if not recorded),
        ``time`` (when the driver learned of the end), ``task_id``, ``layer``, ``block``,
        ``attempt``, ``worker``, ``node``, ``error_type``, ``message``.
    """
    started: dict[tuple[str, int], Mapping[str, Any]] = {}
    rows = []
    for event in events:  # Oldest first.
        key = (event["task_id"], event["attempt"])
        if event["kind"] == "started":
            started[key] = event
            continue
        start = started.get(key, {})
        rows.append(
            {name: value for name, value in event.items() if name != "traceback"}
            | {
                "started_at": start.get("time"),
                "worker": event["worker"] or start.get("worker"),
                "node": event["node"] or start.get("node"),
            }
        )
    return rows
