"""The work of one actor: read a task's tensors, decompose them, write the payload.

Reads only the byte ranges of its task, writes only its payload, and returns a `Result`; whatever
goes wrong with the input comes back as a `Failure` that names the tensor.

A worker that has several tasks works on them at once, each in a thread of its caller: one is read
while another is decomposed and a third is written. So its memory holds at most

    one group in the source's dtype (the next one), one group that is decomposed (its float32
    unfolding and the method's work space), and one payload (the last one's tensors); what
    calibration tells the second, and the first where that is at most `MOST_READ_AHEAD`

however long the run is, and `orchestrator.planning.plan` asks for that much. A bundle of tasks
keeps the group's rotation beside it until its last budget (`Bounds.reuse_bytes`).
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lestd_kernels.audit.rounding import most_expected
from lestd_kernels.errors import LestdError
from lestd_kernels.formats.chain import Chain
from lestd_kernels.formats.entries import with_stored_path
from lestd_kernels.formats.kinds import Decomposition
from lestd_kernels.methods import LOSS, METHODS, Decomposed, Group, MethodArgs
from lestd_kernels.methods.common.base import add_seconds
from lestd_kernels.methods.common.stopwatch import Stopwatch
from lestd_kernels.storage.few_bits import FULL_BITS
from lestd_kernels.storage.matrix import RANS
from lestd_kernels.tensorize import unfold_weights
from workers.checkpoint.checks import check_finite
from workers.checkpoint.metrics import metric_bytes, read_metrics
from workers.checkpoint.tensors import digest_safetensors, read_tensor, write_safetensors
from workers.contracts import (
    MOST_READ_AHEAD,
    Bundle,
    BundleResult,
    CurveResult,
    CurveTask,
    Failure,
    Result,
    Task,
)
from workers.host.devices import (
    device_name,
    peak_memory_bytes,
    require_exact_products,
    reset_peak_memory,
    return_freed_memory,
    software_versions,
)
from workers.host.failures import failure_of
from workers.storage.files import AnyPath, as_path, atomic_write, not_shared


def payload_name(task_id: str, sha256: str) -> str:
    """File name of a payload; it carries the content's hash, so a name is never reused."""
    return f"{task_id}-{sha256}.safetensors"


STATIONS = 3
"""Stages of a task: it is read, decomposed, written."""


class _Line:
    """Stations in a row, each with room for one task; a task leaves one when it enters the next."""

    def __init__(self, stations: int) -> None:
        self._stations = tuple(threading.Lock() for _ in range(stations))

    @contextmanager
    def pass_through(self) -> Iterator[Callable[[], None]]:
        """Yield a function that enters the next station, as soon as it is free."""
        ahead = iter(self._stations)
        held: list[threading.Lock] = []

        def advance() -> None:
            station = next(ahead)
            station.acquire()
            held.append(station)
            if len(held) > 1:
                held.pop(0).release()

        try:
            yield advance
        finally:
            for station in held:
                station.release()

    def last(self) -> threading.Lock:
        """The last station, for a task that needs it before the end."""
        return self._stations[-1]


_Encoded = tuple[Decomposed, dict[str, Tensor], int]
"""A decomposition, its tensors on the host, and the peak memory by then in bytes."""


