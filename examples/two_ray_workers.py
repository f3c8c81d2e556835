"""Two Ray workers, on a Ray of this machine; `--address` takes the same run to a cluster.

python examples/two_ray_workers.py [DIRECTORY]
"""

from __future__ import annotations

import sys
from pathlib import Path

import lestd

MODEL = Path(__file__).parent / "tiny-llama-wikitext2" / "model"


def main() -> None:
    """Compress with two workers, and read in the manifest who did what."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "examples-out") / "from-ray"
    outcome = lestd.compress(MODEL, out, keep=0.6, executor="ray", workers=2, address="local")
    assert outcome.complete, outcome.failures

    for row in lestd.Manifest(out / "manifest").groups().to_pylist():
        print(f"layer {row['layer']}: worker {row['worker']}, begun {row['started_at']:%X}")


if __name__ == "__main__":
    main()
