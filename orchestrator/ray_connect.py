"""Which cluster a driver joins. Is handed the module `ray`: no import here."""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path
from typing import Any

# Tensors never go through the object store: the smallest one that Ray accepts will do.
_OBJECT_STORE_BYTES = 80 * 2**20


def join_or_start(ray: Any, address: str | None) -> None:
    """Connect to the cluster at an address; without one, as `RayExecutor` documents.

    Raises:
        OSError, RuntimeError, ValueError: nobody answers there.
    """
    quiet = {"log_to_driver": False, "logging_level": "error"}
    if address is None:
        address = _running_here()
    if address is not None and address != "local":
        host, port = _host_and_port(address)
        if port is not None:
            # Ray would try for minutes; whoever does not answer this will not answer Ray.
            socket.create_connection((host, port), timeout=10).close()
        ray.init(address=address, **quiet)
        return
    # A token for this cluster alone; left to itself, Ray writes one into the home directory, where
    # it changes what other clusters of this user ask for.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        **quiet,
    )


def _running_here() -> str | None:
    """Address of the cluster that runs on this machine, if one does.

    ``ray start`` leaves its address in a file, where it stays when the cluster dies; so whether
    anybody listens there is asked first.
    """
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        address = file.read_text(encoding="utf-8").strip()
        host, port = _host_and_port(address)
        if port is None:
            return None
        socket.create_connection((host, port), timeout=2).close()
    except (OSError, UnicodeDecodeError):
        return None
    return address


def _host_and_port(address: str) -> tuple[str, int | None]:
    """Parts of ``HOST:PORT``; no port for another kind of address, such as ``ray://...``."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return address, None
    return host, int(port)
