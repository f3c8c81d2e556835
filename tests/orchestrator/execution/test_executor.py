"""Executors: every item gets one answer, whatever its worker does."""

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import ROOT, TESTS
from support.squarer import Job, OnlyOne, Squarer, Unloadable

from lestd_kernels.errors import LestdError
from orchestrator.config.cluster import ClusterConfig
from orchestrator.console import logs
from orchestrator.execution.executor import Event, Executor, WorkerSpec
from orchestrator.execution.open import open_executor
from orchestrator.execution.ray.executor import RayExecutor
from orchestrator.execution.serial import SerialExecutor
from workers.contracts import Failure


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
    assert {e.worker for e in events} == {f"{socket.gethostname()}:{os.getpid()}"}
    assert results[4].worker == events[4].worker
    assert torch.get_num_threads() == before


def test_what_lacks_memory_is_tried_again_with_nothing_in_flight(tmp_path: Path) -> None:
    jobs = [Job("once", "too large once", 3), Job("always", "too large"), Job("after", number=2)]
    events: list[Event] = []
    spec = WorkerSpec(Squarer, {"memory": str(tmp_path)}, in_flight=3)
    results = list(SerialExecutor().map(spec, jobs, events.append))
    assert [r.task_id for r in results] == ["after", "once", "always"]
    assert [r.number for r in results[:2]] == [4, 9]
    assert (results[2].kind, results[2].attempt) == ("device_memory", 2)
    assert "block: the GPU has too little memory (CUDA out of memory" in results[2].message
    assert "Advice" not in results[2].message
    kinds = [(event.kind, event.task_id, event.attempt) for event in events]
    assert kinds[-2:] == [("started", "once", 2), ("started", "always", 2)]
    assert [kind for kind in kinds if kind[0] == "retried"] == [
        ("retried", "once", 1),
        ("retried", "always", 1),
    ]


def test_in_one_process_a_failure_of_the_machine_is_final(tmp_path: Path) -> None:
    spec = WorkerSpec(Squarer, {"memory": str(tmp_path)})
    results = list(SerialExecutor().map(spec, [Job("spoil", "spoil"), Job("after")]))
    assert [(r.task_id, r.kind, r.attempt) for r in results] == [
        ("spoil", "infrastructure", 1),
        ("after", "infrastructure", 1),
    ]


def test_what_others_print_is_logged_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.use(logs.LogFormat.json)
    try:
        stream = logs.Lines()
        print("\x1b[33m(raylet)\x1b[0m A worker", "died", file=stream)
        print("\n\x1b[36mand\x1b[39m", end="\nunfinished", file=stream, flush=True)
    finally:
        logs.use(logs.LogFormat.text)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["message"] for line in lines] == ["(raylet) A worker died", "and"]


@pytest.fixture(scope="module")
def ray_executor() -> Iterator[Executor]:
    # More workers than there is room for, in every test.
    workers = (os.cpu_count() or 1) + 3
    with open_executor(ClusterConfig(workers=workers, max_attempts=3)) as executor:
        executor.worker_memory_bytes()  # Connects, which it tells of.
        yield executor


@pytest.mark.ray
@pytest.mark.parametrize("in_flight", [pytest.param(1, marks=pytest.mark.slow), 3])
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
    assert results["always"].attempt in ((2,) if in_flight == 1 else (2, 3))
    assert "killed 2 workers" in results["always"].message
    assert results["refuse"].kind == "application"
    assert results["refuse"].message == "bad input"
    assert results["bug"].kind == "application"
    assert "a bug" in results["bug"].traceback
    tries = {
        task: sum(e.task_id == task and e.kind == "started" for e in events) for task in results
    }
    expected = {job.task_id: 1 for job in jobs}
    expected |= {"once": 2, "always": results["always"].attempt}
    if in_flight == 1:
        assert tries == expected
    else:  # Whoever was there when a worker died is tried again, once, and by itself.
        assert all(
            expected[task] <= count <= max(expected[task], 2) for task, count in tries.items()
        )
    retried = [event for event in events if event.kind == "retried"]
    assert [e.task_id for e in retried].count("always") == results["always"].attempt - 1
    assert {event.error_type for event in retried} == {"WorkerDied"}
    assert "the last words of always" in results["always"].evidence
    # Who had an item is told when it begins, when it is tried again, and when it has failed.
    had = {(e.task_id, e.attempt): e.worker for e in events if e.kind == "started"}
    here = socket.gethostname()
    assert all(had[task, tries[task]] == f"{here}:{results[task].pid}" for task in "012345")
    assert all(event.worker == had[event.task_id, event.attempt] for event in retried)
    assert len({had["always", attempt] for attempt in range(1, tries["always"] + 1)}) > 1
    failed = [result for result in results.values() if isinstance(result, Failure)]
    assert len(failed) == 3
    assert all(failure.worker == had[failure.task_id, failure.attempt] for failure in failed)


@pytest.mark.ray
@pytest.mark.slow
def test_how_a_worker_ended_is_told(
    ray_executor: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "_task_timeout", 2.0)
    jobs = [Job("killed", "crash"), Job("fault", "fault"), Job("exit", "exit"), Job("h", "hang")]
    jobs += [Job(str(i), number=i) for i in range(4)]
    spec = WorkerSpec(Squarer, {"memory": str(tmp_path)})
    results = {r.task_id: r for r in ray_executor.map(spec, jobs)}
    assert [results[str(i)].number for i in range(4)] == [i * i for i in range(4)]
    told = {"killed": "killed or crashed", "fault": "by SIGSEGV", "exit": "with exit code 4"}
    for task, words in told.items():
        assert results[task].error_type == "WorkerDied"
        assert words in results[task].message
        assert results[task].attempt == 2
    assert results["h"].error_type == "TimedOut"
    assert "took longer than 2 s" in results["h"].message
    assert "task_timeout" in results["h"].message


