"""A map that goes on where an earlier one was stopped."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from support.squarer import Job, Squarer

from orchestrator.execution.executor import Listener, WorkerSpec
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
                lambda results: kept.update({one.task_id: one.number for one in results}),
                on_progress=lambda outcome, *at: seen.append((outcome.task_id, *at)),
            )
            # What is yielded is committed.
            if isinstance(outcome, Failure) or outcome.task_id in kept
        ]

    assert [outcome.task_id for outcome in run()] == ["b", "c", "d"]
    assert kept == {"a": 1, "c": 9, "d": 16}
    assert seen == [("b", 1, 4), ("c", 2, 4), ("d", 3, 4)]
    assert [outcome.task_id for outcome in run()] == ["b"]


class Scripted(SerialExecutor):
    """Yields an item for each of `follows`, whether another is there already, and then ends."""

    def __init__(self, follows: Sequence[bool], end: BaseException | None) -> None:
        self.follows, self.end = follows, end

    def map(
        self, spec: WorkerSpec, items: Sequence[Any], on_event: Listener | None = None
    ) -> Iterator[Any]:
        for more, item in zip(self.follows, items, strict=False):
            self.more = more
            yield item
        if self.end is not None:
            raise self.end


@pytest.mark.parametrize(
    ("follows", "end", "expected"),
    [
        (
            [True, True, False, True, True],
            KeyboardInterrupt(),
            ["commit abc", "a 1", "b 2", "c 3", "commit de"],
        ),
        # Of the last, too, it was said that another follows.
        ([True, True, True], None, ["commit abc", "a 1", "b 2", "c 3"]),
    ],
    ids=["interrupted", "promised"],
)
def test_what_is_there_together_is_committed_together_whatever_ends_it(
    follows: Sequence[bool], end: BaseException | None, expected: list[str]
) -> None:
    seen: list[str] = []
    outcomes = resume(
        Scripted(follows, end),
        WorkerSpec(Squarer, {}),
        [Job(name) for name in "abcdefg"],
        (),
        lambda results: seen.append("commit " + "".join(one.task_id for one in results)),
        on_progress=lambda outcome, done, planned: seen.append(f"{outcome.task_id} {done}"),
    )
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt) if end is not None else nullcontext():
        told.extend(outcome.task_id for outcome in outcomes)
    assert seen == expected
    assert "".join(told) == "abc"


def test_the_serial_executor_says_what_is_there(tmp_path: Path) -> None:
    """Never of what may be tried again, or is the last."""
    executor, jobs = SerialExecutor(), [Job("a", number=1), Job("b", "refuse"), Job("c", number=3)]
    spec = WorkerSpec(Squarer, {"memory": str(tmp_path)}, in_flight=3)
    said = {outcome.task_id: executor.more for outcome in executor.map(spec, jobs)}
    assert said == {"a": False, "b": said["b"], "c": False}
