"""How far the weights of a compressed model are from the source's, in the operator norm.

    ||W - W_hat||_2 / ||W||_2

is the most that a module's output can be off, relative to the most that the module can do: the
Frobenius error says what happens on average over all directions of the input, this one in the
worst. Modules are reconstructed from the files on disk, one group after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lestd_kernels.errors import LestdError
from lestd_kernels.norms import operator_norm
from orchestrator.compressed import open_compressed
from workers.checkpoint import ShardIndex, read_tensor


@dataclass(frozen=True)
class OperatorError:
    """The largest error of a model's modules.

    Attributes:
        value: ``||W - W_hat||_2 / ||W||_2``.
        tensor: the weight that has it.
    """

    value: float
    tensor: str


def largest_operator_error(model: Path, source: ShardIndex) -> OperatorError:
    """The largest relative operator-norm error of the weights in scope.

    Of weights that are stored together, as those of experts are, each counts by itself.

    Args:
        model: a compressed model.
        source: the checkpoint that it was made from.

    Raises:
        LestdError: a file is damaged, or the two do not belong together.
    """
    worst = OperatorError(0.0, "")
    for group in open_compressed(model).groups:
        for name, approximation in group.to_dense().items():
            ref = source.tensors.get(name)
            if ref is None or ref.shape != tuple(approximation.shape):
                raise LestdError(
                    f"{source.location} has no tensor {name} of shape "
                    f"{list(approximation.shape)}, which {model} was made from; give the "
                    "checkpoint that it was made from"
                )
            weight = read_tensor(ref).to(approximation)
            differences = _matrices(weight - approximation)
            for W, D in zip(_matrices(weight), differences, strict=True):
                norm = operator_norm(W)
                error = operator_norm(D) / norm if norm else 0.0
                if error > worst.value:
                    worst = OperatorError(error, name)
    return worst


def _matrices(weight: Tensor) -> Tensor:
    """``(..., rows, columns) -> (n, rows, columns)``."""
    return weight.reshape(-1, *weight.shape[-2:])
