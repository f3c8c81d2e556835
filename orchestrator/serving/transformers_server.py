"""A model behind HTTP: Transformers' own server, pinned to one model.

What the server answers is written here in one place: `/v1/completions`, `/v1/chat/completions` and
`/v1/responses`, streamed or not, `/v1/models`, and `/health` once the weights are loaded.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lestd_kernels.errors import LestdError
from orchestrator.evaluation.model import resolve_dtype

_STOP_SECONDS = 10.0


def serve(
    directory: Path, host: str, port: int, dtype: str, device: str, ready: Callable[[str], None]
) -> None:
    """Serve a compressed or a dense model until SIGINT or SIGTERM; answers under way are finished.

    Args:
        directory: where it lies.
        host: address to listen on.
        port: port to listen on.
        dtype: compute dtype, see `resolve_dtype`.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        ready: called when requests are answered, with the server's URL.

    Raises:
        LestdError: the packages of a server are missing, or it does not start.
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise LestdError(
            'serving needs packages that are not installed; pip install "lestd[serve]"'
        )
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    stop = threading.Event()
    # Before the server's thread: a signal while weights load ends it too, in its own time.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    server = _start(directory, host, port, resolve_dtype(directory, dtype, device), device)
    try:
        while not (server.server.started or stop.wait(0.05)):
            if not server._thread.is_alive():
                raise LestdError(f"the server at {host}:{port} did not start; see its log above")
        if not stop.is_set():
            ready(f"http://{host}:{port}")
        stop.wait()
    finally:
        server.server.should_exit = True
        server._thread.join(_STOP_SECONDS)
        server.reset_loaded_models()


def _start(directory: Path, host: str, port: int, dtype: str, device: str) -> Any:
    """Load the model and start the server, in a thread of its own."""
    from transformers.cli.serve import Serve

    name = str(directory)
    server: Any = None

    class Pinned(Serve):
        """Knows one model, by its directory, and lets nobody load or unload any."""

        def start_server(self) -> None:
            app: Any = self.server.config.app
            hidden = {"/load_model", "/reset", "/v1/models", "/v1/audio/transcriptions"}
            app.router.routes[:] = [
                route for route in app.router.routes if getattr(route, "path", "") not in hidden
            ]
            app.add_api_route("/v1/models", _models, methods=["GET"])
            for handler in logging.getLogger("uvicorn.access").handlers:
                if isinstance(handler, logging.StreamHandler):
                    handler.setStream(sys.stderr)  # Only results belong on standard output.
            super().start_server()  # type: ignore[no-untyped-call]

    def _models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "lestd"}]}

    server = Pinned(
        force_model=name, device=device, dtype=dtype, host=host, port=port, non_blocking=True
    )
    return server
