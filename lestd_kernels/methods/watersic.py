"""WaterSIC: whole numbers on a common step in units of the loss, stored by their entropy.

Weights are rounded with feedback, as in lestd_kernels.methods.gptq, but on steps that cost the same
everywhere (lestd_kernels.linalg.common_step), and the whole numbers are coded
(lestd_kernels.storage.rans). One number, the step, then decides the bytes of a group: it is
searched until they fit, so that any budget is met. In the metric loss the step is the same in all
modules; in the others it is relative to each module's norm. Every row and column has a scale in 8
bits, from which the numbers are made, and which are then fitted to them where that lowers the
error.

What errors may be fed back into is damped: the metrics get ``4^-R`` on their diagonals, relative to
the mean, with R bits of a number. That is the distortion of R bits, below which, by reverse water
filling, no direction is worth a change. Measured, it is near the best of all dampings at 0.8, 1.6
and 3.2 bits; with much less, few bits lose in feedback along both sides, and the weights stray far
from where the metrics hold.

Reference: "WaterSIC: information-theoretically (near) optimal linear layer quantization", arXiv
2603.04956, for one side; see lestd_kernels.linalg.common_step for the other.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lestd_kernels.formats.chain import ModuleChain
from lestd_kernels.formats.ops import Multiply
from lestd_kernels.linalg.common_step import fit_scales, whole_numbers
from lestd_kernels.linalg.error_feedback import inverse_factor
from lestd_kernels.linalg.metric import Metric, diagonal_of, mean_diagonal, whole
from lestd_kernels.linalg.stage1 import Ranks
from lestd_kernels.linalg.two_sided_feedback import output_factor
from lestd_kernels.methods.common.base import (
    ACTIVATION,
    CALIBRATED,
    LOSS,
    NORM,
    WEIGHT,
    Bounds,
    Decomposed,
    Group,
    Method,
    MethodArgs,
    require_budget,
    require_default,
    require_no_core,
)
from lestd_kernels.methods.common.per_module import (
    StoredChains,
    chain_result,
    module_workspace_bytes,
)
from lestd_kernels.methods.common.stopwatch import Stopwatch
from lestd_kernels.search.budget import CurvePoint
from lestd_kernels.search.step import finest_within
from lestd_kernels.storage.few_bits import values_bytes
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.storage.rans import coded_bytes, least_coded_bytes
from lestd_kernels.tensorize import GroupLayout, ModuleLayout

_SCALE_BITS = 8
_LEAST_DAMPING = 0.01
# Root mean square of whole numbers of 8 bits of entropy: finer steps are not worth their bytes.
_MOST_RMS = 62.0
_MOST_BITS = 8
# Octaves between the steps at which a curve is looked at.
_CURVE_OCTAVES = 1.0
_MOST_POINTS = 40
# Of an element, while it is coded; and of the counts of numbers that spread widely.
_CODING_BYTES, _COUNTS_BYTES = 64, 64 << 20

_Fitting = tuple[float, list[EncodedCore]]


@dataclass
class _Module:
    """A module, and what of its steps no budget decides.

    Attributes:
        name: of the module.
        W: ``(in, out)``.
        metric: in which errors count.
        U: see `whole_numbers`.
        V: likewise.
        r: ``(in,)``, of the step 1.
        c: ``(out,)``, likewise.
        cost: squared error to expect of an element on the step 1, in the metric.
        value_dtype: of the scales.
    """

    name: str
    W: Tensor
    metric: Metric
    U: Tensor
    V: Tensor | None
    r: Tensor
    c: Tensor
    cost: float
    value_dtype: torch.dtype

    @property
    def scale_bytes(self) -> int:
        """Bytes of all scales."""
        return values_bytes(sum(self.W.shape), _SCALE_BITS, self.value_dtype.itemsize)

    def rms(self) -> float:
        """Root mean square of the weights in units of the step 1."""
        return float((self.W / (self.r[:, None] * self.c)).double().square().mean().sqrt())

    def rounded(self, step: float) -> _Rounded:
        """Round on a step."""
        scales = torch.cat((self.r, self.c)) * math.sqrt(step)
        stored = self._stored(scales)
        r, c = torch.split(stored, list(self.W.shape))
        Z = whole_numbers(self.W, self.U, r, c, self.value_dtype, self.V)
        size = coded_bytes(Z.to(torch.int64).cpu().numpy()) + self.scale_bytes
        return _Rounded(self, Z, stored, size)

    def _stored(self, scales: Tensor) -> Tensor:
        """Scales as they are once they have been stored; positive."""
        own = EncodedCore.quantized(scales[None], _SCALE_BITS, self.value_dtype, codec="dense")
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
class _Rounded:
    """A module on a step.

    Attributes:
        module: the module.
        Z: ``(in, out)``, whole numbers.
        scales: ``(in + out,)``, r and then c, as stored.
        size: about what it takes to store them, bytes.
    """

    module: _Module
    Z: Tensor
    scales: Tensor
    size: int

    def error(self) -> float:
        """Squared error in the metric."""
        return self.module.error(self.Z, self.scales)

    def stored(self) -> EncodedCore:
        """As it is stored, with fitted scales."""
        scales = self.module.fitted(self.Z, self.scales)
        return EncodedCore.coded(self.Z, scales, _SCALE_BITS, self.module.value_dtype)


def _steps(G: Tensor | None, width: int, damping: float, like: Tensor) -> tuple[Tensor, float]:
    """Steps of a side that know the diagonal of its metric, and its mean; 0 where it has none.

    Damped as in `inverse_factor`, relative to the mean.
    """
    mean = 0.0 if G is None else float(diagonal_of(G).double().mean())
    if G is None or not mean:
        return like.new_ones(width), 0.0
    return (diagonal_of(G) / mean + damping).rsqrt(), mean


def _modules(
    prepared: Group, bits: float, metric_of: Callable[[ModuleLayout], Metric]
) -> list[_Module]:
    """The modules of a group with their steps, of one unit for all.

    Args:
        prepared: the group.
        bits: of a number, about, which decide the damping.
        metric_of: a module's metric.
    """
    damping = max(4.0**-bits, _LEAST_DAMPING)
    layout = prepared.layout
    metrics = [metric_of(module) for module in layout.modules]
    # A module that no token reached counts as the others do on the average.
    unit_A = mean_diagonal([one.input for one in metrics if one.input is not None])
    unit_B = mean_diagonal([one.output for one in metrics if one.output is not None])
    factors: dict[int, Tensor] = {}  # Modules that read the same have one metric.
    found = []
    for module, metric in zip(layout.modules, metrics, strict=True):
        W = prepared.weight(module).contiguous()
        r, mean_A = _steps(metric.input, len(W), damping, W)
        c, mean_B = _steps(metric.output, W.shape[1], damping, W)
        U, V = r, None
        if metric.input is not None and metric.input.dim() > 1 and mean_A:
            if id(metric.input) not in factors:
                factors[id(metric.input)] = inverse_factor(whole(metric.input), damping)
            U = factors[id(metric.input)]
            r = U.diagonal()
        if mean_B:
            V = output_factor(metric.output, damping)
        if V is not None:
            c = V.diagonal(dim1=1, dim2=2).reshape(-1)[: W.shape[1]]
        known = math.sqrt((mean_A or unit_A) * (mean_B or unit_B))
        unit = 1.0
        if prepared.args.metric != LOSS:
            squares = metric.squares(W) or known**2 * float(W.double().square().sum())
            unit = math.sqrt(squares / W.numel()) or 1.0
        unit /= known
        # Both sides of about one size, which is within the range of every dtype.
        balance = float((c.log().double().mean() - r.log().double().mean()).exp())
        r, c = r * math.sqrt(unit * balance), c * math.sqrt(unit / balance)
        cost = (unit * known) ** 2 / 12
        found.append(_Module(module.name, W, metric, U, V, r, c, cost, prepared.value_dtype))
    return found


def _fitting(modules: Sequence[_Module], byte_budget: int, finest: float, start: float) -> _Fitting:
    """The logarithm of the finest step that fits, and what is then stored of each module."""
    elements = sum(one.W.numel() for one in modules)
    left = byte_budget

    def at(log_step: float) -> tuple[int, list[_Rounded]]:
        found = [one.rounded(2.0**log_step) for one in modules]
        return sum(one.size for one in found), found

    while True:
        start, found = finest_within(at, left, elements, math.log2(finest), start)
        stored = [one.stored() for one in found]
        excess = sum(one.stored_bytes for one in stored) - byte_budget
        if excess <= 0:
            return start, stored
        left -= excess


def _curve(
    prepared: Group, log_step: float, rms: float, budgets: Sequence[int]
) -> tuple[CurvePoint, ...]:
    """What errors to expect at other budgets: between steps, their logarithms are straight.

    Args:
        prepared: the group.
        log_step: logarithm of a step to begin with.
        rms: of the weights in units of the step 1.
        budgets: the others.
    """
    if not budgets:
        return ()
    points: list[tuple[int, float]] = []
    finest = math.log2(rms / _MOST_RMS)

    def look(at: float) -> int:
        # The entropy of normal numbers, rounded; never below that of few bits.
        bits = math.log2(1 + 2 * math.pi * math.e * (rms / 2**at) ** 2) / 2
        modules = _modules(prepared, bits, prepared.without_feedback_of_outputs)
        found = [one.rounded(2.0**at) for one in modules]
        size = sum(one.size for one in found)
        points.append((size, sum(one.error() for one in found)))
        return size

    coarser = log_step
    while look(coarser) > min(budgets) and len(points) < _MOST_POINTS:
        coarser += _CURVE_OCTAVES
    finer = log_step
    while max(points)[0] < max(budgets) and finer > finest:
        finer = max(finer - _CURVE_OCTAVES, finest)
        look(finer)
    points.sort()
    sizes = [size for size, _ in points]
    logs = [math.log(max(error, 1e-300)) for _, error in points]
    found = []
    for budget in budgets:
        after = bisect_left(sizes, budget)
        if after in (0, len(sizes)):
            log = logs[min(after, len(sizes) - 1)]
        else:
            share = (budget - sizes[after - 1]) / (sizes[after] - sizes[after - 1])
            log = logs[after - 1] + share * (logs[after] - logs[after - 1])
        found.append(CurvePoint(budget, Ranks(0, 0, 0), math.exp(log)))
    return tuple(found)


def encode(
    prepared: Group,
    byte_budget: int,
    curve_budgets: Sequence[int] = (),
    *,
    reuse: bool = False,
) -> Decomposed:
    """Find the step that fits; see `Method.encode`."""
    bounds(prepared.layout, byte_budget, prepared.value_dtype, prepared.args)
    clock = Stopwatch(prepared.unfolding.device)
    elements = prepared.layout.elements
    with clock("stage2"):
        bits = 8 * byte_budget / elements
        modules = _modules(prepared, bits, prepared.metric)
        rms = max(one.rms() for one in modules) or 1.0
        start = math.log2(rms / _MOST_RMS) + _MOST_BITS - bits
        step, stored = _fitting(modules, byte_budget, rms / _MOST_RMS, start)
        curve = _curve(prepared, step, rms, curve_budgets)
    chains = {
        one.name: ModuleChain((Multiply(0),), (matrix,))
        for one, matrix in zip(modules, stored, strict=True)
    }
    expected = sum(one.cost * one.W.numel() for one in modules) * 4.0**step
    done = chain_result(prepared, StoredChains(chains, expected=expected), clock)
    return replace(done, curve=curve)


def bounds(
    layout: GroupLayout, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
) -> Bounds:
    """See `Method.bounds`."""
    require_budget("watersic", byte_budget, least_bytes(layout, value_dtype, args))
    largest = max(math.prod(layout.weight_shape(module)) for module in layout.modules)
    # Copies of the weights and their numbers, and the factors of all metrics, which the search
    # holds at once; what coding one module takes.
    workspace = module_workspace_bytes(layout, args) + 16 * layout.elements
    if args.metric in CALIBRATED:
        read = {module.reads: layout.weight_shape(module)[1] for module in layout.modules}
        outputs = sum(layout.weight_shape(module)[0] for module in layout.modules)
        workspace += 4 * sum(width**2 for width in read.values()) + 8 * 256 * outputs
    workspace += _CODING_BYTES * largest + _COUNTS_BYTES
    # As measured: numbers of fewer bits have a mask besides, and those of more some beside them.
    bits = min(8 * byte_budget / layout.elements, _MOST_BITS)
    memory = int((1.5 * bits + 0.4) * layout.elements / 8)
    return Bounds(None, None, None, byte_budget, workspace, 0, memory)


def least_bytes(layout: GroupLayout, value_dtype: torch.dtype, args: MethodArgs) -> int:
    """See `Method.least_bytes`: zeros everywhere."""
    require_no_core("watersic", args)
    require_default("watersic", args, "value_bits", "factor_bits")
    total = 0
    for module in layout.modules:
        shape = layout.weight_shape(module)
        total += least_coded_bytes(math.prod(shape))
        total += values_bytes(sum(shape), _SCALE_BITS, value_dtype.itemsize)
    return total


METHOD = Method(
    "watersic",
    lambda group: group,
    encode,
    bounds,
    least_bytes,
    (NORM, WEIGHT, ACTIVATION, LOSS),
    per_matrix=True,
)
