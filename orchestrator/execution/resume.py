"""A map that may be stopped at any time: what is committed is not computed again."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

from orchestrator.execution.executor import Executor, Listener, WorkerSpec
from workers.contracts import Failure

_TOGETHER = 256
"""Results that are committed together, at most."""


def resume(
    executor: Executor,
    spec: WorkerSpec,
    items: Sequence[Any],
    finished: Container[str],
    commit: Callable[[Sequence[Any]], object],
    on_event: Listener | None = None,
    on_progress: Callable[[Any, int, int], object] | None = None,
) -> Iterator[Any]:
    """Run the items that are not finished; yield what came of each, a result once it is committed.

    Results that are there at the same time are committed together: what a commit costs is mostly
    that there is one. One that comes alone does not wait for another.

    Args:
        executor: who computes.
        spec: of the workers.
        items: all of them, see `Executor.map`.
        finished: ids of those that are committed.
        commit: keeps some results, of the items in this order.
        on_event: told of every start and retry.
        on_progress: called with every result and `Failure`, the number finished and that of all.
    """
    todo = [item for item in items if item.task_id not in finished]
    done = len(items) - len(todo)
    held: list[Any] = []

    def keep() -> list[Any]:
        """Commit what is held; returns it."""
        outcomes, held[:] = held[:], []
        if results := [one for one in outcomes if not isinstance(one, Failure)]:
            commit(results)
        return outcomes

    def answer() -> Iterator[Any]:
        """What is held, committed, and counted."""
        nonlocal done
        for one in keep():
            done += not isinstance(one, Failure)
            if on_progress is not None:
                on_progress(one, done, len(items))
            yield one

    try:
        for outcome in executor.map(spec, todo, on_event):
            held.append(outcome)
            if not executor.more or len(held) == _TOGETHER:
                yield from answer()
        yield from answer()
    finally:
        keep()  # What is there is kept, whatever ended the map.
