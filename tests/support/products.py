"""Packed cores and their products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lestd_kernels.storage.codecs import CODECS
from lestd_kernels.storage.matrix import EncodedCore

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def sparse(rows: int, columns: int, density: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A random matrix with an empty first and a full last row, if there is room for both."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, columns, generator=generator) < density
    if rows > 2 and 0 < density < 1:
        keep[0], keep[-1] = False, True
    M = torch.randn(rows, columns, generator=generator).abs() + 0.1
    return (M * keep).to(dtype)


def encode(M: Tensor, codec: str) -> EncodedCore:
    return EncodedCore(codec, *M.shape, int(M.count_nonzero()), CODECS[codec].encode(M))


def assert_is_product(found: Tensor, x: Tensor, M: Tensor, units: float = 0.5) -> None:
    """`found` is ``x @ M`` but for float32 sums and one rounding to the dtype of x.

    A sum of n products in float32, in any order, is off by at most n 2^-24 sum |x| |M| (Higham,
    Accuracy and Stability of Numerical Algorithms, section 3.1), twice that where products are
    rounded too; then come `units` units in the last place of the result.
    """
    assert found.dtype == x.dtype
    exact = x.double() @ M.double()
    sums = 2 * (x.shape[-1] + 1) * 2**-24 * (x.double().abs() @ M.double().abs())
    rounding = units * torch.finfo(x.dtype).eps * (exact.abs() + sums)
    tiniest = torch.finfo(x.dtype).smallest_normal
    assert found.shape == exact.shape
    assert bool(((found.double() - exact).abs() <= sums + rounding + tiniest).all())
