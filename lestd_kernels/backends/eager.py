"""The specification: expand the core, multiply with `torch.matmul`. Runs on every device."""

from __future__ import annotations

from torch import Tensor

from lestd_kernels.backends.base import Backend
from lestd_kernels.storage.matrix import EncodedCore


def apply_core(x: Tensor, core: EncodedCore, transposed: bool) -> Tensor:
    """``x @ M`` for x ``(..., rows)``, or with `transposed` ``x @ M.T`` for x ``(..., columns)``.

    M exists in dense form only during the call; it has the core's size, not the weight's.
    """
    M = core.decode()
    return x @ (M.T if transposed else M)


def runs(x: Tensor, core: EncodedCore) -> bool:
    """Always."""
    return True


BACKEND = Backend(runs, apply_core, EncodedCore.decode)
