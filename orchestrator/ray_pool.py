"""Actors, what they are at, and what became of it. Is handed the module `ray`: no import here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Started:
    """An actor is ready for work."""


@dataclass(frozen=True)
class NotStarted:
    """An actor ended before it was ready; broken: its ``__init__`` raised."""

    error: BaseException
    broken: bool


@dataclass(frozen=True)
class Ran:
    """An actor ended its work on an item, or died of it."""

    item: Any
    attempt: int
    result: Any = None
    error: BaseException | None = None
    died: bool = False


@dataclass(eq=False)
class Actor:
    """A running actor: the items that it has, and how many it may have."""

    handle: Any
    load: int = 0
    room: int = 1


class Pool:
    """Actors and what they are at. An actor gets an item only once it runs: Ray accepts more
    actors than its nodes have room for, and those it never starts must not hold work."""

    def __init__(self, ray: Any, make: Callable[[], Any], in_flight: int) -> None:
        self._ray = ray
        self._make = make
        self._in_flight = in_flight
        self._starting: dict[Any, Any] = {}
        self._actors: list[Actor] = []
        self.running: dict[Any, tuple[Actor, Any, int]] = {}

    @property
    def starting(self) -> int:
        """Number of actors that are not ready yet."""
        return len(self._starting)

    @property
    def size(self) -> int:
        """Number of actors."""
        return len(self._starting) + len(self._actors)

    def start(self) -> None:
        """Ask for one more actor."""
        actor = self._make()
        self._starting[actor.__ray_ready__.remote()] = actor

    def free(self, attempt: int, waiting: int) -> Actor | None:
        """The actor that is to have the next item, one that has the fewest; None: not yet.

        An item whose worker died has the next one for itself: if it dies again, no other item
        pays for it. What an actor has in advance is not taken from those that are starting.
        """
        free = [actor for actor in self._actors if actor.load < actor.room]
        actor = min(free, key=lambda actor: actor.load, default=None)
        if actor is not None and actor.load and (attempt > 1 or waiting <= self.starting):
            return None
        return actor

    def submit(self, actor: Actor, item: Any, attempt: int) -> None:
        """Give an item to an actor."""
        actor.load += 1
        actor.room = 1 if attempt > 1 else self._in_flight
        self.running[actor.handle.run.remote(item)] = (actor, item, attempt)

    def wait(self) -> Iterator[Started | NotStarted | Ran]:
        """What has happened since; returns after a second even if nothing has."""
        # Without a timeout a Ctrl-C would wait as well.
        done, _ = self._ray.wait([*self._starting, *self.running], timeout=1.0)
        for reference in done:
            if reference in self._starting:
                yield self._settle_start(reference)
            else:
                yield self._settle_run(reference)

    def _settle_start(self, reference: Any) -> Started | NotStarted:
        actor = self._starting.pop(reference)
        try:
            self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return NotStarted(error, bool(getattr(error, "actor_init_failed", False)))
        self._actors.append(Actor(actor, room=self._in_flight))
        return Started()

    def _settle_run(self, reference: Any) -> Ran:
        actor, item, attempt = self.running.pop(reference)
        actor.load -= 1
        actor.room = self._in_flight
        try:
            return Ran(item, attempt, self._ray.get(reference))
        except self._ray.exceptions.RayTaskError as error:
            return Ran(item, attempt, error=error)
        except self._ray.exceptions.RayError as error:
            if actor in self._actors:  # The first of its items to be missed.
                self._actors.remove(actor)
                self._ray.kill(actor.handle)
            return Ran(item, attempt, error=error, died=True)

    def close(self) -> None:
        """End all actors."""
        for actor in [*(actor.handle for actor in self._actors), *self._starting.values()]:
            self._ray.kill(actor)
