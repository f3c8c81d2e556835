"""The executors' interface: items run in this process, or on actors of a Ray cluster.

An executor maps a worker class over items. Items and results are small dataclasses; a worker
reads and writes its tensors itself, so no weight passes through the driver or the object store.
The same worker class runs in-process and as an actor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.execution.retries import Again, Attempt


@dataclass(frozen=True)
class WorkerSpec:
    """How to make a worker, and what one needs.

    Attributes:
        cls: class with ``run(item) -> result | Failure``; its ``__init__`` may be slow.
        kwargs: keyword arguments of the class.
        threads: CPU threads that a worker computes with.
        memory_bytes: main memory that a worker is expected to need.
        device: ``"cpu"`` or ``"cuda"``.
        device_memory_bytes: GPU memory that a CUDA worker is expected to need; workers for which
            there is room share a GPU. None: a worker has `gpus` of its own.
        gpus: GPUs of a CUDA worker, on one node.
        in_flight: items that a worker is given at a time; with more than one, `run` is called in
            as many threads.
    """

    cls: type
    kwargs: dict[str, Any]
    threads: int = 1
    memory_bytes: int = 0
    device: str = "cpu"
    device_memory_bytes: int | None = None
    gpus: int = 1
    in_flight: int = 1


@dataclass(frozen=True)
class Event:
    """Something that happened to an item on its way.

    Attributes:
        kind: ``"started"``; ``"retried"``: the attempt has ended, and another will follow.
        task_id: the item's.
        attempt: 1 for the first.
        message: why it is tried again.
        error_type: the cause: ``"WorkerDied"``, ``"WorkerFailed"``, ``"NodeLost"``, ``"TimedOut"``,
            or the error of a device that had too little memory.
        traceback: what is known of the worker's end, for people.
        worker: who has the item, or had it, as host:pid.
        more: whether another event or a result follows at once, so that they may be written
            together.
    """

    kind: str
    task_id: str
    attempt: int
    message: str = ""
    error_type: str = ""
    traceback: str = ""
    worker: str = ""
    more: bool = field(default=False, compare=False)

    def known(self) -> dict[str, Any]:
        """What a log line says beside its kind and its message."""
        but = ("kind", "message", "more")
        return {k: v for k, v in vars(self).items() if v and k not in but}


Listener = Callable[[Event], None]


def retried(again: Again) -> Event:
    """The event of an attempt that is retried."""
    task_id, attempt = again.attempt.item.task_id, again.attempt.number - 1
    return Event(
        "retried",
        task_id,
        attempt,
        again.message,
        again.error_type,
        again.evidence,
        again.attempt.worker,
    )


def all_started(attempts: Sequence[Attempt], notify: Listener, more: bool = False) -> None:
    """Tell of attempts that workers have been given; `more`: a result follows at once."""
    for left, attempt in enumerate(attempts, 1 - len(attempts)):
        task_id, number = attempt.item.task_id, attempt.number
        notify(Event("started", task_id, number, worker=attempt.worker, more=more or left < 0))


class Executor(Protocol):
    """Maps a worker over items: small dataclasses, each with a ``task_id`` of its own.

    Attributes:
        name: as configuration calls it.
        more: while `map` has yielded something: whether the next is there already, so that both
            may be committed together.
    """

    name: str
    more: bool

    def has_cuda(self) -> bool:
        """Whether workers can have a GPU."""

    def require_cuda(self) -> None:
        """Refuse where workers cannot have a GPU, nor will.

        Raises:
            LestdError: it is so.
        """

    def worker_memory_bytes(self) -> int:
        """The most main memory that a worker can have, as things are now."""

    def on_nodes(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """Call a function on every other machine that workers may run on; answers by machine."""

    def map(
        self, spec: WorkerSpec, items: Sequence[Any], on_event: Listener | None = None
    ) -> Iterator[Any]:
        """Yield one result or `Failure` per item, as they finish.

        An item may have ``after``: ids of items before it in the sequence that must have ended.
        Failures of the infrastructure are retried on other workers, up to the limit; within one
        process, where there is no other, they are final. Any other `Failure` that a worker returns
        is final, but for the first of kind ``"device_memory"``: that item is tried once more, with
        nothing else on its device.
        """
