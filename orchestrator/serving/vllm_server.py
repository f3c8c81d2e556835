"""A model behind HTTP: vLLM's own server, in its Transformers backend.

It is a program of its own, which finds the format by the entry point of
`lestd_kernels.vllm_plugin`; here it is started, waited for, and ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path

from lestd_kernels.errors import LestdError

_PAUSE_SECONDS = 0.5
_STOP_SECONDS = 30.0


def serve(directory: Path, host: str, port: int, dtype: str, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        directory: where the model lies.
        host: address to listen on.
        port: port to listen on.
        dtype: compute dtype, or ``"auto"`` for vLLM's choice.
        ready: called when requests are answered, with the server's URL.

    Raises:
        LestdError: the server ended by itself; it has said why.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(directory)]
    command += ["--model-impl", "transformers", "--dtype", dtype, "--host", host]
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    # In a session of its own: Ctrl-C reaches it through us, once.
    server = subprocess.Popen(
        [*command, "--port", str(port)], stdout=sys.stderr, start_new_session=True
    )
    url = f"http://{host}:{port}"
    try:
        while not (answers(url) or stop.wait(_PAUSE_SECONDS)):
            _require_alive(server)
        if not stop.is_set():
            ready(url)
        while not stop.wait(_PAUSE_SECONDS):
            _require_alive(server)
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def answers(url: str) -> bool:
    """Whether a server says that it is healthy."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=_STOP_SECONDS) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _require_alive(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is not None:
        raise LestdError(
            f"vLLM ended with exit code {server.returncode}, see its log above; "
            "--engine transformers does without it"
        )
