"""Which cluster is joined, and what is said where none can be, or none can work."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private.utils import write_ray_address
from support.paths import ROOT

from lestd_kernels.errors import LestdError
from orchestrator.execution.ray.connect import join_or_start
from orchestrator.execution.ray.deaths import how_it_ended
from orchestrator.execution.ray.messages import own_words
from workers.host.watcher import Remains


def test_a_python_without_our_dependencies() -> None:
    """As a job's may be, which brings the code of lestd and nothing else."""
    bare = subprocess.run(
        [sys.executable, "-S", "-m", "orchestrator", "plan", "x"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert bare.returncode == 2
    assert bare.stderr.startswith(f"error: {sys.executable} has no module typer")
    assert "install lestd in the environment" in bare.stderr
    assert bare.stderr.count("\n") == 1


def test_a_node_without_our_dependencies() -> None:
    error = RuntimeError("it died\n  File x, line 1\nModuleNotFoundError: No module named 'upath'")
    assert own_words(error).startswith("ModuleNotFoundError: No module named 'upath'; install")


def test_a_node_without_memory() -> None:
    error = RuntimeError("2 worker(s) were killed due to the node running low on memory. 7 of 8 GB")
    assert own_words(error).endswith("7 of 8 GB; use fewer workers, or larger machines")
    assert "the node ran out of memory" in how_it_ended(error, Remains())


def test_a_worker_that_ended_before_it_began() -> None:
    said = own_words(RuntimeError("The actor died unexpectedly before finishing this task."))
    assert said.startswith("a worker ended before it could begin (Ray says: The actor died")
    assert said.endswith("run the same command again")


class _Ray:
    """Ray, but for what connects or starts."""

    def __init__(self, error: Exception | None = None) -> None:
        self._private, self.error = ray._private, error
        self.addresses: list[str] = []

    def init(self, address: str, **options: Any) -> None:
        self.addresses.append(address)
        if self.error is not None:
            raise self.error

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(gcs_address=self.addresses[-1])


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_the_running_cluster_is_found_where_ray_noted_it(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        write_ray_address(address)  # As `ray start` does.
        joined = _Ray()
        assert join_or_start(joined, None) == f"joined the Ray cluster at {address}"
        assert joined.addresses == [address]
    alone = _Ray()
    assert "started a local Ray cluster" in join_or_start(alone, None)
    assert alone.addresses == ["local"]


def test_a_long_path_of_sockets() -> None:
    error = OSError("AF_UNIX path length cannot exceed 107 bytes: /tmp/long/plasma_store")
    with pytest.raises(LestdError, match=r"no local Ray .*set RAY_TMPDIR to a shorter path"):
        join_or_start(_Ray(error), "local")


@pytest.mark.parametrize("slow", [4, 5])
def test_a_machine_too_busy_to_start_ray_in_time_is_asked_again(slow: int) -> None:
    late = Exception("The current node timed out during startup. This could happen because ...")

    class Slow(_Ray):
        def init(self, address: str, **options: Any) -> None:
            super().init(address)
            if len(self.addresses) <= slow:
                raise late

        def shutdown(self) -> None:
            self.addresses[-1] += " ended"

    one = Slow()
    if slow == 4:
        join_or_start(one, "local")
        assert one.addresses == [*["local ended"] * 4, "local"]
        return
    with pytest.raises(
        LestdError, match=r"can be started .*timed out.*when the machine is less busy"
    ):
        join_or_start(one, "local")
    assert one.addresses == ["local ended"] * 5


def test_a_directory_of_another_user() -> None:
    error = PermissionError(13, "Permission denied", "/tmp/ray/session_1")
    with pytest.raises(LestdError, match=r"no local Ray .*set RAY_TMPDIR to a directory of your"):
        join_or_start(_Ray(error), "local")
