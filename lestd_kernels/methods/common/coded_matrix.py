"""A matrix rounded to whole numbers on the common step, and coded by their entropy.

What errors may be fed back into is damped: the metrics get ``4^-R`` on their diagonals, relative to
the mean, with R bits of a number. That is the distortion of R bits, below which, by reverse water
filling, no direction is worth a change. Measured, it is near the best of all dampings at 0.8, 1.6
and 3.2 bits; with much less, few bits lose in feedback along both sides, and the weights stray far
from where the metrics hold.

Reference: see lestd_kernels.linalg.common_step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lestd_kernels.linalg.common_step import MOST_INTEGER, fit_scales, whole_numbers
from lestd_kernels.linalg.error_feedback import inverse_factor
from lestd_kernels.linalg.metric import Metric, diagonal_of, whole
from lestd_kernels.linalg.two_sided_feedback import output_factor
from lestd_kernels.options import DISK, MEMORY, Size
from lestd_kernels.search.step import finest_within
from lestd_kernels.storage.few_bits import GROUP, values_bytes
from lestd_kernels.storage.matrix import EncodedCore, counted_bytes
from lestd_kernels.storage.packed_integers import least_packed_bytes, packed_bytes
from lestd_kernels.storage.rans import coded_bytes, least_coded_bytes

SCALE_BITS = 8
"""Of the scale of a row or column."""
MOST_RMS, MOST_BITS = 62.0, 8
"""Root mean square of whole numbers of 8 bits of entropy: finer steps are not worth their bytes."""
_LEAST_DAMPING = 0.01
# Numbers of weights as they are; feedback may add as much.
_LARGEST = MOST_INTEGER / 2
_FEW_ELEMENTS = 1 << 22
# As measured: bits in memory of a number that takes so many on disk. Few have a mask besides, and
# more have some beside them.
_MEMORY_OF_BITS, _MEMORY_MORE = 1.5, 0.4


def memory_bits(disk_bits: float) -> float:
    """About the bits in memory of a number that takes so many on disk."""
    return _MEMORY_OF_BITS * min(disk_bits, MOST_BITS) + _MEMORY_MORE


def disk_bits(bits: float, size: Size) -> float:
    """About the bits on disk of a number that a budget gives so many bits."""
    if size == MEMORY:
        bits = max(bits - _MEMORY_MORE, 0) / _MEMORY_OF_BITS
    return min(bits, MOST_BITS)


def least_bytes(shape: Sequence[int], value_bytes: int, size: Size) -> int:
    """Bytes of a matrix of zeros, which no other takes fewer than.

    Args:
        shape: ``(rows, columns)``.
        value_bytes: of the dtype of the scales.
        size: which bytes.
    """
    numbers = least_coded_bytes(math.prod(shape))
    if size == MEMORY:
        numbers = max(numbers, least_packed_bytes(*shape))
    return numbers + values_bytes(sum(shape), SCALE_BITS, value_bytes)


def damping_of(bits: float) -> float:
    """What is added to the metrics, relative to their means, where a number has so many bits."""
    return float(max(4.0**-bits, _LEAST_DAMPING))


def bits_of(rms: float) -> float:
    """Entropy of normal numbers of this deviation, rounded; never below that of few bits."""
    return math.log2(1 + 2 * math.pi * math.e * rms**2) / 2


@dataclass
class SteppedMatrix:
    """A matrix, and what of its steps no budget decides.

    Attributes:
        W: ``(in, out)``; it may be a view.
        metric: in which errors count.
        U: see `whole_numbers`.
        V: likewise.
        r: ``(in,)``, of the step 1.
        c: ``(out,)``, likewise.
        cost: squared error to expect of an element on the step 1, in the metric.
        value_dtype: of the scales.
        size: which bytes count.
    """

    W: Tensor
    metric: Metric
    U: Tensor
    V: Tensor | None
    r: Tensor
    c: Tensor
    cost: float
    value_dtype: torch.dtype
    size: Size

    @classmethod
    def of(
        cls,
        W: Tensor,
        metric: Metric,
        damping: float,
        value_dtype: torch.dtype,
        *,
        size: Size = DISK,
        stand_ins: tuple[float, float] = (1.0, 1.0),
        unit: Callable[[float], float] | None = None,
        factors: dict[int, Tensor] | None = None,
    ) -> SteppedMatrix:
        """Find the steps of a matrix.

        Args:
            W: ``(in, out)``, float32.
            metric: in which errors count.
            damping: see `damping_of`.
            value_dtype: of the scales.
            size: which bytes count.
            stand_ins: mean diagonals of either side's metric, where it has none or is zero.
            unit: the step 1 in units of the metric, from the root of both means; default: 1.
            factors: of inputs' metrics that are known, by identity; those found are added.
        """
        r, mean_A = _steps(metric.input, len(W), damping, W)
        c, mean_B = _steps(metric.output, W.shape[1], damping, W)
        U, V = r, None
        if metric.input is not None and metric.input.dim() > 1 and mean_A:
            factors = {} if factors is None else factors
            if id(metric.input) not in factors:
                factors[id(metric.input)] = inverse_factor(whole(metric.input), damping)
            U = factors[id(metric.input)]
            r = U.diagonal()
        if mean_B:
            # Blocks differ in what their outputs count, and so do their steps.
            V = output_factor(metric.output, damping, mean_B)
        if V is not None:
            c = V.diagonal(dim1=1, dim2=2).reshape(-1)[: W.shape[1]]
        known = math.sqrt((mean_A or stand_ins[0]) * (mean_B or stand_ins[1]))
        scale = (1.0 if unit is None else unit(known)) / known
        # Both sides of about one size, which is within the range of every dtype.
        balance = float((c.log().double().mean() - r.log().double().mean()).exp())
        r, c = r * math.sqrt(scale * balance), c * math.sqrt(scale / balance)
        return cls(W, metric, U, V, r, c, (scale * known) ** 2 / 12, value_dtype, size)

    def some_outputs(self, share: int) -> SteppedMatrix:
        """Every so-manieth output, and at least 64; outputs have no feedback among them."""
        assert self.V is None, "outputs that make up for one another cannot be taken apart"
        share = max(min(share, self.W.shape[1] // GROUP), 1)
        every = slice(None, None, (share - 1) | 1)  # Odd: all channels of a head, not the same few.
        output = None if self.metric.output is None else self.metric.output[every]
        metric = self.metric._replace(output=output)
        return replace(self, W=self.W[:, every], c=self.c[every], metric=metric)

    @property
    def scale_bytes(self) -> int:
        """Bytes of all scales."""
        return values_bytes(sum(self.W.shape), SCALE_BITS, self.value_dtype.itemsize)

    def rms(self) -> float:
        """Root mean square of the weights in units of the step 1."""
        return float((self.W / (self.r[:, None] * self.c)).double().square().mean().sqrt())

    def scales(self, step: float) -> Tensor:
        """Those of a step, ``(in + out,)``, as they are once they have been stored.

        A row whose largest number the coder would not know has coarser steps of its own, of which
        its largest weight has `_LARGEST`.
        """
        root = math.sqrt(step)
        least = (self.W / self.c).abs().amax(dim=1) / (root * _LARGEST)
        return self._stored(torch.cat((torch.maximum(self.r * root, least), self.c * root)))

    def bytes_of(self, Z: Tensor) -> int:
        """About the bytes that count of whole numbers and scales."""
        if self.size == MEMORY:
            numbers = packed_bytes(Z)
        else:
            numbers = coded_bytes(Z.to(torch.int64).cpu().numpy())
        return numbers + self.scale_bytes

    def _stored(self, scales: Tensor) -> Tensor:
        """Scales as they are once they have been stored; positive."""
        own = EncodedCore.quantized(
            scales[None], SCALE_BITS, self.value_dtype, codec="dense", with_zero=False
        )
        return own.decode()[0].float()

    def error(self, Z: Tensor, scales: Tensor) -> float:
        """Squared error in the metric."""
        r, c = torch.split(scales, list(self.W.shape))
        return self.metric.squares(self.W - r[:, None] * Z * c)

    def fitted(self, Z: Tensor, scales: Tensor) -> Tensor:
        """Scales of least error, as stored; or these, where they are no better."""
        r, c = torch.split(scales, list(self.W.shape))
        fresh = torch.cat(fit_scales(self.W, Z, r, c, self.metric))
        if not bool(fresh.isfinite().all()):
            return scales
        fresh = self._stored(fresh)
        return fresh if self.error(Z, fresh) < self.error(Z, scales) else scales


@dataclass
class RoundedMatrix:
    """A matrix on a step.

    Attributes:
        matrix: what was rounded.
        Z: ``(in, out)``, whole numbers, int16.
        scales: ``(in + out,)``, r and then c, as stored.
        size: about the bytes of them that count.
        is_fitted: whether the scales are those of least error.
    """

    matrix: SteppedMatrix
    Z: Tensor
    scales: Tensor
    size: int
    is_fitted: bool = False

    def error(self) -> float:
        """Squared error in the metric."""
        return self.matrix.error(self.Z, self.scales)

    def fitted(self) -> RoundedMatrix:
        """With scales of least error."""
        if self.is_fitted:
            return self
        return replace(self, scales=self.matrix.fitted(self.Z, self.scales), is_fitted=True)

    def value(self) -> Tensor:
        """What is stored, ``(in, out)``, float32."""
        r, c = torch.split(self.scales, list(self.Z.shape))
        return (r[:, None] * self.Z * c).to(self.matrix.value_dtype).float()


def rounded(matrices: Sequence[SteppedMatrix], step: float) -> list[RoundedMatrix]:
    """Round on a step, matrices of one shape and one form of metric side by side.

    What is rounded together follows from the matrices alone, so that the last bits of products do.
    """
    kinds: dict[tuple[object, ...], list[int]] = {}
    for index, one in enumerate(matrices):
        V = None if one.V is None else one.V.shape
        kinds.setdefault((one.W.shape, one.U.dim(), V), []).append(index)
    most = most_together(sum(one.W.numel() for one in matrices))
    found: dict[int, RoundedMatrix] = {}
    for alike in kinds.values():
        own = matrices[alike[0]]
        count = max(most // (own.W.numel() + own.U.numel()), 1)
        for first in range(0, len(alike), count):
            some = alike[first : first + count]
            found |= zip(some, _side_by_side([matrices[i] for i in some], step), strict=True)
    return [found[index] for index in range(len(matrices))]


def most_together(elements: int) -> int:
    """How many elements, with those of factors of metrics, are rounded side by side.

    Args:
        elements: of all matrices.
    """
    return max(_FEW_ELEMENTS, elements // 8)


def _side_by_side(matrices: Sequence[SteppedMatrix], step: float) -> list[RoundedMatrix]:
    scales = [one.scales(step) for one in matrices]
    W = torch.stack([one.W for one in matrices])
    r, c = torch.split(torch.stack(scales), list(W.shape[1:]), dim=1)
    V = [one.V for one in matrices if one.V is not None]
    Z = whole_numbers(
        W,
        torch.stack([one.U for one in matrices]),
        r,
        c,
        matrices[0].value_dtype,
        torch.stack(V) if V else None,
    ).to(torch.int16)
    return [
        RoundedMatrix(one, numbers, own, one.bytes_of(numbers))
        for one, numbers, own in zip(matrices, Z, scales, strict=True)
    ]


def _steps(G: Tensor | None, width: int, damping: float, like: Tensor) -> tuple[Tensor, float]:
    """Steps of a side that know the diagonal of its metric, and its mean; 0 where it has none.

    Damped as in `inverse_factor`, relative to the mean.
    """
    mean = 0.0 if G is None else float(diagonal_of(G).double().mean())
    if G is None or not mean:
        return like.new_ones(width), 0.0
    return (diagonal_of(G) / mean + damping).rsqrt(), mean


def fitting(
    at: Callable[[float], Sequence[RoundedMatrix]],
    elements: int,
    byte_budget: int,
    finest: float,
    start: float,
    size: Size,
) -> tuple[float, list[EncodedCore]]:
    """The finest step whose numbers fit, and what is then stored.

    Args:
        at: logarithm of the step -> the matrices on it.
        elements: how many numbers they have.
        byte_budget: for all of them.
        finest: logarithm of the step below which nothing is gained.
        start: logarithm of the step to begin with.
        size: which bytes count.

    Returns:
        The logarithm of the step, and the matrices.
    """
    left = byte_budget

    def tried(log_step: float) -> tuple[int, Sequence[RoundedMatrix]]:
        found = at(log_step)
        return sum(one.size for one in found), found

    while True:
        start, found = finest_within(tried, left, elements, finest, start)
        fitted = [(one.Z, one.fitted().scales) for one in found]
        stored = EncodedCore.coded(fitted, SCALE_BITS, found[0].matrix.value_dtype)
        excess = sum(counted_bytes(one, size) for one in stored) - byte_budget
        if excess <= 0:
            return start, stored
        left -= excess
