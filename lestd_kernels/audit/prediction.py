"""The error to expect of methods at byte budgets, without decomposing for each of them.

Shapes: see lestd_kernels.tensorize and stage1. All errors are relative and not squared,
``||W - W_hat|| / ||W||`` over the group; all bytes are counted as they are stored, indices and
scales included. A method that stores its values and factors in b bits (see
lestd_kernels.storage.few_bits) is named with them, ``"lestd 4-bit"``.

    svd        low-rank pairs; the singular values that are largest beside their module's norm
    tucker     shared basis, dense cores: leading blocks of the core in its HOSVD's bases
    lestd      shared basis, sparse cores: the largest elements of such a block
    magnitude  the largest weights of every module, in its cheapest codec
    rtn        every weight rounded to b bits; of fixed size

Attention has both bases, U1 and U2; other groups have U1 alone (U2 = I), and one core.
With 16 bits the rounding of values is left out (below 0.002 for bfloat16). With fewer, that of core
values and weights is measured. A factor (n x r) whose elements are off by the share q moves that
share of its directions out of its span, ``q^2 (1 - r / n)`` of the energy in it, if what it is
multiplied by is fitted to it as stored.

The operator error is ``||W_m - W_hat_m||_2 / ||W_m||_2`` in the worst module m. Its optimum at a
size is what low rank can do at best there: the least sigma_{r+1} / sigma_1 of any ranks that fit
(Eckart and Young, Psychometrika 1, 1936; Mirsky, Quart. J. Math. 11, 1960).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lestd_kernels.audit.diagnostics import evenly
from lestd_kernels.audit.rotation import Rotated
from lestd_kernels.audit.rounding import noise, rounded, sum_kept
from lestd_kernels.linalg.operator_norm import operator_norm
from lestd_kernels.linalg.stage1 import FLOAT64_ORDER, Ranks, gram_matrix, squared_sum
from lestd_kernels.linalg.stage2 import select_largest
from lestd_kernels.methods.common.base import MethodArgs
from lestd_kernels.methods.common.per_module import split_budget
from lestd_kernels.methods.common.shared_basis import limits_of
from lestd_kernels.search.budget import GroupShape, rank_grid
from lestd_kernels.search.tucker_ranks import search_dense, search_sparse
from lestd_kernels.storage.codecs import cheapest_codec
from lestd_kernels.storage.few_bits import FULL_BITS, GROUP, QUANTIZED_BITS, values_bytes

VALUE_BITS = (FULL_BITS, 8, 4)
"""Bits of values and factors that factorizations and pruning are predicted with."""

_ARGS = MethodArgs()
# Modules whose residuals' operator norms are measured; of more, evenly spaced ones.
_MOST_NORMS = 16


@dataclass(frozen=True)
class Prediction:
    """Error that a method is expected to reach within a byte budget.

    Attributes:
        method: ``"svd"``, ``"lestd 4-bit"``, ``"rtn 3-bit"``, ...
        keep: stored bytes / dense bytes that were asked for.
        stored_keep: those of the prediction, at most `keep`.
        relative_error: over the group.
        operator_error: in the worst module; None where it is not measured.
        ranks: where it has some: R1 and R2; of svd the least and the largest of a module.
    """

    method: str
    keep: float
    stored_keep: float
    relative_error: float
    operator_error: float | None = None
    ranks: tuple[int, ...] = ()


def named(method: str, bits: int) -> str:
    """Name of a method with values of so many bits."""
    return method if bits == FULL_BITS else f"{method} {bits}-bit"


def module_squares(unfolding: Tensor, columns: Sequence[slice]) -> list[Tensor]:
    """Squared singular values of every module, descending, float64.

    Eigenvalues of the smaller Gram matrix; what is below about 1e-6 of the largest is rounding.
    """
    found = []
    for one in columns:
        matrix = unfolding[:, one]
        gram = gram_matrix(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T)
        exact = gram.double() if len(gram) <= FLOAT64_ORDER else gram
        found.append(torch.linalg.eigvalsh(exact).double().clamp(min=0).flip(0).cpu())
    return found


class _Group:
    """Common parts of the predictions of one group."""

    def __init__(self, rotated_group: Rotated, keeps: Sequence[float]) -> None:
        self.group, self.layout = rotated_group, rotated_group.layout
        self.unfolding = rotated_group.unfolding
        self.columns = [self.layout.columns(module) for module in self.layout.modules]
        self.squares = module_squares(self.unfolding, self.columns)
        self.squared_norm = squared_sum(self.unfolding)
        self.value_bytes = rotated_group.shape.value_bytes
        self.dense_bytes = self.layout.elements * self.value_bytes
        self.keeps, self.budgets = list(keeps), [int(keep * self.dense_bytes) for keep in keeps]
        chosen = evenly(len(self.columns), _MOST_NORMS)
        self.measured = [c for c in chosen if float(self.squares[c][0]) > 0]

    def sides(self, module: int) -> tuple[int, int]:
        """Rows and columns of a module in the unfolding."""
        columns = self.columns[module]
        return self.layout.width, columns.stop - columns.start

    def prediction(
        self,
        method: str,
        at: int,
        stored_bytes: float,
        squared_error: float,
        operator_error: float | None = None,
        ranks: tuple[int, ...] = (),
    ) -> Prediction:
        error = math.sqrt(max(squared_error, 0.0) / self.squared_norm) if self.squared_norm else 0.0
        keep = stored_bytes / self.dense_bytes
        return Prediction(method, self.keeps[at], keep, error, operator_error, ranks)

    def matrix(self, module: int) -> Tensor:
        """A module's columns of the unfolding, a view."""
        return self.unfolding[:, self.columns[module]]

    def sparse_bytes(self, module: int, bits: int) -> Callable[[Sequence[int]], int]:
        """The fewest bytes of a module with so many non-zeros."""
        size = (*self.sides(module), self.value_bytes, bits)

        def stored(nnz: Sequence[int]) -> int:
            rows, columns, value_bytes, value_bits = size
            codec = cheapest_codec(rows, columns, nnz[0], value_bytes, value_bits)
            return codec.stored_bytes(rows, columns, nnz[0], value_bytes, value_bits)

        return stored

    def operator_error(self, residual: Callable[[int], Tensor]) -> float:
        """Of the worst of the measured modules, whose residual matrices the function gives."""
        return max(
            (
                operator_norm(residual(c)) / math.sqrt(float(self.squares[c][0]))
                for c in self.measured
            ),
            default=0.0,
        )


