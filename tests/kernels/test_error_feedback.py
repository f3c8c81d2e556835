"""Rounding and pruning with error feedback, against the formulas without Cholesky factors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lestd_kernels.linalg.error_feedback import (
    _BLOCK,
    DAMPING,
    inverse_factor,
    largest,
    prune,
    round_with_feedback,
)
from lestd_kernels.storage.matrix import EncodedCore

SHAPES = [(48, 64), (71, 100), (33, 7)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weights, and the Gram matrix of fewer inputs than there are channels, two of them silent."""
    generator = torch.Generator().manual_seed(rows)
    X = torch.randn(rows - 5, rows, generator=generator)
    X = X @ torch.randn(rows, rows, generator=generator) * torch.arange(1, rows + 1) ** -0.5
    X[:, [3, 17]] = 0
    return torch.randn(rows, columns, generator=generator), X.T @ X


def damped(gram: Tensor) -> np.ndarray:
    G = gram.double().numpy()
    return G / np.diag(G).mean() + DAMPING * np.eye(len(G))


def feed_back(W: np.ndarray, C: np.ndarray, i: int, error: np.ndarray) -> None:
    """OBQ, eq. 2: the optimal change of the inputs after i, by the inverse of what is left of C."""
    inverse = np.linalg.inv(C[i:, i:])
    W[i + 1 :] -= np.outer(inverse[0, 1:] / inverse[0, 0], error)


def oracle_round(
    W: np.ndarray, C: np.ndarray, mask: np.ndarray, bits: int, dtype: torch.dtype, found: Tensor
) -> np.ndarray:
    """What every input rounds to after those before it have been rounded as `found`.

    A scale is that of its group's members when the first of them is rounded.
    """
    W, expected, stored = W.copy(), np.zeros_like(W), np.argwhere(mask)
    # Four bits, and dense matrices of fewer, are on the grid that has a level 0.
    has_zero, scales = bits == 4 or (bool(mask.all()) and bits < 4), dict[int, float]()
    offset = 2 ** (bits - 1) if has_zero else (2**bits - 1) / 2
    for i in range(len(W)):
        for place in np.flatnonzero(stored[:, 0] == i):
            value, group = W[tuple(stored[place])], place // 64
            if bits < 16 and group not in scales:
                members = W[tuple(stored[group * 64 : group * 64 + 64].T)]
                largest = max(members, key=abs)
                outer = -largest if has_zero else abs(largest)
                scales[group] = float(torch.tensor(outer / offset).to(dtype))
            if bits < 16:
                levels = (np.arange(2**bits) - offset) * scales[group]
                value = levels[np.abs(levels - value).argmin()]
            expected[tuple(stored[place])] = float(torch.tensor(value).to(dtype))
        fixed = found[i].double().numpy()
        feed_back(W, C, i, W[i] - fixed)
        W[i] = fixed
    return expected


def share_of_equal(found: Tensor, expected: np.ndarray) -> float:
    """A value that is near the middle of two levels may go to the other one."""
    return float(np.isclose(found.numpy(), expected, rtol=1e-3, atol=1e-3).mean())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_gptq_is_obq_in_a_fixed_order(
    shape: tuple[int, int], bits: int, dtype: torch.dtype
) -> None:
    W, gram = problem(*shape)
    rounded, scales = round_with_feedback(W, inverse_factor(gram), bits, dtype)
    expected = oracle_round(
        W.double().numpy(), damped(gram), np.ones(shape, dtype=bool), bits, dtype, rounded
    )
    assert share_of_equal(rounded, expected) > 0.99
    core = EncodedCore.quantized(rounded, bits, dtype, scales, codec="dense")
    assert torch.equal(core.decode().float(), rounded)


@pytest.mark.parametrize(
    ("bits", "dtype"), [(16, torch.bfloat16), (4, torch.bfloat16), (3, DTYPES[0])]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_sparsegpt_is_obq_with_a_mask(
    shape: tuple[int, int], bits: int, dtype: torch.dtype
) -> None:
    W, gram = problem(*shape)
    U, C = inverse_factor(gram), damped(gram)
    count = W.numel() // 3
    mask = prune(W, U, count)
    assert int(mask.sum()) == count

    left, chosen = W.double().numpy().copy(), np.zeros(shape, dtype=bool)
    conditional = np.array([np.linalg.inv(C[i:, i:])[0, 0] for i in range(len(C))])
    initial = left**2 / conditional[:, None]
    threshold = np.sort(initial, axis=None)[-count]
    for start in range(0, len(W), _BLOCK):
        block = slice(start, start + _BLOCK)
        quota = int((initial[block] >= threshold).sum())
        scores = left[block] ** 2 / conditional[block, None]
        chosen[block] = scores >= np.sort(scores, axis=None)[-quota] if quota else False
        for i in range(start, min(start + _BLOCK, len(W))):
            feed_back(left, C, i, np.where(chosen[i], 0, left[i]))
    assert (mask.numpy() == chosen).mean() > 0.99

    rounded, scales = round_with_feedback(W, U, bits, dtype, mask)
    expected = oracle_round(W.double().numpy(), C, mask.numpy(), bits, dtype, rounded)
    assert share_of_equal(rounded, expected) > 0.99
    core = EncodedCore.quantized(rounded, bits, dtype, scales, "bitmask", mask)
    assert torch.equal(core.decode().float(), rounded)


@pytest.mark.parametrize("bits", [8, 3])
def test_without_activations_it_is_rounding_to_nearest(bits: int) -> None:
    W, gram = problem(40, 70)
    rounded, _ = round_with_feedback(W, inverse_factor(torch.zeros_like(gram)), bits, DTYPES[1])
    plain = EncodedCore.quantized(W, bits, DTYPES[1], codec="dense").decode().float()
    assert torch.equal(rounded, plain)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_feedback_lowers_the_error_of_the_outputs(bits: int) -> None:
    W, gram = problem(96, 64)
    rounded, _ = round_with_feedback(W, inverse_factor(gram), bits, DTYPES[1])
    plain = EncodedCore.quantized(W, bits, DTYPES[1], codec="dense").decode().float()
    C = torch.from_numpy(damped(gram)).float()
    errors = [float(((W - Q).T @ C @ (W - Q)).trace()) for Q in (rounded, plain)]
    assert errors[0] < 0.5 * errors[1]


def test_ties_do_not_change_how_many_are_largest() -> None:
    scores = torch.tensor([[1.0, 2.0, 1.0], [1.0, 1.0, 3.0]])
    for count in range(7):
        mask = largest(scores, count)
        assert int(mask.sum()) == count
        assert not count or bool(mask[1, 2])
