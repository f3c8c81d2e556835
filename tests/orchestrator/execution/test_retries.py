"""What follows a lost worker: who is tried again, when, how often, and what is told of it."""

import errno
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lestd_kernels.errors import LestdError
from orchestrator.execution.ray.deaths import Place
from orchestrator.execution.ray.pool import Actor, Pool
from orchestrator.execution.retries import (
    Again,
    Attempt,
    Deadlines,
    Loss,
    Queue,
    after_loss,
    after_result,
    backoff_seconds,
    retries,
)
from workers.contracts import Failure
from workers.host.failures import failure_of
from workers.host.watcher import Remains
from workers.storage.retries import TransientError


@dataclass(frozen=True)
class Item:
    task_id: str
    dense_bytes: int = 1


def loss(cause: Any = "WorkerDied", node: str = "n", alone: bool = False) -> Loss:
    return Loss(cause, "it was so", node, alone, RuntimeError("gone"), "the log")


def through(*losses: Loss, max_attempts: int = 9, lost_nodes: tuple[str, ...] = ()) -> Any:
    """What follows one loss after the other."""
    following: Any = Again(Attempt(Item("a")), "", "", "")
    for one in losses:
        assert isinstance(following, Again)
        following = after_loss(following.attempt, one, max_attempts, lost_nodes)
    return following


def test_whoever_was_there_when_a_worker_died_is_tried_again_by_itself() -> None:
    following = through(loss())
    assert following.attempt.alone == "worker"
    assert following.attempt.number == 2
    assert (following.error_type, following.evidence) == ("WorkerDied", "the log")


@pytest.mark.parametrize("cause", ["WorkerDied", "WorkerFailed", "TimedOut"])
def test_who_ends_two_workers_of_its_own_is_marked_failed(cause: Any) -> None:
    assert isinstance(through(loss(), loss(cause, alone=True)), Again)
    failure = through(loss(), loss(cause, alone=True), loss(cause, alone=True))
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.error_type, failure.attempt) == ("infrastructure", cause, 3)
    assert "killed 2 workers" in failure.message
    assert "it was so" in failure.message
    assert failure.evidence == "the log"
    assert "gone" in failure.traceback


def test_a_lost_node_is_nobodys_fault_but_an_attempt() -> None:
    lost = loss("NodeLost", alone=True)
    following = through(*[lost] * 3, max_attempts=4)
    assert (following.attempt.number, following.attempt.alone) == (4, "")
    failure = through(*[lost] * 4, max_attempts=4)
    assert "lost its worker in each of 4 attempts" in failure.message


def test_a_worker_that_died_with_its_node_was_not_the_items_doing() -> None:
    kills = [loss(node="m", alone=True), loss(node="n", alone=True)]
    assert isinstance(through(*kills), Failure)
    assert isinstance(through(*kills, lost_nodes=("m",)), Again)


def test_attempts_wait_longer_and_longer() -> None:
    assert [backoff_seconds(n) for n in range(1, 8)] == [1, 2, 4, 8, 16, 30, 30]


def test_what_lacks_gpu_memory_is_tried_once_more_with_the_device_to_itself() -> None:
    attempt = Attempt(Item("a"))
    failure = Failure("a", "device_memory", "OutOfMemoryError", "too little")
    following = after_result(attempt, failure)
    assert following.attempt == replace(attempt, number=2, alone="device")
    assert after_result(following.attempt, failure) == replace(failure, attempt=2)
    # A worker that dies meanwhile does not give its right away.
    assert after_loss(following.attempt, loss(), 9, ()).attempt.alone == "device"


def test_those_that_wait_for_their_time_keep_nobody_else_waiting() -> None:
    queue = Queue([Item("a"), Item("b")])
    queue.add(Attempt(Item("later"), due=float("inf")))
    queue.add(Attempt(Item("now")))
    given = [attempt.item.task_id for attempt, _ in queue.hand_out(lambda attempt: "place")]
    assert given == ["now", "a", "b"]
    assert len(queue) == 1
    queue.add(Attempt(Item("blocked"), alone="device"))
    queue.add(Attempt(Item("free")))
    places = queue.hand_out(lambda attempt: None if attempt.alone else "place")
    assert [attempt.item.task_id for attempt, _ in places] == ["free"]
    assert len(queue) == 2


