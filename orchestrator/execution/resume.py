"""A map that may be stopped at any time: what is committed is not computed again."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

from orchestrator.execution.executor import Executor, Listener, WorkerSpec
from workers.contracts import Failure


def resume(
    executor: Executor,
    spec: WorkerSpec,
    items: Sequence[Any],
    finished: Container[str],
    commit: Callable[[Any], object],
    on_event: Listener | None = None,
    on_progress: Callable[[Any, int, int], object] | None = None,
) -> Iterator[Any]:
    """Run the items that are not finished; yield what came of each, a result once it is committed.

    Args:
        executor: who computes.
        spec: of the workers.
        items: all of them, see `Executor.map`.
        finished: ids of those that are committed.
        commit: keeps a result.
        on_event: told of every start and retry.
        on_progress: called with every result and `Failure`, the number finished and that of all.
    """
    todo = [item for item in items if item.task_id not in finished]
    done = len(items) - len(todo)
    for outcome in executor.map(spec, todo, on_event):
        if not isinstance(outcome, Failure):
            commit(outcome)
            done += 1
        if on_progress is not None:
            on_progress(outcome, done, len(items))
        yield outcome
