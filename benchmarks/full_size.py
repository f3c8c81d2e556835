"""A run of full size under disturbances: a 30B checkpoint from a Hub, killed again and again.

    python benchmarks/full_size.py --work DIR                       OPT-30B's shape, 48 layers
    python benchmarks/full_size.py --work DIR --shape llama-1b --layers 16 --gone 20    in minutes

The source is benchmarks/made_hub.py, which drops every 50th connection; nothing of it is on disk.
First an undisturbed run of every sixth layer says what the bytes must be and how long a layer
takes; it ends before the model is assembled. Then `lestd compress` runs on a local Ray with two
workers of one thread, and is disturbed: `DISTURBANCES`, each up to a layer's time after a number
of finished layers, and again while the model is put together. After each end of the command it is
started again as it stands. At last every sixth layer's payload must have the same sha256, and
`lestd verify` must find the model whole. Prints the tables of docs/full-size.md, in Markdown.

    disk full       only where DIR is a file system of its own: a file takes all that is left of it
    clock jump      only where a C compiler is: for the command and all of its processes, Ray's too,
                    the wall clock goes two days ahead, then three back, then one ahead, a layer
                    after each (benchmarks/moved_clock.c)
    another host    only as root: the next start runs under another host name (`unshare --uts`)

Needs about 0.8 of the model's bytes as disk and 10 GiB of memory for OPT-30B.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from made_hub import OWNER, HubProcess
from moved_clock import Clock
from run import peak_bytes, show

from orchestrator.manifest.manifest import Manifest

EVERY = 6
WORKERS = 2
GIB = 2**30

DISTURBANCES = (
    (0.04, "worker killed"),
    (0.08, "driver killed"),
    (0.14, "server restarted"),
    (0.20, "worker killed"),
    (0.26, "driver killed, then another host"),
    (0.34, "server gone"),
    (0.42, "clock jumps"),
    (0.50, "worker killed"),
    (0.58, "disk full"),
    (0.66, "server restarted"),
    (0.74, "driver killed"),
    (0.82, "worker killed"),
    (0.90, "driver ended by SIGTERM"),
    (1.20, "driver killed"),
    (1.50, "server restarted"),
    (1.80, "driver killed"),
)
"""Share of the layers that are finished, and what happens then; above 1 the share of the model's
untouched bytes that are there."""


@dataclass
class Event:
    """A disturbance, or an end of the command.

    Attributes:
        what: happened.
        at: seconds since the run began.
        finished: layers that were, then.
        until_next: seconds until the next layer, or the next untouched bytes; None at the end.
        said: the command's last words, where it ended by itself.
    """

    what: str
    at: float
    finished: int
    until_next: float | None = None
    said: str = ""


@dataclass
class Command:
    """`lestd compress` of the model that the hub serves."""

    work: Path
    out: Path
    hub: HubProcess
    clock: Clock
    model: str
    options: list[str]
    process: subprocess.Popen[str] | None = None
    driver_bytes: int = 0

    @property
    def run_dir(self) -> Path:
        """The run's own directory."""
        return self.out.with_name(self.out.name + ".run")

    @property
    def log(self) -> Path:
        """What all its starts have printed."""
        return self.out.with_name(self.out.name + ".log")

    def start(self, prefix: Sequence[str] = ()) -> None:
        """Start it, or go on."""
        command = [*prefix, sys.executable, "-m", "orchestrator", "compress", self.model]
        command += ["--out", str(self.out), "--executor", "ray", "--workers", str(WORKERS)]
        command += ["--threads", "1", *self.options]
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{self.hub.port}", "HF_HOME": str(self.work / "hf")}
        # A Ray of its own, whatever cluster runs on this machine.
        every = os.environ | {"RAY_ADDRESS": "local"} | hub | self.clock.environment
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=every, text=True)

    def running(self) -> bool:
        """Whether it runs; its memory is looked at."""
        assert self.process is not None
        self.driver_bytes = max(self.driver_bytes, peak_bytes(self.process.pid))
        return self.process.poll() is None

    def finished(self) -> int:
        """Layers that are committed."""
        return len(Manifest(self.run_dir / "manifest").groups())

    def untouched_bytes(self) -> int:
        """Bytes that the run directory or the model holds of what is copied as it is."""
        total = 0
        for path in (self.run_dir / "untouched").glob("*.safetensors"):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    def workers(self) -> list[psutil.Process]:
        """Ray's actors of this command that compute."""
        assert self.process is not None
        with suppress(psutil.Error):
            return [
                child
                for child in psutil.Process(self.process.pid).children(recursive=True)
                if " ".join(child.cmdline()).startswith("ray::DecomposeWorker")
            ]
        return []

    def groups(self) -> list[dict[str, Any]]:
        """The manifest's row of every finished layer."""
        rows: list[dict[str, Any]] = Manifest(self.run_dir / "manifest").groups().to_pylist()
        return rows

    def last_words(self) -> str:
        """The last line of its log that is a sentence of its own."""
        lines = [line for line in self.log.read_text().splitlines() if line.strip()]
        return next((line for line in reversed(lines) if line.startswith("error")), lines[-1])


