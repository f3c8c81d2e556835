"""What a backend makes of a packed core once and keeps: the one place for it.

What is kept belongs to the values tensor that it came from: it goes when that tensor goes (as it
does when weights are offloaded), is in no copy and no state dict, and is made anew once a packed
tensor was written to. There is one thing per core: what another backend asks for takes its place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lestd_kernels.decomposition import EncodedCore

Make = Callable[[EncodedCore], Tensor]
_State = tuple[tuple[int, int, torch.dtype], ...]
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # values -> (_State, Make, what it made)


def _state(core: EncodedCore) -> _State:
    """What changes when a packed tensor is written to, moved or exchanged."""
    return tuple(
        (t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype)
        for t in core.tensors.values()
    )


def kept(core: EncodedCore, make: Make) -> Tensor:
    """``make(core)``: the kept one if it is still true.

    Args:
        core: the packed core; its values tensor is what owns the result.
        make: a function of the core alone, the same object at every call.
    """
    values, state = core.tensors["values"], _state(core)
    entry = _kept.get(values)  # type: ignore[no-untyped-call]
    if entry is None or entry[:2] != (state, make):
        entry = (state, make, make(core))
        _kept[values] = entry
    made: Tensor = entry[2]
    return made


def release(values: Tensor) -> None:
    """Forget what is kept for the core whose values these are."""
    _kept.pop(values, None)  # type: ignore[no-untyped-call]
