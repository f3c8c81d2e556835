"""Traces of a worker that died, collected by a process beside it on the same machine.

A worker that hangs or is killed cannot tell what it used and said, so somebody else remembers.
Reads ``/proc``, so elsewhere than on Linux only the log is known.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

_SAMPLE_SECONDS = 1.0
_LOG_LINES = 40
_LOG_BYTES = 8192


@dataclass(frozen=True)
class Remains:
    """Facts of a process that ended.

    Attributes:
        memory_bytes: its resident set when last looked at; None: never.
        peak_memory_bytes: the most that its resident set had been by then.
        free_bytes: main memory that the machine had available then.
        seconds_before: how long ago that was.
        oom_kills: processes that the kernel of the machine ended for lack of memory while this
            one was watched.
        log: last lines that it wrote.
    """

    memory_bytes: int | None = None
    peak_memory_bytes: int | None = None
    free_bytes: int | None = None
    seconds_before: float = 0.0
    oom_kills: int = 0
    log: str = ""


class Watcher:
    """Looks at processes of its machine every second, and remembers the last look."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._oom_kills: dict[int, int] = {}
        self._looks: dict[int, tuple[float, Remains]] = {}
        threading.Thread(target=self._keep_looking, daemon=True).start()

    def watch(self, process: int) -> None:
        """Begin with a process."""
        with self._lock:
            self._oom_kills[process] = _oom_kills()
        self._look(process)

    def remains(self, process: int, logs: list[str]) -> Remains:
        """Facts of a process and the end of its log files; ends watching it."""
        with self._lock:
            oom_kills = _oom_kills() - self._oom_kills.pop(process, _oom_kills())
            seen_at, look = self._looks.pop(process, (time.monotonic(), Remains()))
        return replace(
            look,
            seconds_before=time.monotonic() - seen_at,
            oom_kills=oom_kills,
            log="\n".join(filter(None, (log_tail(Path(log)) for log in logs))),
        )

    def _keep_looking(self) -> None:
        while True:
            for process in tuple(self._oom_kills):
                self._look(process)
            time.sleep(_SAMPLE_SECONDS)

    def _look(self, process: int) -> None:
        used = _sizes(Path(f"/proc/{process}/status"))
        free = _sizes(Path("/proc/meminfo"))
        if "VmRSS" in used:  # One that has ended has no memory.
            look = Remains(used["VmRSS"], used.get("VmHWM"), free.get("MemAvailable"))
            with self._lock:
                if process in self._oom_kills:
                    self._looks[process] = (time.monotonic(), look)


def log_tail(log: Path) -> str:
    """The last lines of a log file, at most `_LOG_LINES` in `_LOG_BYTES`; empty if it is gone."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_BYTES))
            text = file.read(_LOG_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""
    # Ray marks whose log it is, for itself.
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(":")]
    return "\n".join(lines[-_LOG_LINES:])


def _sizes(file: Path) -> dict[str, int]:
    """The lines ``Name:  123 kB`` of a file of ``/proc``, in bytes."""
    found = {}
    with suppress(OSError):
        for line in file.read_text().splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                found[name] = int(value.split()[0]) * 1024
    return found


def _oom_kills() -> int:
    """How many processes the kernel has ended for lack of memory since it started."""
    with suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
