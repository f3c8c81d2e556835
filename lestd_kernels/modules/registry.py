"""All modules that hold compressed tensors, and what is done to any of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from lestd_kernels import backends
from lestd_kernels.errors import LestdError
from lestd_kernels.modules.chain_linear import ChainLinear, PackedMatrix
from lestd_kernels.modules.shared_tucker_linear import (
    CompressedLinear,
    Factor,
    SharedCore,
    packed_core,
)

MODULES = (Factor, SharedCore, CompressedLinear, PackedMatrix)
"""Their classes; a `ChainLinear` is a `PackedMatrix`."""


def check_module(module: nn.Module, present: Collection[nn.Module]) -> None:
    """Check what was loaded into a module of `MODULES`; tensors that are offloaded are left out.

    Args:
        module: the module.
        present: all modules of its model.

    Raises:
        ValueError: tensors are not there, or damaged, see `EncodedCore.check`.
    """
    if any(isinstance(one, nn.Module) and one not in present for one in _others(module)):
        raise ValueError("what it shares with other modules is not part of the model")
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    absent = [name for name, tensor in tensors if tensor.is_meta]
    if absent and not hasattr(module, "_hf_hook"):  # With which accelerate brings them in.
        raise ValueError(f"its {absent[0]} was not loaded")
    if absent:
        return
    if isinstance(module, PackedMatrix):
        module.packed().check()
    elif isinstance(module, SharedCore | CompressedLinear) and module.spec is not None:
        packed_core(module, module.spec).check()


def _others(module: nn.Module) -> Iterable[object]:
    """Parts that a module shares with others of its block."""
    if isinstance(module, CompressedLinear):
        return module._shared
    return dict(module._shared).values() if isinstance(module, ChainLinear) else ()


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
