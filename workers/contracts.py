"""Messages between the driver and its workers: frozen dataclasses, and never a tensor.

A task names tensors; a worker reads them itself, writes a payload, and returns a result.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # They import torch, which readers of a manifest need not wait for.
    from lestd_kernels.methods import SliceStats
    from lestd_kernels.search.budget import CurvePoint
    from lestd_kernels.tensorize import GroupLayout

OUTSIDE = -1
"""In the place of a layer's index, for modules that stand outside of the decoder layers."""


MOST_READ_AHEAD = 1 << 30
"""Bytes of a group's metrics beyond which they are read when its turn comes to be decomposed.

Until then they would lie beside those of the group before it; and to read them takes seconds, to
decompose so large a group minutes."""


@dataclass(frozen=True)
class Packing:
    """Tensors that one in few bits is made of; see `workers.checkpoint.packed`.

    Attributes:
        kind: how the numbers are coded.
        parts: ``weight``, ``scale``, and perhaps ``zero_point``, ``columns`` or ``shape``.
        block: rows and columns that one scale counts for.
        bits: of a number.
        transposed: whether the matrices are kept ``(out, in)`` and the tensor has ``(in, out)``.
    """

    kind: Literal["float8", "float4", "integer"]
    parts: dict[str, TensorRef]
    block: tuple[int, int]
    bits: int = 8
    transposed: bool = False


@dataclass(frozen=True)
class TensorRef:
    """Location of one tensor, from its shard's header.

    Attributes:
        name: name of the tensor in the checkpoint.
        shard: absolute path or URL of the safetensors file.
        shape: shape as stored, ``(out, in)`` for the weight of a linear module.
        dtype: safetensors' name of the dtype: ``"BF16"``, ``"F16"``, ``"F32"``, ...
        byte_range: ``(start, stop)`` in the file, header included; of a packed one from 0.
        version: what the file at a URL was when its header was read; empty for a path.
        packing: what it is made of when it is read, where it does not lie there as it is.
    """

    name: str
    shard: str
    shape: tuple[int, ...]
    dtype: str
    byte_range: tuple[int, int]
    version: str = ""
    packing: Packing | None = None

    @property
    def stored_bytes(self) -> int:
        """Bytes of data of the tensor as it is read."""
        return self.byte_range[1] - self.byte_range[0]

    @property
    def on_disk(self) -> tuple[TensorRef, ...]:
        """What lies on disk of it: itself, or its parts."""
        return (self,) if self.packing is None else tuple(self.packing.parts.values())

    def matrix(self, number: int) -> TensorRef:
        """One of those that this tensor stacks along its first axis."""
        size, packing = self.stored_bytes // self.shape[0], self.packing
        start = self.byte_range[0] + number * size
        if packing is not None:
            parts = {name: part.matrix(number) for name, part in packing.parts.items()}
            start, packing = 0, replace(packing, parts=parts)
        place = (start, start + size)
        return replace(self, shape=self.shape[1:], byte_range=place, packing=packing)


@dataclass(frozen=True)
class Task:
    """One slice group of one layer, to be decomposed within a byte budget.

    Attributes:
        task_id: hash of everything that decides the payload's bytes (see
            `orchestrator.planning.plan`).
        layer: index of the decoder layer, or `OUTSIDE`.
        block: path of the block in the loaded model, ``"model.layers.0.self_attn"``.
        tensor_prefix: path of the block in the checkpoint's tensor names; differs from `block`
            only where the checkpoint leaves the base model's prefix out.
        tensors: module name -> its weight.
        layout: how the weights divide into slices.
        method: key of `lestd_kernels.methods.METHODS`.
        method_args: arguments of the method, as plain values.
        byte_budget: upper bound of the payload's tensor bytes, on disk and, with ``size`` memory
            among the arguments, once they are loaded.
        value_dtype: torch name of the dtype that values and factors are stored in, the
            checkpoint's own: ``"bfloat16"``, ``"float16"``, ``"float32"``.
        predicted_memory_bytes: what the plan expects the worker to need.
        scope: what the block is: ``"attention"``, ``"ffn"``, ``"experts"`` or ``"linear"``.
        metric_tensors: ``ModuleLayout.reads``, or that with a dot and one of
            `lestd_kernels.methods.common.base.STATISTICS` -> where it lies; none in the metric
            ``"weight"``. In the metric ``"norm"`` it is the weight of the preceding norm. In the
            metric ``"loss"`` there are ``<reads>.tokens`` and ``<module>.output`` as well.
        metric_digest: names what they were computed from.
        dense_prefix: path of the block in the dense checkpoint's tensor names, where a compressed
            model must have another one there; else empty.
    """

    task_id: str
    layer: int
    block: str
    tensor_prefix: str
    tensors: dict[str, TensorRef]
    layout: GroupLayout
    method: str
    method_args: dict[str, Any]
    byte_budget: int
    value_dtype: str
    predicted_memory_bytes: int
    scope: str = "attention"
    metric_tensors: dict[str, TensorRef] = field(default_factory=dict)
    metric_digest: str = ""
    dense_prefix: str = ""

    @property
    def path(self) -> str:
        """Path in the loaded model that the modules' names stand below.

        The block's, but for a group of one matrix, which is called by its matrix.
        """
        if self.scope != "linear":
            return self.block
        return self.block.removesuffix(self.layout.modules[0].name).removesuffix(".")

    @property
    def dense_bytes(self) -> int:
        """Bytes of the task's weights in the source checkpoint."""
        return sum(ref.stored_bytes for ref in self.tensors.values())


