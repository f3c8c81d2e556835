"""Whole numbers packed in few bits by the compiled kernel (`packing.h`).

What lestd_kernels.storage.packed_integers does with PyTorch, which is the specification, with the
same result and some times as fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lestd_kernels.backends import bitmask
from lestd_kernels.storage.packed_integers import Packer


def compiled() -> Packer | None:
    """A packer for `PackedIntegers.pack`; None where nothing can be compiled."""
    return Packer(_counts, _pack) if bitmask.is_available() else None


def _counts(flat: Tensor, bits: Sequence[int]) -> list[int]:
    found: list[int] = torch.ops.lestd.packing_counts(flat, bits)
    return found


def _pack(flat: Tensor, bits: int, masked: bool) -> tuple[Tensor, Tensor, int, Tensor]:
    packed: tuple[Tensor, Tensor, int, Tensor] = torch.ops.lestd.packing_pack(flat, bits, masked)
    return packed
