"""The semi-structured pattern 2:4: of each four consecutive core elements two are kept.

Groups of four run along the contraction dimension of the module's product, which is where the
hardware wants them: along the rows R1 of M (R1 x S R2) where U1 stands on the input side
(``(x U1) M``), and along its columns S R2 where it stands on the output side (``Z M^T``). A tail
of k < 4 elements is a group too. In each group the two of largest importance stay: g^2 / E as in
stage2, so the two largest |g|, the first on ties; zeros are never kept.

The number of elements kept follows from the shape, so a byte budget chooses the ranks only. The
order of the factors' columns is free, and decides which elements compete: `spread` deals strong
and weak directions to every group, where in the order of Stage I the strongest four would be one
(at full rank on the example model that lowers the relative error from 0.36 to 0.27).

References: Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378, 2021
(2:4 sparsity); Pool and Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021; LeSTD
(ICLR 2026), Stage II.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from lestd_kernels.linalg.stage1 import Factors, Ranks
from lestd_kernels.search.budget import CurvePoint, GroupShape, Limits, rank_grid
from lestd_kernels.search.tucker_ranks import RotatedCore
from lestd_kernels.tensorize import BasisSide

_CHUNK_ELEMENTS = 1 << 20


def contraction_dim(side: BasisSide) -> int:
    """Dimension of the core unfolding M ``(R1, S R2)`` that the module's product sums over."""
    return 0 if side == "input" else 1


def most_kept(length: int) -> int:
    """How many of `length` consecutive elements are kept at most: two of four, two of a tail."""
    return length // 4 * 2 + min(length % 4, 2)


def pattern_nonzeros(shape: GroupShape, ranks: Ranks) -> list[int]:
    """Non-zeros of each core of a group at given ranks (fewer where the core has zeros itself)."""
    counts = []
    for core, module in enumerate(shape.layout.modules):
        dim = contraction_dim(module.basis_side)
        sizes = shape.core_shape(ranks, core)
        counts.append(most_kept(sizes[dim]) * sizes[1 - dim])
    return counts


def pattern_bytes(shape: GroupShape, ranks: Ranks) -> int:
    """Stored bytes of a group at given ranks, at most."""
    return shape.stored_bytes(ranks, pattern_nonzeros(shape, ranks))


def _spread_order(rank: int) -> Tensor:
    """``0 .. rank - 1`` dealt to groups of four, back and forth as players are to teams."""
    deal = torch.arange(rank + -rank % 4).view(4, -1)
    deal[1::2] = deal[1::2].flip(1)
    order = deal.T.flatten()
    return order[order < rank]


def spread(factors: Factors) -> Factors:
    """The factors with the columns of U1 and U2 in the order that the pattern is chosen in.

    Args:
        factors: strongest directions first, as `stage1.hooi` gives them.
    """
    U1, U2 = (U[:, _spread_order(U.shape[1]).to(U.device)] for U in (factors.U1, factors.U2))
    return replace(factors, U1=U1, U2=U2)


