"""From a byte budget to ranks: byte and multiply-add counts, and the rank search.

Shapes: as in stage1 (W is (d, T, n, p)). P is the number of stored cores: type mode identity has
one per module, type mode learned has one.

Reference: LeSTD (ICLR 2026), Stages I and II.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lestd_kernels.errors import LestdError
from lestd_kernels.linalg.stage1 import Ranks
from lestd_kernels.storage.codecs import CODECS, UNSTRUCTURED, cheapest_codec
from lestd_kernels.tensorize import PROJECTIONS, GroupLayout


@dataclass(frozen=True)
class GroupShape:
    """Parameters of the size of a compressed group, beside its ranks and nnz.

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
    """Limits of a choice of ranks.

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
    """Result of a rank search for one byte budget.

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
