"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.amp import is_autocast_available
from torch.autograd import forward_ad

from lestd_kernels.storage.matrix import EncodedCore


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

    The packed tensors must be contiguous besides. What does not qualify is left to `eager`, whose
    operations PyTorch knows how to differentiate, forwards and backwards, and to cast.
    """
    tensors = core.tensors.values()
    device = x.device.type
    return (
        not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors)))
        and forward_ad._current_level < 0  # else a tangent would be lost without a word
        and not (is_autocast_available(device) and torch.is_autocast_enabled(device))
        and x.dtype == core.tensors["values"].dtype
        and all(t.device == x.device and t.is_contiguous() for t in tensors)
    )


def token_count(x: Tensor) -> int:
    """Number of vectors that x ``(..., n)`` holds."""
    return x.numel() // x.shape[-1]
