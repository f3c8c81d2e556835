"""compress_model(): the whole story on one page.

source -> plan -> (skip what is done) -> executor -> payload and manifest row -> assemble.

In the metric of activations these are found before the first task that has to be done (see
`orchestrator.compression.calibration`).

With global allocation the middle is walked through twice: pass one finds the groups' curves of
error against bytes, which decide the budgets that pass two encodes with. Every decision follows
from what is committed, so a killed run decides the same again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lestd_kernels.errors import OutOfSpaceError
from lestd_kernels.methods import CALIBRATED
from orchestrator.compression.calibration import CALIBRATION_DIR, calibrate_for, with_metrics
from orchestrator.compression.preflight import (
    file_bytes,
    require_apart,
    require_disk,
    require_memory,
    require_shared,
    require_usable,
)
from orchestrator.config.run import RunConfig
from orchestrator.execution.executor import Event, Executor, Listener, WorkerSpec
from orchestrator.execution.resume import resume
from orchestrator.manifest.manifest import Manifest
from orchestrator.model.assemble import assemble
from orchestrator.model.directory import check_output, remove_model
from orchestrator.planning.decide import decide
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.run.directory import RunDirectory
from orchestrator.run.fingerprint import as_recorded, fingerprint, require_same
from orchestrator.run.record import RunRecord, on_record
from orchestrator.source.checkpoint import Source
from workers.calibration.contracts import Calibrated, CalibrationItem
from workers.contracts import CurveResult, CurveTask, Failure, Result, Task
from workers.decompose import STATIONS, DecomposeWorker
from workers.storage.building import require_removable
from workers.storage.files import AnyPath
from workers.storage.names import MANIFEST_DIR

# Called with every finished or failed task, the number done and the number planned.
OnProgress = Callable[[Result | CurveResult | Calibrated | Failure, int, int], None]
# Called when a pass begins with its name, its tasks, and the ids of those that are done already:
# "calibrate", whose tasks are items of `workers.calibration.worker`, "curves", "compress"; at last
# "assemble", which has none.
OnStart = Callable[[str, Sequence[Task | CalibrationItem], set[str]], None]


@dataclass(frozen=True)
class Outcome:
    """How a compression ended.

    Attributes:
        planned: the plan as the call began, undecided under global allocation.
        plan: as it was carried out; undecided where pass one failed.
        rows: group rows of the finished tasks, by layer.
        curves: a row of each curve that is found; what belongs to its group stands in each row.
        failures: tasks that have no result.
        skipped: tasks that were already finished this call.
        seconds: wall time of this call.
        predicted: seconds that each block's decomposition was expected to take; None if not asked.
    """

    planned: Plan
    plan: Plan
    rows: tuple[dict[str, Any], ...]
    failures: tuple[Failure, ...]
    skipped: int
    curves: tuple[dict[str, Any], ...]
    seconds: float
    predicted: Mapping[str, float] | None

    @property
    def complete(self) -> bool:
        """Whether every task is done, and so the model assembled."""
        return len(self.rows) == len(self.plan.tasks)


def compress_model(
    source: Source,
    config: RunConfig,
    executor: Executor,
    out: AnyPath,
    run_dir: AnyPath,
    *,
    calibration: AnyPath | None = None,
    fresh: bool = False,
    on_start: OnStart | None = None,
    on_event: Listener | None = None,
    on_progress: OnProgress | None = None,
    predicted: Mapping[str, float] | None = None,
) -> Outcome:
    """Compress a checkpoint; continue where an earlier call with the same arguments stopped.

    Args:
        source: the checkpoint.
        config: what to compute.
        executor: who computes.
        out: directory of the compressed model; appears when it is complete, see
            `orchestrator.model.assemble`.
        run_dir: where the run keeps its payloads and manifest.
        calibration: directory of the calibration, which runs may share; None for one in `run_dir`.
        fresh: forget what an earlier run left at `out` and `run_dir`.
        on_start: called as a pass begins.
        on_event: told of every start and retry.
        on_progress: called as tasks finish.
        predicted: seconds that each block's decomposition is expected to take, for the record.

    Returns:
        Outcome: with failures instead of a model, if any task failed.

    Raises:
        LestdError: bad input, an impossible budget, directories that are not ours or lie in one
            another, another driver, a run with another configuration, too little disk or memory.
    """
    began = time.monotonic()
    run = RunDirectory(run_dir)
    require_apart(source, out, run_dir)
    run.check_usable()
    finished = check_output(out)
    if not fresh:
        source = as_recorded(source, run.binding() or (finished and finished["fingerprint"]))
    plan = make_plan(source, config)
    with run.locked() as require_lock, ExitStack() as until_the_end:
        model = check_output(out)  # Whoever held the lock may have finished it meanwhile.
        if fresh or (run.binding() is None and model is None):
            # What can be refused is refused before anything is written, or deleted.
            require_disk(plan, out, run_dir, file_bytes(out, run_dir) if fresh else 0)
            require_memory(plan, executor)
            require_shared(source, run, executor)
            require_usable(source, config, executor)
        if fresh:
            if isinstance(run_dir, Path):
                require_removable(run_dir)
            remove_model(out)
            run.remove_contents()
            model = None
        recorded = run.binding() or (model and model["fingerprint"])
        current = fingerprint(source, config, device_of(config, recorded, executor))
        if model is not None:
            require_same(model["fingerprint"], current, out)
            if not run.exists:  # `lestd clean` has dropped it, and nothing is left to do.
                manifest = Manifest(out / MANIFEST_DIR)
                rows = manifest.groups().to_pylist()
                found = _first_rows(manifest.completed_curves(plan.curve_tasks))
                seconds = time.monotonic() - began
                return Outcome(plan, plan, tuple(rows), (), len(rows), found, seconds, predicted)
        run.begin(source, current, plan)
        expected = None if predicted is None else sum(predicted.values())
        record = RunRecord(source, plan, current, executor, expected, began)
        until_the_end.enter_context(on_record(record, run.manifest, require_lock))
        run.manifest.compact_found(require_lock)

        def with_activations(tasks: Sequence[Task]) -> list[Task]:
            found = calibrate_for(
                (planned.task for planned in plan.tasks),
                source,
                config,
                current["config"]["device"],
                executor,
                calibration or run_dir / CALIBRATION_DIR,
                require_lock=require_lock,
                on_start=on_start,
                on_event=on_event,
                on_progress=on_progress,
            )
            return [with_metrics(task, found) for task in tasks]

        encoded_here: set[str] = set()

        def run_pass(name: str, plan: Plan, tasks: Sequence[Task]) -> _Pass:
            done = _completed(run, tasks)
            skipped = len(done.keys() - encoded_here)
            if name == "compress":
                record.finished_before, record.finished = skipped, len(done)
            todo = [task for task in tasks if task.task_id not in done]
            if todo:
                require_disk(plan, out, run_dir, reclaimed=0)
                require_memory(plan, executor)
                require_shared(source, run, executor)
                if config.used_metric in CALIBRATED:
                    tasks = with_activations(tasks)
            if on_start is not None:
                on_start(name, tasks, set(done))
            failures = []
            if todo:
                by_id = {task.task_id: task for task in tasks}

                def listen(event: Event) -> None:
                    record.retried += event.kind == "retried"
                    run.manifest.record_event(event, by_id[event.task_id])
                    if on_event is not None:
                        on_event(event)

                def commit(results: Sequence[Result | CurveResult]) -> None:
                    run.manifest.commit(*results)
                    require_lock()
                    record.finished += sum(isinstance(one, Result) for one in results)
                    run.manifest.compact_many(require_lock)

                # Largest first: small ones fill up the time when workers run out of work.
                items = sorted(tasks, key=lambda task: task.dense_bytes, reverse=True)
                spec = _worker_spec(plan, config, current["config"]["device"], run)
                for one in resume(executor, spec, items, done, commit, listen, on_progress):
                    if isinstance(one, Failure):
                        require_lock()
                        record.failed += 1
                        told = "\n".join(filter(None, (one.evidence, one.traceback)))
                        run.manifest.record_failure(
                            replace(one, traceback=told), by_id[one.task_id]
                        )
                        failures.append(one)
                        if one.error_type == OutOfSpaceError.__name__:
                            break  # No other task would fare better.
                found = _completed(run, todo)
                encoded_here.update(found)
                done |= found
            return _Pass(done, tuple(failures), skipped)

        planned, curves = plan, {}
        following: Plan | None = plan
        if not plan.decided:
            first = run_pass("curves", plan, plan.curve_tasks)
            curves = first.done
            if len(curves) < len(plan.curve_tasks):
                seconds = time.monotonic() - began
                found = _first_rows(curves)
                return Outcome(plan, plan, (), first.failures, 0, found, seconds, predicted)
            following = decide(planned, curves)
        tried: list[list[dict[str, Any]]] = []
        while following is not None:
            plan = following
            run.write_plan(plan)
            tasks = [planned.task for planned in plan.tasks]
            encoded = run_pass("compress", plan, tasks)
            rows = [encoded.done[t.task_id] for t in tasks if t.task_id in encoded.done]
            complete = len(rows) == len(tasks)
            record.stored_bytes = sum(row["stored_bytes"] for row in rows) if complete else None
            if not complete:
                break
            tried.append(rows)
            following = None if planned.decided else decide(planned, curves, tried)
        if complete and (encoded.skipped < len(tasks) or model is None):
            require_lock()
            if on_start is not None:
                on_start("assemble", (), set())
            with record.assembling():
                complete_row = partial(record.ended, "complete")
                assemble(source, plan, rows, run_dir, out, current, complete_row, require_lock)
    seconds = time.monotonic() - began
    found = _first_rows(curves)
    return Outcome(
        planned, plan, tuple(rows), encoded.failures, encoded.skipped, found, seconds, predicted
    )


def _first_rows(curves: Mapping[str, Sequence[dict[str, Any]]]) -> tuple[dict[str, Any], ...]:
    return tuple(rows[0] for rows in curves.values())


@dataclass(frozen=True)
class _Pass:
    """How a pass over tasks ended: what is done by task id, and how much of it was before."""

    done: dict[str, Any]
    failures: tuple[Failure, ...]
    skipped: int


def _completed(run: RunDirectory, tasks: Sequence[Task]) -> dict[str, Any]:
    """Rows of the manifest for the tasks that are done, by task id."""
    curves = [task for task in tasks if isinstance(task, CurveTask)]
    if curves:
        return dict(run.manifest.completed_curves(curves))
    return run.manifest.completed((task.task_id for task in tasks), run.payloads)


def device_of(config: RunConfig, recorded: dict[str, Any] | None, executor: Executor) -> str:
    """The device class: what is asked for; for ``auto`` what the run began with, or the best."""
    if config.device != "auto":
        return config.device
    if recorded is not None:
        return str(recorded["config"]["device"])
    return "cuda" if executor.has_cuda() else "cpu"


def _worker_spec(plan: Plan, config: RunConfig, device: str, run: RunDirectory) -> WorkerSpec:
    payloads = run.payloads
    payload_dir = str(payloads.resolve() if isinstance(payloads, Path) else payloads)
    return WorkerSpec(
        DecomposeWorker,
        {"payload_dir": payload_dir, "device": device, "threads": config.threads},
        threads=config.threads,
        memory_bytes=plan.worker_memory_bytes,
        device=device,
        device_memory_bytes=plan.worker_memory_bytes,
        in_flight=STATIONS,
    )
