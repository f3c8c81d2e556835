"""How an actor ended, in words; what follows is `orchestrator.execution.retries`'s."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lestd_kernels.errors import first_line
from orchestrator.console.output import size
from workers.contracts import Failure
from workers.host.watcher import Remains


@dataclass(frozen=True)
class Place:
    """Where an actor runs.

    Attributes:
        process: its id.
        node: Ray's id of the node.
        gpus: those of the node that it has.
        logs: files that it writes to.
        host: name of the machine.
    """

    process: int
    node: str
    gpus: tuple[Any, ...]
    logs: tuple[str, ...]
    host: str = ""

    @property
    def worker(self) -> str:
        """Name in the manifest."""
        return f"{self.host}:{self.process}"


class WorkerUnfitError(Exception):
    """A worker answered that it, not the item, is unfit: its GPU or its files give errors."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.traceback or failure.message)
        self.message = failure.message


def lacks_memory(text: str) -> bool:
    """Whether Ray ended a worker because its node ran out of memory."""
    return bool(re.search(r"out of memory|low (on )?memory", text, re.IGNORECASE))


def how_it_ended(error: BaseException | None, remains: Remains) -> str:
    """A worker's death as a clause: with exit code or signal if known."""
    text = str(error)
    memory = ""
    if remains.memory_bytes is not None:
        memory = f" with {size(remains.memory_bytes)} of memory in use"
    if code := re.search(r"exit code (-?\d+)", text):
        return f"its worker ended with exit code {code[1]}{memory}"
    if signal := re.search(r"\*\*\* (SIG[A-Z]+) received", remains.log):
        return f"its worker was ended by {signal[1]}{memory}"
    if lacks_memory(text) or "OutOfMemory" in type(error).__name__:
        return f"Ray ended its worker because the node ran out of memory{memory}"
    if remains.oom_kills:
        return f"its worker was killed when its machine ran out of memory{memory}"
    if "Worker exit" in text:
        return f"its worker was killed or crashed{memory}"
    return f"its worker was lost ({text.splitlines()[-1] if text else 'no cause is known'}){memory}"


def evidence_of(place: Place, remains: Remains, error: BaseException | None) -> str:
    """Facts of a worker's death, a line each, then its last log lines."""
    lines = [f"worker: process {place.process} on node {place.node}"]
    if error is not None and not isinstance(error, WorkerUnfitError):  # That is told in full.
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
