"""Actors, what they are at, and what became of it. Is handed the module `ray`: no import here."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lestd_kernels.errors import first_line
from orchestrator.retries import Attempt, Cause, Deadlines, Loss
from orchestrator.tables import size
from workers.devices import release_device_memory
from workers.watcher import Remains

_ANSWER_SECONDS = 10.0


@dataclass(frozen=True)
class Place:
    """Where an actor runs: the process, Ray's id of the node, its GPUs there, and its log files."""

    process: int
    node: str
    gpus: tuple[Any, ...]
    logs: tuple[str, ...]


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
    """A running actor: the items that it has, and how many it may have."""

    handle: Any
    place: Place
    room: int
    load: int = 0
    overdue: dict[str, float] = field(default_factory=dict)

    @property
    def device(self) -> Any:
        """What it shares with other actors: its GPUs; without one nothing."""
        return (self.place.node, self.place.gpus) if self.place.gpus else self.place


@dataclass(frozen=True)
class _End:
    """What is known of a lost actor, the same for all of its items."""

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
        make_watcher: makes a `workers.watcher.Watcher` on a node.
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
        """Have `target` actors, but start none for which no item waits."""
        while self.ready + self.starting < target and self.starting < waiting:
            actor = self._make()
            self._starting[actor.__ray_call__.remote(self._locate)] = actor
        while self.starting > waiting:  # Whatever they wait for is not needed any more.
            self._ray.kill(self._starting.popitem()[1])

    def free(self, attempt: Attempt, waiting: int) -> Actor | None:
        """The actor that is to have the next item, one that has the fewest; None: not yet.

        An item whose worker died has the next one for itself: if it dies again, no other item
        pays for it. What an actor has in advance is not taken from those that are starting.
        """
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
        if self._reserved is not None and self._reserved[1] is not attempt:
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

    def submit(self, actor: Actor, attempt: Attempt) -> None:
        """Give an item to an actor."""
        actor.load += 1
        actor.room = 1 if attempt.alone else self._in_flight
        reference = actor.handle.run.remote(attempt.item)
        self._running[reference] = (actor, attempt, time.monotonic())

    def wait(self, seconds: float) -> Iterator[Started | NotStarted | Ran | Died]:
        """What has happened since; returns after so many seconds even if nothing has."""
        self._end_overdue()
        references = [*self._starting, *self._running]
        if not references:
            time.sleep(seconds)
            return
        # Without a timeout a Ctrl-C would wait as well.
        done, _ = self._ray.wait(references, timeout=seconds)
        for reference in done:
            if reference in self._starting:
                yield self._settle_start(reference)
            else:
                yield self._settle_run(reference)

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for actor, attempt, began in self._running.values():
            limit = self._deadlines.seconds(attempt.item)
            if now - began > limit and actor in self._actors:
                actor.overdue[attempt.item.task_id] = limit
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
        if self._reserved is not None and self._reserved[1] is attempt:
            self._reserved = None
        try:
            result = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            outcome: Ran | Died = Ran(attempt, error=error)
        except self._ray.exceptions.RayError as error:
            if actor in self._actors:
                self._drop(actor, error)
            outcome = Died(attempt, self._loss(actor, attempt, error))
        else:
            self._deadlines.finished(attempt.item, time.monotonic() - began)
            outcome = Ran(attempt, result)
        actor.load -= 1
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
        elif lost:
            cause, message = "NodeLost", f"the node {actor.place.node[:8]} was lost"
        else:
            cause, message = "WorkerDied", _how_it_ended(error, remains)
        evidence = _evidence(actor.place, remains, error)
        self._ends[actor] = _End(cause, message, actor.load == 1, evidence)

    def _loss(self, actor: Actor, attempt: Attempt, error: BaseException) -> Loss:
        end = self._ends[actor]
        cause, message = end.cause, end.message
        if cause == "TimedOut" and attempt.item.task_id not in actor.overdue:
            cause, message = "WorkerDied", "its worker was ended, for another of its items hung"
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


def _how_it_ended(error: BaseException | None, remains: Remains) -> str:
    """A worker's death as a clause: the exit code or signal as far as anybody knows it."""
    text = str(error)
    memory = ""
    if remains.memory_bytes is not None:
        memory = f" with {size(remains.memory_bytes)} of memory in use"
    if code := re.search(r"exit code (-?\d+)", text):
        return f"its worker ended with exit code {code[1]}{memory}"
    if signal := re.search(r"\*\*\* (SIG[A-Z]+) received", remains.log):
        return f"its worker was ended by {signal[1]}{memory}"
    if "Out of memory" in text or "OutOfMemory" in type(error).__name__ or "low memory" in text:
        return f"Ray ended its worker because the node ran out of memory{memory}"
    if remains.oom_kills:
        return f"its worker was killed when its machine ran out of memory{memory}"
    if "Worker exit" in text:
        return f"its worker was killed or crashed{memory}"
    return f"its worker was lost ({text.splitlines()[-1] if text else 'no cause is known'}){memory}"


def _evidence(place: Place, remains: Remains, error: BaseException | None) -> str:
    """What is known of a worker's death, for people: a line each, then its last log lines."""
    lines = [f"worker: process {place.process} on node {place.node}"]
    if error is not None:
        said = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        # Without the advice that follows, which is always the same.
        told = (said[-1] if said else first_line(error)).partition(" Some common causes")[0]
        lines.append(f"Ray: {told}")
    if remains.memory_bytes is not None:
        used = f"{size(remains.memory_bytes)} in use {remains.seconds_before:.1f} s before"
        if remains.peak_memory_bytes is not None:
            used += f", at most {size(remains.peak_memory_bytes)} until then"
        if remains.free_bytes is not None:
            used += f"; the machine had {size(remains.free_bytes)} available"
        lines.append(f"memory: {used}")
    if remains.oom_kills:
        lines.append(f"kernel: ended {remains.oom_kills} processes there for lack of memory")
    lines.append(f"last lines of its log:\n{remains.log}" if remains.log else "its log is empty")
    return "\n".join(lines)
