"""Expand the core once and keep it: memory for speed, where no kernel multiplies it packed.

M has the core's size, not the weight's, but it stays beside the packed tensors. What is kept
belongs to the values tensor that it came from: it goes when that tensor goes (as it does when
weights are offloaded), is in no copy and no state dict, and is made anew once a packed tensor was
written to.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lestd_kernels.backends import bitmask
from lestd_kernels.backends.base import Backend, is_plain
from lestd_kernels.decomposition import EncodedCore

_State = tuple[tuple[int, int, torch.dtype], ...]
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # values -> (_State, M)


def _state(core: EncodedCore) -> _State:
    """What changes when a packed tensor is written to, moved or exchanged."""
    return tuple(
        (t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype)
        for t in core.tensors.values()
    )


def runs(x: Tensor, core: EncodedCore) -> bool:
    """For every packed core outside of autograd, autocast and torch.compile."""
    return core.codec != "dense" and not torch.compiler.is_compiling() and is_plain(x, core)


def expand(core: EncodedCore) -> Tensor:
    """M ``(rows, columns)``: the kept one if it is still true."""
    values, state = core.tensors["values"], _state(core)
    entry = _kept.get(values)  # type: ignore[no-untyped-call]
    if entry is None or entry[0] != state:
        fast = bitmask.runs(values, core)
        entry = (state, (bitmask.expand if fast else EncodedCore.decode)(core).detach())
        _kept[values] = entry
    M: Tensor = entry[1]
    return M


def apply_core(x: Tensor, core: EncodedCore, transposed: bool) -> Tensor:
    """``x @ M``, or with `transposed` ``x @ M.T``."""
    M = expand(core)
    return x @ (M.T if transposed else M)


def release(values: Tensor) -> None:
    """Forget the M of the core whose values these are."""
    _kept.pop(values, None)  # type: ignore[no-untyped-call]


BACKEND = Backend(runs, apply_core, expand)
