"""Expand the core once and keep it: memory for speed, where no kernel multiplies it packed.

M has the core's size, not the weight's, but it stays beside the packed tensors (see `kept`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lestd_kernels.backends import bitmask
from lestd_kernels.backends.base import Backend, is_plain
from lestd_kernels.backends.kept import kept
from lestd_kernels.decomposition import EncodedCore


def runs(x: Tensor, core: EncodedCore) -> bool:
    """For every packed core outside of autograd, autocast and torch.compile."""
    return core.codec != "dense" and not torch.compiler.is_compiling() and is_plain(x, core)


def _expand(core: EncodedCore) -> Tensor:
    fast = bitmask.runs(core.tensors["values"], core)
    return (bitmask.expand if fast else EncodedCore.decode)(core).detach()


def expand(core: EncodedCore) -> Tensor:
    """M ``(rows, columns)``: the kept one if it is still true."""
    return kept(core, _expand)


def apply_core(x: Tensor, core: EncodedCore, transposed: bool) -> Tensor:
    """``x @ M``, or with `transposed` ``x @ M.T``."""
    M = expand(core)
    return x @ (M.T if transposed else M)


BACKEND = Backend(runs, apply_core, expand)
