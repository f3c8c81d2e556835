"""Messages about workers that are missing, yet or for good. Imports no Ray."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from lestd_kernels.errors import LestdError, first_line
from orchestrator.console import logs
from orchestrator.console.output import size
from orchestrator.execution.ray.deaths import lacks_memory
from orchestrator.execution.ray.pool import NotStarted
from orchestrator.execution.retries import Attempt, after_error
from workers.contracts import Failure

INSTALL = "install lestd in the environment that Ray runs in on the nodes"
_SHOWN_NODES = 8
_LESTD_ERROR = f"{LestdError.__module__}.{LestdError.__name__}: "


def never_begun(attempt: Attempt, outcome: NotStarted) -> Failure:
    """The failure of an item for which no worker could be made."""
    failure = after_error(
        attempt, outcome.error, "application" if outcome.broken else "infrastructure"
    )
    return replace(failure, message=own_words(outcome.error), worker="")


def own_words(error: BaseException) -> str:
    """Message of a worker that could not be made: Ray's words and a traceback come before it."""
    lines = str(error).strip().splitlines()
    indented = [number for number, line in enumerate(lines) if line.startswith(" ")]
    own = lines[indented[-1] + 1 :] if indented else []
    said = own[0].removeprefix(_LESTD_ERROR) if own else first_line(error)
    if said.startswith("ModuleNotFoundError: "):
        return f"{said}; {INSTALL}"
    if lacks_memory(said):
        return f"{said}; use fewer workers, or larger machines"
    if own:
        return said
    return (
        f"a worker ended before it could begin (Ray says: {said}); the worker-*.err files in Ray's "
        "logs say why; then run the same command again"
    )


def say_that_others_go_on(outcome: NotStarted, pause_seconds: float) -> bool:
    """Say that a worker could not be made, and that work goes on."""
    logs.log(
        "message",
        f"a worker could not be started ({own_words(outcome.error)}); continuing with the others, "
        f"retrying every {pause_seconds:.0f} s",
        logging.WARNING,
    )
    return True


def say_what_is_waited_for(
    need: dict[str, float], starting: int, nodes: Sequence[str], autoscaling: bool
) -> None:
    """Say what workers that are not there yet take, and what the nodes have."""
    wanted = ", ".join(f"{name} {_figure(name, much)}" for name, much in need.items() if much)
    there = "; ".join(nodes[:_SHOWN_NODES]) or "nothing, as no node is alive"
    more = f"; {len(nodes) - _SHOWN_NODES} more nodes" if len(nodes) > _SHOWN_NODES else ""
    advice = (
        "; if no node type offers that, use fewer --threads, or node types with more memory (their "
        "resources must name it)"
        if autoscaling
        else ""
    )
    logs.log(
        "message",
        f"no worker is running yet: {starting} are starting or waiting for room; each takes "
        f"{wanted}; in use: {there}{more}; waiting, see ray status{advice}",
    )


def in_use(name: str, used: float, offered: float) -> str:
    """How much of one of Ray's resources a node has, and how much of it is taken."""
    return f"{name} {_figure(name, used)} of {_figure(name, offered)}"


def _figure(name: str, much: float) -> str:
    return size(much) if name == "memory" else f"{much:g}"
