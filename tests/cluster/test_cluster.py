"""Several nodes with GPUs, as Ray counts them, on one machine: anything may die at any time."""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import LAYERS
from ray.cluster_utils import Cluster
from support.cli import PATIENCE, Finished, digest_tree, run_lestd
from support.greedy import Greedy, Job
from support.kills import KEEP, committed, starts, wait_for_progress
from support.paths import SUPPORT

from orchestrator.execution.executor import Event, WorkerSpec
from orchestrator.execution.ray.executor import RayExecutor
from orchestrator.manifest.manifest import Manifest

pytestmark = pytest.mark.ray

_NODE = {"num_cpus": 2, "num_gpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without room for work, and two nodes with a GPU each."""
    # Sockets lie there, and their paths may not be long.
    with tempfile.TemporaryDirectory() as short, pytest.MonkeyPatch.context() as patch:
        # Where Ray notes the address of the last cluster, for others to join.
        patch.setenv("RAY_TMPDIR", short)
        one = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "object_store_memory": 80 * 2**20,
                # A node that falls silent is missed after seconds.
                "_system_config": {
                    "health_check_initial_delay_ms": 1000,
                    "health_check_period_ms": 1000,
                    "health_check_failure_threshold": 5,
                },
            },
        )
        for _ in range(2):
            one.add_node(**_NODE)
        yield one
        one.shutdown()


