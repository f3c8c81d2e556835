"""Actors, what they are at, and what became of it. Is handed the module `ray`: no import here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from orchestrator.execution.ray.deaths import Place, WorkerUnfitError, evidence_of, how_it_ended
from orchestrator.execution.retries import Attempt, Cause, Deadlines, Loss
from workers.contracts import Failure
from workers.host.devices import release_device_memory
from workers.host.watcher import Remains

_ANSWER_SECONDS = 10.0
# Who has just answered is not asked whether it is alive.
_IDLE_SECONDS = 1.0


@dataclass(frozen=True)
class Started:
    """An actor is ready for work."""


@dataclass(frozen=True)
class NotStarted:
    """An actor ended before it was ready; broken: its ``__init__`` raised."""

    error: BaseException
    broken: bool
    node_lost: bool


@dataclass(frozen=True)
class Ran:
    """An actor ended its work on an item; `error` is what its ``run`` raised."""

    attempt: Attempt
    result: Any = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Died:
    """An actor was lost that had an item."""

    attempt: Attempt
    loss: Loss


@dataclass(eq=False)
class Actor:
    """A running actor: the items that it has, and how many it may have.

    Attributes:
        since: when it started, or ended its work on the last item, by `time.monotonic`.
        overdue: items that it has had for too long, and for how many seconds they might be had.
    """

    handle: Any
    place: Place
    room: int
    load: int = 0
    since: float = field(default_factory=time.monotonic)
    overdue: dict[str, float] = field(default_factory=dict)

    @property
    def device(self) -> Any:
        """Resources that it shares with other actors: its GPUs, if any."""
        return (self.place.node, self.place.gpus) if self.place.gpus else self.place


@dataclass(frozen=True)
class _End:
    """Facts of a lost actor, the same for all of its items."""

    cause: Cause
    message: str
    alone: bool
    evidence: str


class Pool:
    """Actors and what they are at. An actor gets an item only once it runs: Ray accepts more
    actors than its nodes have room for, and those it never starts must not hold work.

    Args:
        ray: the module, connected.
        make: makes an actor.
        locate: what an actor runs to find its `Place`.
        make_watcher: makes a `workers.host.watcher.Watcher` on a node.
        in_flight: items that an actor has at a time.
        deadlines: how long items may take.
    """

    def __init__(
        self,
        ray: Any,
        make: Callable[[], Any],
        locate: Callable[[Any], Place],
        make_watcher: Callable[[str], Any],
        in_flight: int,
        deadlines: Deadlines,
    ) -> None:
        self._ray = ray
        self._make = make
        self._locate = locate
        self._make_watcher = make_watcher
        self._in_flight = in_flight
        self._deadlines = deadlines
        self._starting: dict[Any, Any] = {}
        self._actors: list[Actor] = []
        self._ends: dict[Actor, _End] = {}
        self._watchers: dict[str, Any] = {}
        self._reserved: tuple[Any, Attempt] | None = None
        self._running: dict[Any, tuple[Actor, Attempt, float]] = {}

    @property
    def starting(self) -> int:
        """Number of actors that are not ready yet."""
        return len(self._starting)

    @property
    def ready(self) -> int:
        """Number of actors that are."""
        return len(self._actors)

    @property
    def running(self) -> int:
        """Number of items that actors have."""
        return len(self._running)

    def lost_nodes(self) -> set[str]:
        """Ray's ids of the nodes that were there and are not."""
        return {node["NodeID"] for node in self._ray.nodes() if not node["Alive"]}

    def resize(self, target: int, waiting: int) -> None:
        """Have `target` actors, but start none for which no item waits.

        Those that have no work are ended where they are too many: an autoscaler takes a node away
        once nothing is on it. So are those of lost nodes, which the next item would only wait for.
        """
        lost = self.lost_nodes()
        for actor in [actor for actor in self._actors if not actor.load]:
            if actor.place.node in lost:
                self._discard(actor)
        # Whatever they wait for is not needed any more.
        while self.starting > max(0, min(waiting, target - self.ready)):
            self._ray.kill(self._starting.popitem()[1])
        reserved = self._reserved and self._reserved[0]
        for actor in [a for a in self._actors if not a.load and a.device != reserved]:
            if self.ready > target:
                self._discard(actor)
        while self.ready + self.starting < target and self.starting < waiting:
            handle = self._make()
            self._starting[handle.__ray_call__.remote(self._locate)] = handle
        if not self.starting:  # A watcher, too, keeps an autoscaler from taking its node away.
            for node in self._watchers.keys() - {actor.place.node for actor in self._actors}:
                self._ray.kill(self._watchers.pop(node))

    def free(self, attempt: Attempt, waiting: int) -> Actor | None:
        """The actor that is to have the next item, one that has the fewest; None: not yet.

        An item whose worker died has the next one for itself: if it dies again, no other item
        pays for it. What an actor has in advance is not taken from those that are starting.
        """
        while (actor := self._best(attempt, waiting)) is not None:
            # It may have died since it last did something; that is not to be the item's fault.
            if actor.load or time.monotonic() - actor.since < _IDLE_SECONDS or self._answers(actor):
                return actor
            self._discard(actor)
        return None

    def _answers(self, actor: Actor) -> bool:
        try:
            self._ray.get(actor.handle.__ray_ready__.remote(), timeout=_ANSWER_SECONDS)
        except self._ray.exceptions.RayError:
            return False
        return True

    def _discard(self, actor: Actor) -> None:
        """End an actor that has no work."""
        self._actors.remove(actor)
        self._ray.kill(actor.handle)

    def _best(self, attempt: Attempt, waiting: int) -> Actor | None:
        if attempt.alone == "device":
            return self._free_device(attempt)
        reserved = self._reserved and self._reserved[0]
        usable = [actor for actor in self._actors if actor.device != reserved]
        if attempt.alone:
            actor = min(usable, key=lambda a: (a.load > 0, a.room > 0, a.load), default=None)
            if actor is not None and actor.load:
                actor.room = 0  # It gets nothing new until it has nothing.
                return None
            return actor
        free = [actor for actor in usable if actor.load < actor.room]
        actor = min(free, key=lambda actor: actor.load, default=None)
        return None if actor and actor.load and waiting <= self.starting else actor

    def _free_device(self, attempt: Attempt) -> Actor | None:
        """An actor on a device where no other has work, nor keeps memory for later.

        One device is reserved at a time, and its actors get nothing new meanwhile.
        """
        if self._reserved is not None and self._reserved[1].item is not attempt.item:
            return None
        loads: dict[Any, int] = {}
        for actor in self._actors:
            loads[actor.device] = loads.get(actor.device, 0) + actor.load
        if not loads:
            return None
        if self._reserved is None or self._reserved[0] not in loads:
            self._reserved = (min(loads, key=lambda device: loads[device]), attempt)
        device = self._reserved[0]
        if loads[device]:
            return None
        sharing = [actor for actor in self._actors if actor.device == device]
        emptied = [a.handle.__ray_call__.remote(release_device_memory) for a in sharing]
        self._ray.wait(emptied, num_returns=len(emptied), timeout=_ANSWER_SECONDS)
        return sharing[0]

    def release(self, attempt: Attempt) -> None:
        """An item needs the device no more that is reserved for it, if one is."""
        if self._reserved is not None and self._reserved[1].item is attempt.item:
            self._reserved = None

    def submit(self, actor: Actor, attempt: Attempt) -> None:
        """Give an item to an actor."""
        actor.load += 1
        actor.room = 1 if attempt.alone else self._in_flight
        reference = actor.handle.run.remote(attempt.item)
        self._running[reference] = (actor, attempt, time.monotonic())

    def wait(self, seconds: float) -> Iterator[Started | NotStarted | Ran | Died]:
        """Wait for events; returns after so many seconds even if there are none."""
        self._end_overdue()
        references = [*self._starting, *self._running]
        if not references:
            time.sleep(seconds)
            return
        # Without a timeout a Ctrl-C would wait as well.
        done, _ = self._ray.wait(references, timeout=seconds)
        others = [one for one in references if one not in done]
        if done and others:  # What else is there by now.
            done += self._ray.wait(others, num_returns=len(others), timeout=0)[0]
        for reference in done:
            if reference in self._starting:
                yield self._settle_start(reference)
            else:
                yield self._settle_run(reference)

    def _end_overdue(self) -> None:
        now = time.monotonic()
        late = []
        for actor, attempt, began in self._running.values():
            limit = self._deadlines.seconds(attempt.item)
            if now - max(began, actor.since) > limit and actor in self._actors:
                late.append((actor, attempt.item.task_id, limit))
        if not late:
            return
        # The driver may have been away for long: what is there by now is not late.
        done, _ = self._ray.wait([*self._running], num_returns=self.running, timeout=0)
        answered = {self._running[reference][0] for reference in done}
        for actor, task_id, limit in late:
            if actor not in answered:
                actor.overdue[task_id] = limit
        for actor in [actor for actor in self._actors if actor.overdue]:
            self._drop(actor, None)

    def _settle_start(self, reference: Any) -> Started | NotStarted:
        handle = self._starting.pop(reference)
        try:
            place = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._ray.kill(handle)
            broken = bool(getattr(error, "actor_init_failed", False))
            # It was nowhere yet, so only Ray's words tell.
            return NotStarted(error, broken, node_lost="node has died" in str(error))
        self._actors.append(Actor(handle, place, room=self._in_flight))
        if place.node not in self._watchers:
            self._watchers[place.node] = self._make_watcher(place.node)
        self._watchers[place.node].watch.remote(place.process)
        return Started()

    def _settle_run(self, reference: Any) -> Ran | Died:
        actor, attempt, began = self._running.pop(reference)
        self.release(attempt)
        try:
            result = self._ray.get(reference)
            if isinstance(result, Failure) and result.kind == "infrastructure":
                raise WorkerUnfitError(result)
        except self._ray.exceptions.RayTaskError as error:
            outcome: Ran | Died = Ran(attempt, error=error)
        except (self._ray.exceptions.RayError, WorkerUnfitError) as error:
            if actor in self._actors:
                self._drop(actor, error)
            outcome = Died(attempt, self._loss(actor, attempt, error))
        else:
            took = time.monotonic() - max(began, actor.since)
            self._deadlines.finished(attempt.item, took)
            outcome = Ran(attempt, result)
        actor.load -= 1
        actor.since = time.monotonic()
        actor.room = self._in_flight
        if not actor.load:
            self._ends.pop(actor, None)
        return outcome

    def _drop(self, actor: Actor, error: BaseException | None) -> None:
        """End an actor, and keep what is known of its end."""
        self._actors.remove(actor)
        self._ray.kill(actor.handle)
        lost = actor.place.node in self.lost_nodes()
        remains = Remains() if lost else self._remains(actor.place)
        if actor.overdue:
            cause: Cause = "TimedOut"
            message = f"its worker took longer than {max(actor.overdue.values()):.0f} s"
        elif isinstance(error, WorkerUnfitError):
            cause, message = "WorkerFailed", error.message
        elif lost:
            cause, message = "NodeLost", f"the node {actor.place.node[:8]} was lost"
        else:
            cause, message = "WorkerDied", how_it_ended(error, remains)
        evidence = evidence_of(actor.place, remains, error)
        self._ends[actor] = _End(cause, message, actor.load == 1, evidence)

    def _loss(self, actor: Actor, attempt: Attempt, error: BaseException) -> Loss:
        end = self._ends[actor]
        cause, message = end.cause, end.message
        if cause == "TimedOut" and attempt.item.task_id not in actor.overdue:
            cause, message = "WorkerDied", "its worker was ended because another of its items hung"
        if cause == "WorkerFailed" and not isinstance(error, WorkerUnfitError):
            cause, message = "WorkerDied", "its worker was ended because it had failed another item"
        return Loss(cause, message, actor.place.node, end.alone, error, end.evidence)

    def _remains(self, place: Place) -> Remains:
        watcher = self._watchers.get(place.node)
        if watcher is None:
            return Remains()
        try:
            found: Remains = self._ray.get(
                watcher.remains.remote(place.process, list(place.logs)), timeout=_ANSWER_SECONDS
            )
        except self._ray.exceptions.RayError:  # It went the same way; the next actor gets another.
            self._ray.kill(self._watchers.pop(place.node))
            return Remains()
        return found

    def close(self) -> None:
        """End all actors."""
        handles = [actor.handle for actor in self._actors]
        for handle in [*handles, *self._starting.values(), *self._watchers.values()]:
            self._ray.kill(handle)
