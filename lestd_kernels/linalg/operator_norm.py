"""The operator norm of a matrix that is too large for a full decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

_COLUMNS = 8
_TOLERANCE = 1e-5
_MOST_STEPS = 200


def operator_norm(matrix: Tensor) -> float:
    """``||M||_2``, the largest singular value, by block power iteration.

    A block of 8 orthonormal columns is multiplied by ``M^T M`` until the largest singular value of
    ``M Q`` stands still (relative change below 1e-5 in two steps together). What is returned is a
    lower bound, and where singular values decay at all a close one: the error falls as
    ``(s_9 / s_1)^(4 steps)``. The start is fixed, so the same matrix gives the same number.

    Args:
        matrix: ``(rows, columns)``, float32.

    References:
        Halko, Martinsson and Tropp, "Finding Structure with Randomness", SIAM Review 53(2), 2011,
        algorithm 4.4.
    """
    # In units of the largest entry, whose squares stay in range.
    scale = max(abs(float(end)) for end in torch.aminmax(matrix)) if matrix.numel() else 0.0
    if scale == 0:
        return 0.0
    rows, columns = matrix.shape
    block = min(_COLUMNS, rows, columns)
    generator = torch.Generator().manual_seed(0)
    Q = torch.randn(columns, block, generator=generator).to(matrix)
    Q = torch.linalg.qr(Q).Q
    norm, still = 0.0, 0
    for _ in range(_MOST_STEPS):
        product = (matrix @ Q).div_(scale)
        before, norm = norm, float(torch.linalg.matrix_norm(product, 2))
        still = still + 1 if norm - before <= _TOLERANCE * norm else 0
        if still == 2:
            break
        Q = torch.linalg.qr((matrix.T @ product).div_(scale)).Q
    return norm * scale
