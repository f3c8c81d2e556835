"""A wall clock that jumps, for benchmarks/full_size.py; the library is moved_clock.c beside it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

LIBRARY = Path(__file__).with_suffix(".c")


class Clock:
    """A wall clock that jumps, for the processes that get its environment; with a C compiler.

    Args:
        directory: for its files.

    Attributes:
        environment: of a process that follows it; empty without a compiler.
    """

    def __init__(self, directory: Path) -> None:
        self._ahead, self._seconds = directory / "ahead", 0
        self.environment: dict[str, str] = {}
        self.jump(0)
        if compiler := shutil.which("cc"):
            library = directory / "moved_clock.so"
            build = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(LIBRARY)]
            subprocess.run([*build, "-ldl"], check=True)
            self.environment = {"LD_PRELOAD": str(library), "MOVED_CLOCK": str(self._ahead)}

    def jump(self, days: int) -> None:
        """Move it, in place: processes have the file mapped."""
        self._seconds += days * 86400
        self._ahead.touch()
        with self._ahead.open("r+b") as file:
            file.write(self._seconds.to_bytes(8, sys.byteorder, signed=True))
