"""TD-MoE: the experts of a layer as one tensor per projection, with factors that they share.

    W_e ~ U_in M_e U_out^T,   U_in (in, R1), U_out (out, R2), M_e (R1, R2)

Mode ``preserve`` stores a core M_e per expert. Mode ``compress`` truncates the expert mode, too:
``M_e = sum_r P[e, r] K_r``, with the reduced cores K_r shared and one row of P per expert. The
ranks are those of least error in the byte budget, found on the rotated tensor.

Whitening, in the metric ``activation`` only: ``input`` decomposes ``S_in^T W_e`` with the root of
the experts' summed Gram matrix, ``output`` decomposes ``W_e S_out`` with the root of the covariance
of the outputs, which the Gram matrices of the inputs say exactly: ``sum_e W_e^T G_e W_e``; ``both``
does both. An expert counts as often as tokens came to it, which the Gram matrices say as well.

Reference: Xu et al., "TD-MoE: Tensor Decomposition for MoE Models", ICLR 2026: joint decomposition
of the stacked experts, multi-linear whitening, allocation of three ranks. There the parameter count
chooses the ranks, here the error does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lestd_kernels.errors import LestdError
from lestd_kernels.formats.chain import ModuleChain
from lestd_kernels.formats.ops import Mix, Multiply, Op
from lestd_kernels.linalg.low_rank import matrix_bytes
from lestd_kernels.linalg.metric import Root
from lestd_kernels.methods.common.base import ACTIVATION, WEIGHT, Decomposed, Group, MethodArgs
from lestd_kernels.methods.common.low_rank_pairs import traffic
from lestd_kernels.methods.common.per_module import StoredChains, chain_method
from lestd_kernels.methods.common.stopwatch import Stopwatch
from lestd_kernels.search.tucker_stack import (
    RankGrid,
    StackFactors,
    StackRanks,
    best_ranks,
    fit_core,
    full_bases,
    kept_energy,
    leading_energies,
    refine,
    search_grid,
)
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.tensorize import GroupLayout, ModuleLayout

# A sweep over the experts of a large layer takes minutes; what further ones gain is not seen.
_TOLERANCE = 1e-4


@dataclass
class _Projection:
    """The experts' matrices of one projection, as they are decomposed.

    Attributes:
        modules: one per expert.
        stack: ``w_e S_in^T W_e S_out``, ``(experts, in, out)``.
        weights: w_e, ``(experts,)``.
        root_in: S_in.
        root_out: S_out.
        bases: of the stack.
        grid: of the ranks that are looked at.
        energies: see `leading_energies`.
    """

    modules: list[ModuleLayout]
    stack: Tensor
    weights: Tensor
    root_in: Root
    root_out: Root
    bases: StackFactors
    grid: RankGrid
    energies: Tensor


@dataclass(kw_only=True)
class PreparedExperts(Group):
    """A group with the stack and the bases of every projection."""

    projections: dict[str, _Projection]


def _by_projection(layout: GroupLayout) -> dict[str, list[ModuleLayout]]:
    """Modules of each projection, one per expert.

    Raises:
        LestdError: the group is not one of experts.
    """
    found: dict[str, list[ModuleLayout]] = {}
    for module in layout.modules:
        found.setdefault(module.slices[0][0], []).append(module)
    experts = {len(modules) for modules in found.values()}
    if any(len(module.slices) > 1 for module in layout.modules) or min(experts) < 2:
        raise LestdError(
            "method 'td_moe' decomposes the experts of a layer together, but this group has the "
            f"modules {', '.join(m.name for m in layout.modules)}; use scope experts "
            "of a model that has experts, or another method"
        )
    return found


def prepare(group: Group) -> PreparedExperts:
    """Stack and whiten the experts, and find their HOSVD bases; see `Method.prepare`."""
    projections = {
        name: _prepare_projection(group, modules)
        for name, modules in _by_projection(group.layout).items()
    }
    return PreparedExperts(**vars(group), projections=projections)


def _prepare_projection(group: Group, modules: list[ModuleLayout]) -> _Projection:
    metrics, args = group.metrics, group.args
    whitening = args.whitening if args.metric == ACTIVATION else "none"
    grams = [metrics.get(module.name) for module in modules]
    matrices = [group.weight(module) for module in modules]
    root_in = Root.of_gram(_sum(grams) if whitening in ("input", "both") else None)
    root_out = Root.of_gram(
        _output_gram(matrices, grams) if whitening in ("output", "both") else None
    )
    counts = traffic(group)
    weights = torch.tensor([math.sqrt(counts[module.name]) for module in modules])
    if whitening == "none":
        weights = torch.ones(len(modules))
    weights = weights.to(matrices[0].device)
    stack = torch.stack(
        [
            root_out.apply(root_in.apply(W).T).T * weight
            for W, weight in zip(matrices, weights, strict=True)
        ]
    )
    compress = args.td_moe_mode == "compress"
    grid, bases = search_grid(stack.shape, compress), full_bases(stack, compress)
    energies = leading_energies(stack, bases, grid)
    return _Projection(modules, stack, weights, root_in, root_out, bases, grid, energies)


def _sum(grams: Sequence[Tensor | None]) -> Tensor | None:
    total = None
    for gram in grams:
        if gram is not None:
            total = gram.clone() if total is None else total.add_(gram)
    return total


def _output_gram(matrices: Sequence[Tensor], grams: Sequence[Tensor | None]) -> Tensor | None:
    """``Y^T Y`` of the outputs ``Y = X W``, summed over the experts."""
    return _sum(
        [
            None if gram is None else W.T @ (gram @ W)
            for W, gram in zip(matrices, grams, strict=True)
        ]
    )


def _projection_bytes(
    shape: Sequence[int], ranks: StackRanks, value_bytes: int, args: MethodArgs
) -> int:
    """Stored bytes of the experts' matrices ``(experts, in, out)`` of one projection."""
    experts, rows, columns = shape
    Rn, R1, R2 = ranks
    total = matrix_bytes(R1, rows, value_bytes, args.factor_bits)
    total += matrix_bytes(R2, columns, value_bytes, args.factor_bits)
    if args.td_moe_mode == "preserve":
        return total + experts * matrix_bytes(R1, R2, value_bytes, args.value_bits)
    total += matrix_bytes(Rn, R1 * R2, value_bytes, args.value_bits)
    return total + experts * matrix_bytes(1, Rn, value_bytes, args.factor_bits)


