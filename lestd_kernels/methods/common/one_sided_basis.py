"""Shared bases in a metric, one for each side of the modules, with cores thinned out and rounded.

Shapes: W (in, out) of a module, y = x W; d the width that the modules of one side share; C (in, in)
the metric of a module's input, see lestd_kernels.linalg.metric; R ranks.

    input side   W_m ~ A M_m     A (d, R), M_m (R, out_m)    Q, K, V; gate, up
    output side  W_m ~ M_m A^T   A (d, R), M_m (in_m, R)     O; down

On the input side A is ``S^-T U`` with the leading left singular vectors U of ``S^T [W_1 ...]`` and
``C = S S^T``; modules that read different inputs (experts) share the basis of their mean metric. On
the output side A holds the leading right singular vectors of the modules in their metrics. Or A is
the identity, which is not stored, and the cores are the weights: at mild compression, and with few
bits, a basis may cost more than it saves. Then
Stage II against A as it is stored: the core of least error in each module's own metric, a threshold
over all cores, and rounding with the error fed back.

References: LeSTD (ICLR 2026), Stages I and II; SVD-LLM (ICLR 2025), section 3, for the whitening;
SparseGPT (ICML 2023), section 3, for importance and feedback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lestd_kernels.linalg.metric import (
    Root,
    apply_metric,
    diagonal_of,
    feedback_root,
    mean_diagonal,
    regularized,
    solver,
)
from lestd_kernels.linalg.stage1 import gram_matrix, leading_eigenvectors
from lestd_kernels.linalg.stage2 import select_largest
from lestd_kernels.linalg.two_sided_feedback import round_both_ways
from lestd_kernels.search.basis_rank import SidedShape, search_rank
from lestd_kernels.storage.codecs import cheapest_codec
from lestd_kernels.storage.matrix import EncodedCore

IDENTITY = 0
"""Stands for the rank of a basis that is the identity."""


@dataclass(frozen=True)
class Reader:
    """Modules that read the same input, side by side, and that input's metric.

    Attributes:
        W: ``(in, n)``, float32.
        C: ``(in, in)`` or ``(in,)``, float32.
    """

    W: Tensor
    C: Tensor


class Encoded(NamedTuple):
    """Stored factor and cores of the modules of one side.

    Attributes:
        factor: the basis (d, R); None for the identity.
        cores: in the order of the modules.
        expected: the squared error that was known before anything was rounded; None where it is
            not.
    """

    factor: EncodedCore | None
    cores: list[EncodedCore]
    expected: float | None


class SidedGroup:
    """Modules that share one basis on one of their sides.

    Args:
        readers: in order; input side: one per input, output side: one per module.
        shape: sizes of the cores; on the input side a reader has one core or several.
        unit: what the metrics were divided by.
    """

    def __init__(self, readers: Sequence[Reader], shape: SidedShape, unit: float) -> None:
        self.shape, self.unit = shape, unit
        self._readers = tuple(readers)
        self._basis, self.singular_values = self._find_basis()
        self._rotated: tuple[list[Tensor], Tensor] | None = None

    def _find_basis(self) -> tuple[Tensor, tuple[float, ...]]:
        """All columns of A ``(d, d)``, float32, the strongest first, and their singular values."""
        if self.shape.rank_first:
            S = Root.of(mean_metric([reader.C for reader in self._readers]))
            gram = _sum(gram_matrix(S.apply(reader.W)) for reader in self._readers)
            energies, U = leading_eigenvectors(gram)
            A = S.solve(U)
        else:
            gram = _sum(r.W.T @ apply_metric(r.C, r.W) for r in self._readers)
            energies, A = leading_eigenvectors((gram + gram.T) / 2)
        values = (energies.clamp(min=0) * self.unit).sqrt().float().tolist()
        # Columns of one largest magnitude share the groups of few-bit values; their cores' rows
        # or columns take the rest.
        return A / A.abs().amax(dim=0), tuple(values)

    def _rotate(self) -> tuple[list[Tensor], Tensor]:
        """Arguments of `search_rank`: losses ``(d, n_c)`` of each core, and `left_out` ``(d,)``.

        A direction counts as the sum of its elements. On the output side that understates both
        what it costs to leave a direction out and what it costs to prune many elements of a column,
        whose losses are taken as those of one at a time; measured, the ranks found so are better.
        """
        losses: list[Tensor] = []
        left_out = torch.zeros(self.shape.width, dtype=torch.float64)
        C, scale = None, self._basis.square().sum(dim=0)
        for reader, widths in zip(self._readers, self._widths(), strict=True):
            if self.shape.rank_first:
                # The columns are those of a basis in the mean metric, exact with one reader.
                if reader.C is not C:
                    C = reader.C
                    scale = (self._basis * apply_metric(C, self._basis)).sum(dim=0)
                core = (self._basis.T @ apply_metric(reader.C, reader.W)) / scale[:, None]
                loss = core.square() * scale[:, None]
            else:
                core = (reader.W @ self._basis) / scale
                R = feedback_root(reader.C)
                loss = (core.square() * diagonal_of(R).square()[:, None] * scale).T
            left_out += loss.double().sum(dim=1).cpu()
            losses += torch.split(loss, widths, dim=1)
        return losses, left_out

    def _widths(self) -> list[list[int]]:
        """Of each reader the extents of its cores beside the rank."""
        left = list(self.shape.core_columns)
        widths = []
        for reader in self._readers:
            extent = reader.W.shape[1] if self.shape.rank_first else reader.W.shape[0]
            mine: list[int] = []
            while sum(mine) < extent:
                mine.append(left.pop(0))
            widths.append(mine)
        return widths

    def search(self, grid: Sequence[int], budgets: Sequence[int]) -> list[tuple[int, float]]:
        """Rank and squared error to expect for each byte budget, before anything is rounded."""
        if self._rotated is None:
            self._rotated = self._rotate()
        found = search_rank(*self._rotated, self.shape, grid, budgets)
        return [(R, error * self.unit) for R, error in found]

    def search_identity(self, budgets: Sequence[int]) -> list[float]:
        """Squared error to expect of the weights themselves, thinned out; inf where none fits."""
        losses: list[Tensor] = []
        for reader, widths in zip(self._readers, self._widths(), strict=True):
            weights = diagonal_of(feedback_root(reader.C)).square()
            loss = reader.W.square() * weights[:, None]
            losses += torch.split(loss if self.shape.rank_first else loss.T, widths, dim=1)
        left_out = torch.zeros(self.shape.width, dtype=torch.float64)
        shape = replace(self.shape, identity=True)
        found = search_rank(losses, left_out, shape, [self.shape.width], budgets)
        return [error * self.unit for _, error in found]

    def forget(self) -> None:
        """Free what only `search` needs; it can be computed again."""
        self._rotated = None

    def encode(
        self,
        R: int,
        byte_budget: int,
        value_dtype: torch.dtype,
        scales: Sequence[float] | None = None,
    ) -> Encoded:
        """The factor (d, R) and the cores, in at most `byte_budget` bytes.

        Args:
            R: the rank; `IDENTITY` for no factor.
            byte_budget: at least that of `R` with one non-zero.
            value_dtype: of values and scales.
            scales: what each core is multiplied by when it is stored.
        """
        shape, A = self.shape, None
        if R == IDENTITY:
            R, shape = shape.width, replace(shape, identity=True)
        else:
            A = self._factor(R, value_dtype)
        stored = None if A is None else A.decode().float()
        cores: list[Tensor] = []
        roots: list[Tensor] = []
        scores: list[Tensor] = []
        fit: _Fit | None = None
        for reader, widths in zip(self._readers, self._widths(), strict=True):
            if fit is None or reader.C is not fit.C:
                fit = _Fit(reader.C, stored, shape.rank_first)
            M, row_root, columns = fit.core(reader.W), fit.row_root, fit.columns
            score = M.abs() * diagonal_of(row_root)[:, None] * columns
            dim = 1 if shape.rank_first else 0
            cores += torch.split(M, widths, dim=dim)
            scores += [part.contiguous() for part in torch.split(score, widths, dim=dim)]
            roots += [row_root] * len(widths)

        def fits(nnz: Sequence[int]) -> bool:
            return shape.stored_bytes(R, nnz) <= byte_budget

        masks = select_largest(scores, fits)
        del scores
        stores = []
        known: Tensor | None = None
        inverse: Tensor | None = None
        for i, scale in enumerate(scales or [1.0] * len(cores)):
            if roots[i] is not known:
                known = roots[i]
                inverse = feedback_inverse(known)
            core = cores[i].mul_(scale).contiguous()
            stores.append(store_rounded(core, masks[i], inverse, shape.value_bits, value_dtype))
        return Encoded(A, stores, None)

    def _factor(self, R: int, value_dtype: torch.dtype) -> EncodedCore:
        """The leading columns of the basis as they are stored."""
        # Their rows are the channels of the input; on the output side they have no metric.
        rows = (
            mean_metric([reader.C for reader in self._readers])
            if self.shape.rank_first
            else self._basis.new_ones(self.shape.width)
        )
        basis = self._basis[:, :R].contiguous()
        every = torch.ones_like(basis, dtype=torch.bool)
        inverse = feedback_inverse(feedback_root(rows))
        return store_rounded(basis, every, inverse, self.shape.factor_bits, value_dtype)

    def error(
        self, A: EncodedCore | None, cores: Sequence[EncodedCore], scales: Sequence[float]
    ) -> float:
        """The squared error of what `encode` has made, in the units of `search`."""
        left = [core.decode().float() / scale for core, scale in zip(cores, scales, strict=True)]
        total = 0.0
        for reader, widths in zip(self._readers, self._widths(), strict=True):
            M = torch.cat([left.pop(0) for _ in widths], dim=1 if self.shape.rank_first else 0)
            if A is not None:
                factor = A.decode().float()
                M = factor @ M if self.shape.rank_first else M @ factor.T
            D = reader.W - M
            total += float((D * apply_metric(reader.C, D)).sum(dtype=torch.float64))
        return total * self.unit


class _Fit:
    """The cores of least error for a factor A (d, R) as it is stored, or for the identity.

    Attributes:
        C: the metric of the inputs.
        row_root: of the metric of a core's rows, see `feedback_root`.
        columns: roots of the weights of its columns.
    """

    def __init__(self, C: Tensor, A: Tensor | None, rank_first: bool) -> None:
        self.C, self._A, self._first = C, A, rank_first
        self.columns, rows = torch.ones(1, device=C.device), C
        if A is None:
            self._solved: Callable[[Tensor], Tensor] | None = None
        elif rank_first:
            self._left = apply_metric(C, A).T
            rows = A.T @ self._left.T
            self._solved = solver(rows)
        else:
            H = A.T @ A
            self._solved, self.columns = solver(H), H.diagonal().sqrt()
        self.row_root = feedback_root(rows)

    def core(self, W: Tensor) -> Tensor:
        """Of W ``(in, n)``, a tensor of its own."""
        if self._A is None or self._solved is None:
            return W.clone()
        if self._first:
            return self._solved(self._left @ W)
        return self._solved(self._A.T @ W.T).T.contiguous()


def feedback_inverse(row_root: Tensor) -> Tensor | None:
    """Factor for `round_with_feedback`; None where rows apart cannot make up for each other."""
    if row_root.dim() == 1:
        return None
    identity = torch.eye(len(row_root), device=row_root.device)
    inverse: Tensor = torch.linalg.solve_triangular(row_root, identity, upper=True)
    return inverse


def store_rounded(
    M: Tensor,
    mask: Tensor,
    inverse: Tensor | None,
    value_bits: int,
    value_dtype: torch.dtype,
    V: Tensor | None = None,
) -> EncodedCore:
    """Store the chosen elements of a matrix, rounded with the error fed back to later rows.

    Args:
        M: ``(m, n)``, float32.
        mask: the elements to store.
        inverse: see `feedback_inverse`.
        value_bits: 16, 8, 4, 3 or 2.
        value_dtype: of values or scales.
        V: to feed the error back to later columns, see `output_factor`.
    """
    rows, columns = M.shape
    nnz, value_bytes = int(mask.sum()), value_dtype.itemsize
    codec = cheapest_codec(rows, columns, nnz, value_bytes, value_bits).name
    chosen = None if codec == "dense" else mask
    if inverse is None and V is None:
        return EncodedCore.quantized(M, value_bits, value_dtype, codec=codec, mask=chosen)
    U = M.new_ones(rows) if inverse is None else inverse
    rounded, scales = round_both_ways(M, U, V, value_bits, value_dtype, chosen)
    return EncodedCore.quantized(rounded, value_bits, value_dtype, scales, codec, chosen)


def mean_metric(metrics: Iterable[Tensor]) -> Tensor:
    """The mean of metrics, of which one is held at a time; diagonal if all are."""
    total, count = None, 0
    for C in metrics:
        if total is not None and C.dim() != total.dim():
            C, total = (X.diag() if X.dim() == 1 else X for X in (C, total))
        total = C if total is None else total + C
        count += 1
    assert total is not None, "a side has modules"
    return total / count


def _sum(parts: object) -> Tensor:
    total: Tensor | None = None
    for part in parts:  # type: ignore[attr-defined]
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def readers_of(
    weights: Mapping[str, Tensor],
    reads: Mapping[str, str],
    metrics: Mapping[str, Tensor],
    scales: Mapping[str, float] | None = None,
) -> tuple[list[Reader], float]:
    """The readers of one side, and the unit of their metrics.

    Args:
        weights: module name -> W ``(in, out)``; those that read the same input are adjacent.
        reads: module name -> the input that it reads.
        metrics: module name -> the metric of its input, where it has one.
        scales: module name -> what its weight is divided by.
    """
    by_input: dict[str, list[str]] = {}
    for name in weights:
        by_input.setdefault(reads[name], []).append(name)
    first = [names[0] for names in by_input.values()]
    unit = mean_diagonal([metrics[name] for name in first if name in metrics])
    readers, plain = [], None
    # One for all that have the same, so that what follows from it is computed and held once.
    known: dict[int, Tensor] = {}
    for names in by_input.values():
        W = torch.cat([weights[name] for name in names], dim=1)
        widths = [weights[name].shape[1] for name in names]
        for name, block in zip(names, torch.split(W, widths, dim=1), strict=True):
            block.div_(1.0 if scales is None else scales[name])
        gram = metrics.get(names[0])
        if gram is not None:
            if id(gram) not in known:
                known[id(gram)] = regularized(gram, unit)
            C = known[id(gram)]
        else:
            if plain is None or len(plain) != len(W):
                plain = W.new_ones(len(W))
            C = plain
        readers.append(Reader(W, C))
    return readers, unit
