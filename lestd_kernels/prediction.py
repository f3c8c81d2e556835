"""The error to expect of methods at byte budgets, without decomposing for each of them.

Shapes: see lestd_kernels.tensorize and stage1. All errors are relative and not squared,
``||W - W_hat|| / ||W||`` over the group; all bytes are counted as they are stored, indices and
scales included. A method that stores its values in b bits is named with them, ``"lestd 4-bit"``:
values and factors in groups of 64 with one 16-bit scale each, symmetric round-to-nearest.

    svd        squared singular values of every module, the largest first over all modules
    tucker     shared basis, dense cores: leading blocks of the core in its HOSVD's bases
    lestd      shared basis, sparse cores: the largest elements of such a block
    magnitude  the largest weights, each module in its cheapest codec
    rtn        every weight rounded to b bits; of fixed size

With 16 bits the rounding of values is left out (below 0.002 for bfloat16); with fewer, the values'
is measured and that of a factor, of relative size q, adds q^2 times the energy that it carries.

The operator error is ``||W_m - W_hat_m||_2 / ||W_m||_2`` in the worst module m. Its optimum at a
size is what low rank can do at best there: the least sigma_{r+1} / sigma_1 of any ranks that fit
(Eckart and Young, Psychometrika 1, 1936; Mirsky, Quart. J. Math. 11, 1960).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lestd_kernels.budget import GroupShape, Limits, rank_grid
from lestd_kernels.codecs import cheapest_codec
from lestd_kernels.diagnostics import evenly, operator_norm
from lestd_kernels.methods.base import MethodArgs
from lestd_kernels.methods.steps import Prepared, limits_of
from lestd_kernels.rank_search import RotatedCore, search_dense, search_sparse
from lestd_kernels.stage1 import Ranks, gram_matrix, squared_sum
from lestd_kernels.stage2 import select_largest

VALUE_BITS = (16, 8, 4)
"""Bits of values and factors that factorizations and pruning are predicted with."""
RTN_BITS = (8, 4, 3, 2)

_GROUP = 64
_SCALE_BYTES = 2
# Modules whose residuals' operator norms are measured; of more, evenly spaced ones.
_MOST_NORMS = 16


@dataclass(frozen=True)
class Prediction:
    """What a method is expected to reach within a byte budget.

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
    """What a method with values of so many bits is called."""
    return method if bits == 16 else f"{method} {bits}-bit"


def value_bytes(bits: int, dense_bytes: int) -> float:
    """Bytes of a value; below 16 bits with its share of its group's scale."""
    return dense_bytes if bits == 16 else bits / 8 + _SCALE_BYTES / _GROUP


def round_to_nearest(values: Tensor, bits: int) -> Tensor:
    """Values after quantization to b bits and back, in groups of 64 of their order.

    Args:
        values: any shape, float32; row-major order decides the groups.
        bits: 2 to 8; codes run from ``-(2^(b-1) - 1)`` to ``2^(b-1) - 1``.

    Returns:
        Of the same shape. A group's scale is its largest magnitude over the largest code, in
        bfloat16.
    """
    flat = values.reshape(-1)
    groups = torch.nn.functional.pad(flat, (0, -flat.numel() % _GROUP)).view(-1, _GROUP)
    top = 2 ** (bits - 1) - 1
    scale = (groups.abs().amax(dim=1, keepdim=True) / top).bfloat16().float()
    codes = (groups / scale.clamp(min=torch.finfo(torch.float32).tiny)).round_().clamp_(-top, top)
    restored: Tensor = codes.mul_(scale).view(-1)[: flat.numel()]
    return restored.view(values.shape)


def module_columns(shape: GroupShape) -> list[slice]:
    """Columns of each module in the unfolding."""
    ends, found = 0, []
    for module in shape.layout.modules:
        width = len(module.slices) * shape.layout.head_dim
        found.append(slice(ends, ends + width))
        ends += width
    return found


def module_squares(unfolding: Tensor, columns: Sequence[slice]) -> list[Tensor]:
    """Squared singular values of every module, descending, float64.

    Eigenvalues of the smaller Gram matrix; what is below about 1e-6 of the largest is rounding.
    """
    found = []
    for one in columns:
        matrix = unfolding[:, one]
        gram = gram_matrix(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T)
        found.append(torch.linalg.eigvalsh(gram.double() if len(gram) <= 1024 else gram))
    return [values.double().clamp(min=0).flip(0).cpu() for values in found]


