"""Kill a run with SIGKILL, run the same command again: the model is the same, byte for byte.

python examples/resume_after_kill.py [DIRECTORY]
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from pathlib import Path

MODEL = Path(__file__).parent / "tiny-llama-wikitext2" / "model"


def compress(out: Path) -> subprocess.Popen[bytes]:
    """Start `lestd compress`."""
    command = ["lestd", "compress", MODEL, "--keep", "0.6", "--out", out, "--executor", "serial"]
    return subprocess.Popen([str(word) for word in command])


def digests(model: Path) -> dict[str, str]:
    """Sha256 of every file of weights."""
    shards = sorted(model.glob("*.safetensors"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards}


def main() -> None:
    """Kill a run after its first block, finish it, and hold it against one that nobody killed."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "examples-out")
    killed, whole = root / "killed", root / "whole"

    run = compress(killed)
    finished = root / "killed.run" / "manifest" / "groups"
    while run.poll() is None and not list(finished.glob("*.parquet")):
        time.sleep(0.01)
    run.kill()
    print(f"killed: exit status {run.wait()}, {len(list(finished.glob('*.parquet')))} blocks kept")

    assert compress(killed).wait() == 0
    assert compress(whole).wait() == 0
    assert digests(killed) == digests(whole)
    for name, digest in digests(killed).items():
        print(f"{name}: {digest[:16]} in both")


if __name__ == "__main__":
    main()
