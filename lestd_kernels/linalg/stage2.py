"""Stage II: the sparse cores. Importance, pruning to the byte budget, refit.

Zeroing core element g of an orthonormal expansion raises the squared residual E by exactly g^2, so
the importance ``(E_{g=0} - E) / E = g^2 / E`` (g^2 where E = 0) ranks elements as |g| does: every
selection here keeps the largest |g|, the first in position order on ties, over all cores of the
group with one threshold.

Shapes: a core is (R1, R3, n_c, R2) (see stage1; a group has one or several along the slice axis).
Factors are the ones that will be stored. Rounded to 16 bits they are no longer exactly
orthonormal, so the cores solve a least-squares problem. With the Gram matrices A1 = U1^T U1,
A2 = U2^T U2, A3 = U3^T U3 and the unconstrained solution C, the squared residual of cores M is

    ||W - M x1 U1 x2 U2 x3 U3||^2 = const + <M - C, A(M - C)>,   A(X) = X x1 A1 x2 A2 x3 A3.

References: LeSTD (ICLR 2026), Stage II; Hestenes and Stiefel, "Methods of conjugate gradients for
solving linear systems", 1952.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lestd_kernels.linalg.stage1 import Factors, gram_matrix, mix, project_rows, squared_sum

Fits = Callable[[Sequence[int]], bool]
"""Whether cores with these numbers of non-zeros fit; once false, false for any larger numbers."""

_LOW_BITS = 16
_CHUNK_ELEMENTS, _COUNT_ELEMENTS = 1 << 20, 1 << 18
_REFIT_ITERATIONS = 10
_REFIT_TOLERANCE = 1e-5
# Share of the squared residual that is not worth a pass over the core. The bound that is compared
# with it is far from reached: on a layer of d 1536 in bfloat16 a refit gains 1e-6.
_REFIT_GAIN = 3e-4


def fit_cores(W: Tensor, factors: Factors, core_slices: Sequence[int]) -> list[Tensor]:
    """The dense cores of least squared residual for given factors.

    Args:
        W: ``(d, T, n, p)``, float32.
        factors: of full column rank, not necessarily orthonormal; any floating dtype.
        core_slices: extent n_c of each core along the slice axis.

    Returns:
        C ``(R1, R3, n_c, R2)``, float32, core by core.
    """
    U1, U2, U3 = (_dual(U) for U in (factors.U1, factors.U2, factors.U3))
    parts = torch.split(W, list(core_slices), dim=2)
    return [mix(project_rows(part, U1), U3) @ U2 for part in parts]


def _dual(U: Tensor) -> Tensor:
    """``U (U^T U)^-1``, float32: its transpose is the pseudo-inverse of U."""
    U = U.float()
    dual: Tensor = torch.linalg.solve(U.T @ U, U.T).T
    return dual


def gram_factors(factors: Factors) -> Factors:
    """A1, A2 and A3, float32, of factors as they will be stored."""
    U1, U2, U3 = (U.float() for U in (factors.U1, factors.U2, factors.U3))
    return Factors(*(gram_matrix(U.T) for U in (U1, U2, U3)))


def one_shot(targets: Sequence[Tensor], fits: Fits, grams: Factors) -> list[Tensor]:
    """Keep the largest elements that fit, and refit them: the optimal k-term approximation.

    Args:
        targets: unconstrained solution C, core by core, float32; used up.
        fits: the byte budget.
        grams: see `gram_factors`.

    Returns:
        Sparse cores, float32.
    """
    return refit_targets(targets, select_largest(targets, fits), grams)


def refit_targets(
    targets: Sequence[Tensor], masks: Sequence[Tensor], grams: Factors
) -> list[Tensor]:
    """`refit` from the targets themselves.

    Where the factors are so near to orthonormal that no step can gain anything worth it, none is
    taken.

    Args:
        targets: unconstrained solution C, per core; used up, since a copy takes as much memory.
        masks: the support, per core.
        grams: A1, A2, A3.

    Returns:
        New cores, zero outside the masks.
    """
    if _largest_gain(grams) > _REFIT_GAIN:
        return refit(targets, masks, targets, grams)
    return [target.mul_(mask) for target, mask in zip(targets, masks, strict=True)]


def prune_refit(
    targets: Sequence[Tensor], fits: Fits, grams: Factors, alpha: float
) -> list[Tensor]:
    """Prune a share of the survivors and refit the rest, until they fit (LeSTD, Stage II).

    Of k survivors the ``min(ceil(alpha k), k - target)`` least important go; target is the
    largest number that fits. In exact arithmetic equal to `one_shot` for orthonormal factors.

    Args:
        targets: unconstrained solution C, core by core, float32.
        fits: the byte budget.
        grams: see `gram_factors`.
        alpha: share pruned per step, in (0, 1].

    Returns:
        Sparse cores, float32.
    """
    values = list(targets)
    while True:
        survivors = sum(int(core.count_nonzero()) for core in values)
        masks = select_largest(values, fits)
        smallest = survivors - math.ceil(alpha * survivors)
        last = sum(int(mask.sum()) for mask in masks) >= smallest
        if not last:
            masks = select_largest(values, _at_most(smallest))
        values = refit(values, masks, targets, grams)
        if last:
            return values


def _at_most(count: int) -> Fits:
    return lambda nnz: sum(nnz) <= count


def select_largest(cores: Sequence[Tensor], fits: Fits) -> list[Tensor]:
    """Masks of the largest |g| over all cores, as many as fit.

    Exact, without sorting: a radix selection on the bit patterns of |g|, which order like the
    values. Counts are integers, so the result does not depend on the order of a reduction.
    Zeros are never kept; ties are kept in position order, core after core.

    Args:
        cores: any shapes, float32, finite, contiguous.
        fits: must hold for no element at all.

    Returns:
        A bool tensor per core, of its shape.
    """
    zeros = torch.tensor([core.numel() - int(core.count_nonzero()) for core in cores])
    buckets = 1 << (31 - _LOW_BITS)
    high = _histograms(cores, buckets, lambda key: key >> _LOW_BITS)
    high[:, 0] -= zeros
    bucket, kept = _first_overflow(high, torch.zeros_like(zeros), fits)
    if bucket < 0:
        return [core != 0 for core in cores]

    base = bucket << _LOW_BITS
    low = _histograms(cores, 1 << _LOW_BITS, lambda key: key[(key >> _LOW_BITS) == bucket] - base)
    if bucket == 0:
        low[:, 0] = 0
    digit, kept = _first_overflow(low, kept, fits)
    threshold = torch.tensor(base + digit, dtype=torch.int32).view(torch.float32).item()

    quotas = _tie_quotas(low[:, digit].tolist(), kept.tolist(), fits)
    masks = []
    for core, quota in zip(cores, quotas, strict=True):
        mask = core.abs() > threshold
        if quota:
            ties = (core.abs().view(-1) == threshold).nonzero().view(-1)
            mask.view(-1)[ties[:quota]] = True
        masks.append(mask)
    return masks


def _histograms(cores: Sequence[Tensor], bins: int, digit: Callable[[Tensor], Tensor]) -> Tensor:
    """Counts ``(cores, bins)`` of a digit of the bit patterns of |g|."""
    counts = torch.zeros(len(cores), bins, dtype=torch.int64)
    for count, core in zip(counts, cores, strict=True):
        for part in torch.split(core.view(-1), _COUNT_ELEMENTS):
            count += torch.bincount(digit(part.abs().view(torch.int32)), minlength=bins).cpu()
    return counts


def _first_overflow(counts: Tensor, kept: Tensor, fits: Fits) -> tuple[int, Tensor]:
    """From the top, the first bin that does not fit entirely beside what is kept already.

    Args:
        counts: ``(cores, bins)``.
        kept: ``(cores,)``, elements above all bins.
        fits: the budget.

    Returns:
        The bin (-1 if all fit) and the elements kept above it, per core.
    """
    bins = counts.shape[1]

    def above(b: int) -> Tensor:
        """Elements kept if the b largest bins are; of many cores their sums would be large."""
        return kept + counts[:, bins - b :].sum(dim=1)

    last = bisect.bisect(range(1, bins + 1), False, key=lambda b: not fits(above(b).tolist()))
    return bins - 1 - last, above(last)


def _tie_quotas(ties: Sequence[int], kept: Sequence[int], fits: Fits) -> list[int]:
    """How many of each core's ties at the threshold fit, filling core after core."""
    starts = [0, *accumulate(ties)]

    def quotas(total: int) -> list[int]:
        return [min(max(total - start, 0), t) for start, t in zip(starts, ties, strict=False)]

    def overflows(total: int) -> bool:
        return not fits([k + q for k, q in zip(kept, quotas(total), strict=True)])

    return quotas(bisect.bisect(range(1, starts[-1] + 1), False, key=overflows))


