"""Flags, eight in a byte, the first in the lowest bit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_COUNT_BYTES = 1 << 17
_BIT_WEIGHTS = (1, 2, 4, 8, 16, 32, 64, 128)


def pack_bits(flags: Tensor) -> Tensor:
    """Pack a 1-D bool tensor ``(n,)`` into uint8 ``(ceil(n / 8),)``, lowest bit first."""
    words = torch.nn.functional.pad(flags, (0, -flags.numel() % 8)).view(torch.int64)
    # The factor moves bit 8 i, the flag of byte i, to bit 56 + i.
    return ((words * 0x0102040810204080) >> 56).to(torch.uint8)


def count_nonzeros(matrix: Tensor) -> int:
    """`Tensor.count_nonzero` of a whole tensor, some times as fast on CPU in 16 bits."""
    return count_bits(pack_bits(matrix.reshape(-1) != 0), matrix.numel())


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Invert `pack_bits`: uint8 ``(ceil(count / 8),)`` -> bool ``(count,)``."""
    weights = torch.tensor(_BIT_WEIGHTS, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(1) & weights).ne(0).reshape(-1)[:count]


def count_bits(packed: Tensor, count: int) -> int:
    """How many of the first `count` bits are set, of uint8 ``(ceil(count / 8),)``."""
    words = count // 64
    rest = int.from_bytes(packed[words * 8 :].tolist(), "little")
    total = (rest & ((1 << (count - words * 64)) - 1)).bit_count()
    for part in torch.split(packed[: words * 8], _COUNT_BYTES):
        bits = np.bitwise_count(part.cpu().numpy().view(np.uint64))
        total += int(bits.sum(dtype=np.uint32))
    return total