def predict(group: Rotated, keeps: Sequence[float]) -> tuple[list[Prediction], list[float]]:
    """Predictions of every method at every keep that it can reach.

    Args:
        group: see `rotation.rotate`.
        keeps: stored bytes / dense bytes, each in (0, 1).

    Returns:
        Predictions in the order of the methods above, each from many to few bits; keeps that a
        method cannot reach have no entry. And for each keep the optimum of the operator error.
    """
    common = _Group(group, keeps)
    # The rotated core is not there before it is asked for.
    others = [*_magnitude(common), *_rtn(common)]
    found = [*_svd(common), *_shared(common), *others]
    return found, [_optimum(common, budget) for budget in common.budgets]


def _allocate(
    group: _Group, worth: Sequence[Tensor], budget: float, bytes_each: float
) -> list[int]:
    """Ranks of the modules: the pairs of vectors worth most for their bytes, while they fit."""
    sizes = [sum(group.sides(c)) * bytes_each for c in range(len(worth))]
    values = torch.cat([w / size for w, size in zip(worth, sizes, strict=True)])
    owners = torch.cat([torch.full((len(w),), c) for c, w in enumerate(worth)])
    order = values.argsort(descending=True, stable=True)
    costs = torch.tensor(sizes, dtype=torch.float64)[owners[order]]
    fitting = int((costs.cumsum(0) <= budget).sum())
    return torch.bincount(owners[order[:fitting]], minlength=len(worth)).tolist()


def _optimum(group: _Group, budget: int) -> float:
    relative = [
        (squares / squares[0].clamp(min=1e-300)).sqrt() * sum(group.sides(c))
        for c, squares in enumerate(group.squares)
    ]
    ranks = _allocate(group, relative, budget, group.value_bytes)
    return _next_singular(group, ranks)


def _next_singular(group: _Group, ranks: Sequence[int]) -> float:
    """The largest sigma_{r+1} / sigma_1 of a module."""
    return max(
        (
            math.sqrt(float(squares[rank] / squares[0]))
            for squares, rank in zip(group.squares, ranks, strict=True)
            if rank < len(squares) and squares[0] > 0
        ),
        default=0.0,
    )


def _svd(group: _Group) -> Iterator[Prediction]:
    worth = [squares / squares.sum().clamp(min=1e-300) for squares in group.squares]
    for bits in VALUE_BITS:
        each = _bytes_each(bits, group.value_bytes)
        lost = noise(bits)
        for at, budget in enumerate(group.budgets):
            ranks = _allocate(group, worth, budget, each)
            if not any(ranks):
                continue
            error = 0.0
            for c, (squares, rank) in enumerate(zip(group.squares, ranks, strict=True)):
                kept, left = float(squares[:rank].sum()), float(squares[rank:].sum())
                # One factor's rounding, to which the other is fitted, and the other's own.
                error += left + lost * kept * (2 - rank / max(group.sides(c)))
            stored = sum(r * sum(group.sides(c)) for c, r in enumerate(ranks)) * each
            operator_error = _next_singular(group, ranks) if bits == FULL_BITS else None
            extent = (min(ranks), max(ranks))
            yield group.prediction(named("svd", bits), at, stored, error, operator_error, extent)


def _bytes_each(bits: int, value_bytes: float) -> float:
    """Bytes of one of many values, with its share of a scale."""
    return values_bytes(GROUP, bits, int(value_bytes)) / GROUP


