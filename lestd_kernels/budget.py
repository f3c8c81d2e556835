"""From a byte budget to ranks: byte and multiply-add counts, and the rank search.

Shapes: as in stage1 (W is (d, T, n, p)). P is the number of stored cores: type mode identity has
one per module, type mode learned has one. Q is the number of R2 candidates.

The rank search (METHOD.md section 6): W is rotated once by its full HOSVD bases; the core of every
truncation (R1, R2, R3) is then a leading sub-block, and the squared error of keeping the k largest
elements of it is ``||W||^2 -`` the sum of their squares. The scan reads the rotated tensor once, in
blocks of rows, and keeps counts of |g| over logarithmic bins instead of the elements. A long grid
of R1 is searched in two rounds: a coarse one, and all values between the neighbors of its best.

References: LeSTD (ICLR 2026), Stages I and II; Vannieuwenhoven, Vandebril, Meerbergen, "A new
truncation strategy for the higher-order singular value decomposition", SISC 34(2), 2012.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lestd_kernels.codecs import CODECS, UNSTRUCTURED, cheapest_codec
from lestd_kernels.errors import LestdError
from lestd_kernels.stage1 import Factors, Ranks, mix, project_rows, squared_sum
from lestd_kernels.tensorize import PROJECTIONS, GroupLayout

_ROWS_PER_CHUNK, _ROWS_PER_COUNT = 512, 32
# Values of R1 that are looked at in a first round, before those near the best.
_COARSE_RANKS = 32
# 32 bins an octave (the upper bits of a float32) over 32 octaves below ||W||: the elements in the
# lowest bin together hold less than 2^-32 of ||W||^2 even if there are 2^32 of them.
_KEY_SHIFT, _MAGNITUDE_BITS = 18, 0x7FFFFFFF
_BINS = 1024


@dataclass(frozen=True)
class GroupShape:
    """What the sizes of a compressed group depend on, beside its ranks and nnz.

    Attributes:
        layout: the group.
        learned: type mode ``learned``: one core, U3 stored.
        value_bytes: bytes of a stored value, of a factor or a core.
        pattern: where non-zeros may stand, see `codecs.PATTERNS`.
    """

    layout: GroupLayout
    learned: bool
    value_bytes: int
    pattern: str = UNSTRUCTURED

    @property
    def types(self) -> int:
        """T: 4 for a learned type mode, else 1."""
        return len(PROJECTIONS) if self.learned else 1

    @property
    def core_slices(self) -> tuple[int, ...]:
        """Extent of each stored core along the slice axis n; sums to n."""
        if self.learned:
            return (len(self.layout.slices) // self.types,)
        return tuple(len(module.slices) for module in self.layout.modules)

    def core_shape(self, ranks: Ranks, core: int) -> tuple[int, int]:
        """Rows and columns of a stored core's unfolding."""
        return ranks.R1, ranks.R3 * self.core_slices[core] * ranks.R2

    def core_elements(self, ranks: Ranks) -> int:
        """Elements of all cores, zero or not."""
        return ranks.R1 * ranks.R3 * sum(self.core_slices) * ranks.R2

    def factor_bytes(self, ranks: Ranks) -> int:
        """Stored bytes of U1, U2 and, with a learned type mode, U3."""
        elements = self.layout.width * ranks.R1 + self.layout.head_dim * ranks.R2
        return (elements + (self.types * ranks.R3 if self.learned else 0)) * self.value_bytes

    def stored_bytes(self, ranks: Ranks, nnz: Sequence[int]) -> int:
        """Bytes of the whole decomposition when core c has ``nnz[c]`` non-zeros."""
        total = self.factor_bytes(ranks)
        for core, count in enumerate(nnz):
            rows, columns = self.core_shape(ranks, core)
            codec = cheapest_codec(rows, columns, count, self.value_bytes)
            total += codec.stored_bytes(rows, columns, count, self.value_bytes)
        return total

    def flops_per_token(self, ranks: Ranks) -> int:
        """Multiply-adds of the compressed projections for one token, cores counted as dense.

        U1 is applied once for all modules that share their input side, and once for all that
        share their output side.
        """
        sides = len({module.basis_side for module in self.layout.modules})
        per_slice = ranks.R1 * ranks.R2 + ranks.R2 * self.layout.head_dim
        return sides * self.layout.width * ranks.R1 + len(self.layout.slices) * per_slice

    def codec_lines(self, ranks: Ranks, core: int) -> list[tuple[int, int]]:
        """Bytes of a core as ``(fixed, per non-zero)``, one pair per codec.

        Every codec's size is affine in nnz.
        """
        rows, columns = self.core_shape(ranks, core)
        lines = []
        for codec in CODECS.values():
            fixed, one = (codec.stored_bytes(rows, columns, k, self.value_bytes) for k in (0, 1))
            lines.append((fixed, one - fixed))
        return lines


