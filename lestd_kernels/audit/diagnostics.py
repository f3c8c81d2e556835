"""Diagnostics of a slice group before it is decomposed: is there a subspace that it shares?

Shapes: W (d, S p) is the unfolding of a group (see lestd_kernels.tensorize). A *unit* is the part
of it that belongs to one head, one expert, or one block of the hidden width of an FFN, as a matrix
(d, w): the columns of its slices side by side.

The explained energy of a basis U (d x R, orthonormal) on a unit is ``||U^T W_j||^2 / ||W_j||^2``.
A random subspace explains R / d of anything, and the leading left singular vectors of W_j the most
that any R directions can. The *margin* of a foreign basis is where it stands between the two:

    margin = (explained - R / d) / (optimum - R / d)      0: no better than random, 1: as its own

References: LeSTD (ICLR 2026), Figure 1 (explained energy of one head's basis on others); Roy and
Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007; Yu et al., "The
Super Weight in Large Language Models", arXiv 2411.07191.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lestd_kernels.linalg.stage1 import (
    FLOAT64_ORDER,
    gram_matrix,
    leading_eigenvectors,
    squared_sum,
)
from lestd_kernels.tensorize import GroupLayout

MOST_UNITS = 32
"""Units that are compared with each other, and experts that predictions are made of; of more,
evenly spaced ones."""
OUTLIER_SIGMAS = 8.0
"""A weight beyond so many standard deviations is a candidate: of 10^9 normal ones none is."""

_BLOCKS = 8
_MOST_OUTLIERS = 8
_CHUNK_ELEMENTS = 1 << 20
# Directions whose singular values are smaller, relative to the largest, are rounding.
_NEGLIGIBLE = 1e-3
_GRAM_ROWS = 64


@dataclass(frozen=True)
class Unit:
    """A head, an expert, or a block of the hidden width.

    Attributes:
        name: such as ``"head 3"``.
        columns: its ranges ``(start, stop)`` of the unfolding's columns, in order.
    """

    name: str
    columns: tuple[tuple[int, int], ...]

    def of(self, unfolding: Tensor) -> Tensor:
        """The unit's matrix ``(d, w)``, contiguous."""
        return torch.cat([unfolding[:, start:stop] for start, stop in self.columns], dim=1)