class _Group:
    """What the predictions of one group have in common."""

    def __init__(self, unfolding: Tensor, shape: GroupShape, keeps: Sequence[float]) -> None:
        self.unfolding, self.shape = unfolding, shape
        self.columns = module_columns(shape)
        self.squares = module_squares(unfolding, self.columns)
        self.squared_norm = squared_sum(unfolding)
        self.dense_bytes = shape.layout.elements * shape.value_bytes
        self.budgets = [int(keep * self.dense_bytes) for keep in keeps]
        self.keeps = list(keeps)
        chosen = evenly(len(self.columns), _MOST_NORMS)
        self.measured = [c for c in chosen if float(self.squares[c][0]) > 0]

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

    def operator_error(self, residual: Callable[[int], Tensor]) -> float:
        """Of the worst of the measured modules, whose residual matrices the function gives."""
        return max(
            (
                operator_norm(residual(c)) / math.sqrt(float(self.squares[c][0]))
                for c in self.measured
            ),
            default=0.0,
        )


def predict(
    unfolding: Tensor, prepared: Prepared, keeps: Sequence[float]
) -> tuple[list[Prediction], list[float]]:
    """Predictions of every method at every keep that it can reach.

    Args:
        unfolding: of the group, ``(d, S p)``, float32, as `prepared` was made of it: divided by its
            scale.
        prepared: the group with its HOSVD bases (`methods.steps.prepare`), type mode identity.
        keeps: stored bytes / dense bytes, each in (0, 1).

    Returns:
        Predictions in the order of the methods above, each from many to few bits; keeps that a
        method cannot reach have no entry. And for each keep the optimum of the operator error.
    """
    group = _Group(unfolding, prepared.shape, keeps)
    _, _, rotated = prepared.parts(reuse=True)
    found = [*_svd(group), *_shared(group, rotated, prepared.args), *_magnitude(group)]
    return [*found, *_rtn(group)], [_optimum(group, budget) for budget in group.budgets]


def _allocate(
    group: _Group, worth: Sequence[Tensor], budget: float, bytes_each: float
) -> list[int]:
    """Ranks of the modules: the pairs of vectors worth most for their bytes, while they fit."""
    sizes = [sum(_sides(group, c)) * bytes_each for c in range(len(worth))]
    values = torch.cat([w / size for w, size in zip(worth, sizes, strict=True)])
    owners = torch.cat([torch.full((len(w),), c) for c, w in enumerate(worth)])
    order = values.argsort(descending=True, stable=True)
    costs = torch.tensor(sizes, dtype=torch.float64)[owners[order]]
    fitting = int((costs.cumsum(0) <= budget).sum())
    return torch.bincount(owners[order[:fitting]], minlength=len(worth)).tolist()


def _sides(group: _Group, module: int) -> tuple[int, int]:
    columns = group.columns[module]
    return group.shape.layout.width, columns.stop - columns.start


def _optimum(group: _Group, budget: int) -> float:
    relative = [
        (squares / squares[0].clamp(min=1e-300)).sqrt() * sum(_sides(group, c))
        for c, squares in enumerate(group.squares)
    ]
    ranks = _allocate(group, relative, budget, group.shape.value_bytes)
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
    for bits in VALUE_BITS:
        each = value_bytes(bits, group.shape.value_bytes)
        # Noise of the factors' own, on normal numbers, to which singular vectors are close.
        noise = 0.0 if bits == 16 else 2 * _noise(bits)
        for at, budget in enumerate(group.budgets):
            ranks = _allocate(group, group.squares, budget, each)
            kept = sum(float(s[:r].sum()) for s, r in zip(group.squares, ranks, strict=True))
            stored = sum(r * sum(_sides(group, c)) for c, r in enumerate(ranks)) * each
            error = group.squared_norm - kept * (1 - noise)
            operator_error = _next_singular(group, ranks) if bits == 16 else None
            extent = (min(ranks), max(ranks))
            yield group.prediction(named("svd", bits), at, stored, error, operator_error, extent)


def _noise(bits: int) -> float:
    """Relative squared error of `round_to_nearest` on normal numbers."""
    values = torch.randn(1 << 14, generator=torch.Generator().manual_seed(0))
    return squared_sum(values - round_to_nearest(values, bits)) / squared_sum(values)


def _shared(group: _Group, rotated: RotatedCore, args: MethodArgs) -> Iterator[Prediction]:
    shape = group.shape
    for method, search, all_bits in (
        ("tucker", search_dense, (16,)),
        ("lestd", search_sparse, VALUE_BITS),
    ):
        for bits in all_bits:
            sized = replace(shape, value_bytes=value_bytes(bits, shape.value_bytes))  # type: ignore[arg-type]
            places = [at for at, b in enumerate(group.budgets) if _fits(sized, method, b, args)]
            if not places:
                continue
            limits = [limits_of(group.budgets[at], args) for at in places]
            for at, point in zip(places, search(rotated, sized, limits), strict=True):
                yield _measured(group, rotated, sized, method, bits, at, point.ranks)