@dataclass(frozen=True)
class Limits:
    """What a choice of ranks must respect.

    Attributes:
        byte_budget: upper bound of `GroupShape.stored_bytes`.
        max_flops: upper bound of multiply-adds per token relative to the dense modules; None: any.
        rank_step: R1 and R2 are multiples of it, or the full dimension.
    """

    byte_budget: int
    max_flops: float | None
    rank_step: int

    def allows_flops(self, shape: GroupShape, ranks: Ranks) -> bool:
        """Whether the ranks respect `max_flops`."""
        if self.max_flops is None:
            return True
        return shape.flops_per_token(ranks) <= self.max_flops * shape.layout.dense_flops_per_token


def rank_grid(dimension: int, step: int) -> list[int]:
    """Multiples of `step` up to `dimension`, and `dimension` itself."""
    return [*range(step, dimension, step), dimension]


def require_feasible(shape: GroupShape, limits: Limits, smallest: Ranks, least: int) -> None:
    """Refuse limits that even the smallest ranks exceed.

    Args:
        shape: the group.
        limits: the limits.
        smallest: the smallest ranks that the method can use.
        least: bytes that the method needs at these ranks.

    Raises:
        LestdError: the byte budget, or `max_flops`, is below that.
    """
    named = f"R1={smallest.R1}, R2={smallest.R2}"
    if least > limits.byte_budget:
        raise LestdError(
            f"the byte budget of a slice group is {limits.byte_budget:,} bytes, but its smallest "
            f"ranks ({named}) take {least:,} bytes; raise keep or lower rank_step"
        )
    if not limits.allows_flops(shape, smallest):
        least_ratio = shape.flops_per_token(smallest) / shape.layout.dense_flops_per_token
        raise LestdError(
            f"max_flops is {limits.max_flops}, but the smallest ranks of a slice group ({named}) "
            f"take {least_ratio:.3f} of the dense multiply-adds; raise max_flops or lower rank_step"
        )


