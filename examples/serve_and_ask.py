"""Serve a compressed model behind OpenAI's API, and ask it.

pip install "lestd[serve]"
python examples/serve_and_ask.py [DIRECTORY]
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import lestd

MODEL = Path(__file__).parent / "tiny-llama-wikitext2" / "model"


def main() -> None:
    """Compress, serve on a free port, ask once, stop."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "examples-out") / "small"
    assert lestd.compress(MODEL, out, keep=0.6, executor="serial").complete

    command = ["lestd", "serve", str(out), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split(" at ")[1].split(";")[0]
        question = {"model": str(out.absolute()), "prompt": "The city of", "max_tokens": 20}
        request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(question | {"temperature": 0}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            print(json.load(answer)["choices"][0]["text"])
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


if __name__ == "__main__":
    main()
