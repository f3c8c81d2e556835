"""What was stored of every slice, and how far it is from the weights.

Shapes: see lestd_kernels.tensorize, stage1 and decomposition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lestd_kernels.formats.shared_tucker import SharedTucker
from lestd_kernels.methods.common.base import SliceStats
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.tensorize import PROJECTIONS

_ERROR_CHUNK_COLUMNS, _SQUARE_ELEMENTS = 512, 1 << 16


def relative(squared_error: float, squared_norm: float) -> float:
    """``sqrt(error / norm)``; 0 for an error of 0, even of a zero tensor."""
    if squared_error == 0:
        return 0.0
    return math.sqrt(squared_error / squared_norm) if squared_norm else math.inf


def _squares(slices: Tensor) -> Tensor:
    """Squared norm of each of n slices ``(m, n, p)``, ``(n,)``, accumulated in float64."""
    per_chunk = max(1, _SQUARE_ELEMENTS // slices[0].numel())
    total = slices.new_zeros(slices.shape[1], dtype=torch.float64)
    for rows in torch.split(slices, per_chunk):
        total += rows.double().square_().sum(dim=(0, 2))
    return total


def _nonzeros(slices: Tensor) -> list[int]:
    """Non-zeros of each of n slices ``(m, n, p)``, float32."""
    # A norm of order 0 counts, exactly up to 2^24 elements.
    counts = torch.linalg.vector_norm(slices, 0, dim=2).sum(dim=0, dtype=torch.float64)
    return [int(count) for count in counts.tolist()]


def slice_stats(
    unfolding: Tensor, scale: float, stored: SharedTucker, cores: Sequence[Tensor]
) -> tuple[list[SliceStats], float, float]:
    """Statistics per slice, and ``||W||^2`` and ``||W - W_hat||^2`` summed over them.

    The unfolding is divided by `scale`; the figures are in the units of the weights. `cores` are
    what the stored ones decode to.
    """
    layout = stored.layout
    U1, U2 = stored.U1.float(), stored.U2.float()
    d, p, R1, R2 = layout.width, layout.head_dim, U1.shape[1], U2.shape[1]
    per_chunk = max(1, _ERROR_CHUNK_COLUMNS // p)
    W = unfolding.view(d, -1, p)
    encoded = list(stored.cores.values())
    heads = [] if stored.U3 is None else _head_bytes(stored, cores[0])
    slices: list[SliceStats] = []
    total_norm = total_error = 0.0
    for module, core in enumerate(stored.mixed_cores(cores)):
        in_module = len(layout.modules[module].slices)
        for part in torch.split(core.view(R1, -1, R2), per_chunk, dim=1):
            M = part / scale
            first, count = len(slices), M.shape[1]
            chunk = W[:, first : first + count]
            residual = (U1 @ (M @ U2.T).flatten(1)).view_as(chunk).sub_(chunk)
            norms, errors, energies = (
                _squares(x).mul_(scale**2).tolist() for x in (chunk, residual, M)
            )
            counts = _nonzeros(M)
            for i, (projection, head) in enumerate(layout.slices[first : first + count]):
                slices.append(
                    SliceStats(
                        projection=projection,
                        head=head,
                        nnz=counts[i],
                        density=counts[i] / (R1 * R2),
                        core_bytes=(
                            heads[head] / len(PROJECTIONS)
                            if heads
                            else _share(encoded[module], counts[i], in_module)
                        ),
                        relative_error=relative(errors[i], norms[i]),
                        squared_norm=norms[i],
                        squared_energy=energies[i],
                    )
                )
            total_norm += sum(norms)
            total_error += sum(errors)
    return slices, total_norm, total_error


def _share(core: EncodedCore, nonzeros: int, slices: int) -> float:
    """Bytes of a core that belong to one of its slices."""
    return core.stored_bytes * (nonzeros / core.nnz if core.nnz else 1 / slices)


def _head_bytes(stored: SharedTucker, core: Tensor) -> list[float]:
    """Bytes of every head's share of the one core of a learned type mode."""
    [encoded], (_, R2, R3) = stored.cores.values(), stored.ranks.values()
    counts = _nonzeros(core.float().view(core.shape[0] * R3, -1, R2))
    return [_share(encoded, count, len(counts)) for count in counts]
