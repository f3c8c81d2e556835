"""The steps that the methods of low-rank pairs have in common: from weights to pairs of a budget.

Shapes: W (in, out) of a module, y = x W; see lestd_kernels.linalg.low_rank.

The bytes of a group are shared between its modules by one common slope of error against bytes. In
the metric loss errors are what they cost, in nats. In the others they are relative, those of each
module to its own norm in the metric: q and k, whose norms are large, do not matter more than v and
o. On trained models that is ahead of equal shares and far ahead of absolute errors. There an
expert's errors count as often as tokens came to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from lestd_kernels.formats.chain import ModuleChain
from lestd_kernels.formats.ops import Multiply
from lestd_kernels.linalg.low_rank import (
    Bits,
    Spectrum,
    common_slope,
    fit_pair,
    matrix_bytes,
    pair_bytes,
    spectrum,
)
from lestd_kernels.linalg.metric import Root, Roots
from lestd_kernels.methods.common.base import (
    LOSS,
    Decomposed,
    Group,
    Method,
    MethodArgs,
    Metrics,
)
from lestd_kernels.methods.common.per_module import (
    StoredChains,
    chain_method,
    chain_result,
)
from lestd_kernels.methods.common.stopwatch import Stopwatch
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.tensorize import GroupLayout, ModuleLayout

# Squared error of rounding, relative to what is rounded, times the square of the number of steps.
# That of normal values in groups of 64 is 2; feedback and refitting were seen to leave a third of
# it down to this.
_NOISE = 0.15
# An expert that no token came to counts as if it had this share of the mean.
_LEAST_TRAFFIC = 0.01


@dataclass
class PreparedPairs(Group):
    """A group with the spectrum of every module.

    Attributes:
        roots: of the modules' metrics; modules with the same input share that of the input.
        spectra: of the modules.
    """

    roots: dict[str, Roots] = field(default_factory=dict)
    spectra: dict[str, Spectrum] = field(default_factory=dict)


MetricOf = Callable[[Metrics, str, MethodArgs], Tensor | None]
"""The metric that a method decomposes a module in."""


def own_metric(metrics: Metrics, module: str, args: MethodArgs) -> Tensor | None:
    """The module's metric as it is."""
    return metrics.get(module)


def traffic(prepared: Group) -> dict[str, float]:
    """How much each module's relative error counts: the energy that its block has read.

    Modules of one expert, and of one block without experts, count the same; by the trace of the
    Gram matrix of what the block reads, which grows with the tokens that came. The mean is 1.
    """
    read: dict[int, float] = {}
    for module in prepared.layout.modules:
        metric, (_, head) = prepared.metrics.get(module.name), module.slices[0]
        if module.basis_side == "input" and metric is not None:
            diagonal = metric.diagonal() if metric.dim() == 2 else metric
            read.setdefault(head, float(diagonal.sum()))
    counts = [read.get(module.slices[0][1], 0.0) for module in prepared.layout.modules]
    mean = sum(counts) / len(counts)
    return {
        module.name: (count / mean if mean else 1.0) + _LEAST_TRAFFIC
        for module, count in zip(prepared.layout.modules, counts, strict=True)
    }


def bits_of(args: MethodArgs) -> Bits:
    """Bits of the two matrices of a pair."""
    return Bits(args.factor_bits, args.value_bits)


def module_bytes(
    layout: GroupLayout, module: ModuleLayout, rank: int, *, value_bytes: int, args: MethodArgs
) -> int:
    """Stored bytes of a module's pair."""
    columns, rows = layout.weight_shape(module)
    return pair_bytes(rows, columns, rank, value_bytes, bits_of(args))


def dense_module_bytes(
    layout: GroupLayout, module: ModuleLayout, value_bytes: int, args: MethodArgs
) -> int:
    """Stored bytes of a module that is left whole."""
    columns, rows = layout.weight_shape(module)
    return matrix_bytes(rows, columns, value_bytes, args.value_bits)


Choice = Mapping[str, int | None]
"""Rank of every module; None leaves it whole."""

Choose = Callable[[PreparedPairs, int], Choice]
"""``(prepared, byte_budget)``: what to store within the budget."""


def choose_ranks(prepared: PreparedPairs, byte_budget: int) -> Choice:
    """The ranks of least summed error, see `common_slope`: expected loss, or relative error."""
    layout = prepared.layout
    modules, value_bytes = layout.modules, prepared.value_dtype.itemsize
    sizes = [
        partial(module_bytes, layout, module, value_bytes=value_bytes, args=prepared.args)
        for module in modules
    ]
    energies = [prepared.spectra[module.name].energies for module in modules]
    if prepared.args.metric != LOSS:
        counts = traffic(prepared)
        energies = [
            one * counts[module.name] for one, module in zip(energies, modules, strict=True)
        ]
    ranks = common_slope([one.tolist() for one in energies], sizes, byte_budget)
    return {module.name: rank for module, rank in zip(modules, ranks, strict=True)}


def _encode_choice(prepared: PreparedPairs, choice: Choice) -> dict[str, ModuleChain]:
    chains = {}
    dtype, bits = prepared.value_dtype, bits_of(prepared.args)
    for module in prepared.layout.modules:
        name, W = module.name, prepared.weight(module)
        rank = choice[name]
        if rank is None:
            whole = EncodedCore.quantized(W, bits.value, dtype)
            chains[name] = ModuleChain((Multiply(0),), (whole,))
            continue
        metric = prepared.metric(module) if prepared.args.metric == LOSS else None
        roots, found = prepared.roots[name], prepared.spectra[name]
        pair = fit_pair(W, roots, found, rank, dtype, bits, metric)
        ops = (Multiply(0, transposed=True), Multiply(1))
        chains[name] = ModuleChain(ops, (pair.left, pair.right))
    return chains


