"""An audit: what the blocks of a checkpoint are like, before any of them is compressed.

Blocks are read one at a time per worker, and nothing is kept but figures and, of a few evenly
spaced layers, bases. First come these reference layers, which leave their bases behind; then all
other blocks, which are held against them; the reference layers are read once more for that.

RUN_DIR/<audit_id>/
    evaluation.json     what is audited, for people
    pieces/3-4.json     what was found of a block; appears whole or not at all
    bases/              of the reference layers
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lestd_kernels.audit.diagnostics import evenly
from lestd_kernels.errors import LestdError
from orchestrator.architectures import LINEAR, SliceGroup
from orchestrator.config.run import RunConfig
from orchestrator.evaluation.pieces import EvaluationDirectory, run_pieces
from orchestrator.execution.executor import Executor, Listener, WorkerSpec
from orchestrator.planning.calibration_costs import WORKER_BASE_BYTES
from orchestrator.planning.groups_in_scope import named_groups
from orchestrator.source.checkpoint import Source
from workers.audit import AuditResult, AuditTask, AuditWorker, memory_bytes, reference_bytes
from workers.checkpoint.digests import sample_digests
from workers.checkpoint.headers import DTYPES
from workers.contracts import Failure
from workers.host.devices import software_versions
from workers.storage.building import make_own_directory
from workers.storage.files import AnyPath, as_path, is_file

REFERENCE_LAYERS = 4
"""Layers of a scope whose bases are held against the others."""

_VERSION = "1"


@dataclass(frozen=True)
class Audit:
    """Findings of an audit.

    Attributes:
        model: the checkpoint, as it was named.
        keeps: stored bytes / dense bytes that errors are predicted at, descending.
        results: of every block that is done, by scope and layer; what the second reading of a
            reference layer has found is with the first.
        planned: blocks that were asked for.
        failures: blocks without a result, or without one of their readings.
        skipped: readings that an earlier call had finished.
        reference_bytes: of the bases that are kept on disk.
        run_dir: where the pieces are.
    """

    model: str
    keeps: tuple[float, ...]
    results: tuple[AuditResult, ...]
    planned: int
    failures: tuple[Failure, ...]
    skipped: int
    reference_bytes: int
    run_dir: str

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return not self.failures and len(self.results) == self.planned


def default_audit_dir(model: str) -> AnyPath:
    """``MODEL.audit`` beside a local model; of one elsewhere, in the current directory."""
    if Path(model).is_dir():
        directory = as_path(model)
        if not directory.name:
            raise LestdError(f"{model} cannot be the directory of a model; name one inside it")
        return directory.with_name(directory.name + ".audit")
    return as_path(model.rstrip("/").rpartition("/")[2] + ".audit")


def check_keeps(keeps: Sequence[float]) -> tuple[float, ...]:
    """The keeps, largest first.

    Raises:
        LestdError: one is not between 0 and 1.
    """
    for keep in keeps:
        if not 0 < keep < 1:
            raise LestdError(f"--keep must be numbers between 0 and 1, got {keep:g}")
    return tuple(sorted(keeps, reverse=True))


def audit(
    source: Source,
    config: RunConfig,
    keeps: Sequence[float],
    executor: Executor,
    run_dir: AnyPath,
    *,
    progress: Callable[[int, int], None] | None = None,
    on_event: Listener | None = None,
) -> Audit:
    """Look at the blocks in scope; continue where an earlier such call stopped.

    Args:
        source: the checkpoint.
        config: scope, layers, device and threads count; see `RunConfig`.
        keeps: see `check_keeps`.
        executor: who computes.
        run_dir: where finished pieces are kept, in a directory per audit.
        progress: called with ``(readings done, readings in all)``.
        on_event: told of every start and retry.

    Raises:
        LestdError: the layers do not exist, a tensor is missing, or the directory cannot be
            written. A block that cannot be read is a failure in what is returned.
    """
    keeps = check_keeps(keeps)
    architecture = source.architecture
    groups = source.groups(config.scope)
    groups = [one for one in named_groups(groups, config) if one.scope != LINEAR]
    if not groups:
        raise LestdError(
            "an audit is of blocks, whose matrices may share a basis, and scope "
            f"{config.scope} of this {architecture.family} model has none; choose another --scope"
        )
    layers = set(config.select_layers(group.layer for group in groups))
    groups = [group for group in groups if group.layer in layers]
    device = config.device
    if device == "auto":
        device = "cuda" if executor.has_cuda() else "cpu"
    about = {
        "version": _VERSION,
        "source": {"config.json": source.config_json, "shards": sample_digests(source.index)},
        "blocks": [group.block for group in groups],
        "keeps": keeps,
        "device": device,
        "threads": config.threads,
        "versions": software_versions(),
    }
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    bases = run_dir / name / "bases"
    first, second = _tasks(groups, keeps, bases)
    store = EvaluationDirectory(
        run_dir / name,
        {"model": source.model, **about},
        (*first, *second),
        lambda fields: AuditResult(**fields),
    )
    make_own_directory(bases)
    for task in first:
        if not is_file(as_path(task.bases)):  # It is not finished without them.
            store.results.pop(task.task_id, None)
    skipped = len(store.results)
    failures: list[Failure] = []

    def work(tasks: Sequence[AuditTask]) -> None:
        """Run the tasks that are not finished; the largest first."""
        todo = [task for task in tasks if task.task_id not in store.results]
        todo.sort(key=lambda task: task.dense_bytes, reverse=True)
        needed = WORKER_BASE_BYTES + max(map(memory_bytes, todo), default=0)
        if todo:
            _require_memory(needed, executor)
        spec = WorkerSpec(
            AuditWorker,
            {"device": device, "threads": config.threads},
            threads=config.threads,
            memory_bytes=needed,
            device=device,
            device_memory_bytes=needed,
        )
        outcomes = run_pieces([store], executor, spec, progress, on_event, todo)
        failures.extend(one for one in outcomes if isinstance(one, Failure))

    work(first)
    known = [task for task in first if task.task_id in store.results]
    work([_held_against(task, known) for task in second])
    return Audit(
        model=source.model,
        keeps=keeps,
        results=_merged(store.ordered()),
        planned=len(groups),
        failures=tuple(failures),
        skipped=skipped,
        reference_bytes=sum(reference_bytes(task.layout) for task in first),
        run_dir=str(store.path),
    )


def _tasks(
    groups: Sequence[SliceGroup], keeps: tuple[float, ...], bases: AnyPath
) -> tuple[list[AuditTask], list[AuditTask]]:
    """The reference layers' tasks, and all that come after them; references are not filled in."""
    references: list[SliceGroup] = []
    for scope in dict.fromkeys(group.scope for group in groups):
        of_scope = [group for group in groups if group.scope == scope]
        if of_scope[1:]:
            references += [of_scope[i] for i in evenly(len(of_scope), REFERENCE_LAYERS)]
    held = {group.block for group in references}
    first = [
        replace(_task(group, keeps), place=place, bases=str(bases / f"{place}.safetensors"))
        for place, group in enumerate(references)
    ]
    second = [_task(group, keeps) for group in groups if group.block not in held]
    second += [
        replace(task, task_id=f"{task.task_id}, across layers", whole=False, bases="")
        for task in first
    ]
    return first, [replace(t, place=len(first) + i) for i, t in enumerate(second)]


