"""Several compressions of one checkpoint at once, which differ in their byte budgets only.

Each is an ordinary `compress_model` with a run directory of its own, in a thread of its own, and
sees an executor that waits for the others: when all of them ask for a pass over their tasks, the
tasks of one slice group go to a worker as one `Bundle`, and every outcome goes back to the
compression that it belongs to, which commits it. They take turns like coroutines, so that only one
thread runs at a time: a compression while it is resumed, otherwise the caller.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

from orchestrator.compression.pipeline import Outcome
from orchestrator.execution.executor import Event, Executor, Listener, WorkerSpec
from workers.contracts import Bundle, BundleResult, Task

_END_SECONDS = 10.0

Compress = Callable[[Executor], Outcome]
"""A call of `compress_model` that lacks its executor."""


def compress_together(
    compressions: Sequence[Compress], executor: Executor, reuse_bytes: int
) -> list[Outcome]:
    """Run compressions that differ in their budgets only, with bundles for tasks.

    Args:
        compressions: of one source, with one method and its arguments.
        executor: who computes.
        reuse_bytes: what a bundle takes beside the memory of its tasks, see `Bounds`.

    Returns:
        Their outcomes.

    Raises:
        LestdError: as `compress_model`; the first one ends them all, with what is done kept.
    """
    runs = [_Compression(compress, executor, reuse_bytes) for compress in compressions]
    try:
        for run in runs:
            run.start()
        while waiting := [run for run in runs if run.request is not None]:
            _run_pass(waiting, executor, reuse_bytes)
    except BaseException:
        for run in runs:
            run.stop()
        raise
    return [run.outcome for run in runs if run.outcome is not None]


@dataclass(frozen=True, eq=False)
class _Request:
    """A pass over tasks that a compression asks for."""

    spec: WorkerSpec
    tasks: Sequence[Task]
    notify: Listener

    @property
    def settings(self) -> dict[str, Any]:
        """Needs that all workers share."""
        return {k: v for k, v in self.spec.kwargs.items() if k != "payload_dir"}


@dataclass(frozen=True)
class _Raise:
    """Instead of an answer."""

    error: BaseException


_NEXT, _END = object(), object()


class _Compression:
    """One of them: its thread, and the executor that it sees.

    Attributes:
        request: the pass that it waits for or is in; None where it has ended.
        outcome: how it ended.
        name: the executor's.
        more: False; one outcome is resumed at a time.
    """

    more = False

    def __init__(self, compress: Compress, executor: Executor, reuse_bytes: int) -> None:
        self.request: _Request | None = None
        self.outcome: Outcome | None = None
        self.name = executor.name
        self._compress = compress
        self._executor = executor
        self._reuse_bytes = reuse_bytes
        self._asked: SimpleQueue[Any] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._stopped = False
        # A daemon: what it does is safe to be cut off at any moment, and must not keep the process.
        self._thread = threading.Thread(target=self._run, daemon=True)

    # -- in the caller's thread --------------------------------------------------------------

    def start(self) -> None:
        """Run it up to its first request, or to its end."""
        self._thread.start()
        self._wait()

    def resume(self, answer: Any) -> None:
        """Give it an outcome, or `_END` of a pass, and run it until it needs something more."""
        self._answers.put(answer)
        self._wait()

    def stop(self) -> None:
        """End it as Ctrl-C does: its lock is given up, and what is done is kept."""
        self._stopped = True
        self._answers.put(_Raise(KeyboardInterrupt()))
        if self._thread.is_alive():
            self._thread.join(_END_SECONDS)

    def _wait(self) -> None:
        while True:
            asked = self._asked.get()
            if asked is _NEXT:
                return
            if isinstance(asked, Outcome | _Request):
                self.request = asked if isinstance(asked, _Request) else None
                self.outcome = asked if isinstance(asked, Outcome) else None
                return
            if isinstance(asked, _Raise):
                raise asked.error
            # Ray wants to be met in the main thread first.
            try:
                answer = asked()
            except Exception as error:
                answer = _Raise(error)
            self._answers.put(answer)

    # -- in its own thread -------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._asked.put(self._compress(self))
        except BaseException as error:
            self._asked.put(_Raise(error))

    def _ask(self, question: Any) -> Any:
        if self._stopped:
            raise KeyboardInterrupt
        self._asked.put(question)
        answer = self._answers.get()
        if isinstance(answer, _Raise):
            raise answer.error
        return answer

    def has_cuda(self) -> bool:
        """See `Executor.has_cuda`."""
        return bool(self._ask(self._executor.has_cuda))

    def require_cuda(self) -> None:
        """See `Executor.require_cuda`."""
        self._ask(self._executor.require_cuda)

    def worker_memory_bytes(self) -> int:
        """Memory that a worker may have beside what bundles need."""
        return int(self._ask(self._executor.worker_memory_bytes)) - self._reuse_bytes

    def on_nodes(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """See `Executor.on_nodes`."""
        return dict(self._ask(lambda: self._executor.on_nodes(function, *arguments)))

    def map(
        self, spec: WorkerSpec, items: Sequence[Any], on_event: Listener | None = None
    ) -> Iterator[Any]:
        """See `Executor.map`; begins when all compressions have come so far."""
        answer = self._ask(_Request(spec, items, on_event or (lambda event: None)))
        while answer is not _END:
            yield answer
            answer = self._ask(_NEXT)


def _run_pass(waiting: Sequence[_Compression], executor: Executor, reuse_bytes: int) -> None:
    """Run what those compressions wait for whose workers are alike, and resume these."""
    requests = {run: run.request for run in waiting if run.request is not None}
    first = next(iter(requests.values()))
    requests = {run: one for run, one in requests.items() if one.settings == first.settings}
    members: dict[str, list[tuple[_Compression, Task]]] = {}
    for run, request in requests.items():
        for task in request.tasks:
            members.setdefault(task.block, []).append((run, task))
    bundles = [
        Bundle(
            tuple(task for _, task in group),
            tuple(requests[run].spec.kwargs["payload_dir"] for run, _ in group),
        )
        for group in members.values()
    ]
    # Largest first: small ones fill up the time when workers run out of work.
    bundles.sort(key=lambda bundle: bundle.dense_bytes, reverse=True)
    groups = {bundle.task_id: members[bundle.block] for bundle in bundles}

    def notify(event: Event) -> None:
        for run, task in groups[event.task_id]:
            if run.request is requests[run]:
                requests[run].notify(replace(event, task_id=task.task_id))

    memory_bytes = max(request.spec.memory_bytes for request in requests.values()) + reuse_bytes
    spec = replace(first.spec, memory_bytes=memory_bytes, device_memory_bytes=memory_bytes)
    for answer in executor.map(spec, bundles, notify):
        group = groups[answer.task_id]
        if isinstance(answer, BundleResult):
            outcomes = [replace(one, attempt=answer.attempt) for one in answer.outcomes]
        else:
            outcomes = [replace(answer, task_id=task.task_id) for _, task in group]
        for (run, _), outcome in zip(group, outcomes, strict=True):
            # One whose disk is full has left already.
            if run.request is requests[run]:
                run.resume(outcome)
        if all(run.request is not request for run, request in requests.items()):
            return
    for run, request in requests.items():
        if run.request is request:
            run.resume(_END)
