"""All modules that hold compressed tensors, and what is done to any of them."""

from __future__ import annotations

from torch import nn

from lestd_kernels import backends
from lestd_kernels.chain_linear import PackedMatrix
from lestd_kernels.errors import LestdError
from lestd_kernels.linear import CompressedLinear, Factor, SharedCore, packed_core

MODULES = (Factor, SharedCore, CompressedLinear, PackedMatrix)
"""Their classes; a `ChainLinear` is a `PackedMatrix`."""


def check_core(module: nn.Module) -> None:
    """Check the index tensors of a module of `MODULES`, where it has some in memory.

    Raises:
        ValueError: they are damaged, see `EncodedCore.check`.
    """
    if module.get_parameter("weight").device.type == "meta":
        return
    if isinstance(module, PackedMatrix):
        module.packed().check()
    elif isinstance(module, SharedCore | CompressedLinear) and module.spec is not None:
        packed_core(module, module.spec).check()


def set_backend(model: nn.Module, backend: str | None) -> None:
    """Have one backend multiply throughout `model`, or with None the one chosen per product.

    Where a backend cannot run (another device or codec, autograd, autocast), `eager` does.

    Raises:
        LestdError: there is no such backend.
    """
    if backend is not None and backend not in backends.BACKENDS:
        raise LestdError(
            f"there is no backend {backend!r}, expected {', '.join(backends.BACKENDS)} or None"
        )
    for module in model.modules():
        if isinstance(module, MODULES):
            module.backend = backend
            backends.release(module.get_parameter("weight"))