def test_an_item_waits_for_those_that_it_comes_after() -> None:
    @dataclass(frozen=True)
    class Step:
        task_id: str
        after: tuple[str, ...]

    queue = Queue([Step("a", ("before",)), Step("b", ("a",)), Step("c", ())])

    def given() -> list[str]:
        return [attempt.item.task_id for attempt, _ in queue.hand_out(lambda attempt: "place")]

    assert given() == ["a"]
    queue.add(Attempt(Step("a", ()), number=2))
    assert given() == ["a"]
    assert given() == []
    queue.ended("a")
    assert given() == ["b", "c"]


def test_an_item_that_is_to_be_alone_is_not_kept_waiting_by_others() -> None:
    """One actor is given nothing new until it is idle; the other goes on."""
    pool = Pool(None, lambda: None, lambda worker: None, lambda node: None, 3, Deadlines(None))  # type: ignore[arg-type, return-value]
    first, second = (Actor(None, Place(i, "n", (), ()), room=3, load=2) for i in range(2))
    pool._actors = [first, second]
    alone, other = Attempt(Item("a"), number=2, alone="worker"), Attempt(Item("b"))
    assert pool.free(alone, waiting=9) is None
    assert pool.free(other, waiting=9) is second
    second.load = 3
    assert pool.free(other, waiting=9) is None
    first.load, first.room = 1, 3  # It has ended one.
    assert pool.free(alone, waiting=9) is None
    assert pool.free(other, waiting=9) is None
    first.load, first.room = 0, 3
    assert pool.free(alone, waiting=9) is first


def test_an_item_that_is_to_have_its_device_waits_for_all_actors_there() -> None:
    pool = Pool(None, lambda: None, lambda worker: None, lambda node: None, 3, Deadlines(None))  # type: ignore[arg-type, return-value]
    gpus = [0, 0, 1]
    here, beside, elsewhere = (
        Actor(None, Place(i, "n", (gpu,), ()), room=3, load=1) for i, gpu in enumerate(gpus)
    )
    pool._actors = [here, beside, elsewhere]
    elsewhere.load = 3
    attempt = Attempt(Item("a"), number=2, alone="device")
    assert pool.free(attempt, waiting=9) is None
    assert pool.free(Attempt(Item("b")), waiting=9) is None
    assert pool.free(Attempt(Item("c"), alone="device"), waiting=9) is None
    here.load = 0
    assert pool.free(attempt, waiting=9) is None
    assert pool.free(Attempt(Item("b")), waiting=9) is None
    elsewhere.load = 2
    assert pool.free(Attempt(Item("b")), waiting=9) is elsewhere


class FakeRay:
    """What a pool asks of Ray, with handles that are their own references."""

    class exceptions:  # noqa: N801
        RayError = OSError
        RayTaskError = KeyError

    def __init__(self, lost: tuple[str, ...] = (), answered: tuple[str, ...] = ()) -> None:
        self.lost, self.answered = lost, answered
        self.killed: list[Any] = []

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": node, "Alive": False} for node in self.lost]

    def kill(self, handle: Any) -> None:
        self.killed.append(handle)

    def get(self, reference: Any, timeout: float | None = None) -> Any:
        if reference == "dead":
            raise OSError("The actor is dead")
        return Remains()

    def wait(self, references: Any, num_returns: int, timeout: float) -> Any:
        return [one for one in references if one in self.answered], []


def handle(reference: str) -> Any:
    """An actor that answers, or does not."""
    remote = SimpleNamespace(remote=lambda *arguments: reference)
    return SimpleNamespace(__ray_ready__=remote, reference=reference)


def pool_of(fake: FakeRay, *actors: Actor, limit: float | None = None) -> Pool:
    pool = Pool(fake, lambda: None, lambda worker: None, lambda node: None, 3, Deadlines(limit))  # type: ignore[arg-type, return-value]
    pool._actors = list(actors)
    return pool


def test_idle_actors_go_with_their_node() -> None:
    """An item must not find out for each of them that its node is gone."""
    there = Actor(handle("alive"), Place(1, "n", (), ()), room=3)
    gone, busy = (Actor(handle("dead"), Place(i, "m", (), ()), room=3, load=i) for i in range(2))
    fake = FakeRay(lost=("m",))
    pool = pool_of(fake, there, gone, busy)
    pool.resize(3, waiting=0)
    assert fake.killed == [gone.handle]
    assert pool.ready == 2
    assert pool.free(Attempt(Item("a")), waiting=9) is there


