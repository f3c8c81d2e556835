"""The run directory: the files of a run, and the lock that lets one driver write them.

OUT.run/          on a disk or in an object store
    lock          held by the driver while it runs: a lock, in an object store a lease
    run.json      fingerprint: configuration, source, software
    plan.json     what is to be done
    payloads/     <task_id>-<sha256>.safetensors, one per finished task
    manifest/     see orchestrator.manifest.manifest
    untouched/    see orchestrator.model.untouched; there while a model is assembled
    calibration/  see orchestrator.compression.calibration; of a run in the metric of activations

The directory, and those above it, may be links, say to a scratch disk: what is deleted lies in it
and belongs to a run by its run.json. What is in it may not be links. OUT, which is renamed into
place, may not be one either, but those above it may.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from upath import UPath

from lestd_kernels.errors import LestdError
from orchestrator.manifest.manifest import Manifest, default_run_dir
from orchestrator.manifest.part_files import Damaged
from orchestrator.planning.plan import Plan
from orchestrator.run.fingerprint import holds_work, require_same, starts_over
from orchestrator.run.lease import is_held, leased
from orchestrator.source.checkpoint import Source
from workers.checkpoint.digests import shard_stats
from workers.checkpoint.tensors import hash_tensor
from workers.storage.building import is_same, open_own_file, require_removable
from workers.storage.files import (
    AnyPath,
    explain_os_errors,
    is_directory,
    is_file,
    list_names,
    make_directory,
    remove_file,
    remove_tree,
    try_lock,
)
from workers.storage.json_files import read_json, write_json
from workers.storage.names import MANIFEST_DIR, TEMPORARY

_AnyPathT = TypeVar("_AnyPathT", bound=AnyPath)
_OURS = {"lock", "run.json", "plan.json", "payloads", "manifest", "untouched", "calibration"}
# `lestd status` takes the lock for a moment to see whether it is free.
_LOCK_PATIENCE_SECONDS = 1.0


class RunDirectory:
    """One run's directory."""

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        self.payloads = self.path / "payloads"
        self.manifest = Manifest(self.path / MANIFEST_DIR)

    @property
    def exists(self) -> bool:
        """Whether a run was begun here.

        Raises:
            LestdError: the object store that it lies in does not answer.
        """
        return is_file(self.path / "run.json")

    def fingerprint(self) -> dict[str, Any] | None:
        """The fingerprint of the run that was begun here; None if none was.

        Raises:
            LestdError: run.json is damaged, or not of lestd.
        """
        return self._about("fingerprint") if self.exists else None

    def binding(self) -> dict[str, Any] | None:
        """The fingerprint that a call must have to go on here; None if any will do.

        A run that has finished nothing binds nobody: it may have been refused, and the corrected
        command is a run that differs.

        Raises:
            LestdError: see `fingerprint`.
        """
        tables = {name.partition(".")[0] for name in list_names(self.manifest.directory)}
        calibration = self.path / "calibration"
        kept = holds_work(self.payloads, calibration, calibration / "pieces")
        return self.fingerprint() if kept or tables & {"groups", "curves"} else None

    def _about(self, key: str) -> dict[str, Any]:
        value = read_json(self.path / "run.json").get(key)
        if not isinstance(value, dict):
            raise LestdError(
                f"{self.path} holds a run.json that lestd did not write; choose another --run-dir"
            )
        return value

    def check_usable(self) -> None:
        """Refuse a directory that holds anything that is not ours, or ours by its name only.

        The directory may be a link, to one on another disk; what is in it may not.

        Raises:
            LestdError: the path is a file, or holds files that a run does not make, links, or what
                belongs to no run; or the object store does not answer.
        """
        if is_file(self.path):
            raise LestdError(f"{self.path} is a file; choose another --run-dir")
        for name in list_names(self.path):
            if name not in _OURS and not name.startswith(TEMPORARY):
                raise LestdError(
                    f"{self.path} is not empty and holds {name}, which no lestd run "
                    "makes; choose another --run-dir"
                )
            if isinstance(self.path, Path) and (self.path / name).is_symlink():
                raise LestdError(
                    f"{self.path / name} is a link, which no lestd run makes; move it away, or "
                    "choose another --run-dir"
                )
        if self.fingerprint() is None:
            for name in _OURS - {"lock"}:
                if is_file(self.path / name) or list_names(self.path / name):
                    raise LestdError(
                        f"{self.path} holds {name}, but no run.json, so it is not a lestd run; "
                        "choose another --run-dir"
                    )

    @contextmanager
    def locked(self) -> Iterator[Callable[[], None]]:
        """Be the one driver of this run while the context lasts; ends with the process.

        Yields:
            A function that raises LestdError when another driver has taken the run over, as it can
            where the directory is in an object store.

        Raises:
            LestdError: another driver holds the lock.
        """
        if isinstance(self.path, UPath):
            with leased(self.path / "lock", self.path) as check:
                yield check
        else:
            with self._flocked(self.path):
                yield lambda: None

    @contextmanager
    def _flocked(self, directory: Path) -> Iterator[None]:
        lock = directory / "lock"
        patience = time.monotonic() + _LOCK_PATIENCE_SECONDS
        while (handle := _open_locked(lock)) is None:
            if time.monotonic() > patience:
                raise LestdError(
                    f"another driver ({_read_holder(lock)}) works on {directory}; wait for it to "
                    "end, or stop it, then run the same command again"
                )
            time.sleep(0.02)
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            yield
        finally:
            if not self.exists:  # Nothing was begun: leave nothing behind.
                with suppress(OSError):
                    lock.unlink()
                    directory.rmdir()
            os.close(handle)

    def is_locked(self) -> bool:
        """Whether a driver runs on this directory now.

        Raises:
            LestdError: its file system has no locks, or its object store does not answer.
        """
        lock = self.path / "lock"
        if isinstance(lock, UPath):
            return is_held(lock)
        try:
            handle = open_own_file(lock, 0)
        except (OSError, LestdError):
            return False
        try:
            return not try_lock(handle, lock.parent)
        finally:
            os.close(handle)

    def begin(self, source: Source, fingerprint: dict[str, Any], plan: Plan) -> None:
        """Start the run, or continue it; one that differs starts over if nothing is finished.

        Raises:
            LestdError: the directory belongs to a run with another configuration or source, or a
                source tensor that a finished task has read was changed since.
        """
        recorded = self.fingerprint()
        if (
            recorded is not None
            and self.binding() is None
            and starts_over(recorded, fingerprint, f"the run that was begun in {self.path}")
        ):
            self.remove_contents()
            recorded = None
        if recorded is not None:
            require_same(recorded, fingerprint, self.path)
            if isinstance(self.path, Path):
                for leftover in self.path.rglob(f"{TEMPORARY}*"):
                    leftover.unlink(missing_ok=True)
        stats = shard_stats(source.index)
        if recorded is not None and self._about("shard_stats") != stats:
            self._require_same_contents(source)
        if recorded is None or self._about("shard_stats") != stats:
            about = {"model": source.model, "revision": source.revision}
            run = {"fingerprint": fingerprint, "source": about, "shard_stats": stats}
            write_json(self.path / "run.json", run)
        make_directory(self.payloads)
        self.write_plan(plan)

    def write_plan(self, plan: Plan) -> None:
        """Say what is to be done; a second time, once global allocation has decided."""
        write_json(self.path / "plan.json", plan.to_dict())

    def _require_same_contents(self, source: Source) -> None:
        """A shard was touched: compare all that finished tasks have read of the source.

        The fingerprint samples each tensor; this reads them to the last byte.
        """
        read = self.manifest.groups().to_pylist() + self.manifest.curves().to_pylist()
        for row in {row["task_id"]: row for row in read}.values():
            digest = hashlib.sha256()
            for name in row["tensors"]:
                hash_tensor(source.index.tensors[name], digest)
            if digest.hexdigest() != row["source_sha256"]:
                raise LestdError(
                    f"{self.path} holds the result of {row['block']}, but its tensors "
                    f"({', '.join(row['tensors'])}) in {source.index.location} have changed since; "
                    "restore them to continue, or start over with --fresh"
                )

    def remove_contents(self) -> None:
        """Delete what a run makes, run.json last, but keep the lock that the caller holds.

        Raises:
            LestdError: a directory is write-protected, or an object store does not delete it.
        """
        if isinstance(self.path, Path):
            require_removable(self.path)
        remove_tree(self.payloads)
        remove_tree(self.manifest.directory)
        remove_tree(self.path / "untouched")
        remove_tree(self.path / "calibration")
        for name in ("plan.json", "run.json"):
            remove_file(self.path / name)

    def remove(self) -> None:
        """Delete the directory; where it is a link, all that is in it.

        Raises:
            LestdError: it holds no run, or a driver is at work in it.
        """
        if not is_directory(self.path) and not is_file(self.path):
            raise LestdError(f"{self.path} does not exist; there is nothing to delete")
        self.check_usable()
        with self.locked():
            self.remove_contents()  # Then whoever gives up the lock leaves nothing behind.
            for name in list_names(self.path):
                if name.startswith(TEMPORARY):
                    remove_file(self.path / name)