@contextmanager
def full_disk(directory: Path) -> Iterator[None]:
    """Within it the file system of a directory has 32 MiB left."""
    filler = directory / "filler"
    free = os.statvfs(directory)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - 2**25)
    yield
    filler.unlink()


class Disturber:
    """Runs the command to its end, whatever happens to it, and takes down what did.

    Args:
        command: not yet started.
        layers: of the model.
        untouched: bytes that it copies as they are.
        gone_seconds: for which the server is gone.
        layer_seconds: for which a layer keeps both workers; a disturbance comes within them.
        seed: of the random moments.
    """

    def __init__(
        self,
        command: Command,
        layers: int,
        untouched: int,
        gone_seconds: float,
        layer_seconds: float,
        seed: int,
    ) -> None:
        self.command = command
        self.hub = command.hub
        self.events: list[Event] = []
        self._layers, self._untouched = layers, untouched
        self._gone, self._layer = gone_seconds, layer_seconds
        self._random = random.Random(seed)
        self._began = time.monotonic()
        self._prefix: list[str] = []

    def run(self) -> float:
        """Seconds until the model was there."""
        left = list(DISTURBANCES)
        self._start()
        while True:
            if not self.command.running():
                assert self.command.process is not None
                code = self.command.process.returncode
                if code == 0:
                    return time.monotonic() - self._began
                self._note(f"the command ended with {code}", self.command.last_words())
                self._start()
            share = self._share()
            self._settle(share)
            if left and share >= left[0][0]:
                time.sleep(self._random.uniform(0, self._layer))
                self._disturb(left.pop(0)[1])
            time.sleep(1)

    def _share(self) -> float:
        share = self.command.finished() / self._layers
        return share if share < 1 else 1 + self.command.untouched_bytes() / self._untouched

    def _settle(self, share: float) -> None:
        """Take down how long the last disturbances held the run up."""
        for event in self.events:
            if event.until_next is None and share > event.finished / self._layers:
                event.until_next = time.monotonic() - self._began - event.at

    def _note(self, what: str, said: str = "") -> None:
        at = time.monotonic() - self._began
        self.events.append(Event(what, at, self.command.finished(), said=said))
        print(f"{at:8.0f} s, {self.command.finished()} layers: {what} {said}", file=sys.stderr)

    def _start(self) -> None:
        self.command.start(self._prefix)
        self._prefix = []

    def _disturb(self, what: str) -> None:
        process = self.command.process
        assert process is not None
        if what.startswith("worker"):
            while not (workers := self.command.workers()):
                if not self.command.running() or self._share() >= 1:
                    return self._note(f"no {what}: none was at work")
                time.sleep(0.2)
            if self.command.running():
                self._random.choice(workers).kill()
                self._note(what)
        elif what.startswith("server"):
            gone = self._gone if what == "server gone" else 3
            self._note(f"{what}, for {gone:.0f} s")
            self.hub.stop()
            time.sleep(gone)
            self.hub.start()
        elif what == "clock jumps":
            if not self.command.clock.environment:
                print("no C compiler: the clock does not jump", file=sys.stderr)
                return
            self._jump()
        elif what == "disk full":
            if not os.path.ismount(self.command.work):
                print(f"{self.command.work} is no file system: no full disk", file=sys.stderr)
                return
            with full_disk(self.command.work):
                self._note(what)
                while self.command.running():
                    time.sleep(0.2)
        else:
            if what.endswith("host") and os.geteuid() == 0:
                rename = 'hostname elsewhere && exec "$@"'
                self._prefix = ["unshare", "--uts", "sh", "-c", rename, "sh"]
            process.send_signal(signal.SIGTERM if "SIGTERM" in what else signal.SIGKILL)
            process.wait()
            self._note(what)
            self._start()

    def _jump(self) -> None:
        """The wall clock goes two days ahead, three back, one ahead, a layer after each."""
        for days in (2, -3, 1):
            before = self.command.finished()
            self.command.clock.jump(days)
            self._note(f"the clock jumps by {days} days")
            while self.command.running() and self.command.finished() == before and days != 1:
                time.sleep(0.2)