def test_who_died_while_it_had_nothing_is_given_nothing() -> None:
    dead = Actor(handle("dead"), Place(1, "n", (), ()), room=3, since=float("-inf"))
    alive = Actor(handle("alive"), Place(2, "n", (), ()), room=3, since=float("-inf"))
    fake = FakeRay()
    pool = pool_of(fake, dead, alive)
    assert pool.free(Attempt(Item("a")), waiting=9) is alive
    assert (fake.killed, pool.ready) == ([dead.handle], 1)


def test_who_has_no_work_goes_when_less_is_needed() -> None:
    """But for those whose device is reserved: their memory was just given back for an item."""
    busy, idle, kept = (
        Actor(handle("alive"), Place(gpu, "n", (gpu,), ()), room=3, load=gpu == 0)
        for gpu in range(3)
    )
    elsewhere = Actor(handle("alive"), Place(3, "m", (), ()), room=3)
    fake = FakeRay()
    pool = pool_of(fake, elsewhere, busy, idle, kept)
    pool._watchers = {"n": "its watcher", "m": "another"}
    attempt = Attempt(Item("a"), alone="device")
    pool._reserved = (kept.device, attempt)
    pool.resize(1, waiting=1)
    assert fake.killed == [elsewhere.handle, idle.handle, "another"]
    pool.release(Attempt(Item("another"), alone="device"))
    pool.resize(1, waiting=1)
    assert pool.ready == 2
    pool.release(attempt)
    pool.resize(1, waiting=1)
    assert fake.killed[3:] == [kept.handle]


def test_an_item_has_its_time_from_when_the_one_before_it_was_done() -> None:
    now = time.monotonic()
    actors = [Actor(handle("alive"), Place(i, "n", (), ()), room=3, load=1) for i in range(3)]
    for actor in actors[1:]:
        actor.since = now - 100
    fake = FakeRay(answered=("second",))
    pool = pool_of(fake, *actors, limit=50)
    pool._running = {
        name: (actor, Attempt(Item(name)), now - 100)
        for name, actor in zip(("first", "second", "third"), actors, strict=True)
    }
    pool._end_overdue()
    # The first had to wait for its worker, the second's answer is there.
    assert pool._actors == actors[:2]
    assert list(actors[2].overdue) == ["third"]


def errors() -> list[tuple[Exception, str]]:
    return [
        (torch.AcceleratorError("CUDA error: an illegal memory access"), "infrastructure"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), "infrastructure"),
        (RuntimeError("CUDA error: out of memory"), "device_memory"),
        (OSError(errno.ESTALE, "Stale file handle"), "infrastructure"),
        (OSError(errno.EIO, "Input/output error"), "infrastructure"),
        (OSError(errno.EACCES, "Permission denied"), "application"),
        (TransientError("the server is busy"), "infrastructure"),
        (LestdError("no such tensor"), "application"),
        (RuntimeError("a bug"), "application"),
    ]


@pytest.mark.parametrize(("error", "kind"), errors(), ids=lambda one: str(one)[:30])
def test_what_the_machine_did_is_no_fault_of_the_work(error: Exception, kind: str) -> None:
    failure = failure_of("a", "block", error)
    assert failure.kind == kind
    assert str(error) in failure.message or "too little memory" in failure.message


def test_deadlines_follow_what_finished_items_took_per_byte() -> None:
    deadlines = Deadlines(None)
    assert deadlines.seconds(Item("a", 100)) == 6 * 3600
    deadlines.finished(Item("b", 10), 1.0)
    assert deadlines.seconds(Item("a", 100)) == 600
    deadlines.finished(Item("c", 10), 20.0)
    deadlines.finished(Item("d", 10), 2.0)
    assert deadlines.seconds(Item("a", 100)) == pytest.approx(10 * 2 * 100)
    assert Deadlines(5).seconds(Item("a", 100)) == 5


def event(kind: str, task_id: str, attempt: int = 1, error_type: str = "") -> dict[str, Any]:
    about = {"message": "because" if error_type else "", "error_type": error_type}
    return {"kind": kind, "task_id": task_id, "attempt": attempt} | about


def test_every_attempt_that_another_followed_is_told() -> None:
    events = [
        *(event("started", task) for task in "abcd"),
        event("retried", "a", 1, "NodeLost"),
        event("started", "a", 2),
        event("failed", "b", 1, "ValueError"),
        # The command is run again: c was interrupted, b had failed, a and d are done.
        event("started", "c"),
        event("started", "b"),
    ]
    told = [(retry.task_id, retry.attempt, retry.cause) for retry in retries(events)]
    assert told == [("a", 1, "NodeLost"), ("c", 1, "Interrupted"), ("b", 1, "ValueError")]
    assert all(retry.message for retry in retries(events))
