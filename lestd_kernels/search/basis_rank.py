"""The rank of a basis that several cores share, and how many of their elements a budget has room
for, when values and factors may have few bits.

Shapes: r the width of the basis (all directions, strongest first), R the rank; a rotated core
(r, n_c), whatever the side of the module that the basis stands on.

As in lestd_kernels.search.tucker_ranks: the core of every rank is a leading block of the rotated
one, and the error of keeping some of its elements is what it loses by the others, plus the
directions that are left out. Elements are counted in logarithmic bins of their importance.

Reference: LeSTD (ICLR 2026), Stages I and II.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lestd_kernels.search.budget import rank_grid
from lestd_kernels.storage.codecs import CODECS, cheapest_codec
from lestd_kernels.storage.few_bits import values_bytes

# 16 bins an octave (the upper bits of a float32) over 64 octaves, see rank_search.
_KEY_SHIFT, _BINS = 19, 1024
# A number of values whose codes fill bytes, and whose groups are full, at any number of bits.
_WHOLE_GROUPS = 512


@dataclass(frozen=True)
class SidedShape:
    """Sizes of cores that share one basis on one side of their modules.

    Attributes:
        width: d, rows of the factor.
        core_columns: extent of each core beside the rank.
        rank_first: the basis stands on the input side, so that a core is (R, n_c); or else on the
            output side: (n_c, R).
        factor_uses: how often the factor is applied to a token.
        value_bytes: of the value dtype.
        value_bits: of a core's value.
        factor_bits: of a factor's element.
        identity: the basis is the identity, all of it, and is not stored.
    """

    width: int
    core_columns: tuple[int, ...]
    rank_first: bool
    factor_uses: int
    value_bytes: int
    value_bits: int
    factor_bits: int
    identity: bool = False

    @property
    def elements(self) -> int:
        """Elements of the dense modules."""
        return self.width * sum(self.core_columns)

    def grid(self, step: int, max_flops: float | None) -> list[int]:
        """The ranks that respect `max_flops`; the smallest one always."""
        ranks = rank_grid(self.width, step)
        if max_flops is None:
            return ranks
        most = max_flops * self.elements
        return [R for R in ranks if ranks[0] == R or self.flops(R) <= most]

    def flops(self, R: int) -> int:
        """Multiply-adds of one token, cores counted as dense."""
        return R * (self.width * self.factor_uses + sum(self.core_columns))

    def core_shape(self, R: int, core: int) -> tuple[int, int]:
        """Rows and columns of a stored core."""
        n = self.core_columns[core]
        return (R, n) if self.rank_first else (n, R)

    def factor_bytes(self, R: int) -> int:
        """Stored bytes of the factor (d, R)."""
        if self.identity:
            return 0
        return values_bytes(self.width * R, self.factor_bits, self.value_bytes)

    def stored_bytes(self, R: int, nnz: Sequence[int]) -> int:
        """Bytes of the factor, and of cores with these numbers of non-zeros."""
        total = self.factor_bytes(R)
        for core, count in enumerate(nnz):
            rows, columns = self.core_shape(R, core)
            codec = cheapest_codec(rows, columns, count, self.value_bytes, self.value_bits)
            total += codec.stored_bytes(rows, columns, count, self.value_bytes, self.value_bits)
        return total

    def least_bytes(self, step: int) -> int:
        """Bytes of the smallest rank with a single non-zero."""
        R = rank_grid(self.width, step)[0]
        return self.stored_bytes(R, [1] + [0] * (len(self.core_columns) - 1))

    def codec_lines(self, R: int) -> Tensor:
        """Bytes of each core in each codec as (fixed, per non-zero), ``(cores, codecs, 2)``."""
        of_width = {}
        for core, n in enumerate(self.core_columns):
            if n in of_width:
                continue
            rows, columns = self.core_shape(R, core)
            lines = []
            for codec in CODECS.values():
                none, some = (
                    codec.stored_bytes(rows, columns, k, self.value_bytes, self.value_bits)
                    for k in (0, _WHOLE_GROUPS)
                )
                lines.append((none, (some - none) / _WHOLE_GROUPS))
            of_width[n] = lines
        return torch.tensor([of_width[n] for n in self.core_columns], dtype=torch.float64)


def search_rank(
    losses: Sequence[Tensor],
    left_out: Tensor,
    shape: SidedShape,
    grid: Sequence[int],
    budgets: Sequence[int],
) -> list[tuple[int, float]]:
    """The rank of least error for each byte budget; of equal ones the smallest.

    Args:
        losses: of each core, ``(r, n_c)``: what the squared error gains by each element's loss.
        left_out: ``(r,)`` float64, what it gains by the loss of a direction with all its elements.
        shape: sizes of the cores.
        grid: ranks to look at, ascending.
        budgets: each fits the grid's first rank with one non-zero.

    Returns:
        ``(R, squared error)`` per budget.
    """
    tails = [*left_out.flip(0).cumsum(0).flip(0).tolist(), 0.0]
    targets = torch.tensor(list(budgets), dtype=torch.float64)
    top = max((float(loss.max()) for loss in losses if loss.numel()), default=0.0)
    lowest = (int(torch.tensor(top).view(torch.int32)) >> _KEY_SHIFT) - _BINS + 1
    counts = torch.zeros(len(losses), _BINS, dtype=torch.float64)
    energies = torch.zeros(_BINS, dtype=torch.float64)
    ranks, errors = torch.full_like(targets, grid[0]), torch.full_like(targets, torch.inf)
    before = 0
    for R in grid:
        for core, loss in enumerate(losses):
            rows = loss[before:R].contiguous().view(-1)
            keys = (rows.view(torch.int32) >> _KEY_SHIFT).sub_(lowest).clamp_(0, _BINS - 1)
            counts[core] += torch.bincount(keys, minlength=_BINS).cpu()
            energies += torch.bincount(keys, rows.double(), minlength=_BINS).cpu()
        before = R
        # From the top: position b holds everything in the b largest bins.
        above = torch.nn.functional.pad(counts.flip(1).cumsum(1), (1, 0))
        kept = torch.nn.functional.pad(energies.flip(0).cumsum(0), (1, 0))
        lines = shape.codec_lines(R)
        options = lines[:, :, :1] + lines[:, :, 1:] * above[:, None, :]
        stored = options.amin(dim=1).sum(dim=0) + shape.factor_bytes(R)
        fitting = torch.searchsorted(stored, targets, right=True)
        last, following = (fitting - 1).clamp(min=0), fitting.clamp(max=_BINS)
        low, high = stored[last], stored[following]
        share = ((targets - low) / (high - low).clamp(min=1)).clamp(0, 1)
        total = kept[last] + share * (kept[following] - kept[last])
        found = torch.where(fitting > 0, tails[R] + kept[-1] - total, torch.inf)
        better = found < errors * (1 - 1e-12)
        ranks[better], errors[better] = R, found[better].clamp(min=0)
    return [(int(R), error) for R, error in zip(ranks.tolist(), errors.tolist(), strict=True)]