def search_sparse(W: Tensor, bases: Factors, shape: GroupShape, limits: Limits) -> Ranks:
    """Ranks whose leading sub-block, thresholded to the budget, keeps the most energy.

    The k of a candidate is the largest whose bytes fit with every core in its cheapest codec and
    one threshold for all cores. Counts are exact; energies take the elements of a bin as evenly
    spread over it. Equal candidates: the smallest R1, then R3, then R2.

    Args:
        W: ``(d, T, n, p)``, float32.
        bases: square factors of `stage1.hosvd`.
        shape: sizes of the group.
        limits: feasible ones (see `require_feasible`).
    """
    grid = rank_grid(W.shape[0], limits.rank_step)
    stride = max(1, len(grid) // _COARSE_RANKS)
    scan = _SparseScan(W, bases, shape, limits)
    coarse = [*grid[stride - 1 : -1 : stride], grid[-1]]
    best, before = scan.best(coarse)
    if stride > 1:
        # Between the coarse neighbors of the best.
        after = min(coarse.index(best.R1) + 1, len(coarse) - 1)
        fine = [R1 for R1 in grid if before.R1 < R1 <= coarse[after]]
        best, _ = scan.best(fine, before)
    return best


class _Seen(NamedTuple):
    """What a scan has counted: ``counts`` (P, T, Q, bins) of the first R1 rotated rows."""

    R1: int
    counts: Tensor


class _SparseScan:
    """One pass over rotated rows for candidates of R1 in ascending order."""

    def __init__(self, W: Tensor, bases: Factors, shape: GroupShape, limits: Limits) -> None:
        T, p = W.shape[1], W.shape[3]
        self._W, self._bases, self._shape, self._limits = W, bases, shape, limits
        self._widths = rank_grid(p, limits.rank_step)
        self._labels = _histogram_labels(shape, p, limits.rank_step).to(W.device)
        top_key = int(torch.tensor(squared_sum(W) ** 0.5).view(torch.int32)) >> _KEY_SHIFT
        self._lowest_key = top_key - _BINS + 1
        self._bin_energy = _bin_energies(self._lowest_key)
        self._sizes = (len(shape.core_slices), T, len(self._widths), _BINS)

    def best(self, candidates: Sequence[int], seen: _Seen | None = None) -> tuple[Ranks, _Seen]:
        """The ranks that keep the most, and what was counted before that R1.

        Args:
            candidates: values of R1, ascending.
            seen: where to go on; by default at the beginning.
        """
        last = seen or _Seen(0, self._W.new_zeros(self._sizes, dtype=torch.int64))
        best, best_energy, before = Ranks(0, 0, 0), -1.0, last
        for R1, counts in self._counts(last.R1, candidates):
            now = _Seen(R1, last.counts + counts)
            # (P, R3, R2, bins): counts of the leading sub-block.
            in_bin = now.counts.cpu().cumsum(1).cumsum(2)
            energy = _fitting_energy(
                in_bin, self._bin_energy, self._shape, self._limits, R1, self._widths
            )
            value, index = energy.flatten().max(dim=0)
            if float(value) > best_energy:
                R3, q = divmod(int(index), len(self._widths))
                best, best_energy = Ranks(R1, self._widths[q], R3 + 1), float(value)
                before = last
            last = now
        return best, before

    def _counts(self, first: int, candidates: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Each candidate, with counts of the rotated rows since the one before it."""
        counts = self._W.new_zeros(math.prod(self._sizes), dtype=torch.int64)
        remaining = iter(candidates)
        R1, done = next(remaining), first
        for rows in _rotated_rows(self._W, self._bases, first, candidates[-1]):
            while len(rows):
                part = rows[: min(_ROWS_PER_COUNT, R1 - done)]
                keys = part.view(torch.int32).bitwise_and_(_MAGNITUDE_BITS)
                keys.bitwise_right_shift_(_KEY_SHIFT).sub_(self._lowest_key)
                keys.clamp_(0, _BINS - 1).add_(self._labels)
                counts += torch.bincount(keys.flatten(), minlength=counts.numel())
                rows, done = rows[len(part) :], done + len(part)
                if done == R1:
                    yield R1, counts.view(self._sizes)
                    counts = torch.zeros_like(counts)
                    R1 = next(remaining, R1)


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
    bin_energy: Tensor,
    shape: GroupShape,
    limits: Limits,
    R1: int,
    widths: Sequence[int],
) -> Tensor:
    """Energy that fits the limits for one R1 and every R3 and R2, ``(T, Q)``; -1 where none."""
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
    options = lines[..., 0, None] + lines[..., 1, None] * above.unsqueeze(-2)
    stored = options.amin(dim=-2).sum(0) + factors[..., None]

    fitting = (stored <= limits.byte_budget).sum(-1, keepdim=True)
    last = (fitting - 1).clamp(min=0)
    following = fitting.clamp(max=stored.shape[-1] - 1)
    low, high = stored.gather(-1, last), stored.gather(-1, following)
    share = ((limits.byte_budget - low) / (high - low).clamp(min=1)).clamp(0, 1)
    kept, more = energy.gather(-1, last), energy.gather(-1, following)
    total = torch.where(fitting > 0, kept + share * (more - kept), -1.0).squeeze(-1)
    return torch.where(allowed, total, -1.0)


def search_dense(W: Tensor, bases: Factors, shape: GroupShape, limits: Limits) -> Ranks:
    """Ranks of the dense core within the limits that keeps the most energy.

    For each R2 and R3, R1 is the largest that fits (any integer). Equal candidates: the smallest
    R3, then R2.

    Args:
        W: ``(d, T, n, p)``, float32.
        bases: square factors of `stage1.hosvd`.
        shape: sizes of the group.
        limits: feasible ones (see `require_feasible`).
    """
    T, p = W.shape[1], W.shape[3]
    best, best_energy = Ranks(0, 0, 0), -1.0
    energies = torch.cat(
        [
            torch.linalg.vector_norm(rows, dim=2, dtype=torch.float64).square().cpu()
            for rows in _rotated_rows(W, bases, 0, W.shape[0])
        ]
    )
    leading = energies.cumsum(0).cumsum(1).cumsum(2)
    for R3 in range(1, T + 1):
        for R2 in rank_grid(p, limits.rank_step):
            R1 = largest_dense_rank(shape, limits, R2, R3)
            if R1 and float(leading[R1 - 1, R3 - 1, R2 - 1]) > best_energy:
                best, best_energy = Ranks(R1, R2, R3), float(leading[R1 - 1, R3 - 1, R2 - 1])
    return best


def dense_bytes(shape: GroupShape, ranks: Ranks) -> int:
    """Stored bytes of a decomposition whose cores are dense."""
    return shape.factor_bytes(ranks) + shape.core_elements(ranks) * shape.value_bytes


def largest_dense_rank(shape: GroupShape, limits: Limits, R2: int, R3: int) -> int:
    """The largest R1 with which a dense core respects the limits; 0 where none does."""
    low, high = 0, shape.layout.width
    while low < high:
        middle = (low + high + 1) // 2
        ranks = Ranks(middle, R2, R3)
        if dense_bytes(shape, ranks) <= limits.byte_budget and limits.allows_flops(shape, ranks):
            low = middle
        else:
            high = middle - 1
    return low
