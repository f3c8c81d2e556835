"""Executors: every item gets one answer, whatever its worker does."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lestd_kernels.errors import LestdError
from orchestrator.config import ClusterConfig
from orchestrator.executor import (
    Event,
    Executor,
    SerialExecutor,
    WorkerSpec,
    open_executor,
)
from workers.contracts import Failure


@dataclass(frozen=True)
class Job:
    task_id: str
    action: str = "square"
    number: int = 0


@dataclass(frozen=True)
class Answer:
    task_id: str
    number: int
    threads: int
    pid: int


class Squarer:
    """Squares numbers, refuses some, crashes on others; remembers crashes in a folder."""

    def __init__(self, memory: str, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        self._memory = Path(memory)

    def run(self, job: Job) -> Answer | Failure:
        crashes = self._memory / job.task_id
        if job.action == "refuse":
            return Failure(job.task_id, "application", "ValueError", "bad input")
        if job.action == "raise":
            raise RuntimeError("a bug")
        if job.action == "crash" or (job.action == "crash once" and not crashes.exists()):
            crashes.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Answer(job.task_id, job.number**2, torch.get_num_threads(), os.getpid())


class Unloadable:
    """A worker that cannot be made."""

    def __init__(self) -> None:
        raise RuntimeError("no such model")

    def run(self, job: Job) -> Answer:
        raise AssertionError("never made, so never run")


@pytest.mark.parametrize("in_flight", [1, 3, 9])
def test_serial_runs_in_order_and_leaves_the_threads_as_they_were(
    tmp_path: Path, in_flight: int
) -> None:
    before = torch.get_num_threads()
    spec = WorkerSpec(Squarer, {"memory": str(tmp_path), "threads": 1}, in_flight=in_flight)
    jobs = [Job(str(i), number=i) for i in range(4)] + [Job("r", "refuse")]
    events: list[Event] = []
    results = list(SerialExecutor().map(spec, jobs, events.append))
    assert [r.task_id for r in results] == ["0", "1", "2", "3", "r"]
    assert [r.number for r in results[:4]] == [0, 1, 4, 9]
    assert isinstance(results[4], Failure)
    assert [e.task_id for e in events] == ["0", "1", "2", "3", "r"]
    assert torch.get_num_threads() == before


@pytest.fixture(scope="module")
def ray_executor() -> Iterator[Executor]:
    # More workers than there is room for, in every test.
    workers = (os.cpu_count() or 1) + 3
    with open_executor(ClusterConfig(workers=workers, max_attempts=3)) as executor:
        yield executor


@pytest.mark.ray
@pytest.mark.parametrize("in_flight", [1, 3])
def test_every_item_gets_one_answer(ray_executor: Executor, tmp_path: Path, in_flight: int) -> None:
    jobs = [Job(str(i), number=i) for i in range(6)]
    jobs += [Job("once", "crash once", 7), Job("always", "crash"), Job("refuse", "refuse")]
    jobs += [Job("bug", "raise")]
    events: list[Event] = []
    spec = WorkerSpec(Squarer, {"memory": str(tmp_path), "threads": 1}, in_flight=in_flight)
    results = {r.task_id: r for r in ray_executor.map(spec, jobs, events.append)}

    assert len(results) == len(jobs)
    assert [results[str(i)].number for i in range(6)] == [i * i for i in range(6)]
    assert all(results[str(i)].threads == 1 for i in range(6))
    assert os.getpid() not in {results[str(i)].pid for i in range(6)}
    assert results["once"].number == 49
    assert results["always"].kind == "infrastructure"
    assert results["always"].attempt in (2, 3)
    assert "ended 2 workers" in results["always"].message
    assert results["refuse"].kind == "application"
    assert results["refuse"].message == "bad input"
    assert results["bug"].kind == "application"
    assert "a bug" in results["bug"].traceback
    tries = {
        task: sum(e.task_id == task and e.kind == "started" for e in events) for task in results
    }
    expected = {job.task_id: 1 for job in jobs} | {"once": 2, "always": 3}
    if in_flight == 1:
        assert tries == expected
    else:  # Whoever was there when a worker died is tried again, once, and by itself.
        assert all(
            expected[task] <= count <= max(expected[task], 2) for task, count in tries.items()
        )
    assert [e.task_id for e in events if e.kind == "retried"].count("always") == 2


@pytest.mark.ray
def test_a_worker_that_cannot_be_made_is_not_tried_for_ever(ray_executor: Executor) -> None:
    results = list(ray_executor.map(WorkerSpec(Unloadable, {}), [Job("a"), Job("b")]))
    assert sorted(r.task_id for r in results) == ["a", "b"]
    assert all(r.kind == "application" for r in results)
    assert all("no such model" in r.traceback for r in results)


@pytest.mark.ray
def test_no_items_need_no_workers(ray_executor: Executor, tmp_path: Path) -> None:
    assert list(ray_executor.map(WorkerSpec(Squarer, {"memory": str(tmp_path)}), [])) == []


@pytest.mark.ray
def test_workers_that_have_no_room_hold_no_work(ray_executor: Executor, tmp_path: Path) -> None:
    """More actors than CPUs, and more threads than any node has: what fits does all the work."""
    cpus = os.cpu_count() or 1
    jobs = [Job(str(i), number=i) for i in range(2 * cpus + 6)]
    for threads in (1, cpus + 1):
        spec = WorkerSpec(Squarer, {"memory": str(tmp_path), "threads": threads}, threads=threads)
        results = list(ray_executor.map(spec, jobs))
        assert sorted(r.number for r in results) == [i * i for i in range(len(jobs))]
        assert {r.threads for r in results} == {threads}


@pytest.mark.ray
def test_a_gpu_that_is_not_there_is_missed_at_once(ray_executor: Executor) -> None:
    if torch.cuda.is_available():
        assert ray_executor.has_cuda()
        return
    assert not ray_executor.has_cuda()
    with pytest.raises(LestdError, match="no node of the Ray cluster has a GPU"):
        list(ray_executor.map(WorkerSpec(Squarer, {}, device="cuda"), [Job("a")]))
