"""Progress of a pool at the pieces of an evaluation."""

from __future__ import annotations

import logging
from typing import Any

from orchestrator.console.progress_bar import Meter
from orchestrator.execution.executor import Event


class PieceProgress:
    """Shows a pool of workers at the pieces of an evaluation: rate, time left, retries.

    Args:
        title: what is going on.
        unit: what the pieces are made of, a plural noun.
    """

    def __init__(self, title: str, unit: str) -> None:
        self._meter = Meter(title, unit)
        self._unit = unit
        self._begun = False

    def __enter__(self) -> PieceProgress:
        self._meter.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        if exc[0] is None and (rate := self._meter.rate_text()):
            self._meter.say("evaluated", rate)
        self._meter.__exit__(*exc)

    def update(self, done: int, total: int) -> None:
        """So many are done; those of the first call were done before."""
        self._meter.update(done, total)
        if not self._begun and done:
            line = f"{done} of {total} {self._unit} were already finished"
            self._meter.say("pieces_found", line, finished=done)
        self._begun = True

    def on_event(self, event: Event) -> None:
        """A piece was started, or is tried again."""
        if event.kind == "started":
            self._meter.work_begins()
            return
        line = f"{event.task_id}: attempt {event.attempt} is retried: {event.message}"
        about = event.known()
        self._meter.say(f"task_{event.kind}", line, logging.WARNING, **about)
