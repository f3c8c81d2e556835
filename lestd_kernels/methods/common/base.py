"""Arguments and results of every method.

Shapes: see lestd_kernels.tensorize and decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from lestd_kernels.errors import LestdError
from lestd_kernels.formats.kinds import Decomposition
from lestd_kernels.linalg.metric import Metric, diagonal_of
from lestd_kernels.options import METRICS, MethodOptions
from lestd_kernels.search.budget import CurvePoint
from lestd_kernels.tensorize import GroupLayout, ModuleLayout

WEIGHT, NORM, ACTIVATION, LOSS = METRICS

CALIBRATED = (ACTIVATION, LOSS)
"""The metrics that a calibration text makes."""

BUFFERS_BYTES = 80 << 20
"""Of a worker: parts of tensors in progress, and what the allocator keeps for small tensors."""


@dataclass(frozen=True)
class MethodArgs(MethodOptions):
    """Arguments of a method: plain values, part of a task's identity.

    Attributes:
        metric: one of `METRICS`.
    """

    metric: str = WEIGHT


@dataclass(frozen=True)
class Bounds:
    """Bounds of a decomposition that shapes alone give.

    Attributes:
        max_R1: the largest R1 that fits, beside the smallest other ranks; None where there is none.
        max_R2: the largest R2 that fits, beside the smallest other ranks; None likewise.
        max_nnz: the most non-zeros that fit at any ranks, however they spread over the cores; None
            where the method does not say.
        max_bytes: upper bound of the stored bytes: the budget, or less where the pattern leaves
            some of it unused even at full rank.
        workspace_bytes: peak memory of `Method.decompose` beside the unfolding.
        reuse_bytes: how much more it is where a group is prepared for several budgets.
        memory_bytes: about what is stored takes once it is loaded; None where that is the same.
        disk_bytes: about what it takes on disk, where the budget counts bytes in memory and it
            takes less; else None.
    """

    max_R1: int | None  # noqa: N815
    max_R2: int | None  # noqa: N815
    max_nnz: int | None
    max_bytes: int
    workspace_bytes: int
    reuse_bytes: int
    memory_bytes: int | None = None
    disk_bytes: int | None = None


@dataclass(frozen=True)
class SliceStats:
    """One slice of a decomposed group.

    Attributes:
        projection: ``"q" "k" "v" "o"``, ``"gate" "up" "down"``.
        head: index of the head, or of the expert.
        nnz: non-zeros of the slice's M_s (mixed, with a learned type mode); of a chain, the slice's
            share of the module's own matrices.
        density: nnz / elements of the core slice.
        core_bytes: the slice's share of its core's bytes, in proportion to nnz; with a learned
            type mode a fourth of its head's share.
        relative_error: ``||W_s - W_hat_s|| / ||W_s||``.
        squared_norm: ``||W_s||^2``.
        squared_energy: ``||M_s||^2``.
    """

    projection: str
    head: int
    nnz: int
    density: float
    core_bytes: float
    relative_error: float
    squared_norm: float
    squared_energy: float


@dataclass(frozen=True)
class Chosen:
    """Choice of the method auto for a group. Losses are expected ones, in nats per token.

    Attributes:
        candidate: method and bits of a value, such as ``"lestd-4"``; ``"watersic"`` has none.
        loss: of what is stored.
        runner_up: the next best of the candidates that were stored, those that might have had the
            least loss and at least one more; None where no other fits the bytes.
        runner_up_loss: what it would have cost.
    """

    candidate: str
    loss: float
    runner_up: str | None
    runner_up_loss: float | None


@dataclass(frozen=True)
class Decomposed:
    """A decomposition and what it cost. Sums over elements are accumulated in float64.

    Attributes:
        decomposition: as stored.
        squared_norm: ``||W||^2``.
        squared_error: ``||W - W_hat||^2``, the residual of the tensors as stored.
        relative_error: ``||W - W_hat|| / ||W||``.
        squared_energy_stage1: ``||G||^2`` after HOOI, for orthonormal float32 factors; None for
            methods without that stage, like the next three.
        squared_energy_stage2: sum of the squares of the stored core values.
        threshold: smallest stored |g|; 0 where nothing is stored.
        hooi_iterations: sweeps after the HOSVD.
        seconds: wall time of ``"stage1"``, ``"rank_search"``, ``"stage2"``, ``"error"``.
        slices: statistics of every slice, in unfolding order.
        curve: the error to expect at other byte budgets, where asked for.
        singular_values: of the mode-1 unfolding (d) and of the mode-2 unfolding (p), descending;
            empty where the method does not need them.
        metric_squared_norm: ``||S W||^2`` with the root S of the metric, ``G = S^T S``, summed over
            the modules; `squared_norm` where there is no metric. In the metric loss
            ``tr(A W B W^T)``.
        metric_squared_error: ``||S (W - W_hat)||^2``; likewise. In the metric loss
            ``tr(A D B D^T)`` with D = W - W_hat: twice the expected loss in nats per token.
        expected_squared_error: what it is to be by what is left out, before anything is rounded;
            None where the method does not know, or knows it in another metric only.
        chosen: of the method auto.
    """

    decomposition: Decomposition
    squared_norm: float
    squared_error: float
    relative_error: float
    squared_energy_stage1: float | None
    squared_energy_stage2: float | None
    threshold: float | None
    hooi_iterations: int | None
    seconds: dict[str, float]
    slices: tuple[SliceStats, ...]
    curve: tuple[CurvePoint, ...]
    singular_values: tuple[tuple[float, ...], tuple[float, ...]]
    metric_squared_norm: float
    metric_squared_error: float
    expected_squared_error: float | None
    chosen: Chosen | None = None


Metrics = Mapping[str, Tensor]
"""Of modules the metric of their input, float32: a Gram matrix ``(in, in)`` or its diagonal
``(in,)``. A module that is absent is measured as it is. Where calibration has recorded them there
are also ``<module>.mean_abs`` ``(in,)``, ``<module>.max_abs`` ``(in,)`` and
``<module>.out_max_abs`` ``(out,)``: the mean and the largest magnitude of each channel.

