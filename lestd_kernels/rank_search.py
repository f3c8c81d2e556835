"""The rank search: which ranks keep the most of a group within a byte budget.

Shapes: as in stage1 (W is (d, T, n, p)). P is the number of stored cores, see budget; Q is the
number of R2 candidates.

The rank search (METHOD.md section 6): W is rotated once by its full HOSVD bases; the core of every
truncation (R1, R2, R3) is then a leading sub-block, and the squared error of keeping the k largest
elements of it is ``||W||^2 -`` the sum of their squares. The scan reads the rotated tensor once, in
blocks of rows, and keeps counts of |g| over logarithmic bins instead of the elements. A long grid
of R1 is searched in two rounds: a coarse one, and all values between the neighbors of its best. For
more byte budgets, a group's curve of error against bytes, one more scan looks at all values.

References: LeSTD (ICLR 2026), Stages I and II; Vannieuwenhoven, Vandebril, Meerbergen, "A new
truncation strategy for the higher-order singular value decomposition", SISC 34(2), 2012.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lestd_kernels.budget import CurvePoint, GroupShape, Limits, largest_dense_rank, rank_grid
from lestd_kernels.stage1 import Factors, Ranks, mix, project_rows, squared_sum

_ROWS_PER_CHUNK, _ROWS_PER_COUNT = 512, 32
# Values of R1 that are looked at in a first round, before those near the best.
_COARSE_RANKS = 32
# 32 bins an octave (the upper bits of a float32) over 32 octaves below ||W||: the elements in the
# lowest bin together hold less than 2^-32 of ||W||^2 even if there are 2^32 of them.
_KEY_SHIFT, _MAGNITUDE_BITS = 18, 0x7FFFFFFF
_BINS = 1024


def search_sparse(
    W: Tensor, bases: Factors, shape: GroupShape, limits: Sequence[Limits]
) -> list[CurvePoint]:
    """Ranks whose leading sub-block, thresholded to the budget, keeps the most energy.

    The k of a candidate is the largest whose bytes fit with every core in its cheapest codec and
    one threshold for all cores. Counts, and the energy of a block, are exact; what is below the
    threshold is counted as if the elements of a bin were evenly spread over it. Equal candidates:
    the smallest R1, then R3, then R2.

    Args:
        W: ``(d, T, n, p)``, float32.
        bases: square factors of `stage1.hosvd`.
        shape: sizes of the group.
        limits: feasible ones (see `require_feasible`), which differ in their byte budgets only.

    Returns:
        One point per budget.
    """
    grid = rank_grid(W.shape[0], limits[0].rank_step)
    scan = _SparseScan(W, bases, shape, limits[0])
    found = [_best_of_two_rounds(scan, grid, limits[0])]
    if len(limits) > 1:
        found += scan.best(grid, limits[1:])
    return [
        CurvePoint(one.byte_budget, best.ranks, max(scan.squared_norm - best.energy, 0.0))
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
    """What a scan has summed up over the first R1 rotated rows.

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

    def __init__(self, W: Tensor, bases: Factors, shape: GroupShape, limits: Limits) -> None:
        T, p = W.shape[1], W.shape[3]
        self._W, self._bases, self._shape = W, bases, shape
        self._widths = rank_grid(p, limits.rank_step)
        self._labels = _histogram_labels(shape, p, limits.rank_step).to(W.device)
        self.squared_norm = squared_sum(W)
        top_key = int(torch.tensor(self.squared_norm**0.5).view(torch.int32)) >> _KEY_SHIFT
        self._lowest_key = top_key - _BINS + 1
        self._bin_energy = _bin_energies(self._lowest_key)
        self._sizes = (len(shape.core_slices), T, len(self._widths), _BINS)

    def best(
        self, candidates: Sequence[int], limits: Sequence[Limits], seen: _Seen | None = None
    ) -> list[_Best]:
        """What is best for each budget.

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
                if value > best[b].energy:
                    R3, q = divmod(index, len(self._widths))
                    best[b] = _Best(value, Ranks(now.R1, self._widths[q], R3 + 1), last)
            last = now
        return best

    def _nothing(self, R1: int) -> _Seen:
        counts = self._W.new_zeros(self._sizes, dtype=torch.int64)
        T, p = self._W.shape[1], self._W.shape[3]
        return _Seen(R1, counts, self._W.new_zeros(T, p, dtype=torch.float64))

    def _sums(self, first: int, candidates: Sequence[int]) -> Iterator[_Seen]:
        """For each candidate, what is added by the rotated rows since the one before it."""
        remaining, done = iter(candidates), first
        more = self._nothing(next(remaining))
        for rows in _rotated_rows(self._W, self._bases, first, candidates[-1]):
            while len(rows):
                part = rows[: min(_ROWS_PER_COUNT, more.R1 - done)]
                more.squares.add_(part.square().sum(dim=2).sum(dim=0, dtype=torch.float64))
                keys = part.view(torch.int32).bitwise_and_(_MAGNITUDE_BITS)
                keys.bitwise_right_shift_(_KEY_SHIFT).sub_(self._lowest_key)
                keys.clamp_(0, _BINS - 1).add_(self._labels)
                counts = torch.bincount(keys.flatten(), minlength=more.counts.numel())
                more.counts.add_(counts.view(self._sizes))
                rows, done = rows[len(part) :], done + len(part)
                if done == more.R1:
                    yield more
                    more = self._nothing(next(remaining, more.R1))


def _rotated_rows(W: Tensor, bases: Factors, first: int, last: int) -> Iterator[Tensor]:
    """Blocks of the rows [first, last) of W rotated by its bases, ``(rows, T, n, p)``, in order."""
    for columns in torch.split(bases.U1[:, first:last], _ROWS_PER_CHUNK, dim=1):
        yield mix(project_rows(W, columns), bases.U3) @ bases.U2


def _histogram_labels(shape: GroupShape, p: int, step: int) -> Tensor:
    """First histogram position of each element of a row, ``(T, n, p)`` int32.

    A row's elements are counted apart by core, type and block of `step` columns.
    """
    core = torch.repeat_interleave(torch.tensor(shape.core_slices))
    kind = torch.arange(shape.types)
    block = torch.arange(p) // step
    blocks = int(block[-1]) + 1
    label = (core[None, :, None] * shape.types + kind[:, None, None]) * blocks + block
    return (label * _BINS).to(torch.int32)


def _bin_energies(lowest_key: int) -> Tensor:
    """Mean square of values evenly spread over each bin, ``(bins,)`` float64; lowest bin: 0."""
    keys = torch.arange(lowest_key, lowest_key + _BINS + 1).clamp(min=0)
    edges = (keys.to(torch.int32) << _KEY_SHIFT).view(torch.float32).double()
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
    P, T = in_bin.shape[:2]
    candidates = [[Ranks(R1, R2, R3 + 1) for R2 in widths] for R3 in range(T)]
    lines = torch.tensor(
        [[[shape.codec_lines(r, core) for r in row] for row in candidates] for core in range(P)],
        dtype=torch.float64,
    )
    factors = torch.tensor([[shape.factor_bytes(r) for r in row] for row in candidates])
    allowed = torch.tensor([[limits.allows_flops(shape, r) for r in row] for row in candidates])

    # From the top: position b holds everything in the b largest bins.
    above = torch.nn.functional.pad(in_bin.flip(-1).cumsum(-1), (1, 0)).double()
    energy = torch.nn.functional.pad((in_bin.sum(0) * bin_energy).flip(-1).cumsum(-1), (1, 0))
    energy = (energy - energy[..., -1:] + block[..., None]).clamp(min=0)
    options = lines[..., 0, None] + lines[..., 1, None] * above.unsqueeze(-2)
    stored = options.amin(dim=-2).sum(0) + factors[..., None]

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
    W: Tensor, bases: Factors, shape: GroupShape, limits: Sequence[Limits]
) -> list[CurvePoint]:
    """Ranks of the dense core within the limits that keeps the most energy.

    For each R2 and R3, R1 is the largest that fits (any integer). Equal candidates: the smallest
    R3, then R2.

    Args:
        W: ``(d, T, n, p)``, float32.
        bases: square factors of `stage1.hosvd`.
        shape: sizes of the group.
        limits: feasible ones (see `require_feasible`), which differ in their byte budgets only.

    Returns:
        One point per budget.
    """
    T, p = W.shape[1], W.shape[3]
    energies = torch.cat(
        [
            torch.linalg.vector_norm(rows, dim=2, dtype=torch.float64).square().cpu()
            for rows in _rotated_rows(W, bases, 0, W.shape[0])
        ]
    )
    leading, squared_norm = energies.cumsum(0).cumsum(1).cumsum(2), squared_sum(W)
    points = []
    for one in limits:
        best, best_energy = Ranks(0, 0, 0), -1.0
        for R3 in range(1, T + 1):
            for R2 in rank_grid(p, one.rank_step):
                R1 = largest_dense_rank(shape, one, R2, R3)
                if R1 and float(leading[R1 - 1, R3 - 1, R2 - 1]) > best_energy:
                    best, best_energy = Ranks(R1, R2, R3), float(leading[R1 - 1, R3 - 1, R2 - 1])
        points.append(CurvePoint(one.byte_budget, best, max(squared_norm - best_energy, 0.0)))
    return points