class Run:
    """The command in a process of its own, which may be killed and begun again."""

    def __init__(self, model: Path, out: Path, address: str, seconds: float) -> None:
        self.out, self.run_dir = out, out.with_name(out.name + ".run")
        script = SUPPORT / "fake_gpus.py"
        options = ("--out", out, *KEEP, "--device", "cpu", "--address", address, "--json")
        self._command = [sys.executable, str(script), "compress", str(model), *map(str, options)]
        self._environment = os.environ | {"FAKE_GPU_SECONDS": str(seconds)}
        self.start()

    def start(self) -> None:
        self.streams = [self.out.with_name(f"{name}.txt") for name in ("out", "err")]
        with self.streams[0].open("w") as out, self.streams[1].open("a") as err:
            self.process = subprocess.Popen(
                self._command, stdout=out, stderr=err, env=self._environment
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def start_again_if_it_set_a_task_aside(self) -> None:
        """What is killed twice by chance looks like a killer; the same command does the rest."""
        if self.process.poll() == 1:
            assert "is marked failed" in self.streams[1].read_text()
            self.start()
        assert self.process.poll() in (None, 0), self.finish()

    def finish(self) -> Finished:
        self.process.wait(timeout=PATIENCE)
        return Finished(self.process.returncode, *(path.read_text() for path in self.streams))


def worker_processes() -> list[psutil.Process]:
    """Processes of workers on the cluster's nodes, which are children of this process."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if child.name().startswith("ray::FakeGpu"):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def disturb(cluster: Cluster, run: Run, target: str, rng: random.Random) -> bool:
    """Kill something; False if there was nothing."""
    if target == "driver":
        run.kill()
        run.start()
    elif target == "worker":
        if not (victims := worker_processes()):
            return False
        rng.choice(victims).kill()
    else:
        nodes = sorted(cluster.worker_nodes, key=lambda node: node.node_id)
        cluster.remove_node(rng.choice(nodes), allow_graceful=rng.random() < 0.5)
        # The new one is of another shape.
        cluster.add_node(**_NODE | {"num_gpus": rng.choice([1, 2])})
    return True


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, 20])
def test_anything_may_die_and_no_byte_changes(
    cluster: Cluster,
    many_layers: Path,
    undisturbed: dict[str, str],
    tmp_path: Path,
    kills: int,
) -> None:
    """Workers, nodes and drivers die at random: same bytes, nothing twice, and all of it told."""
    rng = random.Random(kills)
    targets = [("worker", "node", "driver")[i % 3] for i in range(kills)]
    rng.shuffle(targets)
    run = Run(many_layers, tmp_path / "out", cluster.address, seconds=0.1 if kills == 3 else 0.3)
    for target in targets:
        done = False
        while not done:
            wait_for_progress(run.process, run.run_dir, more=1)
            time.sleep(rng.uniform(0, 0.2))
            run.start_again_if_it_set_a_task_aside()
            finished, begun = committed(run.run_dir), starts(run.run_dir)
            done = disturb(cluster, run, target, rng)
        assert finished.items() <= committed(run.run_dir).items()
    run.process.wait(timeout=PATIENCE)
    run.start_again_if_it_set_a_task_aside()
    ended = run.finish()
    assert ended.code == 0, ended
    assert digest_tree(run.out) == undisturbed

    # What was finished at the last kill is neither lost nor begun again.
    assert finished.items() <= committed(run.run_dir).items()
    started = starts(run.run_dir)
    assert all(started[task] == begun[task] for task in finished)
    # Every task was finished by one of its attempts; the report tells of all the others.
    told = json.loads(ended.out)["retries"]
    assert Counter(retry["task_id"] for retry in told) == started - Counter(
        dict.fromkeys(started, 1)
    )
    assert {"Interrupted", "NodeLost", "WorkerDied"} >= {retry["cause"] for retry in told}
    assert all(retry["block"].startswith("model.layers.") and retry["message"] for retry in told)
    rows = Manifest(run.out / "manifest").groups().to_pylist()
    assert len(rows) == LAYERS
    # Within one call, a result's attempt says how many were lost before it.
    assert max(row["attempt"] for row in rows) <= max(started.values())


@pytest.mark.slow
def test_a_run_begun_on_one_cluster_is_finished_on_another(
    cluster: Cluster, many_layers: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """From two nodes with GPUs to one worker on the only node of another cluster."""
    run = Run(many_layers, tmp_path / "out", cluster.address, seconds=0.0)
    wait_for_progress(run.process, run.run_dir, more=40)
    run.kill()
    finished = committed(run.run_dir)
    assert 40 <= len(finished) < LAYERS
    options = ("--device", "cpu", "--address", "local", "--workers", 1)
    result = run_lestd("compress", many_layers, "--out", run.out, *KEEP, *options)
    assert result.code == 0, result.err
    assert f"{len(finished)} of {LAYERS} tasks were already finished" in result.err
    assert finished.items() <= committed(run.run_dir).items()
    assert digest_tree(run.out) == undisturbed


@pytest.fixture
def executor(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayExecutor]:
    executor = RayExecutor(cluster.address)
    # Two workers share a GPU.
    monkeypatch.setattr(executor, "_gpu_share", lambda memory_bytes: 0.5)
    yield executor
    executor.close()


@pytest.mark.slow
def test_what_lacks_gpu_memory_is_tried_again_with_nothing_beside_it(
    executor: RayExecutor, tmp_path: Path
) -> None:
    jobs = [Job("small", "fits alone"), Job("large", "never fits")]
    jobs += [Job(str(i)) for i in range(30)]
    events: list[Event] = []
    spec = WorkerSpec(Greedy, {"folder": str(tmp_path)}, device="cuda", in_flight=3)
    found = {answer.task_id: answer for answer in executor.map(spec, jobs, events.append)}
    assert len(found) == len(jobs)
    assert found["small"].beside == 0
    assert max(found[str(i)].beside for i in range(30)) > 0
    assert (found["large"].kind, found["large"].attempt) == ("device_memory", 2)
    retried = [event for event in events if event.kind == "retried"]
    assert sorted(event.task_id for event in retried) == ["large", "small"]
    assert {event.error_type for event in retried} == {"OutOfMemoryError"}


@pytest.mark.slow
def test_nodes_join_and_leave_while_a_run_goes_on(
    cluster: Cluster, executor: RayExecutor, tmp_path: Path
) -> None:
    jobs = [Job(str(i)) for i in range(50)]
    events: list[Event] = []
    spec = WorkerSpec(Greedy, {"folder": str(tmp_path)}, device="cuda")
    found: list[Any] = []
    for answer in executor.map(spec, jobs, events.append):
        found.append(answer)
        if len(found) == 5:
            leaving = list(cluster.worker_nodes)
            joined = [cluster.add_node(**_NODE).node_id for _ in range(2)]
        if len(found) == 10:
            for node in leaving:
                cluster.remove_node(node)
    assert sorted(answer.task_id for answer in found) == sorted(job.task_id for job in jobs)
    assert {answer.node for answer in found[-20:]} <= set(joined)
    retried = [event for event in events if event.kind == "retried"]
    assert {event.error_type for event in retried} <= {"NodeLost"}


@pytest.mark.slow
def test_with_an_autoscaler_gpus_are_waited_for(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    while cluster.worker_nodes:
        cluster.remove_node(next(iter(cluster.worker_nodes)))
    executor = RayExecutor(cluster.address, autoscaling=True)
    spec = WorkerSpec(Greedy, {"folder": str(tmp_path)}, device="cuda", memory_bytes=2**30)
    try:
        assert not executor.has_cuda()
        answers = executor.map(spec, [Job("a")], lambda event: None)
        looked = executor._pool_size

        def join_later(need: dict[str, float], items: int) -> int:
            # Asked again and again while nobody has room: by then, the demand is there.
            if not cluster.worker_nodes:
                cluster.add_node(**_NODE)
            return looked(need, items)

        monkeypatch.setattr(executor, "_pool_size", join_later)
        assert [answer.task_id for answer in answers] == ["a"]
    finally:
        executor.close()
        cluster.add_node(**_NODE)
