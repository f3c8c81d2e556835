"""The run directory: everything a run knows, and the right of one driver to write it.

OUT.run/
    run.json      fingerprint: configuration, source, software; written first
    plan.json     what is to be done
    payloads/     <task_id>-<sha256>.safetensors, one per finished task
    manifest/     see orchestrator.manifest
    lock          held by the driver while it runs
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lestd_kernels.decomposition import FORMAT_VERSION
from lestd_kernels.errors import LestdError
from orchestrator.config import RunConfig
from orchestrator.manifest import MANIFEST_FORMAT, Manifest, read_json, write_json
from orchestrator.plan import Plan
from orchestrator.source import Source
from workers.checkpoint import explain_os_errors, sample_digests
from workers.decompose import software_versions


def default_run_dir(out: Path) -> Path:
    """``OUT.run``, beside the output."""
    return out.with_name(out.name + ".run")


def fingerprint(source: Source, config: RunConfig, device: str) -> dict[str, Any]:
    """Everything that decides the bytes of the result, as plain values.

    Not in it: paths, the executor, the number of workers. `device` is the class that ``auto``
    came to mean.
    """
    return {
        "format_version": FORMAT_VERSION,
        "manifest_format": MANIFEST_FORMAT,
        "config": config.model_dump(mode="json") | {"device": device},
        "source": {
            "config.json": source.config_json,
            "shards": sample_digests(source.index),
        },
        "versions": software_versions(),
    }


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Paths of the values that differ, each with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return found
    if old == new:
        return []
    return [f"{path} (was {_short(old)}, is {_short(new)})"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


class RunDirectory:
    """One run's directory on disk."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.payloads = self.path / "payloads"
        self.manifest = Manifest(self.path / "manifest")

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / "run.json").is_file()

    def check_usable(self) -> None:
        """Refuse a directory that holds something else.

        Raises:
            LestdError: the path is a file, or a non-empty directory without a run.
        """
        if self.exists or not self.path.exists():
            return
        # A crash before run.json leaves the lock alone.
        if not self.path.is_dir() or any(p.name != "lock" for p in self.path.iterdir()):
            raise LestdError(
                f"{self.path} is not empty and holds no run of lestd; choose another --run-dir"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the one driver of this run while the context lasts; ends with the process.

        Raises:
            LestdError: another driver holds the lock.
        """
        with explain_os_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "unknown"
                raise LestdError(
                    f"another driver ({holder}) works on {self.path}; wait for it to end, or stop "
                    "it, then run the same command again"
                ) from None
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            yield
        finally:
            os.close(handle)

    def is_locked(self) -> bool:
        """Whether a driver runs on this directory now."""
        try:
            handle = os.open(self.path / "lock", os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(handle)
        return False

    def begin(self, source: Source, config: RunConfig, device: str, plan: Plan) -> None:
        """Start the run, or continue it if it is the same.

        Raises:
            LestdError: the directory belongs to a run with another configuration or source; the
                sentence names the fields.
        """
        current = json.loads(json.dumps(fingerprint(source, config, device)))
        if self.exists:
            recorded = read_json(self.path / "run.json")["fingerprint"]
            if changes := _differences(recorded, current):
                raise LestdError(
                    f"{self.path} belongs to a run that differs in: {'; '.join(changes)}; "
                    "undo the change to continue it, choose another --out, or start over "
                    "with --fresh"
                )
            for leftover in self.path.rglob(".tmp-*"):
                leftover.unlink(missing_ok=True)
            return
        self.payloads.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "plan.json", plan.to_dict())
        about = {"model": source.model, "revision": source.revision}
        write_json(self.path / "run.json", {"fingerprint": current, "source": about})

    def remove_contents(self) -> None:
        """Delete the run, run.json last, but keep the lock that the caller holds."""
        for entry in sorted(self.path.iterdir(), key=lambda path: path.name == "run.json"):
            if entry.name == "lock":
                continue
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def remove(self) -> None:
        """Delete the directory.

        Raises:
            LestdError: it holds no run, or a driver is at work in it.
        """
        self.check_usable()
        with self.locked():
            self.remove_contents()
            shutil.rmtree(self.path)
