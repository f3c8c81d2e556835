"""Whole models, dense against compressed: speed, memory and bytes, by the command `lestd` itself.

    python benchmarks/models.py --work DIR      prints the table of README.md, in Markdown

Takes the example model, and one of the shape of Llama-3.2-1B with made-up weights
(benchmarks/make_checkpoint.py), compresses each with `lestd compress`, and times it with
`lestd bench`. What DIR holds already is used again. Ratios are compressed / dense; the spread is
the slowest over the fastest repetition of one model, near 1 on a machine that does nothing else.
With all 16 layers the 1B shape takes about 5 GB of disk and, most of it to compress, some minutes
on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-llama-wikitext2" / "model"
MAKE_CHECKPOINT = Path(__file__).with_name("make_checkpoint.py")
FIGURES = {
    "prefill_tokens_per_second": ("prefill, tokens/s", 1.0),
    "decode_tokens_per_second": ("decode, tokens/s", 1.0),
    "time_to_first_token_seconds": ("time to first token, ms", 1e-3),
    "peak_memory_bytes": ("peak memory, MiB", 2.0**20),
    "stored_bytes": ("tensors on disk, MiB", 2.0**20),
}
"""A figure of `lestd bench --json` -> its title here, and what it is divided by."""
CONSTANT = ("peak_memory_bytes", "stored_bytes")


def run(*arguments: object) -> str:
    """Run a Python program in a process of its own; what it prints."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout


def show(*cells: str) -> None:
    """Print one row of the table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Make what is not there yet, measure, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["example", "llama-1b"], help="their names")
    parser.add_argument("--layers", type=int, default=16, help="of llama-1b (default: 16)")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.4], help="(default: 0.4)")
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count()], help="e.g. 1 2")
    parser.add_argument("--batch", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="(default: a directory that is deleted)")
    options = parser.parse_args()

    with ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        show("model", "keep", "threads", "", "dense", "compressed", "ratio", "spread")
        show(*["---"] * 4, *["---:"] * 4)
        for model in options.models:
            name, dense = model, EXAMPLE
            if model != "example":
                name = f"{model}, {options.layers} layers"
                dense = work / f"{model}-{options.layers}"
                if not dense.exists():
                    shape = ("--shape", model, "--layers", options.layers)
                    run(MAKE_CHECKPOINT, *shape, "--out", dense)
            for keep in options.keeps:
                out = work / f"{model if dense == EXAMPLE else dense.name}-keep-{keep}"
                settings = (
                    "--metric",
                    "weight",
                    "--keep",
                    keep,
                    "--executor",
                    "serial",
                    "--threads",
                    os.cpu_count(),
                )
                run("-m", "orchestrator", "compress", dense, *settings, "--out", out, "--json")
                for threads in options.threads:
                    timing = ("--threads", threads, "--device", options.device)
                    for option in ("batch", "prompt_tokens", "new_tokens", "repeats"):
                        timing += (f"--{option.replace('_', '-')}", getattr(options, option))
                    printed = run("-m", "orchestrator", "bench", dense, out, *timing, "--json")
                    figures: dict[str, Any] = json.loads(printed)
                    spread = f"{figures['spread']:.1f}"
                    for figure, (title, unit) in FIGURES.items():
                        one, other = (figures[m][figure] / unit for m in ("dense", "compressed"))
                        cells = (title, f"{one:,.1f}", f"{other:,.1f}", f"{other / one:.3f}")
                        cells += ("" if figure in CONSTANT else spread,)
                        show(name, str(keep), str(figures["threads"]), *cells)


if __name__ == "__main__":
    main()