def _shared(group: _Group) -> Iterator[Prediction]:
    for method, search, all_bits in (
        ("tucker", search_dense, (FULL_BITS,)),
        ("lestd", search_sparse, VALUE_BITS),
    ):
        for bits in all_bits:
            # A size with fractions: sums of many values are what is compared.
            each: Any = _bytes_each(bits, group.value_bytes)
            shape = replace(group.group.shape, value_bytes=each)
            places = [at for at, b in enumerate(group.budgets) if _fits(shape, method, b)]
            if not places:
                continue
            limits = [limits_of(group.budgets[at], _ARGS) for at in places]
            points = search(group.group.core, shape, limits)
            for at, point in zip(places, points, strict=True):
                yield _at_ranks(group, shape, method, bits, at, point.ranks)


def _fits(shape: GroupShape, method: str, budget: int) -> bool:
    """Whether the smallest ranks fit a budget."""
    step, layout = _ARGS.rank_step, shape.layout
    R1, R2 = (rank_grid(n, step)[0] for n in (layout.width, layout.head_dim))
    smallest = Ranks(1 if method == "tucker" else R1, R2, 1)
    nnz = [1] + [0] * (len(shape.core_slices) - 1)
    if method == "tucker":
        nnz = [math.prod(shape.core_shape(smallest, c)) for c in range(len(shape.core_slices))]
    return shape.stored_bytes(smallest, nnz) <= budget


def _at_ranks(
    group: _Group, shape: GroupShape, method: str, bits: int, at: int, ranks: Ranks
) -> Prediction:
    """The prediction at ranks that a search has chosen: what it keeps, and what bits cost."""
    core, budget = group.group.core, group.budgets[at]
    cores = core.leading(ranks)
    masks = None
    if method != "tucker":
        masks = select_largest(cores, lambda nnz: shape.stored_bytes(ranks, nnz) <= budget)
    kept = sum_kept(cores, masks, bits)
    del cores
    error = group.squared_norm - kept.energy + kept.rounding
    stored = shape.stored_bytes(ranks, kept.counts)
    operator_error = None
    if bits == FULL_BITS:
        # Orthogonal factors on both sides change no singular value.
        rest = [part.clone() for part in core.parts]
        for number, part in enumerate(rest):
            block = part[: ranks.R1, : ranks.R3, :, : ranks.R2]
            block.zero_() if masks is None else block.masked_fill_(masks[number], 0)
        operator_error = group.operator_error(lambda c: group.group.module_part(rest, c))
    else:
        shares = (ranks.R1 / shape.layout.width, ranks.R2 / shape.layout.head_dim)
        error += noise(bits) * kept.energy * sum(1 - share for share in shares)
    shown = (ranks.R1, ranks.R2)
    return group.prediction(named(method, bits), at, stored, error, operator_error, shown)


def _magnitude(group: _Group) -> Iterator[Prediction]:
    for bits in VALUE_BITS:
        for at, budget in enumerate(group.budgets):
            shares = split_budget(group.layout, budget).values()
            error, size = 0.0, 0
            masks: dict[int, Tensor] = {}
            for c, share in enumerate(shares):
                matrix, stored = group.matrix(c).contiguous(), group.sparse_bytes(c, bits)
                if stored([0]) > share:
                    break
                [mask] = select_largest([matrix], lambda nnz, f=stored, b=share: f(nnz) <= b)  # type: ignore[misc]
                kept = sum_kept([matrix], [mask], bits)
                error += squared_sum(matrix) - kept.energy + kept.rounding
                size += stored(kept.counts)
                if bits == FULL_BITS and c in group.measured:
                    masks[c] = mask
            else:
                operator_error = None
                if bits == FULL_BITS:
                    operator_error = group.operator_error(
                        lambda c, masks=masks: group.matrix(c).masked_fill(masks[c], 0)  # type: ignore[misc]
                    )
                yield group.prediction(named("magnitude", bits), at, size, error, operator_error)


def _rtn(group: _Group) -> Iterator[Prediction]:
    """Each keep gets the most bits that fit it."""
    elements = [math.prod(group.sides(c)) for c in range(len(group.columns))]
    sizes = {
        b: sum(values_bytes(n, b, group.value_bytes) for n in elements) for b in QUANTIZED_BITS
    }
    errors: dict[int, tuple[float, float]] = {}
    for at, budget in enumerate(group.budgets):
        bits = next((bits for bits in QUANTIZED_BITS if sizes[bits] <= budget), None)
        if bits is None:
            continue
        if bits not in errors:

            def weight(c: int) -> Tensor:
                # W (in, out), in the order in which it is stored.
                matrix = group.matrix(c)
                turned = group.layout.modules[c].basis_side == "output"
                return (matrix.T if turned else matrix).contiguous()

            errors[bits] = (
                sum(sum_kept([weight(c)], None, bits).rounding for c in range(len(elements))),
                group.operator_error(
                    lambda c, b=bits: weight(c) - rounded(weight(c), b, True)  # type: ignore[misc]
                ),
            )
        yield group.prediction(named("rtn", bits), at, sizes[bits], *errors[bits])