def _fits(shape: GroupShape, method: str, budget: int, args: MethodArgs) -> bool:
    """Whether the smallest ranks fit a budget, and the cap of multiply-adds."""
    smallest = Ranks(
        rank_grid(shape.layout.width, args.rank_step)[0],
        rank_grid(shape.layout.head_dim, args.rank_step)[0],
        1,
    )
    nnz = [1] + [0] * (len(shape.core_slices) - 1)
    if method == "tucker":
        nnz = [math.prod(shape.core_shape(smallest, c)) for c in range(len(shape.core_slices))]
    limits = Limits(budget, args.max_flops, args.rank_step)
    return shape.stored_bytes(smallest, nnz) <= budget and limits.allows_flops(shape, smallest)


def _measured(
    group: _Group,
    rotated: RotatedCore,
    shape: GroupShape,
    method: str,
    bits: int,
    at: int,
    ranks: Ranks,
) -> Prediction:
    """The prediction at ranks that a search has chosen: what it keeps, and what bits cost."""
    cores = rotated.leading(ranks)
    if method == "tucker":
        masks = [torch.ones_like(core, dtype=torch.bool) for core in cores]
    else:
        masks = select_largest(
            cores, lambda nnz: shape.stored_bytes(ranks, nnz) <= group.budgets[at]
        )
    kept = [core[mask] for core, mask in zip(cores, masks, strict=True)]
    energy = sum(map(squared_sum, kept))
    error = group.squared_norm - energy
    if bits < 16:
        # U2 at its full rank is a rotation of each slice, and is stored all the same.
        error += 2 * _noise(bits) * energy
        error += sum(squared_sum(values - round_to_nearest(values, bits)) for values in kept)
    stored = shape.stored_bytes(ranks, [values.numel() for values in kept])
    operator_error = None
    if bits == 16:

        def residual(c: int) -> Tensor:
            # Orthogonal factors on both sides change no singular value.
            rest = rotated.parts[c].clone()
            rest[: ranks.R1, : ranks.R3, :, : ranks.R2].masked_fill_(masks[c], 0)
            return rest.flatten(1)

        operator_error = group.operator_error(residual)
    shown = (ranks.R1, ranks.R2)
    return group.prediction(named(method, bits), at, stored, error, operator_error, shown)


def _magnitude(group: _Group) -> Iterator[Prediction]:
    matrices = [group.unfolding[:, columns].contiguous() for columns in group.columns]
    for bits in VALUE_BITS:
        each = value_bytes(bits, group.shape.value_bytes)

        def stored(nnz: Sequence[int], each: float = each) -> float:
            return sum(
                cheapest_codec(*_sides(group, c), n, each).stored_bytes(*_sides(group, c), n, each)  # type: ignore[arg-type]
                for c, n in enumerate(nnz)
            )

        for at, budget in enumerate(group.budgets):
            if stored([0] * len(matrices)) > budget:
                continue
            masks = select_largest(matrices, lambda nnz, b=budget: stored(nnz) <= b)  # type: ignore[misc]
            kept = [matrix[mask] for matrix, mask in zip(matrices, masks, strict=True)]
            error = group.squared_norm - sum(map(squared_sum, kept))
            operator_error = None
            if bits < 16:
                error += sum(squared_sum(v - round_to_nearest(v, bits)) for v in kept)
            else:
                operator_error = group.operator_error(
                    lambda c, masks=masks: matrices[c].masked_fill(masks[c], 0)  # type: ignore[misc]
                )
            size = stored([values.numel() for values in kept])
            yield group.prediction(named("magnitude", bits), at, size, error, operator_error)


def _rtn(group: _Group) -> Iterator[Prediction]:
    """Each keep gets the most bits that fit it."""
    sizes = {
        bits: sum(
            math.prod(_sides(group, c)) * bits / 8 + _scales(math.prod(_sides(group, c)))
            for c in range(len(group.columns))
        )
        for bits in RTN_BITS
    }
    errors: dict[int, tuple[float, float]] = {}
    for at, budget in enumerate(group.budgets):
        fitting = [bits for bits in RTN_BITS if sizes[bits] <= budget]
        if not fitting:
            continue
        bits = fitting[0]
        if bits not in errors:

            def residual(c: int, bits: int = bits) -> Tensor:
                # In the order of storage: along the input, (out, in).
                module = group.shape.layout.modules[c]
                matrix = group.unfolding[:, group.columns[c]]
                weight = matrix.T if module.basis_side == "input" else matrix
                return weight - round_to_nearest(weight, bits)

            errors[bits] = (
                sum(squared_sum(residual(c)) for c in range(len(group.columns))),
                group.operator_error(residual),
            )
        squared_error, operator_error = errors[bits]
        yield group.prediction(named("rtn", bits), at, sizes[bits], squared_error, operator_error)


def _scales(elements: int) -> int:
    return -(-elements // _GROUP) * _SCALE_BYTES