def _left_out(prepared: PreparedPairs, choice: Choice) -> float:
    """Squared error of the choice in the metric, before anything is rounded."""
    total = 0.0
    for module in prepared.layout.modules:
        rank, energies = choice[module.name], prepared.spectra[module.name].energies
        if rank is not None and rank < len(energies):
            lost = float(energies[rank:].sum())
            if prepared.args.metric != LOSS:
                lost *= prepared.metric(module).squares(prepared.weight(module))
            total += lost
    return total


def pair_method(
    name: str,
    metrics: tuple[str, ...],
    metric_of: MetricOf = own_metric,
    choose: Choose = choose_ranks,
) -> Method:
    """A method whose modules are low-rank pairs, or whole.

    Args:
        name: of the method.
        metrics: see `Method`.
        metric_of: the metric that a module is decomposed in.
        choose: ranks for a byte budget.
    """

    def prepare(group: Group) -> PreparedPairs:
        prepared, inputs = PreparedPairs(**vars(group)), dict[str, Root]()
        for module in group.layout.modules:
            if module.reads not in inputs:
                gram = metric_of(group.metrics, module.name, group.args)
                inputs[module.reads] = Root.of_gram(gram)
            metric = group.metric(module)
            mine = Roots(inputs[module.reads], Root.of_gram(metric.output))
            prepared.roots[module.name] = mine
            known = metric if group.args.metric == LOSS else None
            prepared.spectra[module.name] = spectrum(group.weight(module), mine, known)
        return prepared

    def store(prepared: PreparedPairs, byte_budget: int, clock: Stopwatch) -> StoredChains:
        with clock("rank_search"):
            choice = choose(prepared, byte_budget)
        with clock("stage2"):
            chains = _encode_choice(prepared, choice)
        expected = _left_out(prepared, choice) if metric_of is own_metric else None
        return StoredChains(chains, {}, _named_ranks(choice), expected)

    def errors(
        prepared: PreparedPairs, done: Decomposed, byte_budget: int, budgets: Sequence[int]
    ) -> list[float]:
        choices = [choose(prepared, budget) for budget in budgets]
        known = done.expected_squared_error
        if known is None:
            # Truncated in one metric and measured in another: only the pairs themselves tell.
            return [_stored_error(prepared, choice) for choice in choices]
        # Few-bit values lose about the same at every rank.
        rounding = max(done.metric_squared_error - known, 0.0)
        more = rounding if prepared.args.metric == LOSS else 0.0
        return [_left_out(prepared, choice) + more for choice in choices]

    def workspace(layout: GroupLayout, args: MethodArgs) -> int:
        """The vectors of every module, and the roots of their inputs' metrics."""
        shapes = [layout.weight_shape(module) for module in layout.modules]
        inputs = {
            module.reads: shape[1] for module, shape in zip(layout.modules, shapes, strict=True)
        }
        kept = sum(4 * min(shape) ** 2 for shape in shapes) + sum(4 * n**2 for n in inputs.values())
        return kept + (sum(4 * out**2 for out, _ in shapes) if args.metric == LOSS else 0)

    def least(layout: GroupLayout, value_bytes: int, args: MethodArgs) -> int:
        return sum(
            module_bytes(layout, module, 1, value_bytes=value_bytes, args=args)
            for module in layout.modules
        )

    method = chain_method(
        name,
        prepare,
        store,
        errors,
        least,
        workspace,
        most=_most_bytes,
        metrics=metrics,
        per_matrix=True,
    )
    if metric_of is not own_metric:
        return method

    def foresee(prepared: PreparedPairs, byte_budget: int, costs: object) -> float:
        choice = choose(prepared, byte_budget)
        return _left_out(prepared, choice) + _rounding(prepared, choice)

    return replace(method, foresee=foresee)


def _rounding(prepared: PreparedPairs, choice: Choice) -> float:
    """About the least that rounding both matrices of a pair adds."""
    noise = sum(_NOISE / (2**bits - 1) ** 2 for bits in bits_of(prepared.args))
    total = 0.0
    for module in prepared.layout.modules:
        kept = float(prepared.spectra[module.name].energies[: choice[module.name]].sum())
        if prepared.args.metric != LOSS:
            kept *= prepared.metric(module).squares(prepared.weight(module))
        total += noise * kept
    return total


def _stored_error(prepared: PreparedPairs, choice: Choice) -> float:
    chains = StoredChains(_encode_choice(prepared, choice))
    return chain_result(prepared, chains, Stopwatch(prepared.unfolding.device)).metric_squared_error


def _most_bytes(layout: GroupLayout, value_bytes: int, args: MethodArgs) -> int:
    """Bytes at full rank, or of the whole matrix where that takes more."""
    total = 0
    for module in layout.modules:
        full = min(layout.weight_shape(module))
        pair = module_bytes(layout, module, full, value_bytes=value_bytes, args=args)
        total += max(pair, dense_module_bytes(layout, module, value_bytes, args))
    return total


def _named_ranks(choice: Choice) -> dict[str, int]:
    """The smallest and the largest rank of a group's pairs."""
    ranks = [rank for rank in choice.values() if rank is not None]
    return {"least": min(ranks), "most": max(ranks)} if ranks else {}
