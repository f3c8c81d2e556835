"""Workers for tests of executors. They import torch only for what needs it: Ray starts dozens."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from lestd_kernels.errors import LestdError
from workers.contracts import Failure


@dataclass(frozen=True)
class Job:
    task_id: str
    action: str = "square"
    number: int = 0


@dataclass(frozen=True)
class Answer:
    task_id: str
    number: int
    threads: int | None
    pid: int


def failed(job: Job, error: str, message: str) -> Failure:
    """The failure of a job that ended with this error of PyTorch."""
    import torch

    from workers.host.failures import failure_of

    return failure_of(job.task_id, "block", getattr(torch, error)(message))


class Squarer:
    """Squares numbers, refuses some, crashes on others; remembers crashes in a folder."""

    def __init__(self, memory: str, threads: int | None = None) -> None:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        self._memory = Path(memory)
        self._unfit = False

    def run(self, job: Job) -> Answer | Failure:
        crashes = self._memory / job.task_id
        seen = crashes.exists()
        if job.action == "refuse":
            return Failure(job.task_id, "application", "ValueError", "bad input")
        if job.action == "raise":
            raise RuntimeError("a bug")
        if job.action == "crash" or (job.action == "crash once" and not crashes.exists()):
            crashes.touch()
            print("the last words of", job.task_id, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if job.action == "fault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if job.action == "exit":
            sys.exit(4)
        if self._unfit or job.action == "spoil" or (job.action == "spoil once" and not seen):
            crashes.touch()
            self._unfit = True  # As after a CUDA error: nothing works any more in this process.
            return failed(job, "AcceleratorError", "CUDA error: gone")
        if job.action == "hang":  # No thread of it answers anybody.
            os.kill(os.getpid(), signal.SIGSTOP)
        if job.action == "too large" or (job.action == "too large once" and not crashes.exists()):
            crashes.touch()
            message = "CUDA out of memory. Tried to allocate 2 GiB. Advice."
            return failed(job, "OutOfMemoryError", message)
        torch = sys.modules.get("torch")
        threads = torch.get_num_threads() if torch else None
        return Answer(job.task_id, job.number**2, threads, os.getpid())


class Unloadable:
    """A worker that cannot be made."""

    def __init__(self) -> None:
        raise RuntimeError("no such model")

    def run(self, job: Job) -> Answer:
        raise AssertionError("never made, so never run")


class OnlyOne(Squarer):
    """A worker of which one can be made, as where one node of two is ill."""

    def __init__(self, memory: str) -> None:
        try:
            Path(memory, "made").mkdir()
        except FileExistsError:
            raise LestdError("this node sees no GPU") from None
        super().__init__(memory)

    def run(self, job: Job) -> Answer | Failure:
        while not (self._memory / "told").exists():  # The others are given time to fail.
            time.sleep(0.05)
        return super().run(job)
