"""The command line on a cluster whose GPUs are only Ray's numbers: workers are placed as CUDA
workers are, and compute on the CPU. Each task takes ``FAKE_GPU_SECONDS`` longer than it would, so
that it can be caught at work."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from orchestrator import cli
from orchestrator.execution.executor import Listener, WorkerSpec
from orchestrator.execution.ray import executor
from workers.contracts import CurveResult, Failure, Result, Task
from workers.decompose import DecomposeWorker


class FakeGpuWorker(DecomposeWorker):
    """The real worker; `device` is cpu in its arguments."""

    def __init__(self, seconds: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._seconds = seconds

    def run(self, task: Task) -> Result | CurveResult | Failure:
        time.sleep(self._seconds)
        return super().run(task)


class FakeGpuExecutor(executor.RayExecutor):
    """Asks for a GPU for each worker."""

    def map(
        self, spec: WorkerSpec, items: Sequence[Any], on_event: Listener | None = None
    ) -> Iterator[Any]:
        kwargs = spec.kwargs | {"seconds": float(os.environ["FAKE_GPU_SECONDS"])}
        changes = {"cls": FakeGpuWorker, "kwargs": kwargs, "device_memory_bytes": None}
        return super().map(replace(spec, **changes, device="cuda"), items, on_event)


if __name__ == "__main__":
    # By its importable name: workers cannot import what `__main__` defines.
    from support.fake_gpus import FakeGpuExecutor as Importable

    executor.RayExecutor = Importable  # type: ignore[misc]
    cli.main()
