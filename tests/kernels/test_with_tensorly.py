"""tensorly on PyTorch tensors: what its user has set stays."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import tensorly
import torch

from lestd_kernels.with_tensorly import (
    partial_tucker,
    project_modes,
    pytorch_backend,
    tt_matrix,
)


@pytest.fixture(autouse=True)
def numpy_backend() -> Iterator[None]:
    tensorly.set_backend("numpy")
    yield
    tensorly.set_backend("numpy")


def test_the_backend_of_other_threads_stays() -> None:
    seen = []
    with pytorch_backend():
        other = threading.Thread(target=lambda: seen.append(tensorly.get_backend()))
        other.start()
        other.join()
        seen.append(tensorly.get_backend())
    assert [*seen, tensorly.get_backend()] == ["numpy", "pytorch", "numpy"]


def test_the_backend_is_restored_after_an_error() -> None:
    with pytest.raises(RuntimeError), pytorch_backend():
        raise RuntimeError
    assert tensorly.get_backend() == "numpy"
    assert isinstance(tensorly.tensor([1.0]), np.ndarray)


def test_a_core_is_the_projection() -> None:
    T, U, V = torch.randn(5, 4, 6), torch.randn(5, 2), torch.randn(6, 3)
    expected = torch.einsum("anb,ar,bs->rns", T, U, V)
    torch.testing.assert_close(project_modes(T, (U, V), (0, 2)), expected)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_sweeps_do_not_raise_the_error(scale: float) -> None:
    T = torch.randn(3, 12, 9, generator=torch.Generator().manual_seed(1)) * scale
    start = [torch.linalg.qr(torch.randn(n, 4))[0] for n in (12, 9)]
    found = partial_tucker(T, start, (1, 2), 1e-6, 25)
    before, after = (
        float((project_modes(T, factors, (1, 2)) / scale).norm()) for factors in (start, found)
    )
    assert after > before
    for factor in found:
        torch.testing.assert_close(factor.T @ factor, torch.eye(4), atol=1e-5, rtol=0)


def test_a_train_of_full_ranks_is_the_tensor() -> None:
    T = torch.randn(2, 3, 4, 3, 2, 2)
    cores = tt_matrix(T, (6, 100))
    assert [tuple(core.shape) for core in cores] == [(1, 2, 3, 6), (6, 3, 2, 8), (8, 4, 2, 1)]
    full = torch.einsum("xadr,rbes,scfy->abcdef", *cores)
    torch.testing.assert_close(full, T)


def test_columns_that_nothing_decides_are_the_same_each_time() -> None:
    """A rank beyond that of the projected unfolding, here 6 of 2: tensorly draws the rest."""
    T = torch.randn(2, 12, 9, generator=torch.Generator().manual_seed(1))
    start = [torch.eye(n)[:, :rank] for n, rank in ((12, 6), (9, 1))]
    first, second = (partial_tucker(T, start, (1, 2), 1e-6, 5) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    torch.testing.assert_close(first[0].T @ first[0], torch.eye(6), atol=1e-5, rtol=0)
