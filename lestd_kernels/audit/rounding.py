"""Sums for predictions: the energy that is kept of matrices, and the cost of rounding it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lestd_kernels.audit.diagnostics import evenly
from lestd_kernels.linalg.stage1 import squared_sum
from lestd_kernels.storage.few_bits import FULL_BITS, dequantize, grid_has_zero, quantize

_SCALE_DTYPE = torch.bfloat16
_CHUNK_ELEMENTS = 1 << 20  # Of whole groups.
# Of each matrix, to find what rounding costs of what is kept.
_SAMPLED_PARTS = 2
# An error is far from what is expected beyond so many times what is left out, and what rounding
# heavy-tailed values costs. Measured with all methods, it is at most two thirds of the sum.
_TIMES_LEFT_OUT, _TIMES_ROUNDING = 1.5, 3.0
# And beyond a relative error of 0.01, which 16 bits and float32 arithmetic stay below.
_LEAST_SHARE = 1e-4


def rounded(values: Tensor, bits: int, has_zero: bool) -> Tensor:
    """Values as they are after quantization, float32; row-major order decides the groups.

    `has_zero` is the grid of matrices that are stored densely, see lestd_kernels.storage.few_bits.
    """
    codes, scales, exponent = quantize(values.reshape(-1), bits, _SCALE_DTYPE, has_zero=has_zero)
    back = dequantize(codes, scales, values.numel(), bits, has_zero, exponent)
    return back.float().view(values.shape)


class Kept(NamedTuple):
    """Kept part of some matrices.

    Attributes:
        counts: elements of each.
        energy: sum of their squares.
        rounding: squared error of rounding them.
    """

    counts: list[int]
    energy: float
    rounding: float


def sum_kept(matrices: Sequence[Tensor], masks: Sequence[Tensor] | None, bits: int) -> Kept:
    """Sum up what masks keep, or everything, a part at a time; a group ends with its part.

    Without masks the error of rounding is exact; else it is that of a few of the parts of each
    matrix, relative to their energy.
    """
    counts, energy, rounding = [], 0.0, 0.0
    for number, matrix in enumerate(matrices):
        parts = torch.split(matrix.view(-1), _CHUNK_ELEMENTS)
        mask = None if masks is None else masks[number].view(-1)
        chosen = None if mask is None else torch.split(mask, _CHUNK_ELEMENTS)
        dense = mask is None or bool(mask.all())
        sampled = range(len(parts)) if masks is None else evenly(len(parts), _SAMPLED_PARTS)
        total = known = error = 0.0
        counts.append(0)
        for place, part in enumerate(parts):
            values = part if chosen is None else part[chosen[place]]
            counts[-1] += values.numel()
            squares = squared_sum(values)
            total += squares
            if bits < FULL_BITS and place in sampled:
                known += squares
                error += squared_sum(values - rounded(values, bits, dense))
        energy += total
        rounding += error * (total / known) if known else 0.0
    return Kept(counts, energy, rounding)


def noise(bits: int) -> float:
    """Relative squared error of `rounded` on normal numbers: singular vectors are like them."""
    return _noise(_normal(), bits, True)


def _normal() -> Tensor:
    return torch.randn(1 << 14, generator=torch.Generator().manual_seed(0))


def _noise(values: Tensor, bits: int, has_zero: bool) -> float:
    if bits == FULL_BITS:
        return 0.0
    return squared_sum(values - rounded(values, bits, has_zero)) / squared_sum(values)


@cache
def _most_noise(bits: int) -> float:
    """`noise` of the cubes of normal numbers, whose tails are heavier than those of weights."""
    return _noise(_normal() ** 3, bits, grid_has_zero(True, bits))


def most_expected(left_out: float, squared_norm: float, value_bits: int, factor_bits: int) -> float:
    """The squared error beyond which something other than ranks and bits must have caused it.

    Args:
        left_out: what is expected before anything is rounded.
        squared_norm: of the weights, in the same metric.
        value_bits: of a core value.
        factor_bits: of an element of the factors, two at most.
    """
    share = _most_noise(value_bits) + 2 * _most_noise(factor_bits)
    return _TIMES_LEFT_OUT * left_out + (_LEAST_SHARE + _TIMES_ROUNDING * share) * squared_norm
