"""Runs the fuzzer: so many minutes with new seeds, or so many inputs per target with fixed ones."""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import conftest  # noqa: F401  (the environment of the tests)
from driver import ROOT, Figures, Fuzzer, Target
from regressions import REGRESSIONS
from targets import BASES, TARGETS, preload

ROUND = 20
"""Inputs of a target, before it is the next one's turn."""


def main() -> int:
    """Run, and print the figures; 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="tests/fuzz", description=__doc__)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--minutes", type=float)
    given.add_argument("--inputs", type=int)
    parser.add_argument("targets", nargs="*", help="names; all without")
    options = parser.parse_args()
    chosen = [one for one in TARGETS if not options.targets or one.name in options.targets]
    if options.minutes is None:
        rounds = _fixed(chosen, options.inputs)
    else:
        rounds = _timed(chosen, time.monotonic() + 60 * options.minutes)
    preload()
    figures: dict[str, Figures] = defaultdict(Figures)
    with tempfile.TemporaryDirectory(prefix="lestd-fuzz-") as scratch:
        fuzzer = Fuzzer(Path(scratch) / "bases", Path(scratch) / "run", ROOT / ".fuzz-findings")
        for target, seeds in rounds:
            fuzzer.prepare(target.base, BASES[target.base])
            fuzzer.run(target, seeds, figures[target.name])
    return _report(figures)


def _fixed(targets: list[Target], inputs: int) -> Iterator[tuple[Target, list[str]]]:
    yield from ((example, ["0"]) for example in REGRESSIONS if example.name in _names(targets))
    yield from ((target, [str(seed) for seed in range(inputs)]) for target in targets)


def _names(targets: list[Target]) -> set[str]:
    return {target.name for target in targets}


def _timed(targets: list[Target], stop: float) -> Iterator[tuple[Target, list[str]]]:
    seed = time.time_ns()
    for turn, target in enumerate(itertools.cycle(targets)):
        if time.monotonic() > stop:
            return
        yield target, [f"{seed}-{turn}-{number}" for number in range(ROUND)]


def _report(figures: dict[str, Figures]) -> int:
    total: Counter[str] = Counter()
    print(f"{'target':16} {'inputs':>7} {'refused':>8} {'equal':>7} {'other':>7} {'findings':>9}")
    for name, one in figures.items():
        total.update(one.counts)
        print(_line(name, one.counts))
        for key, seed in one.findings.items():
            print(f"    {key} (seed {seed})")
    print(_line("all", total))
    return int(total["finding"] > 0)


def _line(name: str, counts: Counter[str]) -> str:
    return (
        f"{name:16} {counts.total():7} {counts['refused']:8} {counts['equal']:7} "
        f"{counts['other']:7} {counts['finding']:9}"
    )


if __name__ == "__main__":
    sys.exit(main())
