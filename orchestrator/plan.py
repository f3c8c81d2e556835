"""From shard headers to a plan: which tasks there are, what each may cost, what the run needs.

Nothing here reads a weight. The plan is data: the executor only schedules it, and the run keeps
to it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from lestd_kernels.decomposition import FORMAT_VERSION
from lestd_kernels.errors import LestdError
from lestd_kernels.methods import METHODS, Bounds
from orchestrator.architectures import AttentionGroup, find_architecture
from orchestrator.config import RunConfig, scope_keep
from orchestrator.source import Source
from workers.contracts import Task, TensorRef
from workers.headers import DTYPES

# A payload's header, its rows and events; the tokenizer and other small files of a model.
_FILES_OF_A_TASK_BYTES = 64 * 2**10
_SIDE_FILES_BYTES = 2**20

WORKER_BASE_BYTES = 600 * 2**20
"""Resident memory of a worker before its first task: the interpreter, torch and Ray."""


@dataclass(frozen=True)
class PlannedTask:
    """A task and what is known of its outcome before any weight is read."""

    task: Task
    keep: float
    bounds: Bounds


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        family: name of the model's architecture.
        tasks: by layer.
        untouched: tensors that are copied byte for byte, by name.
        model_bytes: dense bytes of all tensors.
    """

    family: str
    tasks: tuple[PlannedTask, ...]
    untouched: tuple[TensorRef, ...]
    model_bytes: int

    @property
    def dense_bytes(self) -> int:
        """Dense bytes of the weights in scope."""
        return sum(planned.task.dense_bytes for planned in self.tasks)

    @property
    def budget_bytes(self) -> int:
        """Bytes that the weights in scope may take when stored."""
        return sum(planned.task.byte_budget for planned in self.tasks)

    @property
    def max_bytes(self) -> int:
        """Bytes that the weights in scope take at most; below the budget where a pattern is."""
        return sum(planned.bounds.max_bytes for planned in self.tasks)

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
                "group": planned.task.group,
                "tensors": [ref.name for ref in planned.task.tensors.values()],
                "method": planned.task.method,
                "pattern": planned.task.method_args["pattern"],
                "keep": planned.keep,
                "dense_bytes": planned.task.dense_bytes,
                "byte_budget": planned.task.byte_budget,
                "max_R1": planned.bounds.max_R1,
                "max_R2": planned.bounds.max_R2,
                "max_nnz": planned.bounds.max_nnz,
                "max_bytes": planned.bounds.max_bytes,
                "predicted_memory_bytes": planned.task.predicted_memory_bytes,
            }
            for planned in self.tasks
        ]
        totals = {
            "tasks": len(self.tasks),
            "dense_bytes": self.dense_bytes,
            "byte_budget": self.budget_bytes,
            "max_bytes": self.max_bytes,
            "untouched_bytes": self.untouched_bytes,
            "model_bytes": self.model_bytes,
            "keep_of_model": (self.untouched_bytes + self.max_bytes) / self.model_bytes,
            "worker_memory_bytes": self.worker_memory_bytes,
            "disk_bytes": self.disk_bytes,
        }
        return {"family": self.family, "layers": layers, "total": totals}


def make_plan(source: Source, config: RunConfig) -> Plan:
    """Plan the compression of a checkpoint.

    Raises:
        LestdError: unknown architecture; a tensor missing or of a shape that config.json does not
            give; a layer list that names no layer; a budget that no rank fits.
    """
    architecture = find_architecture(source.config)
    groups = architecture.attention_groups(source.config, source.index)
    chosen = set(config.select_layers(group.layer for group in groups))
    groups = [group for group in groups if group.layer in chosen]

    refs = source.index.tensors
    model_bytes = sum(ref.stored_bytes for ref in refs.values())
    in_scope = {ref.name for group in groups for ref in group.tensors.values()}
    scope_bytes = sum(refs[name].stored_bytes for name in in_scope)
    keep = scope_keep(config, scope_bytes, model_bytes)

    tasks = tuple(_plan_task(group, config, config.keep_of(group.layer, keep)) for group in groups)
    untouched = tuple(ref for name, ref in sorted(refs.items()) if name not in in_scope)
    return Plan(architecture.family, tasks, untouched, model_bytes)


def _plan_task(group: AttentionGroup, config: RunConfig, keep: float) -> PlannedTask:
    dense_bytes = sum(ref.stored_bytes for ref in group.tensors.values())
    budget = int(keep * dense_bytes)
    dtype = DTYPES[next(iter(group.tensors.values())).dtype]
    method_args = config.method_args()
    try:
        bounds = METHODS[config.method].bounds(group.layout, budget, dtype, method_args)
    except LestdError as error:
        raise LestdError(f"layer {group.layer} at keep {keep:g}: {error}") from error
    value_dtype = str(dtype).removeprefix("torch.")
    # One group is decomposed, another read, a third written (workers.decompose): as if all were
    # of this size.
    memory = WORKER_BASE_BYTES + 4 * group.layout.elements + bounds.workspace_bytes
    memory += dense_bytes + budget
    task = Task(
        task_id=_task_id(group, config.method, asdict(method_args), budget, value_dtype),
        layer=group.layer,
        group=group.group,
        tensor_prefix=group.tensor_prefix,
        tensors=group.tensors,
        layout=group.layout,
        method=config.method,
        method_args=asdict(method_args),
        byte_budget=budget,
        value_dtype=value_dtype,
        predicted_memory_bytes=memory,
    )
    return PlannedTask(task, keep, bounds)


def _task_id(
    group: AttentionGroup, method: str, method_args: dict[str, Any], budget: int, value_dtype: str
) -> str:
    """Hash of what decides a payload's bytes, apart from the weights' contents.

    Those are identified by the run's fingerprint; their sha256 stands in the result.
    """
    work = {
        "format_version": FORMAT_VERSION,
        "tensors": [(m, r.name, r.dtype, r.shape) for m, r in group.tensors.items()],
        "layout": asdict(group.layout),
        "prefix": group.tensor_prefix,
        "group": group.group,
        "method": method,
        "method_args": method_args,
        "byte_budget": budget,
        "value_dtype": value_dtype,
    }
    text = json.dumps(work, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
