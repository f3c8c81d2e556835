"""How far the weights of a compressed model are from the source's, beside the Frobenius norm.

    operator error      max over modules of ||W - W_hat||_2 / ||W||_2
    activation error    ||X (W - W_hat)||_F / ||X W||_F, over all modules, X the inputs of each on
                        the calibration text: with its Gram matrix G, ||X W||_F^2 = tr(W^T G W)

The first is the most that a module's output can be off, relative to the most that the module can
do: the Frobenius error says what happens on average over all directions of the input, the operator
norm in the worst one, the activation error in those that occur. Modules are reconstructed from the
files on disk, one group after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lestd_kernels.linalg.operator_norm import operator_norm
from lestd_kernels.tensorize import fold_weights, unfold_weights
from orchestrator.model.reader import open_compressed
from workers.checkpoint.tensors import read_tensor
from workers.contracts import Task, TensorRef


@dataclass(frozen=True)
class WeightErrors:
    """Errors of a model's weights.

    Attributes:
        operator_error: the largest of a module.
        operator_module: the module that has it.
        activation_error: over all modules; None without a calibration.
    """

    operator_error: float
    operator_module: str
    activation_error: float | None


def weight_errors(
    model: Path, tasks: Sequence[Task], grams: Mapping[str, TensorRef]
) -> WeightErrors:
    """Compare the weights in scope of a compressed model with the source's.

    Args:
        model: the compressed model.
        tasks: of the plan that it was made by; they name the source's tensors.
        grams: ``<block>.<what a module reads>`` -> X^T X, see
            `orchestrator.compression.calibration`; empty for no activation error.

    Raises:
        LestdError: a file is damaged.
    """
    by_path = {task.tensor_prefix: task for task in tasks}
    worst, where = 0.0, ""
    squared_error = squared_norm = 0.0
    for group in open_compressed(model).groups:
        task = by_path[group.entry["path"]]
        approximations, _ = group.weights()
        read = {name: read_tensor(ref) for name, ref in task.tensors.items()}
        weights = fold_weights(unfold_weights(read, task.layout), task.layout)
        for module in task.layout.modules:
            W = weights.pop(module.name)
            D = approximations.pop(module.name).sub_(W)
            norm = operator_norm(W)
            error = operator_norm(D) / norm if norm else 0.0
            if error > worst:
                worst, where = error, f"{task.block}.{module.name}"
            if (ref := grams.get(f"{task.block}.{module.reads}")) is not None:
                gram = read_tensor(ref)
                squared_error += _squared_output(D, gram)
                squared_norm += _squared_output(W, gram)
    activation = None
    if grams:
        activation = (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0
    return WeightErrors(worst, where, activation)


def _squared_output(weight: Tensor, gram: Tensor) -> float:
    """``||X W||_F^2`` of a weight ``(out, in)`` from the Gram matrix of its inputs."""
    return max(0.0, float(((weight @ gram) * weight).sum(dtype=torch.float64)))