@pytest.mark.ray
def test_a_worker_that_cannot_be_made_is_not_tried_for_ever(ray_executor: Executor) -> None:
    results = list(ray_executor.map(WorkerSpec(Unloadable, {}), [Job("a"), Job("b")]))
    assert sorted(r.task_id for r in results) == ["a", "b"]
    assert all(r.kind == "application" for r in results)
    assert all("no such model" in r.traceback for r in results)
    assert {r.message for r in results} == {"RuntimeError: no such model"}


@pytest.mark.ray
def test_where_some_workers_cannot_be_made_the_others_do_the_work(
    ray_executor: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def log(event: str, message: str, *rest: Any) -> None:
        if not message.startswith("("):  # What Ray says of its own accord.
            told.append(message)
            Path(tmp_path, "told").touch()

    monkeypatch.setattr(logs, "log", log)
    # However slow this machine is, nothing is said of that.
    monkeypatch.setattr("orchestrator.execution.ray.executor._PATIENCE_SECONDS", math.inf)
    jobs = [Job(str(i), number=i) for i in range(12)]
    results = list(ray_executor.map(WorkerSpec(OnlyOne, {"memory": str(tmp_path)}), jobs))
    assert sorted(r.number for r in results) == [i * i for i in range(12)]
    assert len({r.pid for r in results}) == 1
    assert len(told) == 1
    assert "could not be started (this node sees no GPU)" in told[0]


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_whose_device_is_gone_is_replaced(ray_executor: Executor, tmp_path: Path) -> None:
    """Left alive it would be the fastest of all, and fail the whole queue."""
    jobs = [Job("once", "spoil once", 3), Job("always", "spoil")]
    jobs += [Job(str(i), number=i) for i in range(12)]
    events: list[Event] = []
    spec = WorkerSpec(Squarer, {"memory": str(tmp_path)})
    results = {r.task_id: r for r in ray_executor.map(spec, jobs, events.append)}
    assert [results[str(i)].number for i in range(12)] == [i * i for i in range(12)]
    assert results["once"].number == 9
    always = results["always"]
    assert (always.kind, always.error_type, always.attempt) == ("infrastructure", "WorkerFailed", 2)
    assert "CUDA error: gone" in always.message
    retried = [(e.task_id, e.error_type) for e in events if e.kind == "retried"]
    assert sorted(retried) == [("always", "WorkerFailed"), ("once", "WorkerFailed")]


class EnoughError(Exception):
    """Ends what would wait for ever."""


@pytest.mark.ray
def test_what_no_node_offers_is_asked_for_again_and_again(
    ray_executor: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def log(event: str, message: str, *rest: Any) -> None:
        if not message.startswith("("):
            told.append(message)
        if len(told) == 2:
            raise EnoughError

    monkeypatch.setattr(logs, "log", log)
    monkeypatch.setattr(ray_executor, "_autoscaling", True)
    for name in ("_PATIENCE_SECONDS", "_REMINDER_SECONDS"):
        monkeypatch.setattr(f"orchestrator.execution.ray.executor.{name}", 0.1)
    spec = WorkerSpec(Squarer, {"memory": str(tmp_path)}, threads=10_000, memory_bytes=2**50)
    with pytest.raises(EnoughError):
        list(ray_executor.map(spec, [Job("a")]))
    assert told[0] == told[1]
    assert "each takes CPU 10000" in told[0]
    assert f"in use: {socket.gethostname()}: CPU 0 of " in told[0]
    assert "--threads, or node types with more memory" in told[0]


@pytest.mark.ray
@pytest.mark.slow
def test_what_ray_prints_is_logged_as_json() -> None:
    code = """if True:
        import sys, tempfile
        from orchestrator.console import logs
        from orchestrator.config.cluster import ClusterConfig
        from orchestrator.execution.executor import WorkerSpec
        from orchestrator.execution.open import open_executor
        from support.squarer import Job, Squarer
        logs.use(logs.LogFormat.json)
        with open_executor(ClusterConfig(address="local", workers=1)) as executor:
            spec = WorkerSpec(Squarer, {"memory": tempfile.mkdtemp()})
            results = list(executor.map(spec, [Job("a", "crash")]))
        print(results[0].error_type)
    """
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{TESTS}"},
    )
    assert ended.stdout == "WorkerDied\n"
    messages = [json.loads(line)["message"] for line in ended.stderr.splitlines()]
    assert any(message.startswith("(raylet) ") for message in messages), messages


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


def test_a_worker_of_several_gpus_has_them_on_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = RayExecutor()
    resources = {"CPU": 8.0, "memory": 2.0**34}
    nodes = [{"Alive": True, "Resources": resources | {"GPU": gpus}} for gpus in (2.0, 4.0)]
    monkeypatch.setattr(executor, "_nodes", lambda: nodes)
    monkeypatch.setattr(executor, "has_cuda", lambda: True)
    need = executor._need(WorkerSpec(Squarer, {}, device="cuda", gpus=4))
    assert need["GPU"] == 4
    assert executor._pool_size(need, items=9) == 1
    with pytest.raises(LestdError, match=r"needs 5 GPUs, but no node .* has more than 4"):
        executor._need(WorkerSpec(Squarer, {}, device="cuda", gpus=5))