@dataclass(frozen=True)
class CurveTask(Task):
    """One slice group, whose error at several byte budgets is asked for.

    `byte_budget` is the one that uniform allocation gives; the error there is measured, not
    predicted.

    Attributes:
        curve_budgets: feasible byte budgets, ascending.
    """

    curve_budgets: tuple[int, ...] = ()


@dataclass(frozen=True)
class Bundle:
    """Tasks of several runs that differ in their byte budgets only: one slice group.

    Its tensors are read, and what no budget decides of the decomposition is done, once for all.

    Attributes:
        tasks: which may be curve tasks, too.
        payload_dirs: path or URL where the payload of each goes.
    """

    tasks: tuple[Task, ...]
    payload_dirs: tuple[str, ...]

    @property
    def task_id(self) -> str:
        """The first task's: no other bundle of the runs has it."""
        return self.tasks[0].task_id

    @property
    def block(self) -> str:
        """Path of the block, the same for all tasks."""
        return self.tasks[0].block

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weights once for each task, as the work goes."""
        return sum(task.dense_bytes for task in self.tasks)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Fields of every finished task; the manifest's tables have them.

    `squared_norm` is a squared Frobenius norm. `seconds` has one entry per stage; `started_at` is
    seconds since the epoch. `device` names the hardware: the GPU, or the machine and the vector
    instructions of its CPU.
    """

    task_id: str
    layer: int
    block: str
    tensors: tuple[str, ...]
    method: str
    pattern: str
    source_sha256: str
    dense_bytes: int
    squared_norm: float
    seconds: dict[str, float]
    started_at: float
    peak_memory_bytes: int
    device: str
    worker: str
    node: str
    versions: dict[str, str]
    attempt: int = 1


@dataclass(frozen=True, kw_only=True)
class CurveResult(Finished):
    """A group's error against bytes; the manifest's table `curves` has a row for each point.

    Errors and norms are in the run's metric, so those of different groups may be added up.
    `uniform_squared_error` is what `Result.squared_error` would be within `uniform_byte_budget`;
    the errors of `points` are predictions (see `CurvePoint`).
    """

    uniform_byte_budget: int
    uniform_squared_error: float
    points: tuple[CurvePoint, ...]


@dataclass(frozen=True, kw_only=True)
class Result(Finished):
    """A group that is encoded; the manifest's table `groups` has these fields.

    Energies and errors are squared Frobenius norms in the units of the weights;
    `relative_error` is not squared, and is recomputed from the tensors as stored. `slices` is the
    manifest's table of that name. `singular_values_1` and `_2` are those of the mode-1 and mode-2
    unfoldings of the weights, descending. `most_expected_squared_error` is what
    `metric_squared_error` is at most where nothing went wrong, see
    `lestd_kernels.audit.rounding.most_expected`. `expected_loss` is in nats per token, and None
    where the metric is not that of the loss. `chosen` and the runner-up are of the method auto.
    `memory_bytes` is what the stored tensors take once they are loaded, `size` which of both sizes
    `byte_budget` is for, `coding` ``"entropy"`` or
    ``"fixed"``; values coded by their entropy have no `value_bits`.
    """

    payload: str
    sha256: str
    payload_bytes: int
    format: dict[str, Any]
    ranks: dict[str, int]
    nnz: int
    density: float
    codec: str
    byte_budget: int
    stored_bytes: int
    relative_error: float
    squared_error: float
    squared_energy_stage1: float | None
    squared_energy_stage2: float | None
    threshold: float | None
    hooi_iterations: int | None
    slices: tuple[SliceStats, ...]
    singular_values_1: tuple[float, ...]
    singular_values_2: tuple[float, ...]
    scope: str
    metric: str
    value_bits: int | None
    factor_bits: int
    metric_squared_norm: float
    metric_squared_error: float
    most_expected_squared_error: float | None
    expected_loss: float | None
    chosen: str | None
    runner_up: str | None
    runner_up_loss: float | None
    memory_bytes: int
    bits_per_weight: float
    coding: str
    size: str


@dataclass(frozen=True)
class Failure:
    """Why an item has no result.

    ``kind`` is ``"application"`` (bad input or a bug: not retried), ``"infrastructure"`` (a worker
    or its machine was lost or failed, or a store did not answer: retried elsewhere up to the limit)
    or ``"device_memory"`` (a GPU has too little: retried once with nothing else on it).
    ``evidence`` is what is known of the end of a worker that was lost: Ray's words, its memory, the
    last lines of its log. ``worker``, host:pid, is who had the item; empty where nobody had.
    """

    task_id: str
    kind: Literal["application", "infrastructure", "device_memory"]
    error_type: str
    message: str
    traceback: str = field(default="", repr=False)
    attempt: int = 1
    evidence: str = field(default="", repr=False)
    worker: str = ""


@dataclass(frozen=True)
class BundleResult:
    """Outcomes of the tasks of a bundle, in their order; the failures are the input's."""

    task_id: str
    outcomes: tuple[Result | CurveResult | Failure, ...]
    attempt: int = 1
