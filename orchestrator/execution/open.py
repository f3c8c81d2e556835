"""The executor that a configuration asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from orchestrator.config.cluster import ClusterConfig
from orchestrator.console import logs
from orchestrator.execution.executor import Executor
from orchestrator.execution.serial import SerialExecutor


@contextmanager
def open_executor(cluster: ClusterConfig) -> Iterator[Executor]:
    """The executor that the configuration asks for, closed at the end."""
    if cluster.executor == "serial":
        yield SerialExecutor()
        return
    # Imported here: Ray costs a second, and who runs serially may not have it.
    from orchestrator.execution.ray.executor import RayExecutor

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
