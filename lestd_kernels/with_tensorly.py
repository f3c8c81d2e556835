"""Decompositions by tensorly, on PyTorch tensors and their device.

tensorly has a backend for each thread and a default for all. A function here sets that of its
thread to PyTorch while it runs, and restores it; the default stays as the user has set it.

Importing tensorly takes a second, so it is imported on first use.

Reference: Kossaifi, Panagakis, Anandkumar, Pantic, "TensorLy: Tensor learning in Python", JMLR
20(26), 2019.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def pytorch_backend() -> Iterator[None]:
    """Use tensorly's PyTorch backend in this thread."""
    import tensorly

    before = tensorly.current_backend()
    tensorly.set_backend("pytorch", local_threadsafe=True)
    try:
        yield
    finally:
        tensorly.set_backend(before, local_threadsafe=True)


def project_modes(T: Tensor, factors: Sequence[Tensor], modes: Sequence[int]) -> Tensor:
    """The core ``T x_m F_m^T`` for factors ``(size of mode m, rank)`` of some modes."""
    with pytorch_backend():
        from tensorly.tenalg import multi_mode_dot

        core: Tensor = multi_mode_dot(T, list(factors), list(modes), transpose=True)
    return core


def partial_tucker(
    T: Tensor, factors: Sequence[Tensor], modes: Sequence[int], tol: float, max_iter: int
) -> list[Tensor]:
    """Partial Tucker decomposition by HOOI.

    Args:
        T: float32, any scale.
        factors: to begin with, orthonormal columns, one factor for each mode.
        modes: that are decomposed.
        tol: stop when the relative error changes by less than this; after three sweeps at least.
        max_iter: sweeps at most.

    Returns:
        The factors, of the same shapes.
    """
    # Squares of very large or small elements would leave the range of float32.
    T = T / T.abs().max().clamp(min=torch.finfo(T.dtype).tiny)
    ranks = [factor.shape[1] for factor in factors]
    start = project_modes(T, factors, modes), list(factors)
    with pytorch_backend():
        from tensorly import decomposition

        # The seed is for columns beyond the rank of a projected unfolding, which tensorly draws.
        (_, found), _ = decomposition.partial_tucker(
            T, ranks, list(modes), max_iter, start, tol, random_state=0
        )
    return [factor.contiguous() for factor in found]


def tt_matrix(T: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Cores of a TT-matrix by TT-SVD.

    Args:
        T: ``(a1, ..., ak, b1, ..., bk)``, float32.
        ranks: the k - 1 between the cores.

    Returns:
        Cores ``(r, a_i, b_i, r')``; a rank that is larger than its unfolding has is lower.
    """
    with pytorch_backend():
        from tensorly.decomposition import tensor_train_matrix

        return list(tensor_train_matrix(T, [1, *ranks, 1]).factors)
