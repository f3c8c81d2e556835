"""The work of one actor: read a task's tensors, decompose them, write the payload.

Reads only the byte ranges of its task, writes only its payload, and returns a `Result`; whatever
goes wrong with the input comes back as a `Failure` that names the tensor.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
import traceback
from importlib.metadata import version
from pathlib import Path

import torch

from lestd_kernels.errors import LestdError
from lestd_kernels.methods import METHODS, Decomposed, MethodArgs
from lestd_kernels.methods.steps import Stopwatch
from lestd_kernels.tensorize import unfold_weights
from workers.checkpoint import check_finite, read_tensor, serialize_safetensors
from workers.contracts import CurveResult, CurveTask, Failure, Result, Task
from workers.devices import device_name, peak_memory_bytes, reset_peak_memory
from workers.files import atomic_write


def payload_name(task_id: str, sha256: str) -> str:
    """File name of a payload; it carries the content's hash, so a name is never reused."""
    return f"{task_id}-{sha256}.safetensors"


def software_versions() -> dict[str, str]:
    """Versions of what decides a payload's bytes."""
    return {"lestd": version("lestd"), "torch": torch.__version__}


class DecomposeWorker:
    """Decomposes slice groups, one at a time, on one device.

    Args:
        payload_dir: where payloads go; on a disk that the driver sees too.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads to compute with. Part of the run's configuration, because the order
            of a reduction, and so the last bit of a result, depends on it.

    Raises:
        LestdError: device ``"cuda"`` where there is no GPU.
    """

    def __init__(self, payload_dir: str, device: str = "cpu", threads: int = 1) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise LestdError(
                f"device cuda asked for, but this worker on {socket.gethostname()} sees no GPU; "
                "use --device cpu, or run where PyTorch sees one"
            )
        torch.set_num_threads(threads)
        # TF32 keeps 10 bits of mantissa: too few for factors that are to be orthonormal.
        torch.backends.cuda.matmul.allow_tf32 = False
        self._payload_dir = Path(payload_dir)
        self._device = torch.device(device)
        self._name = f"{socket.gethostname()}:{os.getpid()}"

    def run(self, task: Task) -> Result | CurveResult | Failure:
        """Decompose one task, or find its curve; never raises for a problem with its input."""
        try:
            with torch.inference_mode():
                return self._find_curve(task) if isinstance(task, CurveTask) else self._encode(task)
        except LestdError as error:
            return Failure(task.task_id, "application", type(error).__name__, str(error))
        except Exception as error:
            text = f"{task.group}: {type(error).__name__}: {error}"
            return Failure(
                task.task_id, "application", type(error).__name__, text, traceback.format_exc()
            )

    def _decompose(
        self, task: Task, clock: Stopwatch, curve_budgets: tuple[int, ...] = ()
    ) -> tuple[Decomposed, str]:
        """The decomposition, and the sha256 of the tensors that were read."""
        reset_peak_memory(self._device)
        with clock("read"):
            digest = hashlib.sha256()
            weights = {}
            for module, ref in task.tensors.items():
                weight = read_tensor(ref, digest)
                check_finite(weight, ref)
                weights[module] = weight.to(self._device)
            unfolding = unfold_weights(weights, task.layout)
            del weights
        try:
            done = METHODS[task.method].decompose(
                unfolding,
                task.layout,
                task.byte_budget,
                getattr(torch, task.value_dtype),
                MethodArgs(**task.method_args),
                curve_budgets,
            )
        except LestdError as error:
            raise LestdError(f"{task.group}: {error}") from error
        return done, digest.hexdigest()

    def _find_curve(self, task: CurveTask) -> CurveResult:
        started_at, clock = time.time(), Stopwatch(self._device)
        done, source_sha256 = self._decompose(task, clock, task.curve_budgets)
        return CurveResult(
            task_id=task.task_id,
            layer=task.layer,
            group=task.group,
            tensors=tuple(ref.name for ref in task.tensors.values()),
            method=task.method,
            pattern=MethodArgs(**task.method_args).pattern,
            source_sha256=source_sha256,
            dense_bytes=task.dense_bytes,
            squared_norm=done.squared_norm,
            uniform_byte_budget=task.byte_budget,
            uniform_squared_error=done.squared_error,
            points=done.curve,
            seconds=clock.seconds | done.seconds,
            started_at=started_at,
            peak_memory_bytes=peak_memory_bytes(self._device),
            device=device_name(self._device),
            worker=self._name,
            node=socket.gethostname(),
            versions=software_versions(),
        )

    def _encode(self, task: Task) -> Result:
        started_at, clock = time.time(), Stopwatch(self._device)
        done, source_sha256 = self._decompose(task, clock)
        decomposition = done.decomposition

        with clock("write"):
            content = serialize_safetensors(
                {k: t.cpu() for k, t in decomposition.named_tensors(task.tensor_prefix).items()}
            )
            sha256 = hashlib.sha256(content).hexdigest()
            payload = payload_name(task.task_id, sha256)
            atomic_write(self._payload_dir / payload, lambda file: file.write(content))

        cores = decomposition.cores.values()
        return Result(
            task_id=task.task_id,
            layer=task.layer,
            group=task.group,
            tensors=tuple(ref.name for ref in task.tensors.values()),
            method=task.method,
            pattern=MethodArgs(**task.method_args).pattern,
            payload=payload,
            sha256=sha256,
            payload_bytes=len(content),
            source_sha256=source_sha256,
            format=decomposition.describe(task.group),
            ranks=decomposition.ranks,
            nnz=decomposition.nnz,
            density=decomposition.nnz / sum(core.rows * core.columns for core in cores),
            codec="+".join(sorted({core.codec for core in cores})),
            dense_bytes=task.dense_bytes,
            byte_budget=task.byte_budget,
            stored_bytes=decomposition.stored_bytes,
            relative_error=done.relative_error,
            squared_norm=done.squared_norm,
            squared_error=done.squared_error,
            squared_energy_stage1=done.squared_energy_stage1,
            squared_energy_stage2=done.squared_energy_stage2,
            threshold=done.threshold,
            hooi_iterations=done.hooi_iterations,
            seconds=clock.seconds | done.seconds,
            started_at=started_at,
            peak_memory_bytes=peak_memory_bytes(self._device),
            device=device_name(self._device),
            worker=self._name,
            node=socket.gethostname(),
            versions=software_versions(),
            slices=done.slices,
        )