def refit(
    values: Sequence[Tensor], masks: Sequence[Tensor], targets: Sequence[Tensor], grams: Factors
) -> list[Tensor]:
    """Least-squares values on a support; never raises the residual.

    Conjugate gradients on ``<M - C, A(M - C)>`` from the values masked. Slices do not interact,
    so they are solved some at a time. Where the values are the targets, and the factors so near to
    orthonormal that no step can gain anything worth it, none is taken.

    Args:
        values: start, per core.
        masks: the support, per core.
        targets: unconstrained solution C, per core.
        grams: A1, A2, A3.

    Returns:
        New cores, zero outside the masks.
    """
    fitted = [torch.empty_like(target) for target in targets]
    for new, value, mask, target in zip(fitted, values, masks, targets, strict=True):
        slices = target.shape[2]
        per_chunk = max(1, _CHUNK_ELEMENTS * slices // target.numel())
        for first in range(0, slices, per_chunk):
            part = (slice(None), slice(None), slice(first, first + per_chunk))
            new[part] = _conjugate_gradients(value[part], mask[part], target[part], grams)
    return fitted


def _largest_gain(grams: Factors) -> float:
    """Upper bound of the share of the squared residual that a refit of masked targets can gain.

    With A = I + E and M = C masked, M - C is zero on the support, so the gradient there is that of
    E (M - C): at most ``e ||M - C||`` for the spectral norm e of E. A step then gains at most
    ``e^2 / (1 - e) ||M - C||^2`` of a residual of at least ``(1 - e) ||M - C||^2``. Spectral norms
    are bounded by ``||X||^8 <= ||X^4||_F^2``.
    """
    e = 1.0
    for A in (grams.U1, grams.U2, grams.U3):
        X = A - torch.eye(len(A), device=A.device)
        fourth = gram_matrix(gram_matrix(X))
        e *= 1 + float(torch.linalg.vector_norm(fourth, dtype=torch.float64)) ** 0.25
    e -= 1
    return (e / (1 - e)) ** 2 if e < 1 else math.inf


def _conjugate_gradients(value: Tensor, mask: Tensor, target: Tensor, grams: Factors) -> Tensor:
    M = value * mask
    residual = _apply_grams(target - M, grams) * mask
    direction = residual
    residual_sq = squared_sum(residual)
    enough = _REFIT_TOLERANCE**2 * squared_sum(target)
    for _ in range(_REFIT_ITERATIONS):
        if residual_sq <= enough:
            break
        image = _apply_grams(direction, grams) * mask
        # In float64: in float32 the products of small values underflow.
        curvature = float((direction.double() * image.double()).sum())
        if curvature <= 0:  # the image itself underflowed
            break
        step = residual_sq / curvature
        M = M + step * direction
        residual = residual - step * image
        previous, residual_sq = residual_sq, squared_sum(residual)
        direction = residual + (residual_sq / previous) * direction
    return M


def _apply_grams(X: Tensor, grams: Factors) -> Tensor:
    """A(X) for a core X ``(R1, R3, n, R2)``."""
    return mix(project_rows(X, grams.U1) @ grams.U2, grams.U3)
