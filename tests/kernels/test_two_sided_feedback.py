"""Rounding in tiles against rounding element by element, in the Kronecker product's own order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lestd_kernels.linalg import two_sided_feedback
from lestd_kernels.linalg.error_feedback import inverse_factor
from lestd_kernels.linalg.two_sided_feedback import output_factor, round_both_ways
from lestd_kernels.storage.few_bits import grid_has_zero, group_scales, spread_scales

FP32 = torch.float32


def gram(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(3 * width, width, generator=generator)
    X = X @ torch.randn(width, width, generator=generator) / width**0.5
    return X.T @ X / len(X)


def one_by_one(
    W: Tensor, U: Tensor, V: Tensor, bits: int, scales: Tensor | None, mask: Tensor | None
) -> np.ndarray:
    """Every element in turn; its error moves the ones after it by the factor of A (x) B."""
    columns = W.shape[1]
    U = (U if U.dim() == 2 else U.diag()).double().numpy()
    V = torch.block_diag(*V).double().numpy()[:columns, :columns]
    factor = np.kron(U, V)
    stored = np.ones(W.shape, bool) if mask is None else mask.numpy()
    spread = np.zeros(W.shape)
    if scales is not None:
        spread[stored] = spread_scales(scales, int(stored.sum())).numpy()
    offset = 2 ** (bits - 1) if grid_has_zero(mask is None, bits) else (2**bits - 1) / 2
    left, rounded = W.double().numpy().reshape(-1).copy(), np.zeros(W.numel())
    for i in range(W.numel()):
        scale = spread.reshape(-1)[i]
        if stored.reshape(-1)[i]:
            levels = (np.arange(2**bits) - offset) * scale if bits < 16 else np.array([left[i]])
            rounded[i] = levels[np.abs(levels - left[i]).argmin()]
            if bits == 16:
                rounded[i] = float(torch.tensor(rounded[i]).to(torch.bfloat16))
        left[i + 1 :] -= factor[i, i + 1 :] / factor[i, i] * (left[i] - rounded[i])
    return rounded.reshape(W.shape)


@pytest.mark.parametrize("bits", [16, 4, 2])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "heads"), [(70, 12, 3), (9, 70, None), (5, 8, 1), (21, 19, None)]
)
@pytest.mark.parametrize("tile", [64, 5])
def test_tiles_are_the_order_of_the_kronecker_product(
    rows: int,
    columns: int,
    heads: int | None,
    pruned: bool,
    bits: int,
    tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(two_sided_feedback, "_ROWS", tile + 2)
    monkeypatch.setattr(two_sided_feedback, "_OUTPUTS", tile)
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    B = gram(columns, 2)
    if heads is not None:
        size = columns // heads
        B = torch.stack([B[i : i + size, i : i + size] for i in range(0, columns, size)])
    U, V = inverse_factor(gram(rows, 1)), output_factor(B)
    assert V is not None
    mask = W.abs() > 0.4 if pruned else None
    dtype = torch.bfloat16 if bits == 16 else FP32
    found, scales = round_both_ways(W, U, V, bits, dtype, mask)
    expected = one_by_one(W, U, V, bits, scales, mask)
    if scales is not None:
        stored = W.reshape(-1) if mask is None else W[mask]
        plain = group_scales(stored, bits, FP32, grid_has_zero(mask is None, bits))
        assert torch.equal(scales, plain)
    # Where a value is near the middle of two levels, what follows it goes another way.
    assert np.isclose(found.numpy(), expected, rtol=1e-4, atol=1e-5).mean() > 0.98


def test_rows_that_are_apart_are_rounded_each_on_its_own() -> None:
    W, V = (
        torch.randn(7, 70, generator=torch.Generator().manual_seed(0)),
        output_factor(gram(70, 2)),
    )
    assert V is not None
    found, scales = round_both_ways(W, torch.ones(7), V, 3, FP32)
    expected = one_by_one(W, torch.ones(7), V, 3, scales, None)
    assert np.isclose(found.numpy(), expected, rtol=1e-4, atol=1e-5).mean() > 0.98