class DecomposeWorker:
    """Decomposes slice groups on one device: one at a time, while others are read and written.

    `run` may be called from several threads; more than `STATIONS` at a time gain nothing.

    Args:
        payload_dir: path or URL where payloads go; the driver sees it too.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads to compute with. Part of the run's configuration, because the order
            of a reduction, and so the last bit of a result, depends on it.

    Raises:
        LestdError: device ``"cuda"`` where there is no GPU, or no `payload_dir` as seen from here.
    """

    def __init__(self, payload_dir: str, device: str = "cpu", threads: int = 1) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise LestdError(
                f"device cuda was requested, but this worker on {socket.gethostname()} sees no "
                "GPU; use --device cpu, or run where PyTorch sees one"
            )
        self._payload_dir = as_path(payload_dir)
        if isinstance(self._payload_dir, Path) and not self._payload_dir.is_dir():
            raise LestdError(not_shared([socket.gethostname()], [payload_dir]))
        return_freed_memory()
        self._line = _Line(STATIONS)
        # One thread computes for all tasks: OpenMP's threads belong to the thread that uses them.
        self._computing = ThreadPoolExecutor(
            1, initializer=torch.set_num_threads, initargs=(threads,)
        )
        require_exact_products()
        self._device = torch.device(device)
        self._name = f"{socket.gethostname()}:{os.getpid()}"

    def run(self, item: Task | Bundle) -> Result | CurveResult | BundleResult | Failure:
        """Decompose a task, or find its curve; never raises for a problem with its input.

        Returns when the payloads, if there are any, are on disk or in their store. A bundle has
        one outcome for each task, or fails as a whole: at what its tasks have in common, or for
        want of something that another try may find.
        """
        try:
            with self._line.pass_through() as advance:
                if isinstance(item, Task):
                    [outcome] = self._work((item,), (self._payload_dir,), advance)
                    return outcome
                directories = [as_path(directory) for directory in item.payload_dirs]
                outcomes = self._work(item.tasks, directories, advance)
                return BundleResult(item.task_id, tuple(outcomes))
        except Exception as error:
            return failure_of(item.task_id, item.block, error)

    def _work(
        self, tasks: Sequence[Task], directories: Sequence[AnyPath], advance: Callable[[], None]
    ) -> list[Result | CurveResult | Failure]:
        """One outcome for each task; the next task is encoded while a payload is written."""
        # Host time: to wait for the device here would be to wait for another task's work.
        clock = Stopwatch(torch.device("cpu"))
        advance()
        started_at = time.time()
        with clock("read"):
            weights, source_sha256 = self._read(tasks[0])
            read_ahead = metric_bytes(tasks[0]) <= MOST_READ_AHEAD
            metrics = read_metrics(tasks[0]) if read_ahead else {}

        advance()
        if not read_ahead:
            with clock("read"):
                metrics = read_metrics(tasks[0])
        encodings = self._encodings(tasks, weights, metrics, clock)
        encoding: Future[_Encoded] | None = next(encodings)
        # Each task bears its share of what is done for all.
        shared = {stage: seconds / len(tasks) for stage, seconds in clock.seconds.items()}
        outcomes: list[Result | CurveResult | Failure] = []
        for task, directory in zip(tasks, directories, strict=True):
            assert encoding is not None
            try:
                done, tensors, peak = encoding.result()
            except LestdError as error:
                failure = failure_of(task.task_id, task.block, error)
                if failure.kind != "application":
                    raise
                outcomes.append(failure)
                encoding = next(encodings, None)
                continue
            encoding = next(encodings, None)
            args = MethodArgs(**task.method_args)
            known: dict[str, Any] = {
                "task_id": task.task_id,
                "layer": task.layer,
                "block": task.block,
                "tensors": tuple(dict.fromkeys(ref.name for ref in task.tensors.values())),
                "method": task.method,
                "pattern": args.pattern,
                "source_sha256": source_sha256,
                "dense_bytes": task.dense_bytes,
                "started_at": started_at,
                "peak_memory_bytes": peak,
                "device": device_name(self._device),
                "worker": self._name,
                "node": socket.gethostname(),
                "versions": software_versions(),
            }
            if isinstance(task, CurveTask):
                outcomes.append(
                    CurveResult(
                        uniform_byte_budget=task.byte_budget,
                        squared_norm=done.metric_squared_norm,
                        uniform_squared_error=done.metric_squared_error,
                        points=done.curve,
                        seconds=add_seconds(shared, done.seconds),
                        **known,
                    )
                )
                continue

            if encoding is None:
                advance()
            writing = Stopwatch(torch.device("cpu"))
            with nullcontext() if encoding is None else self._line.last(), writing("write"):
                sha256, payload_bytes = digest_safetensors(tensors)
                payload = payload_name(task.task_id, sha256)
                atomic_write(directory / payload, partial(write_safetensors, tensors=tensors))
            del tensors
            decomposition = done.decomposition
            coded = RANS in decomposition.codecs
            bits = None if coded else _value_bits(decomposition, args)
            most = done.expected_squared_error
            if most is not None:
                rounding = FULL_BITS if bits is None else bits, args.factor_bits
                most = most_expected(most, done.metric_squared_norm, *rounding)
            outcomes.append(
                Result(
                    payload=payload,
                    sha256=sha256,
                    payload_bytes=payload_bytes,
                    format=with_stored_path(
                        decomposition.describe(task.path), task.tensor_prefix, task.dense_prefix
                    ),
                    ranks=decomposition.ranks,
                    nnz=decomposition.nnz,
                    density=decomposition.nnz / decomposition.core_elements,
                    codec="+".join(decomposition.codecs),
                    byte_budget=task.byte_budget,
                    stored_bytes=decomposition.stored_bytes,
                    relative_error=done.relative_error,
                    squared_norm=done.squared_norm,
                    squared_error=done.squared_error,
                    squared_energy_stage1=done.squared_energy_stage1,
                    squared_energy_stage2=done.squared_energy_stage2,
                    threshold=done.threshold,
                    hooi_iterations=done.hooi_iterations,
                    seconds=add_seconds(shared, done.seconds, writing.seconds),
                    slices=done.slices,
                    singular_values_1=done.singular_values[0],
                    singular_values_2=done.singular_values[1],
                    scope=task.scope,
                    metric=args.metric,
                    value_bits=bits,
                    factor_bits=args.factor_bits,
                    metric_squared_norm=done.metric_squared_norm,
                    metric_squared_error=done.metric_squared_error,
                    most_expected_squared_error=most,
                    expected_loss=done.metric_squared_error / 2 if args.metric == LOSS else None,
                    chosen=done.chosen.candidate if done.chosen else None,
                    runner_up=done.chosen.runner_up if done.chosen else None,
                    runner_up_loss=done.chosen.runner_up_loss if done.chosen else None,
                    memory_bytes=decomposition.memory_bytes,
                    bits_per_weight=8 * decomposition.stored_bytes / task.layout.elements,
                    coding="entropy" if coded else "fixed",
                    size=args.size,
                    **known,
                )
            )
            del done, decomposition
        return outcomes

    def _read(self, task: Task) -> tuple[dict[str, Tensor], str]:
        """The task's weights in the source's dtype, on the host, and the sha256 of their bytes."""
        digest = hashlib.sha256()
        weights = {}
        # Experts that one tensor stacks together, so that their bytes are digested as the tensor's.
        names = {ref.name: i for i, ref in reversed([*enumerate(task.tensors.values())])}
        for module, ref in sorted(task.tensors.items(), key=lambda item: names[item[1].name]):
            weights[module] = read_tensor(ref, digest, pinned=self._device.type == "cuda")
            check_finite(weights[module], ref)
        return weights, digest.hexdigest()

    def _encodings(
        self,
        tasks: Sequence[Task],
        weights: dict[str, Tensor],
        metrics: dict[str, Tensor],
        clock: Stopwatch,
    ) -> Iterator[Future[_Encoded]]:
        """Begin with one task after the other, as the next is asked for."""
        prepared = self._computing.submit(self._prepare, tasks[0], weights, metrics, clock).result()
        for task in tasks:
            reuse = task is not tasks[-1]
            encoding = self._computing.submit(self._encode, [prepared], task, reuse)
            if not reuse:
                del prepared
            yield encoding
            del encoding

    def _prepare(
        self,
        task: Task,
        weights: dict[str, Tensor],
        metrics: dict[str, Tensor],
        clock: Stopwatch,
    ) -> Any:
        """Prepare what the decompositions of a group share; its seconds go to `clock`."""
        reset_peak_memory(self._device)
        with torch.inference_mode():
            with clock("read"):
                on_device = {module: weight.to(self._device) for module, weight in weights.items()}
                weights.clear()
                unfolding = unfold_weights(on_device, task.layout)
                del on_device
            # Modules that read the same have one metric, there as here.
            moved = {id(metric): metric.to(self._device) for metric in metrics.values()}
            on_device = {name: moved[id(metric)] for name, metric in metrics.items()}
            metrics.clear()
            group = Group(
                unfolding,
                task.layout,
                getattr(torch, task.value_dtype),
                MethodArgs(**task.method_args),
                on_device,
            )
            del unfolding, moved, on_device
            prepared = METHODS[task.method].prepare(group)
            del group
        clock.seconds.update(add_seconds(clock.seconds, prepared.seconds))
        return prepared

    def _encode(self, given: list[Any], task: Task, reuse: bool) -> _Encoded:
        prepared = given.pop()  # The pool keeps its arguments until the result is out.
        with torch.inference_mode():
            curve_budgets = task.curve_budgets if isinstance(task, CurveTask) else ()
            try:
                done = METHODS[task.method].encode(
                    prepared, task.byte_budget, curve_budgets, reuse=reuse
                )
            except LestdError as error:
                raise LestdError(f"{task.block}: {error}") from error
            del prepared
            tensors = done.decomposition.named_tensors(task.tensor_prefix)
            tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        return done, tensors, peak_memory_bytes(self._device)


def _value_bits(decomposition: Decomposition, args: MethodArgs) -> int:
    """Bits of a stored value; a quantizer chooses them itself where 16 are asked for."""
    chosen = decomposition.chosen_bits if isinstance(decomposition, Chain) else None
    return args.value_bits if chosen is None else chosen