def _choose(prepared: PreparedExperts, byte_budget: int) -> dict[str, StackRanks]:
    """Ranks of every projection; what one leaves of its share is the next one's."""
    value_bytes, args = prepared.value_dtype.itemsize, prepared.args
    left, elements, chosen = byte_budget, prepared.layout.elements, {}
    for name, one in prepared.projections.items():
        size = partial(_projection_bytes, one.stack.shape, value_bytes=value_bytes, args=args)
        ranks = best_ranks(one.energies, one.grid, size, left * one.stack.numel() // elements)
        assert ranks is not None  # bounds has said so
        chosen[name] = ranks
        left -= size(ranks)
        elements -= one.stack.numel()
    return chosen


def store(prepared: PreparedExperts, byte_budget: int, clock: Stopwatch) -> StoredChains:
    """Decompose the experts of a layer."""
    with clock("rank_search"):
        chosen = _choose(prepared, byte_budget)
    shared: dict[str, EncodedCore] = {}
    modules: dict[str, ModuleChain] = {}
    named: dict[str, int] = {}
    args = prepared.args
    for name, ranks in chosen.items():
        one = prepared.projections[name]
        with clock("stage1"):
            tol = max(args.hooi_tol, _TOLERANCE)
            factors = refine(one.stack, one.bases, ranks, tol, args.hooi_max_iter)
        with clock("stage2"):
            modules |= _store(prepared, name, factors, ranks, shared)
        named |= {f"{name}_R1": ranks.Ra, f"{name}_R2": ranks.Rb}
        if factors.P is not None:
            named[f"{name}_experts"] = ranks.Rn
    ordered = {module.name: modules[module.name] for module in prepared.layout.modules}
    # Whitened, the experts are decomposed in another metric than they are measured in.
    expected = _expected_error(prepared, chosen) if args.metric == WEIGHT else None
    return StoredChains(ordered, shared, named, expected)


def errors(
    prepared: PreparedExperts, done: Decomposed, byte_budget: int, budgets: Sequence[int]
) -> list[float]:
    """The error to expect at other byte budgets."""
    return [_expected_error(prepared, _choose(prepared, budget)) for budget in budgets]


def _expected_error(prepared: PreparedExperts, chosen: Mapping[str, StackRanks]) -> float:
    """Squared error of the ranks in the metric, as if the weights were whitened exactly."""
    total = 0.0
    for name, ranks in chosen.items():
        one = prepared.projections[name]
        norm = sum(prepared.metric(m).squares(prepared.weight(m)) for m in one.modules)
        whole = float(one.energies[-1, -1, -1])
        missing = whole - kept_energy(one.energies, one.grid, ranks)
        total += norm * missing / max(whole, 1e-300)
    return total


def _store(
    prepared: PreparedExperts,
    name: str,
    factors: StackFactors,
    ranks: StackRanks,
    shared: dict[str, EncodedCore],
) -> dict[str, ModuleChain]:
    """The chains of a projection; what they share is added to `shared`.

    The cores are fitted to the factors as they are stored.
    """
    one, args, dtype = prepared.projections[name], prepared.args, prepared.value_dtype
    left, right, core = (f"lestd_{name}_{part}" for part in ("in", "out", "core"))
    sides = ((left, one.root_in, factors.U), (right, one.root_out, factors.V))
    white = []
    for key, root, factor in sides:
        # Transposed, so that every column is in groups of its own.
        shared[key] = EncodedCore.quantized(
            root.solve(factor).T.contiguous(), args.factor_bits, dtype
        )
        white.append(root.apply(shared[key].decode().float().T))
    if factors.P is None:
        cores = fit_core(one.stack, StackFactors(white[0], white[1], None))
        own = [
            EncodedCore.quantized(M / weight, args.value_bits, dtype)
            for M, weight in zip(cores, one.weights, strict=True)
        ]
        ops: tuple[Op, ...] = (Multiply(left, transposed=True), Multiply(0), Multiply(right))
    else:
        rows = torch.split(factors.P / one.weights[:, None], 1)
        own = [EncodedCore.quantized(row, args.factor_bits, dtype) for row in rows]
        P = torch.cat([row.decode().float() for row in own]) * one.weights[:, None]
        K = fit_core(one.stack, StackFactors(white[0], white[1], P))
        shared[core] = EncodedCore.quantized(K.flatten(1), args.value_bits, dtype)
        ops = (Multiply(left, transposed=True), Mix(0, core, ranks.Ra), Multiply(right))
    return {
        module.name: ModuleChain(ops, (matrix,))
        for module, matrix in zip(one.modules, own, strict=True)
    }


def workspace(layout: GroupLayout, args: MethodArgs) -> int:
    """The stacks; copies of one, in turn projected and unfolded; eigenvectors, Gram matrices."""
    largest = layout.elements // len(_by_projection(layout))
    squares = max(layout.width, layout.head_dim) ** 2
    return 4 * layout.elements + 32 * largest + 64 * squares


def least(layout: GroupLayout, value_bytes: int, args: MethodArgs) -> int:
    """Bytes at rank one everywhere."""
    total, fewest = len(layout.slices), 0
    for modules in _by_projection(layout).values():
        columns, rows = layout.weight_shape(modules[0])
        shape = (len(modules), rows, columns)
        needed = _projection_bytes(shape, StackRanks(1, 1, 1), value_bytes, args)
        # The budget of which the projection's share is enough.
        fewest = max(fewest, -(-(needed + 1) * total // len(modules)))
    return fewest


METHOD = chain_method(
    "td_moe", prepare, store, errors, least, workspace, metrics=(WEIGHT, ACTIVATION)
)
