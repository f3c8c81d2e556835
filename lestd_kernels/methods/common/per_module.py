"""Methods that store every module of a group on its own, and what chains have in common.

Shapes: W (in, out) of a module, row-vector convention; the unfolding (d, S p) of the group holds
W of modules whose basis side is the input, and W^T of the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from math import inf
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lestd_kernels.errors import LestdError
from lestd_kernels.formats.chain import Chain, ModuleChain
from lestd_kernels.linalg.metric import Metric
from lestd_kernels.linalg.stage1 import Ranks
from lestd_kernels.methods.common.base import (
    BUFFERS_BYTES,
    LOSS,
    WEIGHT,
    Bounds,
    Decomposed,
    Group,
    Method,
    MethodArgs,
    SliceStats,
    require_budget,
    require_no_core,
)
from lestd_kernels.methods.common.slice_statistics import relative
from lestd_kernels.methods.common.stopwatch import Stopwatch
from lestd_kernels.search.budget import CurvePoint
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.tensorize import GroupLayout, ModuleLayout


class StoredChains(NamedTuple):
    """The chains of a group for one byte budget.

    Attributes:
        modules: a chain for each of its modules.
        shared: matrices that several modules use.
        ranks: see `Chain`.
        expected: the `expected_squared_error`, see `Decomposed`.
    """

    modules: Mapping[str, ModuleChain]
    shared: Mapping[str, EncodedCore] = MappingProxyType({})
    ranks: Mapping[str, int] = MappingProxyType({})
    expected: float | None = None


def chain_result(group: Group, chains: StoredChains, clock: Stopwatch) -> Decomposed:
    """Put chains together, and measure what was stored against the weights.

    The clock gets the stage ``"error"``; its seconds are the result's.

    Raises:
        LestdError: a stored value is not finite in the value dtype.
    """
    layout, modules = group.layout, chains.modules
    stored = Chain(layout, chains.shared, modules, dict(chains.ranks), group.value_dtype)
    slices: list[SliceStats] = []
    metric_norm = metric_error = 0.0
    with clock("error"):
        for module in layout.modules:
            W = group.weight(module)
            W_hat = _finite(stored.module_weight(module.name), module, group.value_dtype)
            residual = W - W_hat
            metric = group.metric(module)
            metric_norm += metric.squares(W)
            metric_error += metric.squares(residual)
            slices += _slice_stats(module, W, W_hat, residual, modules[module.name])
    squared_norm = sum(one.squared_norm for one in slices)
    squared_error = sum(one.relative_error**2 * one.squared_norm for one in slices)
    return Decomposed(
        decomposition=stored,
        squared_norm=squared_norm,
        squared_error=squared_error,
        relative_error=relative(squared_error, squared_norm),
        squared_energy_stage1=None,
        squared_energy_stage2=None,
        threshold=None,
        hooi_iterations=None,
        seconds=clock.seconds,
        slices=tuple(slices),
        curve=(),
        singular_values=((), ()),
        metric_squared_norm=metric_norm,
        metric_squared_error=metric_error,
        expected_squared_error=chains.expected,
    )


def _finite(W_hat: Tensor, module: ModuleLayout, value_dtype: torch.dtype) -> Tensor:
    if not bool(torch.isfinite(W_hat).all()):
        raise LestdError(
            f"what is stored of {module.name} has values that do not fit {value_dtype}; convert "
            "the checkpoint to bfloat16"
        )
    return W_hat


def _slice_stats(
    module: ModuleLayout, W: Tensor, W_hat: Tensor, residual: Tensor, chain: ModuleChain
) -> Iterator[SliceStats]:
    """Statistics of the slices of a module; what is stored is shared evenly among them."""
    count = len(module.slices)
    norms, energies, errors = (_slice_squares(X, module) for X in (W, W_hat, residual))
    nnz = sum(own.nnz for own in chain.own)
    elements = sum(own.rows * own.columns for own in chain.own)
    stored = sum(own.stored_bytes for own in chain.own)
    for i, (projection, head) in enumerate(module.slices):
        yield SliceStats(
            projection=projection,
            head=head,
            nnz=nnz // count,
            density=nnz / elements,
            core_bytes=stored / count,
            relative_error=relative(errors[i], norms[i]),
            squared_norm=norms[i],
            squared_energy=energies[i],
        )


def _slice_squares(X: Tensor, module: ModuleLayout) -> list[float]:
    """Squared norms of the slices of ``X (in, out)``, accumulated in float64."""
    columns = X if module.basis_side == "input" else X.T
    total = torch.zeros(len(module.slices), dtype=torch.float64, device=X.device)
    for rows in torch.split(columns, 256):
        slices = rows.reshape(len(rows), len(module.slices), -1)
        total += slices.double().square().sum(dim=(0, 2))
    return [float(one) for one in total.tolist()]


def chain_method(
    name: str,
    prepare: Callable[[Group], Any] | None,
    store: Callable[[Any, int, Stopwatch], StoredChains],
    errors: Callable[[Any, Decomposed, int, Sequence[int]], Sequence[float]],
    least: Callable[[GroupLayout, int, MethodArgs], int],
    workspace: Callable[[GroupLayout, MethodArgs], int] = lambda layout, args: 0,
    most: Callable[[GroupLayout, int, MethodArgs], float] = lambda layout, value_bytes, args: inf,
    metrics: tuple[str, ...] = (WEIGHT,),
    per_matrix: bool = False,
) -> Method:
    """A method that stores every module as a chain of matrices.

    Args:
        name: of the method.
        prepare: the group with what no byte budget decides; None for the group as it is.
        store: ``(prepared, byte_budget, clock)``: the chains, in at most so many bytes.
        errors: ``(prepared, done, byte_budget, others)``: the squared error to expect at each of
            the others in the metric, beside what was stored for this budget.
        least: ``(layout, value_bytes, args)``: the smallest feasible byte budget. Raises
            LestdError for arguments that the method does not know.
        workspace: ``(layout, args)``: memory beyond `module_workspace_bytes`.
        most: ``(layout, value_bytes, args)``: the most bytes that it stores.
        metrics: see `Method`.
        per_matrix: see `Method`.
    """

    def prepare_timed(group: Group) -> Any:
        if prepare is None:
            return group
        clock = Stopwatch(group.unfolding.device)
        with clock("stage1"):
            prepared = prepare(group)
        prepared.seconds = clock.seconds
        return prepared

    def encode(
        prepared: Any, byte_budget: int, curve_budgets: Sequence[int] = (), *, reuse: bool = False
    ) -> Decomposed:
        bounds(prepared.layout, byte_budget, prepared.value_dtype, prepared.args)
        clock = Stopwatch(prepared.unfolding.device)
        done = chain_result(prepared, store(prepared, byte_budget, clock), clock)
        if not curve_budgets:
            return done
        with clock("rank_search"):
            expected = errors(prepared, done, byte_budget, curve_budgets)
        curve = (
            CurvePoint(budget, Ranks(0, 0, 0), error)
            for budget, error in zip(curve_budgets, expected, strict=True)
        )
        return replace(done, curve=tuple(curve))

    def bounds(
        layout: GroupLayout, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
    ) -> Bounds:
        require_budget(name, byte_budget, least_bytes(layout, value_dtype, args))
        most_bytes = int(min(byte_budget, most(layout, value_dtype.itemsize, args)))
        memory = module_workspace_bytes(layout, args) + workspace(layout, args)
        return Bounds(None, None, None, most_bytes, memory, 0)

    def least_bytes(layout: GroupLayout, value_dtype: torch.dtype, args: MethodArgs) -> int:
        require_no_core(name, args)
        return least(layout, value_dtype.itemsize, args)

    return Method(name, prepare_timed, encode, bounds, least_bytes, metrics, per_matrix=per_matrix)


EncodeModule = Callable[[Tensor, Metric, int, torch.dtype, MethodArgs], tuple[ModuleChain, float]]
"""``(W (in, out), metric, byte_budget, value_dtype, args)``: the chain of one module, and the
squared error to expect of it, see `Decomposed`. W is not to be written to."""

ModuleBytes = Callable[[int, int, int, MethodArgs], int]
"""``(in, out, value_bytes, args)``: the fewest bytes in which one module can be stored."""


def split_budget(layout: GroupLayout, byte_budget: int) -> dict[str, int]:
    """Every module's share of a byte budget, in proportion to its elements; none is left over."""
    shares, before = {}, 0
    for module in layout.modules:
        after = before + len(module.slices)
        total = len(layout.slices)
        shares[module.name] = byte_budget * after // total - byte_budget * before // total
        before = after
    return shares


