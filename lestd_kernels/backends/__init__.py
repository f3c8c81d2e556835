"""How a packed core is multiplied: one file per backend, one line in `BACKENDS`.

A backend is one function ``apply_core(x, core, transposed)``: with M ``(rows, columns)`` the
unfolding that `core` packs, it returns ``x @ M`` for x ``(..., rows)``, or ``x @ M.T`` for x
``(..., columns)``. It must agree with `eager`, which is the specification, for every codec.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lestd_kernels.backends import eager
from lestd_kernels.decomposition import EncodedCore

ApplyCore = Callable[[Tensor, EncodedCore, bool], Tensor]

BACKENDS: dict[str, ApplyCore] = {"eager": eager.apply_core}
