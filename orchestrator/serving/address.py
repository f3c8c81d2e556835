"""Where a server listens, and how it is asked."""

from __future__ import annotations

import errno
import json
import shlex
import socket
from typing import Any

from lestd_kernels.errors import LestdError


def example(url: str, name: str, chat: bool) -> str:
    """A command line that asks the server something.

    Args:
        url: of the server.
        name: of the model in requests.
        chat: whether the model has a template for messages.
    """
    asked: dict[str, Any] = {"model": name, "max_tokens": 20}
    if chat:
        path = "chat/completions"
        asked["messages"] = [{"role": "user", "content": "Who are you?"}]
    else:
        path = "completions"
        asked["prompt"] = "The city of"
    body = shlex.quote(json.dumps(asked))
    return f"curl {url}/v1/{path} -H 'Content-Type: application/json' -d {body}"


def free_port(host: str, port: int) -> int:
    """The port, if it can be listened on; for 0 one that is free.

    Raises:
        LestdError: it cannot.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
            return int(trial.getsockname()[1])
    except OSError as error:
        hint = "another --port" if error.errno == errno.EADDRINUSE else "another --host or --port"
        raise LestdError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); give {hint}"
        ) from error
