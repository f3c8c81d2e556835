"""WaterSIC: whole numbers on a common step in units of the loss, stored by their entropy.

Weights are rounded with feedback, as in lestd_kernels.methods.gptq, but on steps that cost the same
everywhere (lestd_kernels.linalg.common_step), and the whole numbers are coded
(lestd_kernels.storage.rans). One number, the step, then decides the bytes of a group: it is
searched until they fit, so that any budget is met. In the metric loss the step is the same in all
modules; in the others it is relative to each module's norm. Every row and column has a scale in 8
bits, from which the numbers are made, and which are then fitted to them where that lowers the
error.

See lestd_kernels.methods.common.coded_matrix for what errors may be fed back into.

Reference: "WaterSIC: information-theoretically (near) optimal linear layer quantization", arXiv
2603.04956, for one side; see lestd_kernels.linalg.common_step for the other.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lestd_kernels.formats.chain import ModuleChain
from lestd_kernels.formats.ops import Multiply
from lestd_kernels.linalg.metric import Metric, mean_diagonal
from lestd_kernels.linalg.stage1 import Ranks
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
from lestd_kernels.methods.common.coded_matrix import (
    MOST_BITS,
    MOST_RMS,
    SteppedMatrix,
    bits_of,
    damping_of,
    disk_bits,
    fitting,
    memory_bits,
    most_together,
    rounded,
)
from lestd_kernels.methods.common.coded_matrix import least_bytes as least_matrix_bytes
from lestd_kernels.methods.common.per_module import (
    StoredChains,
    chain_result,
    module_workspace_bytes,
)
from lestd_kernels.methods.common.stopwatch import Stopwatch
from lestd_kernels.options import DISK, MEMORY
from lestd_kernels.search.budget import CurvePoint
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.tensorize import GroupLayout, ModuleLayout

# Octaves between the steps at which a curve is looked at.
_CURVE_OCTAVES = 1.0
_MOST_POINTS = 40
# With so many times the bytes of zeros there is little to look at before them.
_NEARLY_ZEROS = 1.1
# Where the first step that is tried is sought, and how closely.
_MOST_OCTAVES, _STEP_OCTAVES = 20.0, 0.01
# Elements of a group that a curve looks at.
_LOOKED_AT = 1 << 20
_MORE_MEMORY = (
    "in memory zeros have a bit each; raise keep, or let it count bytes on disk (size: disk)"
)
# Of an element, while it is coded, and while it is rounded beside others; and of the counts of
# numbers that spread widely.
_CODING_BYTES, _TOGETHER_BYTES, _COUNTS_BYTES = 64, 24, 64 << 20


def _modules(
    prepared: Group,
    damping: float,
    metric_of: Callable[[ModuleLayout], Metric],
    factors: dict[int, Tensor] | None = None,
) -> list[SteppedMatrix]:
    """The modules of a group with their steps, of one unit for all.

    Args:
        prepared: the group.
        damping: see `damping_of`.
        metric_of: a module's metric.
        factors: see `SteppedMatrix.of`; of this damping.
    """
    layout = prepared.layout
    metrics = [metric_of(module) for module in layout.modules]
    # A module that no token reached counts as the others do on the average.
    unit_A = mean_diagonal([one.input for one in metrics if one.input is not None])
    unit_B = mean_diagonal([one.output for one in metrics if one.output is not None])
    factors = {} if factors is None else factors  # Modules that read the same have one metric.
    found = []
    for module, metric in zip(layout.modules, metrics, strict=True):
        W = prepared.weight(module)

        def relative(known: float, W: Tensor = W, metric: Metric = metric) -> float:
            squares = metric.squares(W) or known**2 * float(W.double().square().sum())
            return math.sqrt(squares / W.numel()) or 1.0

        found.append(
            SteppedMatrix.of(
                W,
                metric,
                damping,
                prepared.value_dtype,
                size=prepared.args.size,
                stand_ins=(unit_A, unit_B),
                unit=None if prepared.args.metric == LOSS else relative,
                factors=factors,
            )
        )
    return found


def _curve(
    prepared: Group, log_step: float, rms: float, budgets: Sequence[int]
) -> tuple[CurvePoint, ...]:
    """What errors to expect at budgets: between steps, their logarithms are straight.

    Of large modules some outputs stand for all.

    Args:
        prepared: the group.
        log_step: logarithm of the step of the first of them.
        rms: of the weights in units of the step 1.
        budgets: that one, and others.
    """
    points: list[tuple[int, float]] = []
    finest = math.log2(rms / MOST_RMS)
    # In memory what lies beside the others has bytes for each input, however few the outputs are.
    on_disk = prepared.args.size == DISK
    most_outputs = max(prepared.layout.elements // _LOOKED_AT, 1) if on_disk else 1
    known: tuple[float, dict[int, Tensor]] = 0.0, {}

    def look(at: float) -> int:
        nonlocal known
        damping = damping_of(bits_of(rms / 2**at))
        if known[0] != damping:
            known = damping, {}
        whole = _modules(prepared, damping, prepared.without_feedback_of_outputs, known[1])
        some = [one.some_outputs(most_outputs) for one in whole]
        size, error = 0.0, 0.0
        for one, part, found in zip(whole, some, rounded(some, 2.0**at), strict=True):
            share = one.W.numel() / part.W.numel()
            # Beyond what zeros take: else those of all outputs would never be reached.
            size += _zeros(one) + (found.size - _zeros(part)) * share
            error += found.error() * share
        points.append((int(size), error))
        return int(size)

    zeros = least_bytes(prepared.layout, prepared.value_dtype, prepared.args)
    lost = [
        prepared.without_feedback_of_outputs(module).squares(prepared.weight(module))
        for module in prepared.layout.modules
    ]
    points.append((zeros, sum(lost)))
    coarser = log_step
    enough = max(min(budgets), _NEARLY_ZEROS * zeros)
    while look(coarser) > enough and len(points) < _MOST_POINTS:
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


def _zeros(one: SteppedMatrix) -> int:
    """Bytes of a matrix of zeros of this shape."""
    return least_matrix_bytes(one.W.shape, one.value_dtype.itemsize, one.size)


def _first_step(modules: Sequence[SteppedMatrix], bits: float, rms: float) -> float:
    """Logarithm of the step on which normal weights would have so many bits on the average.

    Args:
        modules: of the group.
        bits: on the average.
        rms: the largest of the modules', in units of the step 1.
    """
    each = [(one.W.numel(), one.rms()) for one in modules]
    elements = sum(count for count, _ in each)
    low, high = math.log2(rms) - _MOST_OCTAVES, math.log2(rms / MOST_RMS) + MOST_BITS
    while high - low > _STEP_OCTAVES:
        middle = (low + high) / 2
        has = sum(count * bits_of(rms / 2**middle) for count, rms in each)
        low, high = (middle, high) if has > bits * elements else (low, middle)
    return high


def _finest(prepared: Group, byte_budget: int) -> tuple[float, float, list[EncodedCore], float]:
    """The finest step that fits.

    Returns:
        The logarithm of the step, the largest root mean square of a module in units of the step 1,
        what is stored, and the squared error to expect of it.
    """
    elements, size = prepared.layout.elements, prepared.args.size
    bits = disk_bits(8 * byte_budget / elements, size)
    modules = _modules(prepared, damping_of(bits), prepared.metric)
    rms = max(one.rms() for one in modules) or 1.0
    step, stored = fitting(
        lambda at: rounded(modules, 2.0**at),
        elements,
        byte_budget,
        math.log2(rms / MOST_RMS),
        _first_step(modules, bits, rms),
        size,
    )
    return step, rms, stored, sum(one.cost * one.W.numel() for one in modules) * 4.0**step


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
    with clock("stage2"):
        step, rms, stored, expected = _finest(prepared, byte_budget)
        foreseen: tuple[CurvePoint, ...] = ()
        if curve_budgets:
            foreseen = _curve(prepared, step, rms, [byte_budget, *curve_budgets])
    chains = {
        module.name: ModuleChain((Multiply(0),), (matrix,))
        for module, matrix in zip(prepared.layout.modules, stored, strict=True)
    }
    done = chain_result(prepared, StoredChains(chains, expected=expected), clock)
    # Curves know no feedback of outputs: what is stored here says how much that gains.
    gains = done.metric_squared_error / foreseen[0].squared_error if foreseen else 1.0
    curve = [replace(one, squared_error=one.squared_error * gains) for one in foreseen[1:]]
    return replace(done, curve=tuple(curve))


def bounds(
    layout: GroupLayout, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
) -> Bounds:
    """See `Method.bounds`."""
    require_coded_budget("watersic", byte_budget, least_bytes(layout, value_dtype, args), args)
    largest = max(math.prod(layout.weight_shape(module)) for module in layout.modules)
    # The numbers of two steps and the streams of one, and the factors of all metrics, which the
    # search holds at once; what coding one module takes.
    workspace = module_workspace_bytes(layout, args) + 8 * layout.elements
    squares = 0
    if args.metric in CALIBRATED:
        widths = [layout.weight_shape(module)[1] for module in layout.modules]
        squares = sum(width**2 for width in widths)
        # The factor of one module, however large, is copied beside its weights.
        workspace += 4 * max(widths) ** 2
        read = {m.reads: width for m, width in zip(layout.modules, widths, strict=True)}
        outputs = sum(layout.weight_shape(module)[0] for module in layout.modules)
        workspace += 4 * sum(width**2 for width in read.values()) + 4 * 256 * outputs
    together = max(largest, min(most_together(layout.elements), layout.elements + squares))
    workspace += _CODING_BYTES * largest + _TOGETHER_BYTES * together + _COUNTS_BYTES
    per_weight = 8 * byte_budget / layout.elements
    if args.size == MEMORY:
        disk = int(disk_bits(per_weight, MEMORY) * layout.elements / 8)
        return Bounds(None, None, None, byte_budget, workspace, 0, byte_budget, disk)
    memory = int(memory_bits(per_weight) * layout.elements / 8)
    return Bounds(None, None, None, byte_budget, workspace, 0, memory)


def least_bytes(layout: GroupLayout, value_dtype: torch.dtype, args: MethodArgs) -> int:
    """See `Method.least_bytes`: zeros everywhere."""
    require_no_core("watersic", args)
    require_default("watersic", args, "value_bits", "factor_bits")
    return sum(
        least_matrix_bytes(layout.weight_shape(module), value_dtype.itemsize, args.size)
        for module in layout.modules
    )


def require_coded_budget(name: str, byte_budget: int, least: int, args: MethodArgs) -> None:
    """`require_budget` with what else helps where bytes in memory are too few.

    Raises:
        LestdError: likewise.
    """
    require_budget(name, byte_budget, least, *([_MORE_MEMORY] if args.size == MEMORY else []))


METHOD = Method(
    "watersic",
    lambda group: group,
    encode,
    bounds,
    least_bytes,
    (NORM, WEIGHT, ACTIVATION, LOSS),
    per_matrix=True,
)
