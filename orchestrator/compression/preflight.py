"""Refusals before anything is written: needs of a compression that are not met."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from lestd_kernels.errors import LestdError
from lestd_kernels.methods import CALIBRATED
from orchestrator.config.run import RunConfig
from orchestrator.console.output import size
from orchestrator.execution.executor import Executor
from orchestrator.model.untouched import UNTOUCHED_DIR
from orchestrator.planning.plan import Plan
from orchestrator.run.directory import RunDirectory
from orchestrator.source.checkpoint import Source
from orchestrator.source.texts import samples_of
from workers.storage.files import AnyPath, list_files, not_shared, unseen
from workers.storage.names import TEMPORARY
from workers.storage.ranges import is_url


def require_usable(source: Source, config: RunConfig, executor: Executor) -> None:
    """Refuse a calibration text that does not do, and a device that is not there.

    Raises:
        LestdError: see `read_samples` and `Executor.require_cuda`.
    """
    if config.device == "cuda":
        executor.require_cuda()
    if config.used_metric in CALIBRATED:
        samples_of(source, config)


def require_apart(source: Source, out: AnyPath, run_dir: AnyPath) -> None:
    """Refuse directories that lie in one another, where replacing one would delete another."""
    # Unlike resolve(), no error of a link to itself, which making the directory meets.
    out, run_dir = (
        Path(os.path.realpath(path)) if isinstance(path, Path) else path for path in (out, run_dir)
    )
    location = source.index.location
    model = location if is_url(location) else source.directory.resolve()
    for inner, outer in ((run_dir, out), (out, run_dir), (model, out), (model, run_dir)):
        if f"{inner}/".startswith(str(outer).rstrip("/") + "/"):
            raise LestdError(
                f"{inner} lies in {outer}; the model, --out and --run-dir must be directories of "
                "their own"
            )


def require_disk(plan: Plan, out: AnyPath, run_dir: AnyPath, reclaimed: int) -> None:
    """Refuse a run that its disks cannot hold; `reclaimed` bytes are about to be deleted.

    What is copied from a source elsewhere is fetched into a local run directory, and kept there
    until the model is whole. An object store is taken to hold whatever it is given.
    """
    needs: dict[int, tuple[Path, int]] = {}
    fetched = 0
    if isinstance(run_dir, Path):
        if any(is_url(ref.shard) for ref in plan.untouched):
            fetched = plan.untouched_bytes
        present = {} if reclaimed else list_files(run_dir / "payloads")
        kept = {} if reclaimed else list_files(run_dir / UNTOUCHED_DIR)
        needed = max(plan.run_disk_bytes - sum(present.values()), 0)
        disk = _existing(run_dir)
        needs[disk.stat().st_dev] = disk, needed + max(fetched - sum(kept.values()), 0)
    if isinstance(out, Path):
        disk = _existing(out)
        device = disk.stat().st_dev
        if device in needs:  # Payloads, and what was fetched, are linked into the model.
            disk, needed = needs[device]
            needs[device] = disk, needed + plan.out_disk_bytes - fetched
        else:
            needs[device] = disk, plan.out_disk_bytes + plan.run_disk_bytes
    for disk, needed in needs.values():
        free = shutil.disk_usage(disk).free + reclaimed
        if free < needed:
            raise LestdError(
                f"the disk of {disk} has {size(free)} free, but the run needs {size(needed)} "
                "there; free some, or choose another --out and --run-dir"
            )


def require_shared(source: Source, run: RunDirectory, executor: Executor) -> None:
    """Refuse nodes that do not see the disks of the run and of the source."""
    shard = next(iter(source.index.tensors.values())).shard
    paths = [] if "://" in shard else [shard]
    probe = run.path / f"{TEMPORARY}probe-{secrets.token_hex(8)}"
    if isinstance(probe, Path):
        # A fresh file: a directory of the same name may be there on a node of its own disk.
        probe.touch(exist_ok=False)
        paths.append(str(probe.resolve()))
    try:
        answers = executor.on_nodes(unseen, paths) if paths else {}
    finally:
        if isinstance(probe, Path):
            probe.unlink()
    if blind := {node: absent for node, absent in answers.items() if absent}:
        absent = {str(Path(path).parent) for paths in blind.values() for path in paths}
        raise LestdError(not_shared(sorted(blind), sorted(absent)))


def require_memory(plan: Plan, executor: Executor) -> None:
    """Refuse a run whose largest group no worker has the memory for."""
    offered = executor.worker_memory_bytes()
    if plan.worker_memory_bytes > offered:
        raise LestdError(
            f"a worker needs about {size(plan.worker_memory_bytes)} of memory, but {size(offered)} "
            "are free on the machine that offers most; free some, or join a cluster of larger "
            "machines with --address"
        )


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that exists."""
    return next(p for p in (path, *path.parents) if p.exists())


def file_bytes(*directories: AnyPath) -> int:
    """Bytes of all files below local directories; one with several links counts once."""
    local = [directory for directory in directories if isinstance(directory, Path)]
    stats = [p.lstat() for d in local for p in d.rglob("*") if p.is_file()]
    return sum({stat.st_ino: stat.st_size for stat in stats}.values())
