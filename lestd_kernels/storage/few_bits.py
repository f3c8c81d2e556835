"""Values in few bits: groups of 64 consecutive values share one scale.

A value is ``(code - offset) * scale``, and there are two grids of 2^bits levels:

    grid        offset            scale                          for
    with zero   2^(bits - 1)      signed: the largest value is   4 bits; dense ones in 2 or 3,
                                  the first level exactly        whose values crowd around zero
    without     (2^bits - 1) / 2  the largest value is on the    8 bits; sparse ones in 2 or 3,
                                  last level, by magnitude       without small values

Where one weight is tens of times the others of its group, none of these is near zero on the grid
without: half a step is more than they are. A real model has such weights where its activations are
largest, and 4 bits without a zero cost it more than 3 bits with one (docs/compare.md). Elsewhere
it gains a tenth or loses some hundredths. Whole weights whose groups lie along the inputs are on
the one with zero in any bits, which other libraries read.

A code takes `bits` bits, the first value in the lowest ones; the scale has the value dtype. A group
of zeros has the scale 0. Scales below the normal numbers of the value dtype, as float16 has them
from 6e-5 down, are stored divided by a power of two that the whole matrix has in common
(`scale_exponent`).

Reference: uniform quantization in groups as in Frantar et al., "GPTQ", ICLR 2023, section 5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from lestd_kernels.storage.bitmasks import pack_bits, unpack_bits

GROUP = 64
"""Consecutive values that share a scale."""
FULL_BITS = 16
"""Stands for values as they are, in the value dtype, whatever its width."""
QUANTIZED_BITS = (8, 4, 3, 2)
_BITS_WITH_ZERO = 4


def code_bytes(count: int, bits: int) -> int:
    """Bytes of the codes of `count` values."""
    return (count * bits + 7) // 8


def scale_count(count: int) -> int:
    """Scales of `count` values."""
    return -(-count // GROUP)


def values_bytes(count: int, bits: int, value_bytes: int) -> int:
    """Bytes of `count` values, scales included.

    Args:
        count: number of values.
        bits: 16 for values as they are.
        value_bytes: of the value dtype.
    """
    if bits == FULL_BITS:
        return count * value_bytes
    return code_bytes(count, bits) + scale_count(count) * value_bytes


def grid_has_zero(dense: bool, bits: int) -> bool:
    """Which grid the values of a matrix are rounded to."""
    return bits == _BITS_WITH_ZERO or (dense and bits < _BITS_WITH_ZERO)


def unsaid_has_zero(dense: bool, bits: int) -> bool:
    """Which grid the values of a matrix are on whose entry does not say."""
    return dense and bits < _BITS_WITH_ZERO


def _offset(bits: int, has_zero: bool) -> float:
    return float((1 << bits) / 2 if has_zero else ((1 << bits) - 1) / 2)


def group_scales(
    values: Tensor, bits: int, scale_dtype: torch.dtype, has_zero: bool = False
) -> Tensor:
    """The scales with which the largest value of each group is on an outer level of the grid.

    Args:
        values: ``(n,)``, float32.
        bits: 8, 4, 3 or 2.
        scale_dtype: to whose precision they are rounded, whatever its range.
        has_zero: whether the grid has a level 0.

    Returns:
        ``(ceil(n / 64),)``, float32.
    """
    padded = functional.pad(values, (0, -len(values) % GROUP)).view(-1, GROUP)
    low, high = padded.aminmax(dim=1)
    outer = -torch.where(high > -low, high, low) if has_zero else torch.maximum(high, -low)
    scales: Tensor = outer / _offset(bits, has_zero)
    # Zero, not a number that is not normal, which has few bits itself.
    tiny = torch.finfo(scales.dtype).smallest_normal
    scales = torch.where(scales.abs() < tiny, torch.zeros_like(scales), scales)
    mantissa, exponent = torch.frexp(scales)
    return torch.ldexp((2 * mantissa).to(scale_dtype).float(), exponent - 1)


def scale_exponent(scales: Tensor, scale_dtype: torch.dtype) -> int:
    """Of the power of two by which scales are divided to be stored; 0 where all fit as they are.

    No larger than it takes to make the smallest normal, while the largest stays in range.
    """
    magnitudes = scales[scales != 0].abs()
    if not magnitudes.numel():
        return 0
    least, most = (float(end) for end in torch.aminmax(magnitudes))
    finfo = torch.finfo(scale_dtype)
    below = math.frexp(least)[1] - math.frexp(finfo.smallest_normal)[1]
    above = math.frexp(most)[1] - math.frexp(finfo.max)[1]
    return max(min(below, 0), above)


def nearest_codes(values: Tensor, scales: Tensor, bits: int, has_zero: bool = False) -> Tensor:
    """The code of the level nearest to each value, uint8 ``(n,)``; any shapes that broadcast.

    A tie goes to the even code; with a scale of 0 every level is 0.
    """
    safe = torch.where(scales == 0, torch.ones_like(scales), scales).float()
    codes: Tensor = (values.float() / safe + _offset(bits, has_zero)).round_()
    return codes.clamp_(0, 2**bits - 1).to(torch.uint8)


def levels(codes: Tensor, scales: Tensor, bits: int, has_zero: bool = False) -> Tensor:
    """Values of codes, float32; shapes that broadcast."""
    values: Tensor = (codes.float() - _offset(bits, has_zero)) * scales.float()
    return values


def spread_scales(scales: Tensor, count: int) -> Tensor:
    """The scale of each of `count` values ``(count,)``."""
    return scales.repeat_interleave(GROUP)[:count]


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits, uint8 ``(n,)`` -> uint8 ``(ceil(n bits / 8),)``."""
    if bits == 8:
        return codes.clone()
    if bits == 3:
        shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
        return pack_bits((codes[:, None] >> shifts & 1).bool().reshape(-1))
    per_byte = 8 // bits
    padded = functional.pad(codes, (0, -len(codes) % per_byte)).view(-1, per_byte)
    shifts = torch.arange(per_byte, dtype=torch.uint8, device=codes.device) * bits
    packed: Tensor = (padded << shifts).sum(dim=1, dtype=torch.uint8)
    return packed


