"""What follows a lost worker: who is tried again, when, how often, and what is told of it."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from orchestrator.ray_pool import Actor, Place, Pool
from orchestrator.retries import (
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


@pytest.mark.parametrize("cause", ["WorkerDied", "TimedOut"])
def test_who_ends_two_workers_of_its_own_is_set_aside(cause: Any) -> None:
    assert isinstance(through(loss(), loss(cause, alone=True)), Again)
    failure = through(loss(), loss(cause, alone=True), loss(cause, alone=True))
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.error_type, failure.attempt) == ("infrastructure", cause, 3)
    assert "ended 2 workers" in failure.message
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
