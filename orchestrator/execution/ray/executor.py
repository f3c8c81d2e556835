"""Actors on a Ray cluster. Ray is imported nowhere else.

Retries and placement are the executor's own: Ray's ActorPool loses the item of an actor that dies.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lestd_kernels.errors import LestdError, first_line
from orchestrator.console import logs
from orchestrator.console.output import size
from orchestrator.execution.executor import Listener, WorkerSpec, all_started, retried
from orchestrator.execution.ray.connect import STARTED, join_or_start
from orchestrator.execution.ray.deaths import Place
from orchestrator.execution.ray.messages import (
    in_use,
    never_begun,
    say_that_others_go_on,
    say_what_is_waited_for,
)
from orchestrator.execution.ray.pool import Died, NotStarted, Pool, Ran, Started
from orchestrator.execution.retries import (
    Again,
    Deadlines,
    Queue,
    after_error,
    after_loss,
    after_result,
)
from workers.host.devices import gpu_memory_bytes
from workers.host.watcher import Watcher

# More than a few only wait for one another's kernels; and not all memory is free memory.
_WORKERS_PER_GPU = 4
_USABLE_GPU_MEMORY = 0.9
_PROBE_SECONDS = 60
# How often the cluster is asked for its nodes.
_LOOK_SECONDS = 2.0
# Workers that compute need some seconds to start; who waits longer wants to know for what.
_PATIENCE_SECONDS = 60.0
_REMINDER_SECONDS = 300.0
# A node where no worker can be made has room for the next one at once.
_PAUSE_SECONDS = 30.0
# Actors that wait for nodes which an autoscaler may add: they are the demand that it sees.
_DEMANDED = 8


class RayExecutor:
    """A pool of actors on a Ray cluster. Connects when it is first asked for something.

    Joins the cluster at ``address`` or ``RAY_ADDRESS``, else the one that runs on this machine,
    else starts a local one that ends with this process.

    Args:
        address: the cluster to join; None for the default above.
        workers: number of actors; None for as many as GPUs, CPUs and memory have room for.
        max_attempts: tries of an item whose actor was lost.
        task_timeout: seconds that an item may take; None for what `Deadlines` finds plausible.
        autoscaling: nodes join on demand, so what no node offers yet is waited for.
    """

    name = "ray"
    more = False

    def __init__(
        self,
        address: str | None = None,
        workers: int | None = None,
        max_attempts: int = 4,
        task_timeout: float | None = None,
        autoscaling: bool = False,
    ) -> None:
        self._address = address or os.environ.get("RAY_ADDRESS")
        self._workers = workers
        self._max_attempts = max_attempts
        self._task_timeout = task_timeout
        self._autoscaling = autoscaling
        self._connection: Any = None
        self._started_here = False

    def close(self) -> None:
        """Leave the cluster; end it if it was started here."""
        if self._connection is not None:
            self._connection.shutdown()
            self._connection = None

    def has_cuda(self) -> bool:
        """Whether any node of the cluster offers a GPU."""
        return self._most("GPU") >= 1

    def require_cuda(self) -> None:
        """See `Executor.require_cuda`."""
        if not self.has_cuda() and not self._autoscaling:
            raise LestdError(
                "device cuda was requested, but no node of the Ray cluster has a GPU; use "
                "--device cpu, or join a cluster that has one with --address"
            )

    def map(
        self, spec: WorkerSpec, items: Sequence[Any], on_event: Listener | None = None
    ) -> Iterator[Any]:
        """See `Executor.map`; results come in the order in which actors finish.

        Nodes may join and leave meanwhile: there are as many actors as they have room for.

        Raises:
            LestdError: the cluster does not answer, or has no GPU for CUDA workers; or one that
                was started here has ended.
        """
        if not items:
            return
        ray = self._ray()
        need = self._need(spec)
        pool = Pool(
            ray,
            make=self._actor_class(spec, need),
            locate=_place,
            make_watcher=self._make_watcher,
            in_flight=spec.in_flight,
            deadlines=Deadlines(self._task_timeout),
        )
        notify = on_event or (lambda event: None)
        queue = Queue(items)
        failed_starts, paused_until, told = 0, -math.inf, False
        looked_at, target = -math.inf, 0
        patience = time.monotonic() + _PATIENCE_SECONDS
        try:
            while queue or pool.running:
                if time.monotonic() - looked_at > _LOOK_SECONDS:  # Nodes come and go.
                    self._require_local_node()
                    target = self._pool_size(need, len(queue) + pool.running)
                    looked_at = time.monotonic()
                exist = pool.ready + pool.starting
                paused = exist and time.monotonic() < paused_until
                pool.resize(min(target, exist) if paused else target, len(queue))
                if pool.ready:
                    patience = time.monotonic() + _PATIENCE_SECONDS
                elif time.monotonic() > patience:
                    patience = time.monotonic() + _REMINDER_SECONDS
                    say_what_is_waited_for(
                        need, pool.starting, self._in_use(need), self._autoscaling
                    )
                begun = []
                for attempt, actor in queue.hand_out(lambda a: pool.free(a, len(queue))):
                    attempt = replace(attempt, worker=actor.place.worker)
                    pool.submit(actor, attempt)
                    begun.append(attempt)
                all_started(begun, notify)
                ended: list[Any] = []
                for outcome in pool.wait(min(1.0, queue.seconds_until_due())):
                    if isinstance(outcome, Started):
                        failed_starts = 0
                        continue
                    if isinstance(outcome, NotStarted):
                        if outcome.node_lost:
                            continue
                        failed_starts = 0 if pool.ready else failed_starts + 1
                        if pool.ready or pool.starting:  # It may be this one's node alone.
                            paused_until = time.monotonic() + _PAUSE_SECONDS
                            told = told or say_that_others_go_on(outcome, _PAUSE_SECONDS)
                        elif failed_starts >= self._max_attempts:
                            while queue:
                                pool.release(attempt := queue.pop())
                                ended.append(never_begun(attempt, outcome))
                        continue
                    following = self._judge(outcome, pool)
                    if isinstance(following, Again):
                        queue.add(following.attempt)
                        notify(retried(following))
                    else:
                        queue.ended(following.task_id)
                        ended.append(following)
                for left, answer in enumerate(ended, 1 - len(ended)):
                    self.more = left < 0
                    yield answer
        finally:
            pool.close()

    def _judge(self, outcome: Ran | Died, pool: Pool) -> Any:
        """The answer for an item, or that it is tried again."""
        if isinstance(outcome, Died):
            lost_nodes = pool.lost_nodes()
            return after_loss(outcome.attempt, outcome.loss, self._max_attempts, lost_nodes)
        if outcome.error is not None:
            return after_error(outcome.attempt, outcome.error, "application")
        return after_result(outcome.attempt, outcome.result)

    def worker_memory_bytes(self) -> int:
        """Memory of the node that has most; Ray counts what was free when it started.

        Nobody knows what nodes an autoscaler may add: they count as large enough.
        """
        return sys.maxsize if self._autoscaling else int(self._most("memory"))

    def on_nodes(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """See `Executor.on_nodes`; a node that is too busy to answer is left out."""
        ray = self._ray()
        remote = ray.remote(function)
        asked = {}
        for node in self._nodes():
            # The head of a cluster may have no CPU, and so no workers.
            here = node["NodeManagerHostname"] == socket.gethostname()
            if not here and node["Resources"].get("CPU", 0) >= 1:
                answer = remote.options(num_cpus=0, **_on_node(node["NodeID"])).remote(*arguments)
                asked[answer] = node["NodeManagerHostname"]
        if not asked:
            return {}
        done, busy = ray.wait([*asked], num_returns=len(asked), timeout=_PROBE_SECONDS)
        for reference in busy:
            ray.cancel(reference)
        answers = {}
        for reference in done:
            # A node that has died since has nothing to say.
            with suppress(ray.exceptions.RayError):
                answers[asked[reference]] = ray.get(reference)
        return answers

    def _need(self, spec: WorkerSpec) -> dict[str, float]:
        """Resources of its node that a worker takes, by Ray's names.

        A worker that needs more than any node has, of CPUs or by a rough estimate of memory, is
        slow, not impossible: it has a node for itself.

        Raises:
            LestdError: no node has a GPU, or none with the memory that a worker needs; or none has
                as many.
        """
        need = {"CPU": float(spec.threads), "memory": float(spec.memory_bytes)}
        if not self._autoscaling:
            need = {name: min(much, int(self._most(name))) for name, much in need.items()}
        if spec.device == "cuda":
            need["GPU"] = self._gpu_share(spec.device_memory_bytes)
            if spec.gpus > 1:
                need["GPU"] = self._whole_gpus(spec.gpus)
        return need

    def _whole_gpus(self, count: int) -> float:
        most = int(self._most("GPU"))
        if count > most and not self._autoscaling:
            raise LestdError(
                f"each worker needs {count} GPUs, but no node of the Ray cluster has more than "
                f"{most}; give a smaller --gpus, or join a cluster that has one with --address"
            )
        return float(count)

    def _gpu_share(self, memory_bytes: int | None) -> float:
        """1 / n where n workers share a GPU."""
        self.require_cuda()
        if memory_bytes is None:
            return 1.0
        smallest = self._smallest_gpu_bytes()
        if smallest is None:
            return 1.0
        if memory_bytes > smallest:
            raise LestdError(
                f"a worker needs about {size(memory_bytes)} of GPU memory, but a GPU of the "
                f"cluster has {size(smallest)}; use --device cpu, or join one with larger GPUs"
            )
        share = max(1, int(_USABLE_GPU_MEMORY * smallest) // memory_bytes)
        return 1 / min(share, _WORKERS_PER_GPU)

    def _smallest_gpu_bytes(self) -> int | None:
        """Memory of the smallest GPU, one asked on each node; None if none is free to answer."""
        ray = self._ray()
        probe = ray.remote(gpu_memory_bytes)
        asked = [
            probe.options(num_cpus=0, num_gpus=1, **_on_node(node["NodeID"])).remote()
            for node in self._nodes()
            if node["Resources"].get("GPU", 0) >= 1
        ]
        done, busy = ray.wait(asked, num_returns=len(asked), timeout=_PROBE_SECONDS)
        for reference in busy:
            ray.cancel(reference)
        answers = []
        for reference in done:
            # A node without a usable GPU says so when a worker starts there.
            with suppress(ray.exceptions.RayError):
                answers.append(ray.get(reference))
        return min(answers, default=None)

    def _actor_class(self, spec: WorkerSpec, need: dict[str, float]) -> Any:
        options = (
            self._ray()
            .remote(spec.cls)
            .options(
                num_cpus=need["CPU"],
                num_gpus=need.get("GPU", 0),
                memory=need["memory"],
                max_concurrency=spec.in_flight,
            )
        )
        return lambda: options.remote(**spec.kwargs)

    def _make_watcher(self, node: str) -> Any:
        return self._ray().remote(Watcher).options(num_cpus=0, **_on_node(node)).remote()

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray().nodes() if node["Alive"]]

    def _require_local_node(self) -> None:
        """Of a cluster that was started here no other node will ever come.

        Raises:
            LestdError: its only one is gone.
        """
        if self._started_here and not self._nodes():
            raise LestdError(
                "the local Ray cluster has ended (its raylet was killed, or died for lack of "
                "memory); run the same command again to continue, or with --executor serial"
            )

    def _in_use(self, names: Iterable[str]) -> list[str]:
        """Resources of each node, and what is taken of them, in words."""
        free = self._ray()._private.state.available_resources_per_node()
        said = []
        for node in self._nodes():
            each = []
            for name in names:
                offered = float(node["Resources"].get(name, 0))
                used = offered - float(free.get(node["NodeID"], {}).get(name, 0))
                each.append(in_use(name, used, offered))
            said.append(f"{node['NodeManagerHostname']}: {', '.join(each)}")
        return said

    def _most(self, resource: str) -> float:
        """The most that any one node offers of a resource."""
        offers = (float(node["Resources"].get(resource, 0)) for node in self._nodes())
        return max(offers, default=0.0)

    def _pool_size(self, need: dict[str, float], items: int) -> int:
        if self._workers is not None:
            return min(self._workers, items)
        # Each node by itself: what is left over on two of them makes no worker.
        fitting = sum(_fitting(node["Resources"], need) for node in self._nodes())
        return max(1, min(fitting + (_DEMANDED if self._autoscaling else 0), items))

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
            logs.log("message", cluster := join_or_start(ray, self._address))
        except (OSError, RuntimeError, ValueError) as error:
            raise LestdError(
                f"the Ray cluster at {self._address or 'this machine'} does not answer "
                f"({first_line(error)}); check the address, or use --executor serial"
            ) from error
        if threading.current_thread() is threading.main_thread():
            # Ray took SIGTERM for itself; a batch system that ends the job must be told as
            # Ctrl-C is.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        self._connection, self._started_here = ray, cluster == STARTED
        return ray


def _on_node(node: str) -> dict[str, Any]:
    """Ray's options for a task or an actor of that node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def _fitting(offered: dict[str, float], need: dict[str, float]) -> int:
    """How many workers a node has room for."""
    counts = (int(offered.get(name, 0) / share) for name, share in need.items() if share)
    return min(counts, default=0)


def _place(worker: Any) -> Place:
    """Where an actor runs; called in its process."""
    import ray

    # Ray redirects what a worker writes to files of its own.
    logs = [Path(f"/proc/self/fd/{stream}") for stream in (2, 1)]
    return Place(
        process=os.getpid(),
        node=ray.get_runtime_context().get_node_id(),
        gpus=tuple(ray.get_gpu_ids()),
        logs=tuple(str(log.readlink()) for log in logs if log.is_file()),
        host=socket.gethostname(),
    )
