"""Feeds damaged files to the product in forked processes, whose time and memory have limits.

Whatever the input: it ends within `CPU_SECONDS` and `MEMORY_BYTES`, and is refused in one sentence
or answered; what is neither is a finding. A process that an input kills takes no other along.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from damage import Damage, anything

CPU_SECONDS = 10
BLOCKED_SECONDS = 300
"""Of a clock on the wall: long enough for a loaded machine, and only what waits reaches it."""
MEMORY_BYTES = 2**30
FILE_BYTES = 2**26
BATCH = 100
ROOT = Path(__file__).parents[2]
HOUSE = tuple(f"{ROOT / name}/" for name in ("orchestrator", "workers", "lestd_kernels"))
SIGNALS = {signal.SIGPROF: f"over {CPU_SECONDS} s", signal.SIGALRM: "blocked"}


class RefusedError(Exception):
    """The input was refused as it should be; the text is the sentence."""


class WrongError(Exception):
    """The input got an answer that it should not have."""


Probe = Callable[[Path], str]
"""Uses a directory of which a file may be damaged; returns what a sound one determines."""


@dataclass(frozen=True)
class Target:
    """Files of a valid directory, how they are damaged, and what is done with them then.

    Attributes:
        name: of the kind of input.
        base: name of the directory, see `bases`.
        victims: patterns of the files below it that are damaged, one per input.
        probes: what is done, one per input.
        damage: how.
    """

    name: str
    base: str
    victims: tuple[str, ...]
    probes: tuple[Probe, ...]
    damage: Damage = anything


@dataclass
class Figures:
    """What became of the inputs of a target; a finding's key is what and where."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Fuzzer:
    """Runs inputs.

    Attributes:
        bases: directory of the valid directories.
        scratch: directory for damaged ones.
        saved: directory for the inputs that were findings.
    """

    bases: Path
    scratch: Path
    saved: Path | None = None

    def prepare(self, name: str, make: Callable[[Path], None]) -> None:
        """Make a valid directory if there is none, in a process: this one stays without threads."""
        if (self.bases / name).exists():
            return
        child = os.fork()
        if child == 0:
            (self.bases / name).mkdir(parents=True)
            with _exits():
                make(self.bases / name)
        _, status = os.waitpid(child, 0)
        if status != 0:
            raise RuntimeError(f"the directory {name} could not be made")

    def run(self, target: Target, seeds: Iterable[str], figures: Figures) -> None:
        """Give a target one input per seed."""
        remaining = list(seeds)
        while remaining:
            batch = remaining[:BATCH]
            done = self._batch(target, batch, figures)
            remaining = remaining[done:]

    def _batch(self, target: Target, seeds: list[str], figures: Figures) -> int:
        """The number of seeds that are done with: all of them, or those up to one that killed."""
        reader, writer = os.pipe()
        self.scratch.mkdir(exist_ok=True)
        child = os.fork()
        if child == 0:
            os.close(reader)
            with _exits(), os.fdopen(writer, "w") as pipe:
                _limit(self.scratch / "log")
                for seed in seeds:
                    print(json.dumps(self._one(target, seed)), file=pipe, flush=True)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            results = [json.loads(line) for line in pipe]
        _, status = os.waitpid(child, 0)
        log = (self.scratch / "log").read_text(errors="replace")
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
            raise RuntimeError(f"{target.name} {seeds[len(results)]} cannot be made: {log}")
        if len(results) < len(seeds):
            number = os.WTERMSIG(status)
            what = SIGNALS.get(signal.Signals(number), f"killed by signal {number}")
            frames = [line for line in log.splitlines() if line.startswith('  File "')]
            where = next((line for line in frames if any(h in line for h in HOUSE)), "nowhere")
            results.append(["finding", f"{what} {where.strip().replace(str(ROOT), '')}", log])
        for seed, (kind, key, text) in zip(seeds, results, strict=False):
            figures.counts[kind] += 1
            if kind == "finding" and key not in figures.findings:
                figures.findings[key] = f"{target.name} {seed}"
                self._save(target, seed, key, text)
        return len(results)

    def draw(self, target: Target, seed: str) -> tuple[Path, Path, Probe, str]:
        """An input: the directory, the damaged file in it, the probe, what a sound one answers."""
        rng = random.Random(f"{target.name} {seed}")
        probe = rng.choice(target.probes)
        sound = self._sound(target.base, probe)
        place = self._copy(target.base)
        files = sorted({path for victim in target.victims for path in place.glob(victim)})
        victim = rng.choice(files)
        target.damage(victim, rng)
        return place, victim, probe, sound

    def _copy(self, base: str) -> Path:
        place = self.scratch / "place"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.bases / base, place)
        return place

    def _sound(self, base: str, probe: Probe) -> str:
        """The answer that the valid directory gets."""
        known = self.bases / f"{base}.{probe.__name__}"
        if not known.exists():
            place = self._copy(base)
            known.write_text(probe(place).replace(str(place), "PLACE"))
        return known.read_text()

    def _one(self, target: Target, seed: str) -> tuple[str, str, str]:
        place, victim, probe, sound = self.draw(target, seed)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.alarm(BLOCKED_SECONDS)
        try:
            answer = probe(place).replace(str(place), "PLACE")
            return ("equal" if answer == sound else "other"), "", ""
        except RefusedError:
            return "refused", "", ""
        except BaseException as error:
            key = f"{type(error).__name__} {_where(error)}"
            about = f"{probe.__name__} with {victim.relative_to(place)} damaged"
            return "finding", key, f"{about}\n{''.join(traceback.format_exception(error))}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)

    def _save(self, target: Target, seed: str, key: str, text: str) -> None:
        if self.saved is None:
            return
        name = "".join(char if char.isalnum() else "-" for char in key)[-100:]
        directory = self.saved / target.name / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "what.txt").write_text(
            f"{target.name} {seed}\n{key}\n{text}", errors="replace"
        )
        try:
            _, victim, _, _ = self.draw(target, seed)
            if victim.is_file() and not victim.is_symlink():
                shutil.copy(victim, directory)
        except Exception as error:
            (directory / "not-saved.txt").write_text(repr(error))


@contextmanager
def _exits() -> Iterator[None]:
    """End this process after the context, without what its parent would do at its end."""
    status = 1
    try:
        yield
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _where(error: BaseException) -> str:
    """The innermost line of ours that an exception went through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(HOUSE)] or frames
    return f"{os.path.relpath(ours[-1].filename, ROOT)}:{ours[-1].lineno}"


def _limit(log: Path) -> None:
    """Limits of this process: what goes beyond them ends it, with its stack in the log."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
        faulthandler.register(number, file=handle, all_threads=False, chain=True)
    faulthandler.enable(file=handle, all_threads=False)
    lines = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
