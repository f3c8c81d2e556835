"""Retries: the fate of an item whose worker is lost, and its messages. Knows nothing of Ray.

Only what the infrastructure does is retried, after 1, 2, 4, ... seconds, on another worker. Who
is to blame decides how often:

    node lost       nobody's fault: up to the limit of attempts
    worker died     the item's, if it had the worker to itself: the second time it is marked failed
    worker failed   the same; the worker was ended because its GPU or its files gave errors
    timed out       the same; the worker was ended because it did not answer
    device memory   retried once, by itself on its GPU (see `Executor.map`)
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from lestd_kernels.errors import first_line
from workers.contracts import Failure

MAX_KILLS = 2
"""Workers that an item may end while it has them to itself."""

_LONGEST_BACKOFF_SECONDS = 30.0
_FIRST_TIMEOUT_SECONDS = 6 * 3600.0
_LEAST_TIMEOUT_SECONDS = 600.0
_TIMEOUT_FACTOR = 10.0

Cause = Literal["WorkerDied", "WorkerFailed", "NodeLost", "TimedOut"]
_HINTS: dict[Cause, str] = {
    "WorkerDied": "memory is the usual cause: use fewer workers or larger machines",
    "WorkerFailed": "check the machines' GPUs, disks and network",
    "NodeLost": "find out why the cluster loses nodes",
    "TimedOut": "if it is only slow, set a longer task_timeout in the cluster file",
}


@dataclass(frozen=True)
class Attempt:
    """An item on its way.

    Attributes:
        item: what a worker is given.
        number: 1 for the first attempt.
        due: when it may begin, by `time.monotonic`.
        alone: what it must have to itself.
        kills: nodes of the workers that it ended while it had them to itself.
        worker: who has it, or had it last, as host:pid.
    """

    item: Any
    number: int = 1
    due: float = 0.0
    alone: Literal["", "worker", "device"] = ""
    kills: tuple[str, ...] = ()
    worker: str = ""

    @property
    def name(self) -> str:
        """Name in messages."""
        return str(getattr(self.item, "block", self.item.task_id))


@dataclass(frozen=True)
class Again:
    """The next attempt of an item, and why the one before it was not the last."""

    attempt: Attempt
    error_type: str
    message: str
    evidence: str


@dataclass(frozen=True)
class Loss:
    """How a worker was lost that had an item.

    Attributes:
        cause: who is to blame.
        message: what happened, as a clause.
        node: Ray's id of the worker's node.
        alone: whether the item was the only one that the worker had.
        error: what Ray said.
        evidence: memory and last log lines of the worker.
    """

    cause: Cause
    message: str
    node: str
    alone: bool
    error: BaseException
    evidence: str = ""


def after_loss(
    attempt: Attempt, loss: Loss, max_attempts: int, lost_nodes: Container[str]
) -> Again | Failure:
    """The next attempt of an item whose worker was lost, or why there is none.

    A worker whose node turns out to be lost was not the item's doing: a node that is shut down
    ends its workers first.
    """
    kills = attempt.kills
    if loss.alone and loss.cause != "NodeLost":
        kills += (loss.node,)
    guilty = sum(node not in lost_nodes for node in kills)
    if guilty < MAX_KILLS and attempt.number < max_attempts:
        following = replace(
            attempt,
            number=attempt.number + 1,
            due=time.monotonic() + backoff_seconds(attempt.number),
            alone=attempt.alone if loss.cause == "NodeLost" else attempt.alone or "worker",
            kills=kills,
        )
        return Again(following, loss.cause, loss.message, loss.evidence)
    if guilty >= MAX_KILLS:
        found = f"is marked failed: it killed {guilty} workers that had no other task"
    else:
        found = f"lost its worker in each of {attempt.number} attempts"
    return Failure(
        task_id=attempt.item.task_id,
        kind="infrastructure",
        error_type=loss.cause,
        message=f"{attempt.name} {found} (last: {loss.message}); {_HINTS[loss.cause]}, then run "
        "the same command again",
        traceback=described(loss.error),
        attempt=attempt.number,
        evidence=loss.evidence,
        worker=attempt.worker,
    )


def after_result(attempt: Attempt, result: Any) -> Any:
    """What a worker returned, with the number of the attempt where it has a place for it; or the
    next attempt, where a device had too little memory.

    The device is then to have nothing else. What is computed stays the same, to the last bit:
    only who computes beside it changes.
    """
    if isinstance(result, Failure):
        if result.kind == "device_memory" and attempt.alone != "device":
            following = replace(attempt, number=attempt.number + 1, alone="device")
            return Again(following, result.error_type, result.message, result.traceback)
        result = replace(result, worker=attempt.worker)
    return replace(result, attempt=attempt.number) if hasattr(result, "attempt") else result


def backoff_seconds(attempts: int) -> float:
    """Seconds to wait after so many attempts."""
    return float(min(2.0 ** (attempts - 1), _LONGEST_BACKOFF_SECONDS))


def after_error(
    attempt: Attempt, error: BaseException, kind: Literal["application", "infrastructure"]
) -> Failure:
    """The failure of an item whose worker raised, or could not be made."""
    return Failure(
        task_id=attempt.item.task_id,
        kind=kind,
        error_type=type(error).__name__,
        message=first_line(error),
        traceback=described(error),
        attempt=attempt.number,
        worker=attempt.worker,
    )


def described(error: BaseException) -> str:
    """An exception with its traceback."""
    return "".join(traceback.format_exception(error))


SlotT = TypeVar("SlotT")


class Queue:
    """The items that no worker has: first those that are tried again and due, then the others.

    An item with `after` waits for the items of those ids, which stand before it, and those behind
    it wait with it.
    """

    def __init__(self, items: Iterable[Any]) -> None:
        self._fresh = deque(Attempt(item) for item in items)
        self._again: list[Attempt] = []
        self._unfinished = {attempt.item.task_id for attempt in self._fresh}

    def __len__(self) -> int:
        return len(self._fresh) + len(self._again)

    def add(self, attempt: Attempt) -> None:
        """Have an item tried again, once it is due."""
        self._again.append(attempt)
        self._again.sort(key=lambda attempt: attempt.due)

    def ended(self, task_id: str) -> None:
        """An item will not be tried again."""
        self._unfinished.discard(task_id)

    def pop(self) -> Attempt:
        """Take any item out, due or not."""
        return self._fresh.popleft() if self._fresh else self._again.pop(0)

    def hand_out(self, free: Callable[[Attempt], SlotT | None]) -> Iterator[tuple[Attempt, SlotT]]:
        """Take out the items for which `free` finds a place, with the places."""
        now = time.monotonic()
        for attempt in [attempt for attempt in self._again if attempt.due <= now]:
            if (slot := free(attempt)) is not None:
                self._again.remove(attempt)
                yield attempt, slot
        while self._fresh and self._may_begin(self._fresh[0].item):
            if (slot := free(self._fresh[0])) is None:
                return
            yield self._fresh.popleft(), slot

    def _may_begin(self, item: Any) -> bool:
        return self._unfinished.isdisjoint(getattr(item, "after", ()))

    def seconds_until_due(self) -> float:
        """Until an item that is not due now will be; infinite if there is none."""
        now = time.monotonic()
        return min((a.due - now for a in self._again if a.due > now), default=float("inf"))


class Deadlines:
    """How long an attempt may take: what is set, or what finished items make plausible.

    Args:
        limit: seconds; None: ten times as long, per byte, as the slowest that has finished, but at
            least ten minutes; six hours until one has.
    """

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self._slowest = 0.0

    def finished(self, item: Any, seconds: float) -> None:
        """An item has taken so long, in the company that it had."""
        self._slowest = max(self._slowest, seconds / _amount(item))

    def seconds(self, item: Any) -> float:
        """How long an item may take."""
        if self._limit is not None:
            return self._limit
        if not self._slowest:
            return _FIRST_TIMEOUT_SECONDS
        return max(_LEAST_TIMEOUT_SECONDS, _TIMEOUT_FACTOR * self._slowest * _amount(item))


def _amount(item: Any) -> float:
    return float(max(1, getattr(item, "dense_bytes", 1)))


@dataclass(frozen=True)
class Retry:
    """An attempt that did not end with a result, and was followed by another."""

    task_id: str
    attempt: int
    cause: str
    message: str


_INTERRUPTED = "an earlier call ended before it was finished, or its result was damaged since"


def retries(events: Iterable[dict[str, Any]]) -> list[Retry]:
    """Every retry that a manifest's events tell of, in order; `events` come oldest first.

    Attempts are numbered within one call of the command: a call that continues begins with 1.
    """
    found: list[Retry] = []
    unfinished: dict[str, Retry] = {}
    for event in events:
        task_id, attempt = event["task_id"], event["attempt"]
        told = Retry(task_id, attempt, event["error_type"] or "", event["message"] or "")
        if event["kind"] == "started":
            if task_id in unfinished:
                found.append(unfinished[task_id])
            unfinished[task_id] = Retry(task_id, attempt, "Interrupted", _INTERRUPTED)
        elif event["kind"] == "retried":
            unfinished.pop(task_id, None)
            found.append(told)
        elif event["kind"] == "failed":
            unfinished[task_id] = told
    return found
