"""Methods at the same bytes, and how to read the table that comes out.

python examples/compare_methods.py [DIRECTORY]
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parent / "tiny-llama-wikitext2"


def perplexity(row: dict[str, Any]) -> float:
    """Of a row of the table, which has all that the evaluation said."""
    figures = {one["metric"]: one["value"] for one in row["point"]["quality"]}
    return float(figures["token_perplexity"])


def main() -> None:
    """Compare three methods at two sizes, and name the best of each size."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "examples-out") / "compared"
    command = ["lestd", "compare", EXAMPLE / "model", "--methods", "lestd, svd, magnitude"]
    command += ["--keep", "0.6,0.4", "--out", out, "--text", EXAMPLE / "wikitext-2-test.txt"]
    command += ["--max-windows", "4", "--no-speed", "--executor", "serial", "--json"]
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, check=True)

    table = json.loads(done.stdout)
    for keep in (0.6, 0.4):
        # Equal bytes, so the smaller perplexity is the better method for this model.
        found = [row for row in table["rows"] if row["point"]["keep"] == keep]
        best = min(found, key=perplexity)
        print(f"keep {keep}: {best['label']}, perplexity {perplexity(best):.2f}")
    print(f"dense: perplexity {perplexity(table['dense']):.2f}")
    print((out / "compare.md").read_text())


if __name__ == "__main__":
    main()
