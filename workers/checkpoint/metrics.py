"""What calibration, or a norm, tells a task of its modules' inputs and outputs."""

from __future__ import annotations

import math

from torch import Tensor

from lestd_kernels.linalg.metric import whole
from lestd_kernels.methods.common.base import NORM, STATISTICS
from workers.checkpoint.checks import check_finite, check_metric
from workers.checkpoint.tensors import read_tensor
from workers.contracts import Task


def metric_bytes(task: Task) -> int:
    """Bytes of what `read_metrics` returns, from the headers."""
    inputs = {m.reads: task.layout.weight_shape(m)[1] for m in task.layout.modules}
    total = 0
    for name, ref in task.metric_tensors.items():
        # Inputs' blocks become one matrix.
        in_blocks = name in inputs and len(ref.shape) == 3
        total += 4 * (inputs[name] ** 2 if in_blocks else math.prod(ref.shape))
    return total


def read_metrics(task: Task) -> dict[str, Tensor]:
    """The metric of each module's input that has one, float32, see `Metrics`."""
    widths = {m.reads: task.layout.weight_shape(m)[1] for m in task.layout.modules}
    widths |= {f"{m.name}.output": task.layout.weight_shape(m)[0] for m in task.layout.modules}
    read: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}  # All experts of a layer read one: it is one metric.
    for name, ref in task.metric_tensors.items():
        if ref.name in norms:
            read[name] = norms[ref.name]
            continue
        read[name] = read_tensor(ref).float()
        check_finite(read[name], ref)
        if task.method_args["metric"] == NORM:
            # The inputs of the modules are normalized ones, each channel times the norm's weight.
            norms[ref.name] = read[name].square_()
        elif name in widths:
            check_metric(read[name], ref, widths[name])
            if not name.endswith(".output"):
                read[name] = whole(read[name])
        tokens = f"{name}.tokens"  # In the metric loss: the mean is asked for, not the sum.
        if tokens in task.metric_tensors:
            read[name] /= read_tensor(task.metric_tensors[tokens]).clamp(min=1)
    metrics = {}
    for module in task.layout.modules:
        for suffix in ("", *(f".{one}" for one in STATISTICS)):
            if module.reads + suffix in read:
                metrics[module.name + suffix] = read[module.reads + suffix]
        if f"{module.name}.output" in read:
            metrics[f"{module.name}.output"] = read[f"{module.name}.output"]
    return metrics