In the metric ``"loss"`` the metric of an input is A, the *mean* of ``x^T x`` over the tokens that
the module sees, and there is ``<module>.output``, B: the sum of ``g^T g`` over those tokens,
divided by the number of all; g is the gradient of a window's loss by an output ``y = x W`` of one
token, the loss the sum of the cross entropies with labels drawn from the model's own distribution.
``(out, out)``, or of its blocks on the diagonal ``(heads, p, p)`` in the order of the module's
slices, or the diagonal ``(out,)``; a module without has the identity. An error D of W is then
expected to cost ``1/2 tr(A D B D^T)`` nats per token: the divergence of the model's predictions
from the dense one's."""

STATISTICS = ("mean_abs", "max_abs", "out_max_abs")
"""What calibration records of an input beside its Gram matrix."""


@dataclass
class Group:
    """A slice group as it was read; methods derive what they prepare from it.

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
    metrics: Metrics = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def weight(self, module: ModuleLayout) -> Tensor:
        """W ``(in, out)`` of a module, float32; a view that is not to be written to."""
        block = self.unfolding[:, self.layout.columns(module)]
        return block if module.basis_side == "input" else block.T

    def metric(self, module: ModuleLayout) -> Metric:
        """The metric of a module."""
        return Metric(self.metrics.get(module.name), self.metrics.get(f"{module.name}.output"))

    def in_bits(self, args: MethodArgs) -> Self:
        """The same group for other bits of values and factors, which preparing does not ask for."""
        return replace(self, args=args)

    def without_feedback_of_outputs(self, module: ModuleLayout) -> Metric:
        """The metric with the diagonal of its output side: quick, where an estimate will do."""
        metric = self.metric(module)
        return (
            metric if metric.output is None else metric._replace(output=diagonal_of(metric.output))
        )


class Encode(Protocol):
    """See `Method.encode`."""

    def __call__(
        self,
        prepared: Any,
        byte_budget: int,
        curve_budgets: Sequence[int] = (),
        *,
        reuse: bool = False,
    ) -> Decomposed:
        """Decompose a prepared slice group."""


def require_plain(name: str, args: MethodArgs) -> None:
    """Refuse options that the shared-basis methods in the weights' own norm do not support.

    Raises:
        LestdError: another metric, few-bit values, or outliers.
    """
    require_default(name, args, "metric", "value_bits", "factor_bits", "keep_outliers", "coding")


def require_no_core(name: str, args: MethodArgs) -> None:
    """Refuse options that only sparse cores in a shared basis have.

    Raises:
        LestdError: a type mode, a kind of Stage II, a pattern or a limit of arithmetic is asked
            for.
    """
    require_default(name, args, "type_mode", "stage2", "pattern", "max_flops", "coding")


def require_default(name: str, args: MethodArgs, *options: str) -> None:
    """Refuse options that are not at their defaults, which are all that a method supports.

    Raises:
        LestdError: there is one.
    """
    plain = MethodArgs()
    for option in options:
        if (found := getattr(args, option)) != (known := getattr(plain, option)):
            takes = f"does not support {option}"
            if known is not None:
                takes = f"supports only {option} {known!r}"
            raise LestdError(f"method {name!r} {takes}, found {found!r}; change one of the two")


def require_budget(name: str, byte_budget: int, least: int, remedy: str = "raise keep") -> None:
    """Refuse a byte budget below the least that a method needs.

    Raises:
        LestdError: says both.
    """
    if byte_budget < least:
        raise LestdError(
            f"the byte budget of a slice group is {byte_budget:,} bytes, but method {name!r} needs "
            f"at least {least:,} bytes; {remedy}"
        )


def add_seconds(*parts: dict[str, float]) -> dict[str, float]:
    """Seconds per stage, summed over parts of the work."""
    names = {name: None for part in parts for name in part}
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


@dataclass(frozen=True)
class Method:
    """One way to decompose a slice group.

    Attributes:
        name: how configuration and manifest call it.
        prepare: what no byte budget decides, done once for all of them. What it returns has its
            cost as `seconds`. The unfolding is used up: it is scaled in place, since a copy would
            double the memory.
            Raises LestdError where the type mode does not go with the layout or the pattern.
        encode: ``(prepared, byte_budget, curve_budgets, reuse=...)``; the result takes at most
            `byte_budget` bytes, those that `MethodArgs.size` says (`matrix.counted_bytes`), and has
            the error to expect at each of the curve's budgets (feasible ones). What was prepared is
            used up unless it is to be reused, for another budget: neither order nor number of the
            budgets changes a bit of a result. Deterministic for a fixed device and number of
            threads. Raises LestdError as `bounds` does, and where a core value does not fit the
            value dtype.
        bounds: ``(layout, byte_budget, value_dtype, args)``; reads no weights. Raises LestdError
            where the smallest ranks exceed the budget or `max_flops`, where a learned type
            mode meets projections with different numbers of heads, or where the method, the type
            mode or the kind of Stage II does not go with the pattern.
        least_bytes: ``(layout, value_dtype, args)``; the smallest feasible byte budget. Raises
            LestdError as `bounds` does, but for the budget and `max_flops`.
        metrics: the metrics that it supports. The first is the one used without calibration; if
            it is ``"activation"`` or ``"loss"``, the method needs a calibration.
        jumps: ``(layout, value_dtype, args)``; the byte budgets from which on it stores what it
            does not below, of a method of fixed sizes: where a curve is worth a look.
        per_matrix: whether it stores every matrix on its own, and so takes groups of one.
        weight_options: options that mean something in the metric weight only.
        groups_inputs: whether it knows `MethodArgs.scale_groups`.
        foresee: ``(prepared, byte_budget, costs)``, with `foresight.costs_of` the group; in the
            metric loss about the squared error of what `encode` would store, or of a part of it, in
            a fraction of the time. None where only storing tells.
    """

    name: str
    prepare: Callable[[Group], Any]
    encode: Encode
    bounds: Callable[[GroupLayout, int, torch.dtype, MethodArgs], Bounds]
    least_bytes: Callable[[GroupLayout, torch.dtype, MethodArgs], int]
    metrics: tuple[str, ...] = (WEIGHT,)
    jumps: Callable[[GroupLayout, torch.dtype, MethodArgs], tuple[int, ...]] = (
        lambda layout, value_dtype, args: ()
    )
    per_matrix: bool = False
    weight_options: tuple[str, ...] = ()
    groups_inputs: bool = False
    foresee: Callable[[Any, int, Any], float] | None = None

    def decompose(
        self,
        unfolding: Tensor,
        layout: GroupLayout,
        byte_budget: int,
        value_dtype: torch.dtype,
        args: MethodArgs,
        curve_budgets: Sequence[int] = (),
        metrics: Metrics | None = None,
    ) -> Decomposed:
        """Decompose a slice group for one byte budget: `prepare`, then `encode`."""
        prepared = self.prepare(Group(unfolding, layout, value_dtype, args, metrics or {}))
        done = self.encode(prepared, byte_budget, curve_budgets)
        return replace(done, seconds=add_seconds(prepared.seconds, done.seconds))