def run_dir_of(out: _AnyPathT) -> _AnyPathT:
    """The run directory beside a model, ``OUT.run``.

    Raises:
        LestdError: `out` is a run directory itself.
    """
    if is_file(out / "run.json"):
        model = out.name.removesuffix(".run")
        name = out.with_name(model) if model != out.name else "the directory given to --out"
        raise LestdError(f"{out} is a run directory; name {name}")
    return default_run_dir(out)


def compact(path: AnyPath) -> tuple[int, list[Damaged]]:
    """Put the many small files of a run's manifest together, while no driver works on it.

    Args:
        path: a run directory, or the model that a run beside it makes or has made. The manifest
            of a model whose run is gone is left as it is: all but its evaluations is together.

    Returns:
        Number of files that are gone, and the damaged ones, which stay as they are.

    Raises:
        LestdError: there is no manifest, a driver is at work, or no space is left.
    """
    for run in map(RunDirectory, (path, default_run_dir(path))):
        if run.exists:
            run.check_usable()
            with run.locked() as check:
                return run.manifest.compact(check), run.manifest.damaged()
    return 0, Manifest(path).damaged()


def _open_locked(lock: Path) -> int | None:
    """An open descriptor of the lock file that holds the lock; None if another has it."""
    with explain_os_errors(lock.parent):
        make_directory(lock.parent)
        handle = open_own_file(lock)
    try:
        # A driver that began nothing removes its lock file.
        if try_lock(handle, lock.parent) and is_same(handle, lock):
            return handle
    except LestdError:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _read_holder(lock: Path) -> str:
    try:
        return lock.read_text(encoding="utf-8", errors="replace").strip() or "unknown"
    except OSError:
        return "unknown"
