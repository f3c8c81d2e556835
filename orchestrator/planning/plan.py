"""From shard headers to a plan: which tasks there are, what each may cost, what the run needs.

Nothing here reads a weight. The plan is data: the executor only schedules it, and the run keeps
to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from lestd_kernels.errors import LestdError
from lestd_kernels.formats.shared_tucker import FORMAT_VERSION
from lestd_kernels.methods import CALIBRATED, METHODS, NORM, WEIGHT, Bounds, MethodArgs
from orchestrator.architectures import LeftDense, SliceGroup
from orchestrator.config.run import RunConfig, scope_keep
from orchestrator.planning.allocation import curve_budgets
from orchestrator.planning.calibration_costs import (
    WORKER_BASE_BYTES,
    blocks_of,
    input_bytes,
    output_bytes,
)
from orchestrator.planning.groups_in_scope import groups_in_scope
from orchestrator.source.checkpoint import Source
from orchestrator.source.texts import read_calibration
from workers.checkpoint.headers import DTYPES
from workers.checkpoint.packed import working_bytes
from workers.contracts import MOST_READ_AHEAD, OUTSIDE, CurveTask, Task, TensorRef

# A payload's header, its rows with the singular values, its events; the small files of a model.
_FILES_OF_A_TASK_BYTES = 128 * 2**10
_SIDE_FILES_BYTES = 2**20
# Around which the curves are closest where a target decides the size: the same for every target.
_KEEP_OF_TARGETS = 0.3


@dataclass(frozen=True)
class PlannedTask:
    """A task and the bounds of its outcome, before any weight is read.

    Attributes:
        task: the task. While its budget is undecided it has that of uniform allocation.
        keep: its budget's share of its dense bytes.
        bounds: for its budget, or where that is undecided for any that it may get.
        curve: what finds its curve; None where its budget was never in question.
    """

    task: Task
    keep: float
    bounds: Bounds
    curve: CurveTask | None = None


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        family: name of the model's architecture.
        tasks: by layer.
        untouched: tensors that are copied byte for byte, or dequantized, by name.
        model_bytes: dense bytes of all tensors.
        allocation: how bytes are divided among the tasks.
        decided: whether the budgets are known; those of global allocation are after pass one.
        target_loss: what the model may cost, nats per token, where that decides its size.
        left_dense: modules of the layers that no task compresses for a reason of their own.
        quantized: how the source is quantized; every other number here is of the dense model.
        source_bytes: bytes on disk of its tensors.
    """

    family: str
    tasks: tuple[PlannedTask, ...]
    untouched: tuple[TensorRef, ...]
    model_bytes: int
    allocation: str
    decided: bool
    target_loss: float | None = None
    left_dense: tuple[LeftDense, ...] = ()
    quantized: str | None = None
    source_bytes: int = 0

    @property
    def curve_tasks(self) -> list[CurveTask]:
        """The tasks of pass one; none under uniform allocation."""
        return [planned.curve for planned in self.tasks if planned.curve is not None]

    @property
    def is_uniform(self) -> bool:
        """Whether every budget is the one that uniform allocation gives."""
        return all(p.curve is None or p.curve.byte_budget == p.task.byte_budget for p in self.tasks)

    @property
    def dense_bytes(self) -> int:
        """Dense bytes of the weights in scope."""
        return sum(planned.task.dense_bytes for planned in self.tasks)

    @property
    def budget_bytes(self) -> int:
        """Bytes that the weights in scope may take when stored."""
        if self.target_loss is not None and not self.decided:
            return sum(task.curve_budgets[-1] for task in self.curve_tasks)
        return sum(planned.task.byte_budget for planned in self.tasks)

    @property
    def max_bytes(self) -> int:
        """Bytes that the weights in scope take at most; below the budget where a pattern is."""
        bound = sum(planned.bounds.max_bytes for planned in self.tasks)
        return min(bound, self.budget_bytes)

    @property
    def memory_bytes(self) -> int:
        """About what the weights in scope take once they are loaded."""
        return sum(
            planned.bounds.memory_bytes or min(planned.bounds.max_bytes, planned.task.byte_budget)
            for planned in self.tasks
        )

    @property
    def size(self) -> str:
        """Which bytes the budgets count."""
        return str(self.tasks[0].task.method_args["size"])

    @property
    def stored_bytes(self) -> int:
        """About what the weights in scope take on disk."""
        if any(planned.bounds.disk_bytes is None for planned in self.tasks):
            return self.max_bytes
        return sum(planned.bounds.disk_bytes or 0 for planned in self.tasks)

    @property
    def untouched_bytes(self) -> int:
        """Bytes of the tensors out of scope."""
        return self.model_bytes - self.dense_bytes

    @property
    def worker_memory_bytes(self) -> int:
        """Predicted peak memory of one worker: of any tasks that meet in it."""
        tasks = [planned.task for planned in self.tasks]
        dense = max(task.dense_bytes for task in tasks)
        budget = max(task.byte_budget for task in tasks)
        decomposing = max(t.predicted_memory_bytes - t.dense_bytes - t.byte_budget for t in tasks)
        return decomposing + dense + budget

    @property
    def run_disk_bytes(self) -> int:
        """Predicted disk use of the run directory."""
        return self.budget_bytes + (len(self.tasks) + 1) * _FILES_OF_A_TASK_BYTES

    @property
    def out_disk_bytes(self) -> int:
        """Predicted disk use of the result, whose payloads are links into the run directory."""
        return self.untouched_bytes + _SIDE_FILES_BYTES

    @property
    def disk_bytes(self) -> int:
        """Predicted disk use of both, on one disk."""
        return self.run_disk_bytes + self.out_disk_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``plan --json`` and ``plan.json``."""
        layers = [
            {
                "task_id": planned.task.task_id,
                "layer": planned.task.layer,
                "block": planned.task.block,
                "tensors": list(dict.fromkeys(r.name for r in planned.task.tensors.values())),
                "method": planned.task.method,
                "pattern": planned.task.method_args["pattern"],
                "keep": planned.keep,
                "dense_bytes": planned.task.dense_bytes,
                "byte_budget": planned.task.byte_budget,
                "budget_range": None if self.decided else _budget_range(planned),
                "curve_task_id": planned.curve and planned.curve.task_id,
                "scope": planned.task.scope,
                "metric": planned.task.method_args["metric"],
                "value_bits": planned.task.method_args["value_bits"],
                "factor_bits": planned.task.method_args["factor_bits"],
                "max_R1": planned.bounds.max_R1,
                "max_R2": planned.bounds.max_R2,
                "max_nnz": planned.bounds.max_nnz,
                "max_bytes": planned.bounds.max_bytes,
                "memory_bytes": planned.bounds.memory_bytes or planned.bounds.max_bytes,
                "predicted_memory_bytes": planned.task.predicted_memory_bytes,
            }
            for planned in self.tasks
        ]
        totals = {
            "tasks": len(self.tasks),
            "dense_bytes": self.dense_bytes,
            "byte_budget": self.budget_bytes,
            "max_bytes": self.max_bytes,
            "stored_bytes": self.stored_bytes,
            "memory_bytes": self.memory_bytes,
            "untouched_bytes": self.untouched_bytes,
            "model_bytes": self.model_bytes,
            "source_bytes": self.source_bytes,
            "keep_of_model": (self.untouched_bytes + self.max_bytes) / self.model_bytes,
            "worker_memory_bytes": self.worker_memory_bytes,
            "run_disk_bytes": self.run_disk_bytes,
            "out_disk_bytes": self.out_disk_bytes,
            "disk_bytes": self.disk_bytes,
        }
        how = {"allocation": self.allocation, "budgets_decided": self.decided}
        how |= {"target_loss": self.target_loss, "quantized": self.quantized, "size": self.size}
        described = {"family": self.family} | how | {"layers": layers, "total": totals}
        if self.left_dense:
            described["left_dense"] = [one.model_dump(mode="json") for one in self.left_dense]
        return described


def _budget_range(planned: PlannedTask) -> list[int]:
    """The least and the most bytes that a task may get."""
    budgets = planned.curve.curve_budgets if planned.curve else (planned.task.byte_budget,)
    return [budgets[0], budgets[-1]]


def make_plan(source: Source, config: RunConfig) -> Plan:
    """Plan the compression of a checkpoint.

    Raises:
        LestdError: unknown architecture; a tensor missing or of a shape that config.json does not
            give; a layer list that names no layer; a budget that no rank fits.
    """
    groups, left_dense = groups_in_scope(source, config)
    chosen = {*config.select_layers(group.layer for group in groups), OUTSIDE}
    groups = [group for group in groups if group.layer in chosen]

    refs = source.index.tensors
    model_bytes = sum(ref.stored_bytes for ref in refs.values())
    in_scope = {ref.name for group in groups for ref in group.tensors.values()}
    scope_bytes = sum(refs[name].stored_bytes for name in in_scope)
    by_loss = config.target_loss is not None
    keep = _KEEP_OF_TARGETS if by_loss else scope_keep(config, scope_bytes, model_bytes)

    digest = calibration_digest(config) if config.used_metric in CALIBRATED else ""
    tasks = tuple(
        _plan_task(group, config, config.keep_of(group.layer, keep), digest) for group in groups
    )
    decided = config.used_allocation == "uniform"
    if not decided:
        own = config.layers_with_own_keep()
        tasks = tuple(p if p.task.layer in own else _undecided(p) for p in tasks)
    untouched = tuple(ref for name, ref in sorted(refs.items()) if name not in in_scope)
    return Plan(
        source.architecture.family,
        tasks,
        untouched,
        model_bytes,
        config.used_allocation,
        decided,
        config.target_loss,
        left_dense,
        None if source.quantization is None else source.quantization["quant_method"],
        sum(part.stored_bytes for ref in refs.values() for part in ref.on_disk),
    )


def _plan_task(
    group: SliceGroup, config: RunConfig, keep: float, metric_digest: str
) -> PlannedTask:
    dense_bytes = sum(ref.stored_bytes for ref in group.tensors.values())
    dtype, args = DTYPES[next(iter(group.tensors.values())).dtype], config.method_args()
    if args.metric == NORM and not group.norms:  # By default the metric of those that have one.
        args = replace(args, metric=WEIGHT)
    task = Task(
        task_id="",
        layer=group.layer,
        block=group.block,
        tensor_prefix=group.tensor_prefix,
        tensors=group.tensors,
        layout=group.layout,
        method=config.method,
        method_args=asdict(args),
        byte_budget=0,
        value_dtype=str(dtype).removeprefix("torch."),
        predicted_memory_bytes=0,
        scope=group.scope,
        metric_tensors=group.norms if args.metric == NORM else {},
        metric_digest=metric_digest,
        dense_prefix=group.dense_prefix,
    )
    budget = int(keep * dense_bytes)
    try:
        if config.target_loss is not None:
            budget = max(budget, METHODS[task.method].least_bytes(group.layout, dtype, args))
        return replace(with_budget(task, budget), keep=keep)
    except LestdError as error:
        where = group.block if group.layer == OUTSIDE else f"layer {group.layer}"
        raise LestdError(f"{where} at keep {keep:g}: {error}") from error


def with_budget(task: Task, budget: int) -> PlannedTask:
    """The task with another byte budget, and so with another id."""
    bounds = METHODS[task.method].bounds(
        task.layout, budget, getattr(torch, task.value_dtype), MethodArgs(**task.method_args)
    )
    # One group is decomposed, another read, a third written (workers.decompose): as if all were
    # of this size.
    memory = WORKER_BASE_BYTES + 4 * task.layout.elements + bounds.workspace_bytes
    memory += task.dense_bytes + budget + _metric_bytes(task)
    memory += max(map(working_bytes, task.tensors.values()))
    task = replace(task, byte_budget=budget, predicted_memory_bytes=memory)
    return PlannedTask(replace(task, task_id=_task_id(task)), budget / task.dense_bytes, bounds)


def _metric_bytes(task: Task) -> int:
    """Bytes of what calibration tells a task, and the next one where that is read ahead."""
    if task.method_args["metric"] not in CALIBRATED:
        return 0
    blocks = blocks_of([task])
    own = input_bytes(blocks) + output_bytes(blocks)
    return own + min(own, MOST_READ_AHEAD)


def calibration_digest(config: RunConfig) -> str:
    """Hash of the text and the settings that decide the activations of a model.

    Raises:
        LestdError: the text cannot be read.
    """
    assert config.calibrate_on is not None
    text = read_calibration(config.calibrate_on)
    settings = [hashlib.sha256(text).hexdigest(), config.samples, config.sample_tokens]
    if config.gram_width is not None:
        settings.append(config.gram_width)
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _undecided(planned: PlannedTask) -> PlannedTask:
    """A task whose budget its curve shall decide: it may get any from the least to all bytes."""
    task = planned.task
    method, dtype = METHODS[task.method], getattr(torch, task.value_dtype)
    args = MethodArgs(**task.method_args)
    least = method.least_bytes(task.layout, dtype, args)
    jumps = method.jumps(task.layout, dtype, args)
    budgets = curve_budgets(least, task.byte_budget, task.dense_bytes, jumps)
    curve = CurveTask(**vars(task), curve_budgets=budgets)
    curve = replace(curve, task_id=_task_id(curve, {"curve_budgets": budgets}))
    largest = with_budget(task, budgets[-1])
    task = replace(task, predicted_memory_bytes=largest.task.predicted_memory_bytes)
    # Together they take as much as with the budgets of uniform allocation.
    sizes = {name: getattr(planned.bounds, name) for name in ("memory_bytes", "disk_bytes")}
    return PlannedTask(task, planned.keep, replace(largest.bounds, **sizes), curve)


def _task_id(task: Task, more: Mapping[str, Any] | None = None) -> str:
    """Hash of what decides a payload's bytes, or a curve, apart from the weights' contents.

    Those are identified by the run's fingerprint; their sha256 stands in the result.
    """
    work = {
        "format_version": FORMAT_VERSION,
        "tensors": [(m, r.name, r.dtype, r.shape) for m, r in task.tensors.items()],
        "layout": task.layout,
        "prefix": task.tensor_prefix,
        "group": task.block,
        "method": task.method,
        "method_args": task.method_args,
        "byte_budget": task.byte_budget,
        "value_dtype": task.value_dtype,
        "metric_digest": task.metric_digest,
    }
    if task.dense_prefix:
        work["dense_prefix"] = task.dense_prefix
    text = json.dumps(work | dict(more or {}), sort_keys=True, default=_fields)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _fields(one: Any) -> dict[str, Any]:
    """Of a dataclass, not copied as by `asdict`, which took most of a large plan's time."""
    return {field.name: getattr(one, field.name) for field in fields(one)}
