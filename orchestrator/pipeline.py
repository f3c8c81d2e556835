"""compress_model(): the whole story on one page.

source -> plan -> (skip what is done) -> executor -> payload and manifest row -> assemble.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lestd_kernels.errors import LestdError, OutOfSpaceError
from orchestrator.assemble import assemble, check_output
from orchestrator.config import RunConfig
from orchestrator.executor import Event, Executor, Listener, WorkerSpec
from orchestrator.plan import Plan, make_plan
from orchestrator.rundir import RunDirectory
from orchestrator.source import Source
from workers.contracts import Failure, Result, Task
from workers.decompose import DecomposeWorker

# Called with every finished or failed task, the number done and the number planned.
OnProgress = Callable[[Result | Failure, int, int], None]


@dataclass(frozen=True)
class Outcome:
    """How a compression ended.

    Attributes:
        rows: group rows of the finished tasks, by layer.
        failures: tasks that have no result.
        skipped: tasks that were finished before this call.
        seconds: wall time of this call.
    """

    plan: Plan
    rows: tuple[dict[str, Any], ...]
    failures: tuple[Failure, ...]
    skipped: int
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether every task is done, and so the model assembled."""
        return len(self.rows) == len(self.plan.tasks)


def compress_model(
    source: Source,
    config: RunConfig,
    executor: Executor,
    out: Path,
    run_dir: Path,
    *,
    fresh: bool = False,
    on_start: Callable[[Plan, set[str]], None] | None = None,
    on_event: Listener | None = None,
    on_progress: OnProgress | None = None,
) -> Outcome:
    """Compress a checkpoint; continue where an earlier call with the same arguments stopped.

    Args:
        source: the checkpoint.
        config: what to compute.
        executor: who computes.
        out: directory of the compressed model; appears when it is complete.
        run_dir: where the run keeps its payloads and manifest.
        fresh: forget what an earlier run left at `out` and `run_dir`.
        on_start: called with the plan and the ids of the tasks that are done already.
        on_event: told of every start and retry.
        on_progress: called as tasks finish.

    Returns:
        Outcome: with failures instead of a model, if any task failed.

    Raises:
        LestdError: bad input, an impossible budget, a foreign output directory, another driver,
            a run with another configuration, too little disk.
    """
    began = time.monotonic()
    plan = make_plan(source, config)
    device = config.device
    if device == "auto":
        device = "cuda" if executor.has_cuda() else "cpu"
    run = RunDirectory(run_dir)
    run.check_usable()
    finished_model = check_output(out)
    with run.locked():
        if fresh:
            run.remove_contents()
            if finished_model:
                shutil.rmtree(out)
        elif finished_model and not run.exists:
            raise LestdError(
                f"{out} holds a compressed model whose run directory {run_dir} is gone; choose "
                "another --out, or start over with --fresh"
            )
        run.begin(source, config, device, plan)

        tasks = {planned.task.task_id: planned.task for planned in plan.tasks}
        done = run.manifest.completed(tasks, run.payloads)
        skipped = len(done)
        if on_start is not None:
            on_start(plan, set(done))
        todo = [task for task in tasks.values() if task.task_id not in done]
        if todo:
            _require_disk(plan, run_dir)

        spec = WorkerSpec(
            DecomposeWorker,
            {
                "payload_dir": str(run.payloads.resolve()),
                "device": device,
                "threads": config.threads,
            },
            threads=config.threads,
            memory_bytes=plan.worker_memory_bytes,
            device=device,
        )
        finished = len(done)
        failures = []
        for outcome in _run_and_commit(executor, spec, todo, run, on_event):
            if isinstance(outcome, Failure):
                failures.append(outcome)
            else:
                finished += 1
            if on_progress is not None:
                on_progress(outcome, finished, len(tasks))

        done = run.manifest.completed(tasks, run.payloads)
        rows = tuple(done[task_id] for task_id in tasks if task_id in done)
        if len(done) == len(tasks) and (fresh or not finished_model or todo):
            if out.exists() and any(out.iterdir()):
                shutil.rmtree(out)
            assemble(source, plan, rows, run_dir, out)
    return Outcome(plan, rows, tuple(failures), skipped, time.monotonic() - began)


def _run_and_commit(
    executor: Executor,
    spec: WorkerSpec,
    todo: list[Task],
    run: RunDirectory,
    on_event: Listener | None,
) -> Iterator[Result | Failure]:
    """Run tasks; what is yielded is in the manifest."""
    attempts: dict[str, int] = {}

    def listen(event: Event) -> None:
        attempts[event.task_id] = event.attempt
        run.manifest.record_event(event)
        if on_event is not None:
            on_event(event)

    for outcome in executor.map(spec, todo, listen):
        outcome = replace(outcome, attempt=attempts[outcome.task_id])
        if isinstance(outcome, Failure):
            run.manifest.record_failure(outcome)
        else:
            run.manifest.commit(outcome)
        yield outcome
        if isinstance(outcome, Failure) and outcome.error_type == OutOfSpaceError.__name__:
            return  # No other task would fare better.


def _require_disk(plan: Plan, run_dir: Path) -> None:
    free = shutil.disk_usage(run_dir).free
    present = sum(p.stat().st_size for p in (run_dir / "payloads").iterdir())
    needed = plan.disk_bytes - present
    if free < needed:
        raise LestdError(
            f"the disk of {run_dir} has {free / 2**30:.2f} GiB free, the run needs "
            f"{needed / 2**30:.2f} GiB; free some, or choose another --out"
        )