def unpack_codes(packed: Tensor, count: int, bits: int) -> Tensor:
    """Invert `pack_codes`: the first `count` codes, uint8 ``(count,)``."""
    if bits == 8:
        return packed[:count]
    if bits == 3:
        flags = unpack_bits(packed, count * bits).view(-1, bits).to(torch.uint8)
        shifts = torch.arange(bits, dtype=torch.uint8, device=packed.device)
        codes: Tensor = (flags << shifts).sum(dim=1, dtype=torch.uint8)
        return codes
    shifts = torch.arange(8 // bits, dtype=torch.uint8, device=packed.device) * bits
    every: Tensor = (packed[:, None] >> shifts & (2**bits - 1)).reshape(-1)
    return every[:count]


def quantize(
    values: Tensor,
    bits: int,
    scale_dtype: torch.dtype,
    scales: Tensor | None = None,
    has_zero: bool = False,
) -> tuple[Tensor, Tensor, int]:
    """Round values to few bits.

    Args:
        values: ``(n,)``, any floating dtype.
        bits: 8, 4, 3 or 2.
        scale_dtype: dtype of the scales.
        scales: one per group, where they are chosen already, float32.
        has_zero: whether the grid has a level 0.

    Returns:
        Codes, uint8 ``(ceil(n bits / 8),)``, scales ``(ceil(n / 64),)`` as they are stored, and
        the exponent of the power of two by which they are divided.
    """
    values = values.float()
    if scales is None:
        scales = group_scales(values, bits, scale_dtype, has_zero)
    exponent = scale_exponent(scales, scale_dtype)
    stored = (scales.double() * 2.0**-exponent).to(scale_dtype)
    scales = _scales_of(stored, exponent)
    codes = nearest_codes(values, spread_scales(scales, len(values)), bits, has_zero)
    return pack_codes(codes, bits), stored, exponent


def _scales_of(stored: Tensor, exponent: int) -> Tensor:
    return stored.float() * 2.0**exponent if exponent else stored


def dequantize(
    codes: Tensor,
    scales: Tensor,
    count: int,
    bits: int,
    has_zero: bool = False,
    exponent: int = 0,
) -> Tensor:
    """The values of packed codes, in the dtype of the stored scales, ``(count,)``."""
    unpacked = unpack_codes(codes, count, bits)
    spread = spread_scales(_scales_of(scales, exponent), count)
    return levels(unpacked, spread, bits, has_zero).to(scales.dtype)