def units(layout: GroupLayout) -> tuple[Unit, ...]:
    """The units of a group.

    Heads: where several query heads share a key and value head, all that belong to it are one unit.
    Experts: one each. A group with one slice per projection (an FFN): blocks of its hidden width,
    the same columns of each slice.
    """
    numbers: dict[str, list[int]] = {}
    for projection, number in layout.slices:
        numbers.setdefault(projection, []).append(number)
    count, p = min(map(len, numbers.values())), layout.head_dim
    if count == 1:
        ends = [p * block // min(_BLOCKS, p) for block in range(min(_BLOCKS, p) + 1)]
        starts = [place * p for place in range(len(layout.slices))]
        return tuple(
            Unit(f"block {b}", tuple((start + first, start + stop) for start in starts))
            for b, (first, stop) in enumerate(itertools.pairwise(ends))
        )
    kind = "head" if "q" in numbers else "expert"
    fewest = min(numbers.values(), key=len)
    found: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for place, (projection, number) in enumerate(layout.slices):
        rank = sorted(numbers[projection]).index(number)
        found[rank * count // len(numbers[projection])].append((place * p, (place + 1) * p))
    names = (f"{kind} {number}" for number in sorted(fewest))
    return tuple(Unit(name, tuple(columns)) for name, columns in zip(names, found, strict=True))


def sampled_experts(layout: GroupLayout) -> GroupLayout:
    """The group with `MOST_UNITS` of its experts, evenly spaced; others and fewer as they are."""
    experts = sorted({module.slices[0][1] for module in layout.modules})
    apart = all(len(module.slices) == 1 for module in layout.modules)
    if not apart or len(experts) <= MOST_UNITS:
        return layout
    chosen = {experts[i] for i in evenly(len(experts), MOST_UNITS)}
    modules = tuple(module for module in layout.modules if module.slices[0][1] in chosen)
    return replace(layout, modules=modules)


def evenly(count: int, most: int) -> list[int]:
    """At most so many of the indices below `count`, evenly spaced, with the first and the last."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [0]
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def left_subspace(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors, and squared singular values, without the negligible ones.

    Args:
        matrix: ``(m, w)``, float32.

    Returns:
        ``(squares (k,) float64, descending; U (m, k) float32, orthonormal)``; k is 0 for a zero
        matrix. Directions with less than 1e-6 of the leading one's energy are left out.
    """
    m, w = matrix.shape
    if m <= w:
        squares, U = leading_eigenvectors(gram_matrix(matrix))
        return squares[: _rank(squares)], U[:, : _rank(squares)]
    small = matrix.double() if w <= FLOAT64_ORDER else matrix
    squares, V = leading_eigenvectors(small.T @ small)
    rank = _rank(squares)
    return squares[:rank], (matrix @ V[:, :rank]) / squares[:rank].sqrt().float()


def _rank(squares: Tensor) -> int:
    return int((squares > squares.clamp(min=0).max() * _NEGLIGIBLE**2).sum())


@dataclass(frozen=True)
class Explained:
    """Explained energy of the bases of n units on each other.

    Attributes:
        choice: how R was chosen: a rank, or below 1 the share of its own unit's energy that the
            basis holds.
        ranks: R of each basis.
        energy: ``[i, j]``: basis i on unit j, ``(n, n)`` float64; NaN for a unit of zeros.
        optimum: ``[i, j]``: the most that R_i directions explain of unit j, ``(n, n)``.
        baseline: what R_i random directions explain of anything, R_i / m, ``(n,)``.
    """

    choice: float
    ranks: tuple[int, ...]
    energy: Tensor
    optimum: Tensor
    baseline: Tensor

    def pairs(self) -> dict[str, float]:
        """Over all pairs of different units: mean and least energy, mean optimum, baseline, margin.

        The margin is that of the means. NaN where there is no pair.
        """
        n = len(self.ranks)
        others = ~torch.eye(n, dtype=torch.bool) & ~self.energy.isnan()
        energy, optimum = self.energy[others], self.optimum[others]
        baseline = self.baseline[:, None].expand(n, n)[others]
        if not energy.numel():
            return dict.fromkeys(("mean", "least", "optimum", "baseline", "margin"), float("nan"))
        mean, best, random = (float(x.mean()) for x in (energy, optimum, baseline))
        return {
            "mean": mean,
            "least": float(energy.min()),
            "optimum": best,
            "baseline": random,
            "margin": (mean - random) / (best - random) if best > random else float("nan"),
        }


def rank_choices(width: int, head_dim: int) -> tuple[float, ...]:
    """The ranks to compare at: 90 % of the energy, p / 2, and p; for a p above d / 4, that."""
    base = max(2, min(head_dim, width // 4))
    return (0.9, base // 2, base)


def explained_energy(matrices: Sequence[Tensor], choices: Sequence[float]) -> list[Explained]:
    """How much of each unit the leading left singular vectors of every other explain.

    One basis is held at a time.

    Args:
        matrices: of the units, ``(m, w_j)``, float32.
        choices: see `Explained.choice`. A unit of lower rank than asked for gives what it has.

    Returns:
        One for each choice.
    """
    m = len(matrices[0])
    norms = torch.tensor([squared_sum(matrix) for matrix in matrices], dtype=torch.float64)
    held = _held_by_grams if min(x.shape[1] for x in matrices) >= m else _held_by_products
    spectra, every = [], []
    for squares, rows in held(matrices, choices):
        spectra.append(squares.cpu())
        every.append(rows.cpu())
    # [c, i, j]: what basis i, at the rank of choice c, holds of unit j.
    energies = torch.stack(every, dim=1)
    found = []
    for c, choice in enumerate(choices):
        ranks = tuple(_rank_of(choice, squares) for squares in spectra)
        most = torch.stack([torch.stack([one[:rank].sum() for one in spectra]) for rank in ranks])
        energy, optimum = (
            (squares / norms).clamp(max=1).masked_fill(norms == 0, torch.nan)
            for squares in (energies[c], most)
        )
        baseline = torch.tensor(ranks, dtype=torch.float64) / m
        found.append(Explained(choice, ranks, energy, optimum, baseline))
    return found


def _held_by_products(
    matrices: Sequence[Tensor], choices: Sequence[float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each basis its spectrum, and the energy that it holds of each unit: ``(choices, n)``."""
    for matrix in matrices:
        squares, U = left_subspace(matrix)
        ranks = [_rank_of(choice, squares) for choice in choices]
        held = torch.zeros(len(choices), len(matrices), dtype=torch.float64)
        for j, other in enumerate(matrices):
            rows = (U[:, : max(ranks)].T @ other).square_().sum(dim=1, dtype=torch.float64)
            held[:, j] = torch.stack([rows[:rank].sum() for rank in ranks])
        yield squares, held


def _held_by_grams(
    matrices: Sequence[Tensor], choices: Sequence[float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """As `_held_by_products`, with ``||U^T W_j||^2 = <U U^T, W_j W_j^T>``: for units at least as
    wide as high, where Gram matrices take no more memory and many times less work."""
    grams = torch.stack([gram_matrix(matrix) for matrix in matrices])
    for gram in grams:
        squares, U = leading_eigenvectors(gram)
        squares = squares[: _rank(squares)]
        held = torch.zeros(len(choices), len(matrices), dtype=torch.float64, device=gram.device)
        parts = [U[:, : _rank_of(choice, squares)] for choice in choices]
        # In float32 over few rows, in float64 over those.
        for start in range(0, len(gram), _GRAM_ROWS):
            block = slice(start, start + _GRAM_ROWS)
            projectors = torch.stack([(part[block] @ part.T).flatten() for part in parts])
            held += (projectors @ grams[:, block].flatten(1).T).double()
        yield squares, held


def _rank_of(choice: float, squares: Tensor) -> int:
    if choice >= 1 or not len(squares):
        return min(int(choice), len(squares))
    return rank_at(squares, choice)


def rank_at(squares: Tensor, share: float) -> int:
    """The fewest leading directions that hold this share of the energy; 0 for no energy.

    Args:
        squares: squared singular values, descending.
        share: between 0 and 1.
    """
    sums = squares.double().clamp(min=0).cumsum(0)
    if not len(sums) or float(sums[-1]) == 0:
        return 0
    # A hair less: the sum of all need not be reached exactly.
    target = share * sums[-1] * (1 - 1e-12)
    return int(torch.searchsorted(sums, target)) + 1


def effective_rank(squares: Tensor) -> float:
    """``exp(H)`` of the singular values normalized to sum to one (Roy and Vetterli, 2007).

    Args:
        squares: squared singular values.

    Returns:
        Between 1 and their number; 0 where all are zero.
    """
    values = squares.double().clamp(min=0).sqrt()
    if float(values.sum()) == 0:
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def unit_gram(unfolding: Tensor, members: Sequence[Unit]) -> Tensor:
    """Gram matrix of the units as vectors, ``<W_i, W_j>``: of the head or expert mode's unfolding.

    Args:
        unfolding: ``(d, S p)``, float32.
        members: units of equal widths.

    Returns:
        ``(n, n)``, float64.
    """
    n, rows = len(members), max(1, _CHUNK_ELEMENTS // unfolding.shape[1])
    gram = unfolding.new_zeros(n, n, dtype=torch.float64)
    for part in torch.split(unfolding, rows):
        flat = torch.stack([unit.of(part).flatten() for unit in members])
        gram += (flat @ flat.T).double()
    return gram


@dataclass(frozen=True)
class Outlier:
    """A weight far from all others of its tensor: a candidate for a super weight, no more.

    The rule of arXiv 2411.07191 finds super weights by the activations that they cause, and so
    needs data.
    """

    tensor: str
    row: int
    column: int
    value: float
    sigmas: float


@dataclass(frozen=True)
class Entries:
    """How the entries of a tensor are distributed.

    Attributes:
        kurtosis: fourth standardized moment; 3 for normal entries, NaN for constant ones.
        outliers: entries beyond `OUTLIER_SIGMAS` standard deviations, in number.
        largest: the first few of them, by magnitude.
    """

    kurtosis: float
    outliers: int
    largest: tuple[Outlier, ...]


def entries(weight: Tensor, name: str) -> Entries:
    """Kurtosis ``E (w - mu)^4 / sigma^4`` and outliers of a weight.

    Args:
        weight: ``(rows, columns)`` as stored, any floating dtype.
        name: of the tensor.
    """
    flat = weight.reshape(-1)
    parts = torch.split(flat, _CHUNK_ELEMENTS)
    mean = sum(float(part.sum(dtype=torch.float64)) for part in parts) / flat.numel()
    second = fourth = 0.0
    for part in parts:
        squares = part.double().sub_(mean).square_()
        second += float(squares.sum())
        fourth += float(squares.square_().sum())
    variance = second / flat.numel()
    if variance == 0:
        return Entries(float("nan"), 0, ())
    sigma = variance**0.5
    beyond: list[tuple[float, int]] = []
    for number, part in enumerate(parts):
        far = (part.double() - mean).abs() > OUTLIER_SIGMAS * sigma
        places = far.nonzero().view(-1)
        first = number * _CHUNK_ELEMENTS
        beyond += zip(part[places].double().tolist(), (places + first).tolist(), strict=True)
    beyond.sort(key=lambda one: (-abs(one[0] - mean), one[1]))
    largest = tuple(
        Outlier(name, *divmod(place, weight.shape[1]), value, abs(value - mean) / sigma)
        for value, place in beyond[:_MOST_OUTLIERS]
    )
    return Entries(fourth / flat.numel() / variance**2, len(beyond), largest)
