"""Methods that store every module of a group on its own, and what chains have in common.

Shapes: W (in, out) of a module, row-vector convention; the unfolding (d, S p) of the group holds
W of modules whose basis side is the input, and W^T of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lestd_kernels.errors import LestdError
from lestd_kernels.formats.chain import Chain, ModuleChain
from lestd_kernels.linalg.metric import Metric, diagonal_of
from lestd_kernels.linalg.stage1 import Ranks
from lestd_kernels.methods.common.base import (
    BUFFERS_BYTES,
    LOSS,
    WEIGHT,
    Bounds,
    Decomposed,
    Method,
    MethodArgs,
    Metrics,
    SliceStats,
    require_budget,
    require_no_core,
)
from lestd_kernels.methods.common.slice_statistics import relative
from lestd_kernels.methods.common.stopwatch import Stopwatch
from lestd_kernels.search.budget import CurvePoint
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.tensorize import GroupLayout, ModuleLayout


@dataclass
class PreparedGroup:
    """A group as it was read.

    Attributes:
        unfolding: ``(d, S p)``, float32.
        layout: the group.
        value_dtype: of the stored tensors.
        args: of the method.
        metrics: of the modules.
        seconds: what preparing took, by stage.
    """

    unfolding: Tensor
    layout: GroupLayout
    value_dtype: torch.dtype
    args: MethodArgs
    metrics: Metrics
    seconds: dict[str, float]

    def weight(self, module: ModuleLayout) -> Tensor:
        """W ``(in, out)`` of a module, float32; a view that is not to be written to."""
        block = self.unfolding[:, self.layout.columns(module)]
        return block if module.basis_side == "input" else block.T

    def metric(self, module: ModuleLayout) -> Metric:
        """The metric of a module."""
        return Metric(self.metrics.get(module.name), self.metrics.get(f"{module.name}.output"))

    def without_feedback_of_outputs(self, module: ModuleLayout) -> Metric:
        """The metric with the diagonal of its output side: quick, where an estimate will do."""
        metric = self.metric(module)
        return (
            metric if metric.output is None else metric._replace(output=diagonal_of(metric.output))
        )


def prepare(
    unfolding: Tensor,
    layout: GroupLayout,
    value_dtype: torch.dtype,
    args: MethodArgs,
    metrics: Metrics,
) -> PreparedGroup:
    """Keep a group for `encode`; see `Method.prepare`."""
    return PreparedGroup(unfolding, layout, value_dtype, args, metrics, {})


def chain_result(
    prepared: PreparedGroup,
    modules: Mapping[str, ModuleChain],
    clock: Stopwatch,
    shared: Mapping[str, EncodedCore] | None = None,
    ranks: dict[str, int] | None = None,
    curve: Sequence[CurvePoint] = (),
    expected: float | None = None,
) -> Decomposed:
    """Put chains together, and measure what was stored against the weights.

    Args:
        prepared: the group.
        modules: a chain for each of its modules.
        clock: gets the stage ``"error"``; its seconds are the result's.
        shared: matrices that several modules use.
        ranks: see `Chain`.
        curve: see `Decomposed`.
        expected: its `expected_squared_error`.

    Raises:
        LestdError: a stored value is not finite in the value dtype.
    """
    layout = prepared.layout
    stored = Chain(layout, shared or {}, modules, ranks or {}, prepared.value_dtype)
    slices: list[SliceStats] = []
    metric_norm = metric_error = 0.0
    with clock("error"):
        for module in layout.modules:
            W = prepared.weight(module)
            W_hat = stored.module_weight(module.name)
            if not bool(torch.isfinite(W_hat).all()):
                raise LestdError(
                    f"what is stored of {module.name} has values that do not fit "
                    f"{prepared.value_dtype}; convert the checkpoint to bfloat16"
                )
            residual = W - W_hat
            metric = prepared.metric(module)
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
        curve=tuple(curve),
        singular_values=((), ()),
        metric_squared_norm=metric_norm,
        metric_squared_error=metric_error,
        expected_squared_error=expected,
    )


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


def module_method(
    name: str,
    encode_module: EncodeModule,
    least_module_bytes: ModuleBytes,
    metrics: tuple[str, ...] = (WEIGHT,),
) -> Method:
    """A method that stores every module on its own, each with the same share of its bytes.

    Args:
        name: of the method.
        encode_module: stores one module; raises LestdError where the budget is too small.
        least_module_bytes: the smallest such budget. Raises LestdError for arguments that the
            method does not know.
        metrics: see `Method`.
    """

    def least_bytes(layout: GroupLayout, value_dtype: torch.dtype, args: MethodArgs) -> int:
        require_no_core(name, args)
        total = len(layout.slices)
        least = 0
        for module in layout.modules:
            rows, columns = layout.weight_shape(module)[::-1]
            needed = least_module_bytes(rows, columns, value_dtype.itemsize, args)
            # The budget of which the module's share is enough.
            least = max(least, -(-(needed + 1) * total // len(module.slices)))
        return least

    def encode(
        prepared: PreparedGroup,
        byte_budget: int,
        curve_budgets: Sequence[int] = (),
        *,
        reuse: bool = False,
    ) -> Decomposed:
        bounds(prepared.layout, byte_budget, prepared.value_dtype, prepared.args)
        done = _encode_modules(prepared, byte_budget, encode_module, prepared.metric, {})
        stored: dict[str, tuple[ModuleChain, float]] = {}
        errors = {}
        for budget in sorted(curve_budgets, reverse=True):
            other = _encode_modules(
                prepared, budget, encode_module, prepared.without_feedback_of_outputs, stored
            )
            errors[budget] = other.metric_squared_error
        points = (CurvePoint(budget, Ranks(0, 0, 0), errors[budget]) for budget in curve_budgets)
        return replace(done, curve=tuple(points))

    def bounds(
        layout: GroupLayout, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
    ) -> Bounds:
        least = least_bytes(layout, value_dtype, args)
        require_budget(name, byte_budget, least)
        return Bounds(None, None, None, byte_budget, module_workspace_bytes(layout, args), 0)

    return Method(name, prepare, encode, bounds, least_bytes, metrics, per_matrix=True)


def _encode_modules(
    prepared: PreparedGroup,
    byte_budget: int,
    encode_module: EncodeModule,
    metric_of: Callable[[ModuleLayout], Metric],
    stored: dict[str, tuple[ModuleChain, float]],
) -> Decomposed:
    """Store every module, or take it from what a larger budget has stored, where that fits."""
    clock = Stopwatch(prepared.unfolding.device)
    chains, expected = {}, 0.0
    shares = split_budget(prepared.layout, byte_budget)
    with clock("stage2"):
        for module in prepared.layout.modules:
            budget, known = shares[module.name], stored.get(module.name)
            if known is None or sum(one.stored_bytes for one in known[0].own) > budget:
                W, metric = prepared.weight(module), metric_of(module)
                try:
                    known = encode_module(W, metric, budget, prepared.value_dtype, prepared.args)
                except LestdError as error:
                    raise LestdError(f"{module.name}: {error}") from error
                stored[module.name] = known
            chains[module.name], lost = known
            expected += lost
    return chain_result(prepared, chains, clock, expected=expected)


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
