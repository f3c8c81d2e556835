"""What is computed once from a packed core and kept beside it.

A kept tensor belongs to the values tensor that it came from: it goes when that tensor goes (as it
does when weights are offloaded), is in no copy and no state dict, and is made anew once a packed
tensor was written to, moved or exchanged. What is written through ``.data``, or to a tensor made
under inference mode, does not show: `set_backend` makes everything forgotten.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lestd_kernels.storage.matrix import EncodedCore

_State = tuple[tuple[int, int, torch.dtype], ...]


def _state(core: EncodedCore) -> _State:
    """State that changes when a packed tensor is written to, moved or exchanged."""
    return tuple(
        (t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype)
        for t in core.tensors.values()
    )


class Kept:
    """``compute(core)``, remembered for each core. Not to be called under torch.compile."""

    def __init__(self, compute: Callable[[EncodedCore], Tensor]) -> None:
        self._compute = compute
        self._entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __call__(self, core: EncodedCore) -> Tensor:
        """The kept tensor if it is still true, else a new one."""
        values, state = core.tensors["values"], _state(core)
        entry = self._entries.get(values)  # type: ignore[no-untyped-call]
        if entry is None or entry[0] != state:
            entry = (state, self._compute(core).detach())
            self._entries[values] = entry
        kept: Tensor = entry[1]
        return kept

    def release(self, values: Tensor) -> None:
        """Forget what was computed for the core whose values these are."""
        self._entries.pop(values, None)  # type: ignore[no-untyped-call]
