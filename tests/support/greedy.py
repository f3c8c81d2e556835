"""Workers for tests of a cluster: they take a while, and see who else is at work on their GPU."""

import time
from dataclasses import dataclass
from pathlib import Path

import ray

from workers.contracts import Failure


@dataclass(frozen=True)
class Job:
    task_id: str
    action: str = "work"


@dataclass(frozen=True)
class Seen:
    task_id: str
    node: str
    beside: int


class Greedy:
    """Works for a while, and sees who else is at work on its GPU."""

    def __init__(self, folder: str) -> None:
        context = ray.get_runtime_context()
        self._node = context.get_node_id()
        self._folder = Path(folder) / f"{self._node}-{ray.get_gpu_ids()}"
        self._folder.mkdir(exist_ok=True)
        self._seen = Path(folder) / "seen"

    def run(self, job: Job) -> Seen | Failure:
        mark = self._folder / job.task_id
        beside = len(list(self._folder.iterdir()))
        mark.touch()
        time.sleep(0.3)
        mark.unlink()
        if job.action == "never fits" or (job.action == "fits alone" and not self._seen.exists()):
            if job.action == "fits alone":
                self._seen.touch()
            return Failure(job.task_id, "device_memory", "OutOfMemoryError", "too little memory")
        return Seen(job.task_id, self._node, beside)
