"""Expand the core once and keep it: memory for speed, where no kernel multiplies it packed.

M has the core's size, not the weight's, but it stays beside the packed tensors (`Kept`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lestd_kernels.backends import bitmask, triton_bitmask
from lestd_kernels.backends.base import Backend, is_plain
from lestd_kernels.backends.cache import Kept
from lestd_kernels.storage.matrix import EncodedCore


def _expand(core: EncodedCore) -> Tensor:
    values = core.tensors["values"]
    packed = triton_bitmask if values.device.type == triton_bitmask.DEVICE else bitmask
    return (packed.BACKEND.expand if packed.runs(values, core) else EncodedCore.decode)(core)


expand = Kept(_expand)
"""M ``(rows, columns)``: the kept one if it is still true."""


def runs(x: Tensor, core: EncodedCore) -> bool:
    """For every packed core outside of autograd, autocast and torch.compile."""
    return core.codec != "dense" and not torch.compiler.is_compiling() and is_plain(x, core)


def apply_core(x: Tensor, core: EncodedCore, transposed: bool) -> Tensor:
    """``x @ M``, or with `transposed` ``x @ M.T``."""
    M = expand(core)
    return x @ (M.T if transposed else M)


BACKEND = Backend(runs, apply_core, expand)
