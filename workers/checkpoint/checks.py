"""What a tensor must be before anything is computed with it."""

from __future__ import annotations

import torch
from torch import Tensor

from lestd_kernels.errors import LestdError
from workers.contracts import TensorRef

_ROWS = 512
# Of the products of a matrix with itself both halves are summed up apart from each other.
_ROUNDING = 1e-3


def check_finite(tensor: Tensor, ref: TensorRef) -> None:
    """Refuse a weight with NaN or Inf.

    Raises:
        LestdError: names the tensor, its file and the first index that is not finite.
    """
    finite = torch.isfinite(tensor).reshape(-1)
    if bool(finite.all()):
        return
    first = int(finite.to(torch.uint8).argmin())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), tensor.shape))
    raise LestdError(
        f"tensor {ref.name} in {ref.shard} has {float(tensor.reshape(-1)[first])} at index "
        f"{list(index)}, and every weight must be finite; download the shard again, or repair "
        "the checkpoint (compress then starts over with --fresh)"
    )


def check_metric(tensor: Tensor, ref: TensorRef, width: int) -> None:
    """Refuse what is no metric of so many channels: a Gram matrix, blocks of one, or a diagonal.

    Raises:
        LestdError: it has another shape, a square below zero, or is not symmetric.
    """
    wrong = None
    if tensor.shape not in {(width, width), (width,)} and not (
        tensor.dim() == 3
        and tensor.shape[1] == tensor.shape[2]
        and tensor.shape[0] * tensor.shape[1] == width
    ):
        wrong = f"has the shape {list(tensor.shape)}, expected that of a metric of {width} channels"
    else:
        matrices = tensor if tensor.dim() == 3 else tensor[None]
        squares = tensor if tensor.dim() == 1 else matrices.diagonal(dim1=1, dim2=2)
        if bool((squares < 0).any()):
            wrong = "has a square below zero"
        elif tensor.dim() > 1 and not _is_symmetric(matrices, _ROUNDING * float(squares.max())):
            wrong = "is not symmetric"
    if wrong is not None:
        raise LestdError(
            f"tensor {ref.name} in {ref.shard} {wrong}; the file is damaged, delete it: the same "
            "command makes it again"
        )


def _is_symmetric(matrices: Tensor, most: float) -> bool:
    """Whether the matrices ``(k, n, n)`` are, up to so much in an element."""
    for start in range(0, matrices.shape[1], _ROWS):
        rows = slice(start, start + _ROWS)
        if bool(((matrices[:, rows] - matrices[:, :, rows].mT).abs() > most).any()):
            return False
    return True
