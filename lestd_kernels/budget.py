"""From a byte budget to ranks: byte and multiply-add counts, and the rank search.

Shapes: as in stage1 (W is (d, T, n, p)). P is the number of stored cores: type mode identity has
one per module, type mode learned has one. Q is the number of R2 candidates.

The rank search (METHOD.md section 6): W is rotated once by its full HOSVD bases; the core of every
truncation (R1, R2, R3) is then a leading sub-block, and the squared error of keeping the k largest
elements of it is ``||W||^2 -`` the sum of their squares. The scan reads the rotated tensor once, in
blocks of rows, and keeps counts of |g| over logarithmic bins instead of the elements. One scan
serves any number of byte budgets: what they give is the group's curve of error against bytes.

References: LeSTD (ICLR 2026), Stages I and II; Vannieuwenhoven, Vandebril, Meerbergen, "A new
truncation strategy for the higher-order singular value decomposition", SISC 34(2), 2012.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lestd_kernels.codecs import CODECS, UNSTRUCTURED, cheapest_codec
from lestd_kernels.errors import LestdError
from lestd_kernels.stage1 import Factors, Ranks, mix, project_rows, squared_sum
from lestd_kernels.tensorize import PROJECTIONS, GroupLayout

_ROWS_PER_CHUNK = 128
# 32 bins an octave (the upper bits of a float32) over 32 octaves below ||W||: the elements in the
# lowest bin together hold less than 2^-32 of ||W||^2 even if there are 2^32 of them.
_KEY_SHIFT = 18
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


@dataclass(frozen=True)
class CurvePoint:
    """What a rank search finds for one byte budget.

    Attributes:
        byte_budget: the budget.
        ranks: the ranks that it chooses.
        squared_error: ``||W - W_hat||^2`` to expect at them: in the HOSVD's bases, before a value
            or a factor is rounded. HOOI lowers it, rounding adds to it.
    """

    byte_budget: int
    ranks: Ranks
    squared_error: float


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
        One point per budget; the scan is the same for one and for many.
    """
    _, T, _, p = W.shape
    P, step = len(shape.core_slices), limits[0].rank_step
    widths = rank_grid(p, step)
    ends = torch.tensor(widths) - 1
    budgets = torch.tensor([one.byte_budget for one in limits], dtype=torch.float64)
    labels = _histogram_labels(shape, p, step).to(W.device)
    squared_norm = squared_sum(W)
    top_key = int(torch.tensor(squared_norm**0.5).view(torch.int32)) >> _KEY_SHIFT
    lowest_key = top_key - _BINS + 1
    bin_energy = _bin_energies(lowest_key)
    counts = torch.zeros(P * T * len(widths) * _BINS, dtype=torch.int64, device=W.device)
    squares = torch.zeros(T, p, dtype=torch.float64, device=W.device)

    best, R1 = [(-1.0, Ranks(0, 0, 0))] * len(limits), 0
    for rows in _rotated_rows(W, bases, step):
        R1 += rows.shape[0]
        squares += rows.square().sum(dim=2).sum(dim=0, dtype=torch.float64)
        keys = (rows.abs().view(torch.int32) >> _KEY_SHIFT).sub_(lowest_key).clamp_(0, _BINS - 1)
        counts += torch.bincount((keys + labels).flatten(), minlength=counts.numel())
        # Of the leading sub-blocks: (P, R3, R2, bins) elements per bin, and (R3, R2) energies.
        in_bin = counts.view(P, T, len(widths), _BINS).cpu().cumsum(1).cumsum(2)
        block = squares.cpu().cumsum(0).cumsum(1)[:, ends]
        energy = _fitting_energy(in_bin, block, bin_energy, shape, limits[0], budgets, R1, widths)
        for b, (value, index) in enumerate(
            zip(*(found.tolist() for found in energy.flatten(0, 1).T.max(dim=1)), strict=True)
        ):
            if value > best[b][0]:
                R3, q = divmod(index, len(widths))
                best[b] = value, Ranks(R1, widths[q], R3 + 1)
    return [
        CurvePoint(one.byte_budget, ranks, max(squared_norm - energy, 0.0))
        for one, (energy, ranks) in zip(limits, best, strict=True)
    ]


def _rotated_rows(W: Tensor, bases: Factors, step: int) -> Iterator[Tensor]:
    """Blocks of `step` rows ``(step, T, n, p)`` of W rotated by its bases, in order."""
    for columns in torch.split(bases.U1, -(-_ROWS_PER_CHUNK // step) * step, dim=1):
        rotated = mix(project_rows(W, columns), bases.U3) @ bases.U2
        yield from torch.split(rotated, step)


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
            for rows in _rotated_rows(W, bases, _ROWS_PER_CHUNK)
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
