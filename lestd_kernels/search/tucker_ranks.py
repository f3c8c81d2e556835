"""The rank search: which ranks keep the most of a group within a byte budget.

Shapes: as in stage1 (W is (d, T, n, p)). P is the number of stored cores, see budget; Q is the
number of R2 candidates.

The rank search (METHOD.md section 6): W is rotated once by its full HOSVD bases; the core of every
truncation (R1, R2, R3) is then a leading sub-block, and the squared error of keeping the k largest
elements of it is ``||W||^2 -`` the sum of their squares. The scan reads the rotated tensor in
blocks of rows, and keeps counts of |g| over logarithmic bins instead of the elements. A long grid
of R1 is searched in two rounds: a coarse one, and all values between the neighbors of its best. For
more byte budgets, a group's curve of error against bytes, one more scan looks at all values. A scan
ends where no larger R1 has been better for an eighth of d: rows cost bytes and hold ever less.
The rotated rows are kept, since those of the ranks chosen are the core.

References: LeSTD (ICLR 2026), Stages I and II; Vannieuwenhoven, Vandebril, Meerbergen, "A new
truncation strategy for the higher-order singular value decomposition", SISC 34(2), 2012.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from lestd_kernels.linalg.stage1 import Factors, Ranks, mix, project_rows, squared_sum
from lestd_kernels.search.budget import (
    CurvePoint,
    GroupShape,
    Limits,
    largest_dense_rank,
    rank_grid,
)

_ROWS_PER_CHUNK, _COUNT_ELEMENTS = 512, 1 << 18
# Values of R1 that are looked at in a first round, before those near the best.
_COARSE_RANKS = 32
# Values of R1 beyond the best one that are looked at: a share of d, and steps of the grid.
_PATIENCE_SHARE, _PATIENCE_STEPS = 8, 8
# 16 bins an octave of g^2 (the upper bits of a float32) over 64 octaves below ||W||^2: the elements
# in the lowest bin together hold less than 2^-32 of ||W||^2 even if there are 2^32 of them.
_KEY_SHIFT, _BINS = 19, 1024


class RotatedCore:
    """W in the coordinates of its HOSVD bases, ``W x1 U1^T x2 U2^T x3 U3^T``, row by row.

    Rows are computed when they are asked for, and kept: on CPU the others take no memory.

    Attributes:
        parts: one tensor ``(d, T, n_c, p)``, float32, per stored core of the group.
        squared_norm: ``||W||^2``.

    Args:
        W: ``(d, T, n, p)``, float32.
        bases: square factors of `stage1.hosvd`.
        core_slices: extent n_c of each stored core along the slice axis.
    """

    def __init__(self, W: Tensor, bases: Factors, core_slices: Sequence[int]) -> None:
        self._sources = torch.split(W, list(core_slices), dim=2)
        self._bases, self._rows = bases, 0
        self.parts = [W.new_empty(source.shape) for source in self._sources]
        self.squared_norm = squared_sum(W)

    def compute(self, rows: int) -> None:
        """Have at least the first `rows` rows of every part."""
        while self._rows < rows:
            block = slice(self._rows, self._rows + _ROWS_PER_CHUNK)
            columns, U2 = self._bases.U1[:, block], self._bases.U2
            for source, part in zip(self._sources, self.parts, strict=True):
                mixed = mix(project_rows(source, columns), self._bases.U3)
                torch.mm(mixed.flatten(0, 2), U2, out=part[block].flatten(0, 2))
            self._rows = block.stop

    def leading(self, ranks: Ranks) -> list[Tensor]:
        """The core of the leading columns of the bases, part by part; views where they can be."""
        self.compute(ranks.R1)
        return [part[: ranks.R1, : ranks.R3, :, : ranks.R2].contiguous() for part in self.parts]


def search_sparse(
    core: RotatedCore, shape: GroupShape, limits: Sequence[Limits]
) -> list[CurvePoint]:
    """Ranks whose leading sub-block, thresholded to the budget, keeps the most energy.

    The k of a candidate is the largest whose bytes fit with every core in its cheapest codec and
    one threshold for all cores. Counts, and the energy of a block, are exact; what is below the
    threshold is counted as if the elements of a bin were evenly spread over it. Equal candidates:
    the smallest R1, then R3, then R2.

    Args:
        core: the group, rotated by its HOSVD bases.
        shape: sizes of the group.
        limits: feasible ones (see `require_feasible`), which differ in their byte budgets only.

    Returns:
        One point per budget.
    """
    grid = rank_grid(shape.layout.width, limits[0].rank_step)
    scan = _SparseScan(core, shape, limits[0])
    found = [_best_of_two_rounds(scan, grid, limits[0])]
    if len(limits) > 1:
        found += scan.best(grid, limits[1:])
    return [
        CurvePoint(one.byte_budget, best.ranks, max(core.squared_norm - best.energy, 0.0))
        for one, best in zip(limits, found, strict=True)
    ]


def _best_of_two_rounds(scan: _SparseScan, grid: Sequence[int], limits: Limits) -> _Best:
    stride = max(1, len(grid) // _COARSE_RANKS)
    # A small budget has room for the smallest ranks only: 1, 2, 4, ... steps, then every stride.
    small = {grid[2**i - 1] for i in range(stride.bit_length())}
    coarse = sorted(small | {*grid[stride - 1 : -1 : stride], grid[-1]})
    [best] = scan.best(coarse, [limits])
    if stride > 1:
        # Between the coarse neighbors of the best.
        after = min(coarse.index(best.ranks.R1) + 1, len(coarse) - 1)
        fine = [R1 for R1 in grid if best.before.R1 < R1 <= coarse[after]]
        [best] = scan.best(fine, [limits], best.before)
    return best


class _Seen(NamedTuple):
    """Sums of a scan over the first R1 rotated rows.

    Attributes:
        R1: number of rows.
        counts: elements per bin, ``(P, T, Q, bins)``.
        squares: of the elements, ``(T, p)`` float64.
    """

    R1: int
    counts: Tensor
    squares: Tensor


class _Best(NamedTuple):
    """The ranks that keep the most, and what was seen before their R1."""

    energy: float
    ranks: Ranks
    before: _Seen


class _SparseScan:
    """One pass over rotated rows for candidates of R1 in ascending order."""

    def __init__(self, core: RotatedCore, shape: GroupShape, limits: Limits) -> None:
        d, T, _, p = core.parts[0].shape
        self._core, self._shape = core, shape
        self._widths = rank_grid(p, limits.rank_step)
        self._patience = max(d // _PATIENCE_SHARE, _PATIENCE_STEPS * limits.rank_step)
        top_key = int(torch.tensor(core.squared_norm).view(torch.int32)) >> _KEY_SHIFT
        self._lowest_key = top_key - _BINS + 1
        labels = _histogram_labels(T, p, limits.rank_step) - self._lowest_key
        self._labels = labels.to(core.parts[0].device)
        self._bin_energy = _bin_energies(self._lowest_key)
        self._sizes = (len(core.parts), T, len(self._widths), _BINS)

    def best(
        self, candidates: Sequence[int], limits: Sequence[Limits], seen: _Seen | None = None
    ) -> list[_Best]:
        """The best candidate for each budget.

        Args:
            candidates: values of R1, ascending.
            limits: which differ in their byte budgets only.
            seen: where to go on; by default at the beginning.
        """
        budgets = torch.tensor([one.byte_budget for one in limits], dtype=torch.float64)
        ends = torch.tensor(self._widths) - 1
        last = seen or self._nothing(0)
        best = [_Best(-1.0, Ranks(0, 0, 0), last)] * len(limits)
        for more in self._sums(last.R1, candidates):
            now = _Seen(more.R1, last.counts + more.counts, last.squares + more.squares)
            # Of the leading sub-blocks: (P, R3, R2, bins) elements, and (R3, R2) energies.
            in_bin = now.counts.cpu().cumsum(1).cumsum(2)
            block = now.squares.cpu().cumsum(0).cumsum(1)[:, ends]
            energy = _fitting_energy(
                in_bin,
                block,
                self._bin_energy,
                self._shape,
                limits[0],
                budgets,
                now.R1,
                self._widths,
            )
            values, indices = energy.flatten(0, 1).T.max(dim=1)
            for b, (value, index) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
                going_on = best[b].energy < 0 or best[b].ranks.R1 + self._patience >= now.R1
                if going_on and value > best[b].energy:
                    R3, q = divmod(index, len(self._widths))
                    best[b] = _Best(value, Ranks(now.R1, self._widths[q], R3 + 1), last)
            last = now
            if all(b.energy >= 0 and b.ranks.R1 + self._patience <= now.R1 for b in best):
                break
        return best

    def _nothing(self, R1: int) -> _Seen:
        part = self._core.parts[0]
        counts = part.new_zeros(self._sizes, dtype=torch.int64)
        return _Seen(R1, counts, part.new_zeros(part.shape[1], part.shape[3], dtype=torch.float64))

    def _sums(self, first: int, candidates: Sequence[int]) -> Iterator[_Seen]:
        """For each candidate, what is added by the rotated rows since the one before it."""
        for R1 in candidates:
            self._core.compute(R1)
            more = self._nothing(R1)
            for counts, part in zip(more.counts, self._core.parts, strict=True):
                per_block = max(1, _COUNT_ELEMENTS // part[0].numel())
                for rows in torch.split(part[first:R1], per_block):
                    squares = rows.square()
                    more.squares.add_(squares.sum(dim=2).sum(dim=0, dtype=torch.float64))
                    # The bits of numbers that are not negative order like the numbers.
                    keys = squares.view(torch.int32).bitwise_right_shift_(_KEY_SHIFT)
                    keys.clamp_(self._lowest_key, self._lowest_key + _BINS - 1).add_(self._labels)
                    found = torch.bincount(keys.flatten(), minlength=counts.numel())
                    counts.add_(found.view_as(counts))
            yield more
            first = R1


def _histogram_labels(types: int, p: int, step: int) -> Tensor:
    """First histogram position of each element of a slice of a row, ``(T, 1, p)`` int32.

    Elements are counted apart by type and block of `step` columns.
    """
    block = torch.arange(p) // step
    label = torch.arange(types)[:, None, None] * (int(block[-1]) + 1) + block
    return (label * _BINS).to(torch.int32)


def _bin_energies(lowest_key: int) -> Tensor:
    """Mean square of |g| evenly spread over each bin, ``(bins,)`` float64; lowest bin: 0."""
    keys = torch.arange(lowest_key, lowest_key + _BINS + 1).clamp(min=0)
    edges = (keys.to(torch.int32) << _KEY_SHIFT).view(torch.float32).double().sqrt()
    low, high = edges[:-1], edges[1:]
    energy = (low.square() + low * high + high.square()) / 3
    energy[0] = 0
    return energy


def _fitting_energy(
    in_bin: Tensor,
    block: Tensor,
    bin_energy: Tensor,
    shape: GroupShape,
    limits: Limits,
    budgets: Tensor,
    R1: int,
    widths: Sequence[int],
) -> Tensor:
    """Energy that fits each of B budgets for one R1, every R3 and R2, ``(T, Q, B)``; -1: none.

    `in_bin` ``(P, T, Q, bins)`` and `block` ``(T, Q)`` are counts and energy of the sub-blocks.
    """
    T = in_bin.shape[1]
    candidates = [[Ranks(R1, R2, R3 + 1) for R2 in widths] for R3 in range(T)]
    # Cores of as many slices have the same sizes.
    alike = [shape.core_slices.index(slices) for slices in shape.core_slices]
    of_core = {
        core: [[shape.codec_lines(r, core) for r in row] for row in candidates]
        for core in set(alike)
    }
    lines = torch.tensor([of_core[core] for core in alike], dtype=torch.float64)
    factors = torch.tensor([[shape.factor_bytes(r) for r in row] for row in candidates])
    allowed = torch.tensor([[limits.allows_flops(shape, r) for r in row] for row in candidates])

    # From the top: position b holds everything in the b largest bins.
    above = torch.nn.functional.pad(in_bin.flip(-1).cumsum(-1), (1, 0)).double()
    energy = torch.nn.functional.pad((in_bin.sum(0) * bin_energy).flip(-1).cumsum(-1), (1, 0))
    energy = (energy - energy[..., -1:] + block[..., None]).clamp(min=0)
    options = (
        fixed[..., None] + per_nonzero[..., None] * above
        for fixed, per_nonzero in (codec.unbind(-1) for codec in lines.unbind(-2))
    )
    stored = reduce(torch.minimum, options).sum(0) + factors[..., None]

    targets = budgets.expand(*block.shape, -1).contiguous()
    fitting = torch.searchsorted(stored, targets, right=True)
    last = (fitting - 1).clamp(min=0)
    following = fitting.clamp(max=stored.shape[-1] - 1)
    low, high = stored.gather(-1, last), stored.gather(-1, following)
    share = ((targets - low) / (high - low).clamp(min=1)).clamp(0, 1)
    kept, more = energy.gather(-1, last), energy.gather(-1, following)
    total = torch.where(fitting > 0, kept + share * (more - kept), -1.0)
    return torch.where(allowed[..., None], total, -1.0)


def search_dense(
    core: RotatedCore, shape: GroupShape, limits: Sequence[Limits]
) -> list[CurvePoint]:
    """Ranks of the dense core within the limits that keeps the most energy.

    For each R2 and R3, R1 is the largest that fits (any integer). Equal candidates: the smallest
    R3, then R2.

    Args:
        core: the group, rotated by its HOSVD bases.
        shape: sizes of the group.
        limits: feasible ones (see `require_feasible`), which differ in their byte budgets only.

    Returns:
        One point per budget.
    """
    d, T, _, p = core.parts[0].shape
    core.compute(d)
    energies = torch.zeros(d, T, p, dtype=torch.float64)
    for part in core.parts:
        blocks = torch.split(part, max(1, _COUNT_ELEMENTS // part[0].numel()))
        energies += torch.cat([rows.double().square_().sum(dim=2) for rows in blocks]).cpu()
    leading = energies.cumsum(0).cumsum(1).cumsum(2)
    points = []
    for one in limits:
        best, best_energy = Ranks(0, 0, 0), -1.0
        for R3 in range(1, T + 1):
            for R2 in rank_grid(p, one.rank_step):
                R1 = largest_dense_rank(shape, one, R2, R3)
                if R1 and float(leading[R1 - 1, R3 - 1, R2 - 1]) > best_energy:
                    best, best_energy = Ranks(R1, R2, R3), float(leading[R1 - 1, R3 - 1, R2 - 1])
        points.append(CurvePoint(one.byte_budget, best, max(core.squared_norm - best_energy, 0.0)))
    return points
