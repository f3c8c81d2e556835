"""Actors on a Ray cluster. Ray is imported nowhere else.

Retries and placement are the executor's own: Ray's ActorPool loses the item of an actor that dies.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lestd_kernels.errors import LestdError, first_line
from orchestrator.executor import Event, Listener, WorkerSpec
from workers.contracts import Failure

# Tensors never go through the object store: the smallest one that Ray accepts will do.
_OBJECT_STORE_BYTES = 80 * 2**20


class RayExecutor:
    """A pool of actors on a Ray cluster. Connects when it is first asked for something.

    Joins the cluster at ``address`` or ``RAY_ADDRESS``, else the one that runs on this machine,
    else starts a local one that ends with this process.

    Args:
        address: the cluster to join; None for the default above.
        workers: number of actors; None for one per GPU, or as many as CPUs and memory allow.
        max_attempts: tries of an item whose actor died.
    """

    def __init__(
        self, address: str | None = None, workers: int | None = None, max_attempts: int = 4
    ) -> None:
        self._address = address or os.environ.get("RAY_ADDRESS")
        self._workers = workers
        self._max_attempts = max_attempts
        self._connection: Any = None

    def close(self) -> None:
        """Leave the cluster; end it if it was started here."""
        if self._connection is not None:
            self._connection.shutdown()
            self._connection = None

    def has_cuda(self) -> bool:
        """Whether any node of the cluster offers a GPU."""
        return self._most("GPU") >= 1

    def map(
        self, spec: WorkerSpec, items: Sequence[Any], on_event: Listener | None = None
    ) -> Iterator[Any]:
        """See `Executor.map`; results come in the order in which actors finish.

        Raises:
            LestdError: the cluster does not answer, or has no GPU for CUDA workers.
        """
        if not items:
            return
        ray = self._ray()
        pool = _Pool(ray, self._actor_class(spec))
        notify = on_event or (lambda event: None)
        waiting: deque[tuple[Any, int]] = deque((item, 1) for item in items)
        failed_starts = 0
        target = self._pool_size(spec, len(items))
        for _ in range(target):
            pool.start()
        try:
            while waiting or pool.running:
                while waiting and pool.idle:
                    item, attempt = waiting.popleft()
                    pool.submit(item, attempt)
                    notify(Event("started", item.task_id, attempt))
                for outcome in pool.wait():
                    if isinstance(outcome, _Started):
                        failed_starts = 0
                    elif isinstance(outcome, _NotStarted):
                        failed_starts += 1
                        if waiting and (outcome.broken or failed_starts >= self._max_attempts):
                            item, attempt = waiting.popleft()
                            kind = "application" if outcome.broken else "infrastructure"
                            yield _failure(item, kind, outcome.error, attempt)
                    elif outcome.error is None:
                        yield outcome.result
                    elif not outcome.died:
                        yield _failure(outcome.item, "application", outcome.error, outcome.attempt)
                    elif outcome.attempt >= self._max_attempts:
                        error, attempt = outcome.error, outcome.attempt
                        yield _failure(outcome.item, "infrastructure", error, attempt)
                    else:
                        message = first_line(outcome.error)
                        notify(Event("retried", outcome.item.task_id, outcome.attempt, message))
                        waiting.append((outcome.item, outcome.attempt + 1))
                    if pool.size < target and len(waiting) > pool.starting:
                        pool.start()
        finally:
            pool.close()

    def _actor_class(self, spec: WorkerSpec) -> Any:
        if spec.device == "cuda" and not self.has_cuda():
            raise LestdError(
                "device cuda is asked for, but no node of the Ray cluster has a GPU; use "
                "--device cpu, or join a cluster that has one with --address"
            )
        # A worker that computes with more threads than any node has CPUs is slow, not impossible.
        cpus = min(spec.threads, int(self._most("CPU")))
        gpus = 1 if spec.device == "cuda" else 0
        options = self._ray().remote(spec.cls).options(num_cpus=cpus, num_gpus=gpus)
        return lambda: options.remote(**spec.kwargs)

    def _most(self, resource: str) -> float:
        """The most that any one node offers of a resource."""
        nodes = [node["Resources"] for node in self._ray().nodes() if node["Alive"]]
        return max((float(resources.get(resource, 0)) for resources in nodes), default=0.0)

    def _pool_size(self, spec: WorkerSpec, items: int) -> int:
        if self._workers is not None:
            return min(self._workers, items)
        resources = self._ray().cluster_resources()
        if spec.device == "cuda":
            size = int(resources.get("GPU", 0))
        else:
            size = int(resources.get("CPU", 1)) // spec.threads
            if spec.memory_bytes:
                size = min(size, int(resources.get("memory", 0)) // spec.memory_bytes)
        return max(1, min(size, items))

    def _ray(self) -> Any:
        """Ray, connected.

        Raises:
            LestdError: the named cluster does not answer.
        """
        if self._connection is not None:
            return self._connection
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        try:
            _join_or_start(ray, self._address)
        except (OSError, RuntimeError, ValueError) as error:
            raise LestdError(
                f"the Ray cluster at {self._address or 'this machine'} does not answer "
                f"({first_line(error)}); check the address, or use --executor serial"
            ) from error
        if threading.current_thread() is threading.main_thread():
            # Ray took SIGTERM for itself; a batch system that ends the job must be told as
            # Ctrl-C is.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        self._connection = ray
        return ray


@dataclass(frozen=True)
class _Started:
    """An actor is ready for work."""


@dataclass(frozen=True)
class _NotStarted:
    """An actor ended before it was ready; broken: its ``__init__`` raised."""

    error: BaseException
    broken: bool


@dataclass(frozen=True)
class _Ran:
    """An actor ended its work on an item, or died of it."""

    item: Any
    attempt: int
    result: Any = None
    error: BaseException | None = None
    died: bool = False


class _Pool:
    """Actors and what they are at. An actor gets an item only once it runs: Ray accepts more
    actors than its nodes have room for, and those it never starts must not hold work."""

    def __init__(self, ray: Any, make: Callable[[], Any]) -> None:
        self._ray = ray
        self._make = make
        self._starting: dict[Any, Any] = {}
        self.idle: list[Any] = []
        self.running: dict[Any, tuple[Any, Any, int]] = {}

    @property
    def starting(self) -> int:
        """Number of actors that are not ready yet."""
        return len(self._starting)

    @property
    def size(self) -> int:
        """Number of actors."""
        return len(self._starting) + len(self.idle) + len(self.running)

    def start(self) -> None:
        """Ask for one more actor."""
        actor = self._make()
        self._starting[actor.__ray_ready__.remote()] = actor

    def submit(self, item: Any, attempt: int) -> None:
        """Give an item to an idle actor."""
        actor = self.idle.pop()
        self.running[actor.run.remote(item)] = (actor, item, attempt)

    def wait(self) -> Iterator[_Started | _NotStarted | _Ran]:
        """What has happened since; returns after a second even if nothing has."""
        # Without a timeout a Ctrl-C would wait as well.
        done, _ = self._ray.wait([*self._starting, *self.running], timeout=1.0)
        for reference in done:
            if reference in self._starting:
                yield self._settle_start(reference)
            else:
                yield self._settle_run(reference)

    def _settle_start(self, reference: Any) -> _Started | _NotStarted:
        actor = self._starting.pop(reference)
        try:
            self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return _NotStarted(error, bool(getattr(error, "actor_init_failed", False)))
        self.idle.append(actor)
        return _Started()

    def _settle_run(self, reference: Any) -> _Ran:
        actor, item, attempt = self.running.pop(reference)
        try:
            result = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            self.idle.append(actor)
            return _Ran(item, attempt, error=error)
        except self._ray.exceptions.RayError as error:
            self._ray.kill(actor)
            return _Ran(item, attempt, error=error, died=True)
        self.idle.append(actor)
        return _Ran(item, attempt, result)

    def close(self) -> None:
        """End all actors."""
        busy = [actor for actor, _, _ in self.running.values()]
        for actor in [*self.idle, *busy, *self._starting.values()]:
            self._ray.kill(actor)


def _failure(item: Any, kind: Any, error: BaseException, attempt: int) -> Failure:
    message = first_line(error)
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


def _join_or_start(ray: Any, address: str | None) -> None:
    quiet = {"log_to_driver": False, "logging_level": "error"}
    if address is None:
        address = _running_here()
    if address is not None and address != "local":
        host, port = _host_and_port(address)
        if port is not None:
            # Ray would try for minutes; whoever does not answer this will not answer Ray.
            socket.create_connection((host, port), timeout=10).close()
        ray.init(address=address, **quiet)
        return
    # A token for this cluster alone; left to itself, Ray writes one into the home directory, where
    # it changes what other clusters of this user ask for.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        **quiet,
    )


def _running_here() -> str | None:
    """Address of the cluster that runs on this machine, if one does.

    ``ray start`` leaves its address in a file, where it stays when the cluster dies; so whether
    anybody listens there is asked first.
    """
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        address = file.read_text(encoding="utf-8").strip()
        host, port = _host_and_port(address)
        if port is None:
            return None
        socket.create_connection((host, port), timeout=2).close()
    except (OSError, UnicodeDecodeError):
        return None
    return address


def _host_and_port(address: str) -> tuple[str, int | None]:
    """Parts of ``HOST:PORT``; no port for another kind of address, such as ``ray://...``."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return address, None
    return host, int(port)
