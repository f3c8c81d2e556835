"""A call of `compress_model` in the table `runs`: a row as it begins, replaced as it ends."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from typing import Any

from orchestrator.execution.executor import Executor
from orchestrator.manifest.manifest import Manifest
from orchestrator.planning.plan import Plan
from orchestrator.source.checkpoint import Source

_LIBRARIES = ("lestd", "torch", "transformers")


class RunRecord:
    """The row of one call; the pipeline tells it what happens.

    Args:
        source: the checkpoint.
        plan: of the run.
        fingerprint: of the run.
        executor: who computes.
        planned_seconds: what decomposing was expected to take; None where nobody asked.
        began: when the call began, by `time.monotonic`.

    Attributes:
        finished_before: groups that were encoded when the call looked.
        finished: groups that are encoded now.
        failed: tasks that have failed for good.
        retried: attempts that were followed by another.
        stored_bytes: what the groups take; None until all are encoded.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        fingerprint: dict[str, Any],
        executor: Executor,
        planned_seconds: float | None,
        began: float,
    ) -> None:
        self._began = began
        self._assembling: list[float] = []
        self.finished_before = self.finished = self.failed = self.retried = 0
        self.stored_bytes: int | None = None
        started_at = time.time() - (time.monotonic() - began)
        config = fingerprint["config"]
        libraries = (*_LIBRARIES, "ray") if executor.name == "ray" else _LIBRARIES
        versions = {name: version(name) for name in libraries}
        identity = json.dumps(fingerprint, sort_keys=True).encode()
        self._row = {
            "invocation": f"{round(started_at * 1e6):020d}-{os.getpid()}",
            "run_id": hashlib.sha256(identity).hexdigest()[:32],
            "started_at": round(started_at * 1e6),
            "driver": f"{socket.gethostname()}:{os.getpid()}",
            "model": source.model,
            "revision": source.revision,
            "family": plan.family,
            "keep": plan.budget_bytes / plan.dense_bytes,
            "config": json.dumps(config, sort_keys=True),
            "executor": executor.name,
            "tasks": len(plan.tasks),
            "dense_bytes": plan.dense_bytes,
            "byte_budget": plan.budget_bytes,
            "model_bytes": plan.model_bytes,
            "untouched_bytes": plan.untouched_bytes,
            "planned_worker_memory_bytes": plan.worker_memory_bytes,
            "planned_disk_bytes": plan.run_disk_bytes,
            "planned_seconds": planned_seconds,
            "versions": json.dumps(versions | {"python": platform.python_version()}),
        }
        self._row |= {
            name: config[name] for name in ("method", "pattern", "scope", "allocation", "device")
        }

    @contextmanager
    def assembling(self) -> Iterator[None]:
        """The time of the context is that of assembling the model."""
        self._assembling.append(time.monotonic())
        yield
        self._assembling.append(time.monotonic())

    def begun(self) -> dict[str, Any]:
        """The row as the call begins; all that it may leave if it is killed."""
        return self._row | {"state": "running"}

    def ended(self, state: str) -> dict[str, Any]:
        """The row as things are now; what the call still does is not in it."""
        now = time.monotonic()
        began, ended = [*self._assembling, now, now][:2]
        return self._row | {
            "state": state,
            "ended_at": round(time.time() * 1e6),
            "finished_before": self.finished_before,
            "finished": self.finished,
            "failed": self.failed,
            "retried": self.retried,
            "stored_bytes": self.stored_bytes,
            "seconds": now - self._began,
            "seconds_assemble": ended - began,
        }


@contextmanager
def on_record(record: RunRecord, manifest: Manifest, check: Callable[[], None]) -> Iterator[None]:
    """Keep the row of a call that works in this context in the manifest.

    Earlier calls that have not recorded how they ended are marked as killed.

    Args:
        record: the call.
        manifest: the run's.
        check: raises where the run is another driver's by now, whose manifest is left alone.
    """
    begun = record.begun()
    manifest.record_run(begun)
    # Whoever holds the lock knows that they are dead.
    for earlier in manifest.runs().to_pylist():
        if earlier["state"] == "running" and earlier["invocation"] != begun["invocation"]:
            check()
            manifest.record_run(earlier | {"state": "killed"})
    try:
        yield
    except BaseException:
        with suppress(Exception):  # The reason for the end is what matters, and may be a full disk.
            check()
            manifest.record_run(record.ended("interrupted"))
        raise
    check()
    manifest.record_run(record.ended("failed" if record.stored_bytes is None else "complete"))