Division = Callable[[Group], Callable[[int], Mapping[str, int]]]
"""Of a group: byte budget -> every module's share of it."""


def evenly(group: Group) -> Callable[[int], Mapping[str, int]]:
    """Bytes in proportion to elements."""
    return partial(split_budget, group.layout)


@dataclass
class _Modules(Group):
    """A group whose bytes are divided among its modules once for all budgets."""

    divide: Division = evenly

    @cached_property
    def division(self) -> Callable[[int], Mapping[str, int]]:
        """See `Division`; found when it is first asked for, and anew for other arguments."""
        return self.divide(self)


def module_method(
    name: str,
    encode_module: EncodeModule,
    least_module_bytes: ModuleBytes,
    metrics: tuple[str, ...] = (WEIGHT,),
    divide: Division = evenly,
) -> Method:
    """A method that stores every module on its own.

    Args:
        name: of the method.
        encode_module: stores one module; raises LestdError where the budget is too small.
        least_module_bytes: the smallest such budget. Raises LestdError for arguments that the
            method does not know.
        metrics: see `Method`.
        divide: the bytes of a group among its modules; at least the smallest budget of each.
    """

    def prepare(group: Group) -> _Modules:
        own = {one.name: getattr(group, one.name) for one in fields(Group)}
        return _Modules(**own, divide=divide)

    def encoded(
        group: Group, module: ModuleLayout, metric: Metric, share: int
    ) -> tuple[ModuleChain, float]:
        W, dtype = group.weight(module), group.value_dtype
        try:
            return encode_module(W, metric, share, dtype, group.args)
        except LestdError as error:
            raise LestdError(f"{module.name}: {error}") from error

    def store(group: _Modules, byte_budget: int, clock: Stopwatch) -> StoredChains:
        chains, expected = {}, 0.0
        with clock("stage2"):
            shares = group.division(byte_budget)
            for module in group.layout.modules:
                chains[module.name], lost = encoded(
                    group, module, group.metric(module), shares[module.name]
                )
                expected += lost
        return StoredChains(chains, expected=expected)

    def errors(
        group: _Modules, done: Decomposed, byte_budget: int, budgets: Sequence[int]
    ) -> list[float]:
        found = {}
        # Of every module what it was stored in: a share, the bytes that it took of it, the error.
        stored: dict[str, list[tuple[int, int, float]]] = defaultdict(list)

        def error_of(module: ModuleLayout, share: int) -> float:
            """Of what is stored in a share: perhaps what was stored in a larger one, and fits."""
            for larger, taken, error in stored[module.name]:
                if taken <= share <= larger:
                    return error
            W, metric = group.weight(module), group.without_feedback_of_outputs(module)
            chain, _ = encoded(group, module, metric, share)
            W_hat = _finite(chain.weight(len(W), {}), module, group.value_dtype)
            error = group.metric(module).squares(W - W_hat)
            stored[module.name].append((share, sum(own.stored_bytes for own in chain.own), error))
            return error

        for budget in sorted({byte_budget, *budgets}, reverse=True):
            shares = group.division(budget)
            found[budget] = sum(error_of(one, shares[one.name]) for one in group.layout.modules)
        # What was stored says how much feedback of outputs gains.
        gains = done.metric_squared_error / found[byte_budget] if found[byte_budget] else 1.0
        return [found[budget] * gains for budget in budgets]

    def least(layout: GroupLayout, value_bytes: int, args: MethodArgs) -> int:
        total, fewest = len(layout.slices), 0
        for module in layout.modules:
            rows, columns = layout.weight_shape(module)[::-1]
            needed = least_module_bytes(rows, columns, value_bytes, args)
            # The budget of which the module's even share is enough.
            fewest = max(fewest, -(-(needed + 1) * total // len(module.slices)))
        return fewest

    return chain_method(name, prepare, store, errors, least, metrics=metrics, per_matrix=True)


def module_workspace_bytes(layout: GroupLayout, args: MethodArgs) -> int:
    """Upper bound of the memory of working on one module at a time, beside the unfolding.

    A copy of the module, its singular vectors and the work space of an SVD, or in a metric two
    square matrices of its input, and in the metric loss of its output; the residual and the
    reconstruction when the error is measured.
    """
    most = 0
    for module in layout.modules:
        out_features, in_features = layout.weight_shape(module)
        elements, square = out_features * in_features, in_features**2
        if args.metric == LOSS:
            elements, square = 2 * elements, square + out_features**2
        smaller = min(out_features, in_features) ** 2
        most = max(most, 24 * elements + 24 * square + 24 * smaller)
    return most + BUFFERS_BYTES
