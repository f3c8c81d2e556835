"""Log of a command on standard error: progress and failures.

One logger, ``lestd``, in one of two formats: lines for people, or one JSON object per line for
programs. Results are no log: they go to standard output.
"""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from orchestrator.console import output

LOGGER = logging.getLogger("lestd")
# People see these in other ways: a bar or the lines of progress, and the tables at the end.
_ONLY_JSON = ("run_started", "task_started", "run_ended")
_SHORT_ID = 8
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class LogFormat(StrEnum):
    """How standard error reads."""

    text = "text"
    json = "json"


class _TextHandler(logging.Handler):
    """Lines of text, above the bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        event = getattr(record, "event", "message")
        if event in _ONLY_JSON:
            return
        prefix = "error: " if event == "error" else ""
        style = "red" if record.levelno >= logging.ERROR else None
        text = prefix + record.getMessage()
        output.err.print(text, style=style, soft_wrap=True)


class _JsonFormatter(logging.Formatter):
    """One JSON object; its fields are listed in docs/watching.md."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "message"),
            **getattr(record, "fields", {}),
            "message": record.getMessage(),
        }
        return json.dumps(output.finite(line))


class _JsonHandler(logging.Handler):
    """Lines for programs."""

    def emit(self, record: logging.LogRecord) -> None:
        # Looked up anew: standard error may have been replaced since the handler was made.
        print(self.format(record), file=sys.stderr, flush=True)


def use(log_format: LogFormat) -> None:
    """From now on log in this format; in JSON Python's warnings are logged as well."""
    as_json = log_format is LogFormat.json
    handler: logging.Handler = _TextHandler()
    if as_json:
        handler = _JsonHandler()
        handler.setFormatter(_JsonFormatter())
    LOGGER.handlers = [handler]
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    logging.captureWarnings(as_json)
    logging.getLogger("py.warnings").handlers = [handler] if as_json else []


def in_json() -> bool:
    """Whether standard error is for programs."""
    return isinstance(LOGGER.handlers[0], _JsonHandler)


def log(event: str, message: str, level: int = logging.INFO, **fields: Any) -> None:
    """Say something.

    Args:
        event: what kind of thing happened; ``"error"`` is what ends a command.
        message: the line for people.
        level: of `logging`.
        fields: what JSON has besides; plain values with units in their names, None for unknown.
    """
    known = {name: value for name, value in fields.items() if value is not None}
    LOGGER.log(level, message, extra={"event": event, "fields": known})


class Lines(io.TextIOBase):
    """A stream whose lines are logged as messages, without their colors."""

    def __init__(self) -> None:
        self._begun = ""

    def write(self, text: str) -> int:
        """Log the lines that this completes."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if plain := _ESCAPE.sub("", line).strip():
                log("message", plain)
        return len(text)


def error(message: object, **fields: Any) -> None:
    """Say, in one sentence, what ends a command."""
    log("error", str(message), logging.ERROR, **fields)


REPAIR = (
    "the same lestd compress makes again what it lacks; what is still named then can be deleted"
)
"""Advice about damaged files of a run's manifest."""


def damaged(path: object, reason: str) -> None:
    """Say that a file of a manifest cannot be read, and that its rows are missing."""
    log("damaged", f"{path} is damaged and left out: {reason}", path=str(path))


def short(task_id: str) -> str:
    """As much of a task's id as tells it from others."""
    return task_id[:_SHORT_ID]


use(LogFormat.text)