def undisturbed(command: Command, layers: int) -> float:
    """Run until all layers are committed; the wall time of the tasks."""
    command.start()
    while command.running() and command.finished() < layers:
        time.sleep(1)
    assert command.process is not None
    if command.finished() < layers:
        sys.exit(f"error: the undisturbed run ended: {command.last_words()}")
    command.process.kill()
    command.process.wait()
    rows = command.groups()
    began = [row["started_at"].timestamp() for row in rows]
    ended = [
        at + sum(row[name] for name in row if name.startswith("seconds_"))
        for at, row in zip(began, rows, strict=True)
    ]
    return max(ended) - min(began)


def report(disturber: Disturber, reference: Command, wall: float, quiet: float) -> None:
    """Print the tables: events, then sizes and times."""
    command = disturber.command
    rows, known = command.groups(), {row["layer"]: row for row in reference.groups()}
    same = sum(
        row["sha256"] == known[row["layer"]]["sha256"] for row in rows if row["layer"] in known
    )
    plan = json.loads((command.run_dir / "plan.json").read_text())["total"]
    per_layer = quiet / len(known)
    show("at, s", "layers done", "disturbance", "next layer after, s")
    show("---:", "---:", "---", "---:")
    for event in disturber.events:
        after = "" if event.until_next is None else f"{event.until_next:.0f}"
        show(f"{event.at:.0f}", str(event.finished), f"{event.what} {event.said}".strip(), after)
    print()
    show("figure", "measured", "planned or undisturbed")
    show("---", "---:", "---:")
    sizes = sum(p.stat().st_size for p in command.out.rglob("*") if p.is_file())
    show("layers with the payload of the undisturbed run", f"{same} of {len(known)}", "all")
    show("a layer, s of wall time, two workers", f"{wall / len(rows):.1f}", f"{per_layer:.1f}")
    show("wall time, s", f"{wall:.0f}", "")
    planned = plan["keep_of_model"] * plan["model_bytes"]
    show("model on disk, GiB", f"{sizes / GIB:.2f}", f"{planned / GIB:.2f}")
    worker = max(row["peak_memory_bytes"] for row in rows) / GIB
    show("worker memory, GiB", f"{worker:.2f}", f"{plan['worker_memory_bytes'] / GIB:.2f}")
    show("driver memory, GiB", f"{command.driver_bytes / GIB:.2f}", "")
    sent = command.hub.sent()
    needed = plan["source_bytes"]
    show("bytes fetched over needed, with all kills", f"{sum(sent.values()) / needed:.3f}", "")


def main() -> None:
    """Run both, compare, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="directory for all files")
    parser.add_argument("--shape", default="opt-30b", help="of make_checkpoint.py")
    parser.add_argument("--layers", type=int, default=48, help="(default: %(default)s)")
    parser.add_argument("--keep", type=float, default=0.4, help="(default: %(default)s)")
    parser.add_argument("--gone", type=float, default=300, help="seconds without the server")
    parser.add_argument("--seed", type=int, default=0, help="of the disturbances")
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    clock = Clock(work)
    shape = ["--shape", options.shape, "--layers", str(options.layers)]
    hub = HubProcess([*shape, "--drop-every", "50", "--memory", str(work / "hub")])
    hub.start()
    model = f"{OWNER}/{options.shape}"
    settings = ["--keep", str(options.keep), "--metric", "weight"]
    try:
        sixth = ",".join(str(layer) for layer in range(0, options.layers, EVERY))
        few = [*settings, "--include", sixth]
        reference = Command(work, work / "reference", hub, clock, model, few)
        quiet = undisturbed(reference, len(sixth.split(",")))
        needed = sum(row["dense_bytes"] for row in reference.groups())
        if fetched := hub.sent().get("attention", 0):  # Else it was there already.
            print(f"undisturbed: {fetched / needed:.4f} of the bytes needed were fetched\n")
        hub.stop()
        hub.before = {}
        hub.start()
        command = Command(work, work / "model", hub, clock, model, settings)
        plan = json.loads((reference.run_dir / "plan.json").read_text())["total"]
        attention = needed * options.layers // len(sixth.split(","))
        untouched = plan["source_bytes"] - attention
        layer = quiet / len(reference.groups())
        disturber = Disturber(command, options.layers, untouched, options.gone, layer, options.seed)
        wall = disturber.run()
        report(disturber, reference, wall, quiet)
        verify = [sys.executable, "-m", "orchestrator", "verify", str(command.out)]
        sys.exit(subprocess.run(verify).returncode)
    finally:
        assert hub.process is not None
        hub.process.kill()


if __name__ == "__main__":
    main()
