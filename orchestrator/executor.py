"""Who runs the items: this process, or actors on a Ray cluster. Neither knows what an item is.

An executor maps a worker class over items. Items and results are small dataclasses; a worker
reads and writes its tensors itself, so no weight passes through the driver or the object store.
The same worker class runs in-process and as an actor, and Ray is imported nowhere else.
"""

from __future__ import annotations

import os
import secrets
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lestd_kernels.errors import LestdError
from orchestrator.config import ClusterConfig
from workers.contracts import Failure

# Tensors never go through the object store: the smallest one that Ray accepts will do.
_OBJECT_STORE_BYTES = 80 * 2**20


class Item(Protocol):
    """Anything with a name of its own."""

    @property
    def task_id(self) -> str:
        """Name of the item in events and failures."""


@dataclass(frozen=True)
class WorkerSpec:
    """How to make a worker, and what one needs.

    Attributes:
        cls: class with ``run(item) -> result | Failure``; its ``__init__`` may be slow.
        kwargs: keyword arguments of the class.
        threads: CPU threads that a worker computes with.
        memory_bytes: main memory that a worker is expected to need.
        device: ``"cpu"`` or ``"cuda"``; a CUDA worker has one GPU of its own.
    """

    cls: type
    kwargs: dict[str, Any]
    threads: int = 1
    memory_bytes: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Event:
    """Something that happened to an item on its way: ``"started"`` or ``"retried"``."""

    kind: str
    task_id: str
    attempt: int
    message: str = ""


Listener = Callable[[Event], None]


class Executor(Protocol):
    """Maps a worker over items."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def has_cuda(self) -> bool:
        """Whether workers can have a GPU."""

    def map(
        self, spec: WorkerSpec, items: Sequence[Any], on_event: Listener | None = None
    ) -> Iterator[Any]:
        """Yield one result or `Failure` per item, as they finish.

        Failures of the infrastructure are retried, up to the limit; a `Failure` that a worker
        returns is final.
        """


class SerialExecutor:
    """One worker in this process; for debuggers, tests and machines without Ray."""

    name = "serial"

    def has_cuda(self) -> bool:
        """Whether this process sees a GPU."""
        return torch.cuda.is_available()

    def map(
        self, spec: WorkerSpec, items: Sequence[Any], on_event: Listener | None = None
    ) -> Iterator[Any]:
        """See `Executor.map`; results come in the order of the items."""
        threads = torch.get_num_threads()
        torch.set_num_threads(spec.threads)
        try:
            worker = spec.cls(**spec.kwargs) if items else None
            for item in items:
                if on_event is not None:
                    on_event(Event("started", item.task_id, attempt=1))
                yield worker.run(item)  # type: ignore[union-attr]
        finally:
            torch.set_num_threads(threads)


class RayExecutor:
    """A pool of actors on the Ray cluster that the driver is connected to.

    Args:
        workers: number of actors; None for one per GPU, or as many as CPUs and memory allow.
        max_attempts: tries of an item whose actor died.
    """

    name = "ray"

    def __init__(self, workers: int | None = None, max_attempts: int = 4) -> None:
        self._workers = workers
        self._max_attempts = max_attempts

    def has_cuda(self) -> bool:
        """Whether any node of the cluster offers a GPU."""
        import ray

        return bool(ray.cluster_resources().get("GPU", 0) >= 1)

    def _pool_size(self, spec: WorkerSpec, items: int) -> int:
        import ray

        if self._workers is not None:
            return min(self._workers, items)
        resources = ray.cluster_resources()
        if spec.device == "cuda":
            size = int(resources.get("GPU", 0))
        else:
            size = int(resources.get("CPU", 1)) // spec.threads
            if spec.memory_bytes:
                size = min(size, int(resources.get("memory", 0)) // spec.memory_bytes)
        return max(1, min(size, items))

    def map(
        self, spec: WorkerSpec, items: Sequence[Any], on_event: Listener | None = None
    ) -> Iterator[Any]:
        """See `Executor.map`; results come in the order in which actors finish."""
        import ray
        from ray.exceptions import RayActorError, RayError, RayTaskError

        notify = on_event or (lambda event: None)
        actor_class: Any = ray.remote(spec.cls).options(
            num_cpus=spec.threads, num_gpus=1 if spec.device == "cuda" else 0
        )
        waiting: deque[tuple[Any, int]] = deque((item, 1) for item in items)
        idle = [actor_class.remote(**spec.kwargs) for _ in range(self._pool_size(spec, len(items)))]
        running: dict[Any, tuple[Any, Any, int]] = {}
        try:
            while waiting or running:
                while waiting and idle:
                    item, attempt = waiting.popleft()
                    actor = idle.pop()
                    running[actor.run.remote(item)] = (actor, item, attempt)
                    notify(Event("started", item.task_id, attempt))
                # The timeout lets a Ctrl-C through, which a wait without end would hold back.
                done, _ = ray.wait(list(running), timeout=1.0)
                for reference in done:
                    actor, item, attempt = running.pop(reference)
                    try:
                        result = ray.get(reference)
                    except RayTaskError as error:
                        idle.append(actor)
                        yield _failure(item, "application", error, attempt)
                    except RayError as error:
                        ray.kill(actor)
                        broken = isinstance(error, RayActorError) and error.actor_init_failed
                        if broken or attempt >= self._max_attempts:
                            kind = "application" if broken else "infrastructure"
                            yield _failure(item, kind, error, attempt)
                        else:
                            notify(Event("retried", item.task_id, attempt, _first_line(error)))
                            waiting.append((item, attempt + 1))
                        if waiting:
                            idle.append(actor_class.remote(**spec.kwargs))
                    else:
                        idle.append(actor)
                        yield result
        finally:
            for actor in idle + [actor for actor, _, _ in running.values()]:
                ray.kill(actor)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def _failure(item: Any, kind: Any, error: BaseException, attempt: int) -> Failure:
    message = _first_line(error)
    if kind == "infrastructure":
        message = (
            f"its worker died {attempt} times (last: {message}); most often the machine ran out of "
            "memory: use fewer workers, then run the same command again"
        )
    return Failure(
        task_id=item.task_id,
        kind=kind,
        error_type=type(error).__name__,
        message=message,
        traceback="".join(traceback.format_exception(error)),
        attempt=attempt,
    )


@contextmanager
def open_executor(cluster: ClusterConfig) -> Iterator[Executor]:
    """The executor that the configuration asks for; for Ray, connected while the context lasts.

    Joins the cluster at ``address`` or ``RAY_ADDRESS``, else the one that runs on this machine,
    else starts a local one that ends with this process.

    Raises:
        LestdError: the named cluster does not answer.
    """
    if cluster.executor == "serial":
        yield SerialExecutor()
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    # Ray prints what happens to workers on standard output, where only results belong.
    with redirect_stdout(sys.stderr):
        try:
            if address is None or address == "local":
                _join_or_start(ray, address, quiet)
            else:
                ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise LestdError(
                f"the Ray cluster at {address or 'this machine'} does not answer "
                f"({_first_line(error)}); check the address, or use --executor serial"
            ) from error
        try:
            yield RayExecutor(cluster.workers, cluster.max_attempts)
        finally:
            ray.shutdown()


def _join_or_start(ray: Any, address: str | None, quiet: dict[str, Any]) -> None:
    if address is None:
        try:
            ray.init(address="auto", **quiet)
            return
        except ConnectionError:
            pass  # No cluster on this machine: start one.
    # A token for this cluster alone; left to itself, Ray writes one into the home directory, where
    # it changes what other clusters of this user ask for.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        **quiet,
    )