def _task(group: SliceGroup, keeps: tuple[float, ...]) -> AuditTask:
    dtype = DTYPES[next(iter(group.tensors.values())).dtype]
    return AuditTask(
        task_id=group.block,
        place=0,
        layer=group.layer,
        block=group.block,
        scope=group.scope,
        tensors=group.tensors,
        layout=group.layout,
        value_dtype=str(dtype).removeprefix("torch."),
        keeps=keeps,
        whole=True,
    )


def _held_against(task: AuditTask, references: Sequence[AuditTask]) -> AuditTask:
    others = [
        (r.layer, r.bases) for r in references if r.scope == task.scope and r.block != task.block
    ]
    return replace(task, references=tuple(others))


def _require_memory(needed: int, executor: Executor) -> None:
    free = executor.worker_memory_bytes()
    if free < needed:
        raise LestdError(
            f"a worker has {free / 2**30:.1f} GiB of memory, but the audit of the largest block "
            f"needs {needed / 2**30:.1f} GiB; free some, or narrow --scope or --include"
        )


def _merged(results: Sequence[AuditResult]) -> tuple[AuditResult, ...]:
    """One result for each block, by scope and layer."""
    across = {result.block: result.across for result in results if result.findings is None}
    blocks = [result for result in results if result.findings is not None]
    blocks.sort(key=lambda result: (result.scope, result.layer, result.block))
    return tuple(replace(one, across=one.across or across.get(one.block, [])) for one in blocks)
