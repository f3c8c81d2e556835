"""Who runs the items: this process, or actors on a Ray cluster. Neither knows what an item is.

An executor maps a worker class over items. Items and results are small dataclasses; a worker
reads and writes its tensors itself, so no weight passes through the driver or the object store.
The same worker class runs in-process and as an actor.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any, Protocol

import psutil
import torch

from lestd_kernels.errors import LestdError
from orchestrator import logs
from orchestrator.config import ClusterConfig
from orchestrator.retries import Again, Attempt, after_result
from workers.devices import release_device_memory


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
    """

    kind: str
    task_id: str
    attempt: int
    message: str = ""
    error_type: str = ""
    traceback: str = ""
    worker: str = ""


Listener = Callable[[Event], None]


def retried(again: Again) -> Event:
    """The event of an attempt that is followed by another."""
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


def started(attempt: Attempt) -> Event:
    """The event of an attempt that a worker has been given."""
    return Event("started", attempt.item.task_id, attempt.number, worker=attempt.worker)


class Executor(Protocol):
    """Maps a worker over items: small dataclasses, each with a ``task_id`` of its own.

    Attributes:
        name: as configuration calls it.
    """

    name: str

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
        """What a function answers on every other machine that workers may run on, by its name."""

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


class SerialExecutor:
    """One worker in this process; for debuggers, tests and machines without Ray."""

    name = "serial"

    def has_cuda(self) -> bool:
        """Whether this process sees a GPU."""
        return torch.cuda.is_available()

    def require_cuda(self) -> None:
        """See `Executor.require_cuda`."""
        if not self.has_cuda():
            raise LestdError(
                "device cuda is asked for, but this process sees no GPU; use --device cpu, or run "
                "where PyTorch sees one"
            )

    def worker_memory_bytes(self) -> int:
        """What this machine has free."""
        return int(psutil.virtual_memory().available)

    def on_nodes(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """See `Executor.on_nodes`; there is no other machine."""
        return {}

    def map(
        self, spec: WorkerSpec, items: Sequence[Any], on_event: Listener | None = None
    ) -> Iterator[Any]:
        """See `Executor.map`; results come in the order of the items, second attempts last.

        Raises:
            LestdError: workers are to have a GPU, and this process sees none.
        """
        if not items:
            return
        if spec.device == "cuda":
            self.require_cuda()
        notify = on_event or (lambda event: None)
        threads = torch.get_num_threads()
        torch.set_num_threads(spec.threads)
        pool = ThreadPoolExecutor(spec.in_flight)
        try:
            worker = spec.cls(**spec.kwargs)
            waiting = deque(Attempt(item) for item in items)
            running: deque[tuple[Attempt, Future[Any]]] = deque()
            while waiting or running:
                room = 1 if waiting and waiting[0].alone else spec.in_flight
                if not waiting or len(running) >= room:
                    attempt, future = running.popleft()
                    answer = after_result(attempt, future.result())
                    if isinstance(answer, Again):
                        waiting.append(answer.attempt)
                        notify(retried(answer))
                    else:
                        yield answer
                    continue
                attempt = replace(waiting.popleft(), worker=f"{socket.gethostname()}:{os.getpid()}")
                if attempt.alone:
                    release_device_memory(worker)
                notify(started(attempt))
                running.append((attempt, pool.submit(worker.run, attempt.item)))
        finally:
            # What runs when nobody wants more results may take minutes, and is not waited for.
            pool.shutdown(wait=False, cancel_futures=True)
            torch.set_num_threads(threads)


@contextmanager
def open_executor(cluster: ClusterConfig) -> Iterator[Executor]:
    """The executor that the configuration asks for, closed at the end."""
    if cluster.executor == "serial":
        yield SerialExecutor()
        return
    # Imported here: Ray costs a second, and who runs serially may not have it.
    from orchestrator.ray_executor import RayExecutor

    # Ray prints what happens to workers on standard output, where only results belong.
    with redirect_stdout(logs.Lines()):
        executor = RayExecutor(
            cluster.address,
            cluster.workers,
            cluster.max_attempts,
            cluster.task_timeout,
            cluster.autoscaling,
        )
        try:
            yield executor
        finally:
            executor.close()
