"""Where to compute: executor, cluster, workers, time limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from orchestrator.config.files import Strict, load_yaml, validated


class ClusterConfig(Strict):
    """Where to compute. Nothing here affects the bytes of the result."""

    executor: Literal["ray", "serial"] = Field("ray", description="ray, or in this process")
    address: str | None = Field(
        None, description="Ray cluster to join; default: the one that runs, else a local one"
    )
    workers: int | None = Field(
        None, ge=1, description="actors; default: as many as GPUs, CPUs and memory have room for"
    )
    max_attempts: int = Field(
        4, ge=1, description="tries of a task whose worker was lost, before it counts as failed"
    )
    task_timeout: float | None = Field(
        None,
        gt=0,
        description="seconds until a worker counts as hung; default: ten times what the slowest "
        "finished task took per byte, at least 600; until one has finished, six hours",
    )
    autoscaling: bool = Field(
        False,
        description="nodes join on demand: ask for them, and wait for what no node offers yet",
    )


def cluster_options(cluster: Path | None, **options: Any) -> ClusterConfig:
    """Where to compute, from a cluster file and the options; options win.

    Raises:
        LestdError: a value is not valid.
    """
    values = {} if cluster is None else load_yaml(cluster)
    values |= {key: value for key, value in options.items() if value is not None}
    return validated(ClusterConfig, values, str(cluster or "options"))
