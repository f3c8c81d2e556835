"""A map that goes on where an earlier one was stopped."""

from pathlib import Path
from typing import Any

from support.squarer import Job, Squarer

from orchestrator.execution.executor import WorkerSpec
from orchestrator.execution.resume import resume
from orchestrator.execution.serial import SerialExecutor
from workers.contracts import Failure


def test_what_is_committed_is_left_out_and_failures_are_not_counted(tmp_path: Path) -> None:
    jobs = [Job("a", number=1), Job("b", "refuse"), Job("c", number=3), Job("d", number=4)]
    kept: dict[str, int] = {"a": 1}
    seen: list[tuple[str, int, int]] = []

    def run() -> list[Any]:
        return [
            outcome
            for outcome in resume(
                SerialExecutor(),
                WorkerSpec(Squarer, {"memory": str(tmp_path)}),
                jobs,
                set(kept),
                lambda result: kept.update({result.task_id: result.number}),
                on_progress=lambda outcome, *at: seen.append((outcome.task_id, *at)),
            )
            # What is yielded is committed.
            if isinstance(outcome, Failure) or outcome.task_id in kept
        ]

    assert [outcome.task_id for outcome in run()] == ["b", "c", "d"]
    assert kept == {"a": 1, "c": 9, "d": 16}
    assert seen == [("b", 1, 4), ("c", 2, 4), ("d", 3, 4)]
    assert [outcome.task_id for outcome in run()] == ["b"]
