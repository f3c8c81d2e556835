"""A shared basis in the metric loss, with cores thinned out and rounded.

Shapes: W (d, n) of a module, transposed on the output side, so that d is the width that the modules
of one side share; L (d, d) the metric of the module on that side, N (n, n) that on its other side;
A (d, R) the basis, M (R, n) the core of a module, R ranks.

    W ~ A M,    tr(L D N D^T) / 2 nats per token,   D = W - A M

A is ``S^-T U`` with the leading eigenvectors U of ``sum S^T W N W^T S`` over the modules, and
``S S^T`` their mean L; or the identity, which is not stored. The core's element g counts
``g^2 h n``, with the diagonals h of ``A^T L A`` and n of N: half of it is nats. A threshold over
all cores says which stay, and they are fitted to make up for the others in both metrics; few-bit
values are rounded with the error fed back along both sides.

Nothing of N is stored. A basis per head takes p / d of the dense bytes, and even one p x p for all
heads, tried on trained attention at equal bytes, is behind cores fitted on their support without
one at 0.6, 0.2 and below of the dense bytes, and within 3 % of them at 0.4.

References: LeSTD (ICLR 2026), Stages I and II; Martens and Grosse, "Optimizing Neural Networks with
Kronecker-factored Approximate Curvature", ICML 2015.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lestd_kernels.linalg.metric import (
    Metric,
    Root,
    apply_metric,
    diagonal_of,
    feedback_root,
    mean_diagonal,
    regularized,
    solver,
)
from lestd_kernels.linalg.stage1 import leading_eigenvectors
from lestd_kernels.linalg.stage2 import select_largest
from lestd_kernels.linalg.support_fit import fit_on_support
from lestd_kernels.linalg.two_sided_feedback import output_factor
from lestd_kernels.methods.common.one_sided_basis import (
    IDENTITY,
    Encoded,
    feedback_inverse,
    mean_metric,
    store_rounded,
)
from lestd_kernels.search.basis_rank import SidedShape, search_rank
from lestd_kernels.storage.few_bits import FULL_BITS
from lestd_kernels.storage.matrix import EncodedCore

# What a module counts whose outputs move no prediction, as of an expert that no token chose.
_NOTHING = 1e-12


@dataclass(frozen=True)
class TwoSided:
    """A module.

    Attributes:
        W: ``(d, n)``, float32.
        exact: its metric as it is: L and N.
        reads: modules with the same name have the same L.
    """

    W: Tensor
    exact: Metric
    reads: str


class LossGroup:
    """Modules that share one basis on one of their sides, in the metric loss.

    Args:
        modules: in the order of their cores.
        shape: sizes of the cores.

    Attributes:
        modules: as they were given.
        basis: all columns of A ``(d, d)``, float32, the strongest first.
        singular_values: theirs.
    """

    def __init__(self, modules: Sequence[TwoSided], shape: SidedShape) -> None:
        self.shape, self.modules = shape, tuple(modules)
        self.basis, self.singular_values = self._find_basis()
        self._rows: tuple[list[Tensor], float] | None = None

    def metrics(self) -> Iterator[Metric]:
        """Those of the modules, regularized: L of mean 1, and N with all that makes it nats.

        Made one by one, each time anew: those of a hundred experts together would take more
        memory than their weights.
        """
        reads = None
        for one in self.modules:
            if one.reads != reads:
                reads, (L, unit) = one.reads, _regularized(one.exact.input, one.W[:, 0])
            N, other = _regularized(one.exact.output, one.W[0])
            # All that makes it nats is on one side, so that those who read the same share L.
            yield Metric(L, N * (unit * other))

    def mean(self) -> Tensor:
        """The mean of the modules' L, by what they count."""
        if len({one.reads for one in self.modules}) == 1:
            return _of(next(self.metrics()).input)
        weights = [mean_diagonal([_of(metric.output)]) for metric in self.metrics()]
        total = sum(weights)
        return mean_metric(
            _of(metric.input) * (weight * len(weights) / total)
            for metric, weight in zip(self.metrics(), weights, strict=True)
        )

    def _find_basis(self) -> tuple[Tensor, tuple[float, ...]]:
        """All columns of A ``(d, d)``, float32, the strongest first, and their singular values."""
        S, gram = Root.of(self.mean()), None
        for one, metric in zip(self.modules, self.metrics(), strict=True):
            X = S.apply(one.W)
            part = X @ Metric(None, metric.output).apply(X).T
            gram = part if gram is None else gram + part
        assert gram is not None, "a side has modules"
        energies, U = leading_eigenvectors((gram + gram.T) / 2)
        A = S.solve(U)
        values = energies.clamp(min=0).sqrt().float().tolist()
        # As in one_sided_basis: columns of one largest magnitude share the groups of few bits.
        return A / A.abs().amax(dim=0), tuple(values)

    def search(self, grid: Sequence[int], budgets: Sequence[int]) -> list[tuple[int, float]]:
        """Rank and squared error to expect for each byte budget, before anything is rounded."""
        losses: list[Tensor] = []
        left_out = torch.zeros(self.shape.width, dtype=torch.float64)
        L: Tensor | None = None
        for one, metric in zip(self.modules, self.metrics(), strict=True):
            if metric.input is not L:
                L = metric.input
                image = apply_metric(_of(L), self.basis)
                scale = (self.basis * image).sum(dim=0)
            core = (image.T @ one.W) / scale[:, None]
            losses.append(core.square() * scale[:, None] * diagonal_of(_of(metric.output)))
            whole = (core * Metric(None, metric.output).apply(core)).sum(dim=1) * scale
            left_out += whole.double().cpu()
        return search_rank(losses, left_out, self.shape, grid, budgets)

    def search_identity(self, budgets: Sequence[int]) -> list[float]:
        """Squared error to expect of the weights themselves, thinned out; inf where none fits.

        Inputs are correlated: few elements that are missing are made up for, and many add up to
        more than the sum of each. An element counts between what it does alone and what it does
        when made up for; and the more is lost of the sum, the more of the ratio by which the
        error of all is larger than it. Measured on trained attention this is within a factor of 3.
        """
        rows, whole = self._known_rows()
        losses = [
            one.W.square() * own[:, None] * diagonal_of(_of(metric.output))
            for one, own, metric in zip(self.modules, rows, self.metrics(), strict=True)
        ]
        total = sum(float(loss.sum(dtype=torch.float64)) for loss in losses)
        left_out = torch.zeros(self.shape.width, dtype=torch.float64)
        shape = replace(self.shape, identity=True)
        found = search_rank(losses, left_out, shape, [self.shape.width], budgets)
        if not total or not whole:
            return [error for _, error in found]
        return [
            error * (whole / total) ** min(error / total, 1.0) if error < torch.inf else error
            for _, error in found
        ]

    def _known_rows(self) -> tuple[list[Tensor], float]:
        """What the weights of a row count in `search_identity`, by module, and the squared norm of
        all in their metrics. Of no budget and no bits, and so found once for all."""
        if self._rows is None:
            rows, whole = [], 0.0
            L: Tensor | None = None
            for one, metric in zip(self.modules, self.metrics(), strict=True):
                if metric.input is not L:
                    L = metric.input
                    own = diagonal_of(feedback_root(_of(L))) * diagonal_of(_of(L)).sqrt()
                rows.append(own)
                whole += metric.squares(one.W)
            self._rows = rows, whole
        return self._rows

    def forget(self) -> None:
        """Nothing large is kept of a search."""

    def encode(
        self,
        R: int,
        byte_budget: int,
        value_dtype: torch.dtype,
        scales: Sequence[float] | None = None,
    ) -> Encoded:
        """The factor (d, R) and the cores, in at most `byte_budget` bytes; see `SidedGroup`."""
        shape, A = self.shape, None
        if R == IDENTITY:
            R, shape = shape.width, replace(shape, identity=True)
        else:
            inverse = feedback_inverse(feedback_root(self.mean()))
            basis = self.basis[:, :R].contiguous()
            every = torch.ones_like(basis, dtype=torch.bool)
            A = store_rounded(basis, every, inverse, shape.factor_bits, value_dtype)
        factor = None if A is None else A.decode().float()
        cores, scores = [], []
        H: Tensor | None = None
        for one, metric, image in self._in_basis(factor):
            if metric.input is not H:
                H = _of(metric.input)
                rows = diagonal_of(feedback_root(H))[:, None]
                solved = None if image is None else solver(H)
            M = one.W if solved is None or image is None else solved(image.T @ one.W)
            cores.append(M)
            scores.append(M.abs() * (rows * diagonal_of(_of(metric.output)).sqrt()))

        def fits(nnz: Sequence[int]) -> bool:
            return shape.stored_bytes(R, nnz) <= byte_budget

        masks = select_largest(scores, fits)
        del scores
        stores, expected = [], 0.0
        for (one, metric, _), mask in zip(self._in_basis(factor), masks, strict=True):
            core = fit_on_support(cores.pop(0), mask, metric)
            expected += one.exact.squares(one.W - (core if factor is None else factor @ core))
            stores.append(self._store(core, mask, metric, value_dtype))
        return Encoded(A, stores, expected)

    def _in_basis(self, factor: Tensor | None) -> Iterator[tuple[TwoSided, Metric, Tensor | None]]:
        """Each module, the metric of its core, and L times the factor; None for the identity."""
        L: Tensor | None = None
        for one, metric in zip(self.modules, self.metrics(), strict=True):
            if metric.input is not L:
                H = L = metric.input
                image = None
                if factor is not None:
                    image = apply_metric(_of(L), factor)
                    H = factor.T @ image
            yield one, metric._replace(input=H), image

    def _store(
        self, core: Tensor, mask: Tensor, metric: Metric, value_dtype: torch.dtype
    ) -> EncodedCore:
        """A core as it stands in its module, transposed on the output side."""
        if not self.shape.rank_first:
            core, mask, metric = core.T.contiguous(), mask.T.contiguous(), metric.transposed
        U = V = None
        if self.shape.value_bits != FULL_BITS:
            U, V = feedback_inverse(feedback_root(_of(metric.input))), output_factor(metric.output)
        return store_rounded(core, mask, U, self.shape.value_bits, value_dtype, V)

    def error(
        self,
        A: EncodedCore | None,
        cores: Sequence[EncodedCore],
        scales: Sequence[float] | None = None,
    ) -> float:
        """The squared error of what `encode` has made: twice the nats."""
        factor, total = None if A is None else A.decode().float(), 0.0
        for one, core in zip(self.modules, cores, strict=True):
            M = core.decode().float()
            M = M if self.shape.rank_first else M.T
            total += one.exact.squares(one.W - (M if factor is None else factor @ M))
        return total


def _regularized(G: Tensor | None, like: Tensor) -> tuple[Tensor, float]:
    """A metric of mean diagonal 1, positive definite, and what it was divided by.

    Args:
        G: one side's; None for the identity.
        like: a vector of that side.
    """
    if G is None:
        return torch.ones_like(like), 1.0
    if G.dim() == 3:
        G = torch.block_diag(*G)  # type: ignore[no-untyped-call]
    unit = mean_diagonal([G])
    return regularized(G, unit), unit if bool(G.any()) else _NOTHING


def _of(side: Tensor | None) -> Tensor:
    assert side is not None, "both sides of a regularized metric are there"
    return side
