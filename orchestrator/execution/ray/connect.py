"""Which cluster a driver joins. Is handed the module `ray`: no import here."""

from __future__ import annotations

import os
import secrets
import socket
from typing import Any

from lestd_kernels.errors import LestdError, first_line

# Tensors never go through the object store: the smallest one that Ray accepts will do.
_OBJECT_STORE_BYTES = 80 * 2**20
_STARTS = 5
STARTED = "started a local Ray cluster, which ends with this command"


def join_or_start(ray: Any, address: str | None) -> str:
    """Connect to the cluster at an address; without one, as `RayExecutor` documents.

    Returns:
        Which cluster it is, in words.

    Raises:
        OSError, RuntimeError, ValueError: nobody answers there.
        LestdError: a cluster of its own cannot be started here.
    """
    quiet = {"log_to_driver": False, "logging_level": "error"}
    if address is None:
        address = _running_here(ray)
    if address is not None and address != "local":
        host, port = _host_and_port(address)
        if port is not None:
            # Ray would try for minutes; whoever does not answer this will not answer Ray.
            socket.create_connection((host, port), timeout=10).close()
        ray.init(address=address, **quiet)
        return f"joined the Ray cluster at {ray.get_runtime_context().gcs_address}"
    # A token for this cluster alone; left to itself, Ray writes one into the home directory, where
    # it changes what other clusters of this user ask for.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        _start(
            ray,
            address="local",
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            **quiet,
        )
    except (OSError, RuntimeError, ValueError) as error:
        advice = "use --executor serial"
        if "timed out" in str(error):
            advice = f"run the same command again when the machine is less busy, or {advice}"
        if "AF_UNIX" in str(error):  # Sockets lie there.
            advice = f"set RAY_TMPDIR to a shorter path, such as /tmp, or {advice}"
        if isinstance(error, PermissionError):  # Or it is another user's.
            advice = f"set RAY_TMPDIR to a directory of your own, or {advice}"
        raise LestdError(
            f"no local Ray cluster can be started ({first_line(error)}); {advice}"
        ) from error
    return STARTED


def _start(ray: Any, **options: Any) -> None:
    """``ray.init``, tried again where a node has not started within the 30 s that Ray gives it.

    A busy machine takes longer, and the next attempt finds in memory what this one had to read.

    Raises:
        OSError, RuntimeError, ValueError: it does not start.
    """
    for left in reversed(range(_STARTS)):
        try:
            ray.init(**options)
            return
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if not left:
                raise RuntimeError(str(error)) from error


def _running_here(ray: Any) -> str | None:
    """Address of the cluster that runs on this machine, if one does.

    ``ray start`` leaves its address in a file, where it stays when the cluster dies; so whether
    anybody listens there is asked first. Where that file lies Ray knows alone.
    """
    try:
        address: str | None = ray._private.services.find_bootstrap_address(None)
        host, port = _host_and_port(address or "")
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