def _in_fours(matrix: Tensor) -> Tensor:
    """``(n, m)`` -> ``(ceil(n / 4), 4, m)``, the last group filled up with zeros."""
    padded = torch.nn.functional.pad(matrix, (0, 0, 0, -matrix.shape[0] % 4))
    return padded.view(padded.shape[0] // 4, 4, matrix.shape[1])


def _chunks(matrix: Tensor) -> Iterator[Tensor]:
    yield from torch.split(matrix, max(1, _CHUNK_ELEMENTS // matrix.shape[0]), dim=1)


def two_of_four(matrix: Tensor, dim: int) -> Tensor:
    """Where the elements stand that stay.

    Args:
        matrix: 2-D, any floating dtype.
        dim: along which the groups of four run.

    Returns:
        A bool tensor of its shape.
    """
    if dim == 1:
        return two_of_four(matrix.T, 0).T
    mask = torch.empty_like(matrix, dtype=torch.bool)
    for kept, part in zip(_chunks(mask), _chunks(matrix), strict=True):
        groups = _in_fours(part.abs())
        largest = groups.sort(dim=1, descending=True, stable=True).indices[:, :2]
        chosen = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, largest, True)
        kept.copy_(chosen.flatten(0, 1)[: part.shape[0]])
    return mask.logical_and_(matrix != 0)


def select_two_of_four(cores: Sequence[Tensor], shape: GroupShape) -> list[Tensor]:
    """Masks of the elements that stay, core by core.

    Args:
        cores: ``(R1, 1, n_c, R2)`` each, one per module of the group.
        shape: sizes of the group.

    Returns:
        A bool tensor per core, of its shape.
    """
    return [
        two_of_four(core.flatten(1), contraction_dim(module.basis_side)).reshape(core.shape)
        for core, module in zip(cores, shape.layout.modules, strict=True)
    ]


def fitting_ranks(shape: GroupShape, limits: Limits) -> list[Ranks]:
    """For each R2 the largest R1 of the grid whose bytes and multiply-adds respect the limits."""
    grid1 = rank_grid(shape.layout.width, limits.rank_step)

    def allowed(ranks: Ranks) -> bool:
        fits = pattern_bytes(shape, ranks) <= limits.byte_budget
        return fits and limits.allows_flops(shape, ranks)

    fitting = []
    for R2 in rank_grid(shape.layout.head_dim, limits.rank_step):
        low, high = 0, len(grid1)
        while low < high:
            middle = (low + high) // 2
            if allowed(Ranks(grid1[middle], R2, 1)):
                low = middle + 1
            else:
                high = middle
        if low:
            fitting.append(Ranks(grid1[low - 1], R2, 1))
    return fitting


def search_two_of_four(
    core: RotatedCore, shape: GroupShape, limits: Sequence[Limits]
) -> list[CurvePoint]:
    """Ranks of `fitting_ranks` that keep the most energy under the pattern.

    The energy is that of the very selection on the leading sub-block of W rotated by its bases,
    columns spread. Only the largest R1 of each R2 is tried: all candidates are equally dense, and
    where directions are spread the stronger half of them may be what is kept, so that more of
    them hardly ever keep less. Equal candidates: the smallest R2.

    Args:
        core: the group, rotated by its HOSVD bases.
        shape: sizes of the group, type mode identity.
        limits: feasible ones (see `budget.require_feasible`).

    Returns:
        One point per budget.
    """
    found = [(one.byte_budget, fitting_ranks(shape, one)) for one in limits]
    core.compute(max(ranks.R1 for _, fitting in found for ranks in fitting))

    @cache
    def energy(ranks: Ranks) -> float:
        device = core.parts[0].device
        order1, order2 = (_spread_order(rank).to(device) for rank in (ranks.R1, ranks.R2))
        total = 0.0
        for module, part in zip(shape.layout.modules, core.parts, strict=True):
            M = part[order1, 0][:, :, order2].flatten(1)
            total += _kept_energy(M, contraction_dim(module.basis_side))
        return total

    chosen = [(budget, max(fitting, key=energy)) for budget, fitting in found]
    return [CurvePoint(b, r, max(core.squared_norm - energy(r), 0.0)) for b, r in chosen]


def _kept_energy(matrix: Tensor, dim: int) -> float:
    """Sum of the squares that `two_of_four` keeps, in float64."""
    total = 0.0
    for part in _chunks(matrix if dim == 0 else matrix.T):
        a, b, c, d = _in_fours(part.square()).unbind(1)
        # The two largest of four are the larger of each pair, or one of the pairs.
        largest = torch.maximum(torch.maximum(a, b) + torch.maximum(c, d), a + b)
        total += float(torch.maximum(largest, c + d).sum(dtype=torch.float64))
    return total
