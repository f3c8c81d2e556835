"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lestd_kernels.decomposition import EncodedCore


@dataclass(frozen=True)
class Backend:
    """One way to multiply by a packed core M ``(rows, columns)``.

    Attributes:
        runs: ``(x, core) -> bool``: whether the other two can be called with these.
        apply_core: ``(x, core, transposed)``: ``x @ M`` for x ``(..., rows)``, or ``x @ M.T`` for
            x ``(..., columns)``; agrees with `eager`, which is the specification.
        expand: ``(core) -> M``, dense, not to be written to.
    """

    runs: Callable[[Tensor, EncodedCore], bool]
    apply_core: Callable[[Tensor, EncodedCore, bool], Tensor]
    expand: Callable[[EncodedCore], Tensor]


def is_plain(x: Tensor, core: EncodedCore) -> bool:
    """Whether a product needs nothing of autograd and autocast, and one dtype holds throughout.

    What does not is left to `eager`, whose operations PyTorch knows how to differentiate and cast.
    """
    tensors = core.tensors.values()
    return (
        not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors)))
        and not torch.is_autocast_enabled(x.device.type)
        and x.dtype == core.tensors["values"].dtype
        and all(t.device == x.device for t in tensors)
    )


def token_count(x: Tensor) -> int:
    """Number of vectors that x ``(..., n)`` holds."""
    return x.numel() // x.shape[-1]
