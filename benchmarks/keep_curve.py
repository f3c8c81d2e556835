"""Size against perplexity: compress and evaluate the example at four keeps, with two methods.

    python benchmarks/keep_curve.py            prints the table of README.md, in Markdown

Runs the command `lestd` itself, and takes every figure from its --json. Takes some
minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-llama-wikitext2"


def lestd(*arguments: str | Path) -> Any:
    """Run a command of lestd and return what its --json prints."""
    command = [sys.executable, "-m", "orchestrator", *map(str, arguments), "--json"]
    run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(run.stdout)


def main() -> None:
    """Compress, evaluate, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=EXAMPLE / "model")
    parser.add_argument("--text", type=Path, default=EXAMPLE / "wikitext-2-test.txt")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.6, 0.4, 0.2])
    parser.add_argument("--methods", nargs="+", default=["lestd", "tucker"])
    parser.add_argument("--window", default="256", help="inputs per window (default: %(default)s)")
    parser.add_argument("--executor", default="serial", help="serial or ray (default: %(default)s)")
    options = parser.parse_args()

    executor = ("--executor", options.executor)

    def evaluate(model: Path) -> dict[str, Any]:
        settings = ("--text", options.text, "--window", options.window)
        [figures] = lestd("evaluate", model, *settings, *executor)["models"]
        return dict(figures)

    def show(*cells: str) -> None:
        print(f"| {' | '.join(cells)} |", flush=True)

    show("method", "keep", "weights in scope, bytes", "files, bytes", "rel. error", "token ppl")
    show(*["---"] * 6)
    planned = lestd("plan", options.model, "--keep", str(options.keeps[0]))
    dense = evaluate(options.model)
    show(
        "dense",
        "1",
        f"{planned['total']['dense_bytes']:,}",
        f"{dense['model_bytes_on_disk']:,}",
        "0",
        f"{dense['token_perplexity']:.2f}",
    )
    with tempfile.TemporaryDirectory() as scratch:
        for method in options.methods:
            for keep in options.keeps:
                out = Path(scratch) / f"{method}-{keep}"
                settings = ("--keep", str(keep), "--method", method, "--out", out)
                made = lestd("compress", options.model, *settings, *executor)
                judged = evaluate(out)
                show(
                    method,
                    str(keep),
                    f"{made['stored_bytes']:,}",
                    f"{judged['model_bytes_on_disk']:,}",
                    f"{made['relative_error']:.4f}",
                    f"{judged['token_perplexity']:.2f}",
                )


if __name__ == "__main__":
    main()
