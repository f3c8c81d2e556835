"""The executor of one process: a worker here, without Ray."""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import psutil
import torch

from lestd_kernels.errors import LestdError
from orchestrator.execution.executor import Listener, WorkerSpec, all_started, retried
from orchestrator.execution.retries import Again, Attempt, after_result
from workers.contracts import Failure
from workers.host.devices import release_device_memory


class SerialExecutor:
    """One worker in this process; for debuggers, tests and machines without Ray."""

    name = "serial"
    more = False

    def has_cuda(self) -> bool:
        """Whether this process sees a GPU."""
        return torch.cuda.is_available()

    def require_cuda(self) -> None:
        """See `Executor.require_cuda`."""
        if not self.has_cuda():
            raise LestdError(
                "device cuda was requested, but this process sees no GPU; use --device cpu, or run "
                "where PyTorch sees one"
            )

    def worker_memory_bytes(self) -> int:
        """Free memory of this machine."""
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
            here = f"{socket.gethostname()}:{os.getpid()}"
            while waiting or running:
                begun = []
                while waiting and len(running) < (1 if waiting[0].alone else spec.in_flight):
                    attempt = replace(waiting.popleft(), worker=here)
                    if attempt.alone:
                        release_device_memory(worker)
                    running.append((attempt, pool.submit(worker.run, attempt.item)))
                    begun.append(attempt)
                all_started(begun, notify, _has_result(running[0][1]))
                attempt, future = running.popleft()
                answer = after_result(attempt, future.result())
                if isinstance(answer, Again):
                    waiting.append(answer.attempt)
                    notify(retried(answer))
                else:
                    self.more = bool(running) and _has_result(running[0][1])
                    yield answer
        finally:
            # What runs when nobody wants more results may take minutes, and is not waited for.
            pool.shutdown(wait=False, cancel_futures=True)
            torch.set_num_threads(threads)


def _has_result(future: Future[Any]) -> bool:
    """Whether a worker has returned, and no failure that may be tried again."""
    returned = future.done() and future.exception() is None
    return returned and not isinstance(future.result(), Failure)
