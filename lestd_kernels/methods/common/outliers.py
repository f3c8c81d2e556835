"""Outliers: a share of the weights, exact in a sparse side matrix, beside any method.

Shapes: W (in, out) of a module, y = x W.

Of every module the largest weights by magnitude are taken, ``ceil(share in out)`` of them. Where
calibration has recorded the largest inputs and outputs of a module, as it does for down
projections, the first one is the weight from the input of the largest spike to the output of the
largest spike. The method decomposes the rest, with zeros in their places, in what their bytes leave
of the budget. The side matrix then holds ``W - W_hat`` at those positions, in the value dtype, so
that the sum is W there up to one rounding, whatever the method makes of a zero.

Reference: Yu et al., "The super weight in large language models", arXiv 2411.07191, section 3.1,
for the activation rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lestd_kernels.errors import LestdError
from lestd_kernels.formats.chain import Chain, ModuleChain
from lestd_kernels.formats.ops import Multiply
from lestd_kernels.formats.shared_tucker import U1_NAME, U2_NAME, SharedTucker
from lestd_kernels.linalg.error_feedback import largest
from lestd_kernels.methods.common.base import (
    Bounds,
    Decomposed,
    Group,
    Method,
    MethodArgs,
    require_default,
)
from lestd_kernels.methods.common.per_module import StoredChains, chain_result
from lestd_kernels.methods.common.stopwatch import Stopwatch
from lestd_kernels.storage.codecs import CODECS
from lestd_kernels.storage.few_bits import FULL_BITS
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.tensorize import GroupLayout


def outlier_count(elements: int, share: float) -> int:
    """How many weights of a module are kept exactly."""
    return math.ceil(elements * share)


def find_outliers(
    W: Tensor, count: int, max_abs: Tensor | None = None, out_max_abs: Tensor | None = None
) -> Tensor:
    """Choose the weights of a module that are kept exactly.

    Args:
        W: ``(in, out)``.
        count: how many, at least one.
        max_abs: ``(in,)``, the largest magnitude of each input.
        out_max_abs: ``(out,)``, of each output; with both the activation rule names the first.

    Returns:
        Mask ``(in, out)``, bool, with `count` elements set.
    """
    scores = W.abs()
    if max_abs is not None and out_max_abs is not None:
        scores[max_abs.argmax(), out_max_abs.argmax()] = torch.inf
    return largest(scores, count)


def side_bytes(layout: GroupLayout, value_dtype: torch.dtype, share: float) -> int:
    """Stored bytes of the side matrices of a group."""
    total = 0
    for module in layout.modules:
        columns, rows = layout.weight_shape(module)
        count = outlier_count(rows * columns, share)
        total += min(
            codec.stored_bytes(rows, columns, count, value_dtype.itemsize)
            for codec in CODECS.values()
        )
    return total


def as_chain(stored: SharedTucker) -> Chain:
    """The same weights in the same bytes, in the kind that has room for side matrices."""
    shared = {
        name: EncodedCore.quantized(factor, FULL_BITS, factor.dtype, codec="dense")
        for name, factor in ((U1_NAME, stored.U1), (U2_NAME, stored.U2))
    }
    modules = {}
    for module in stored.layout.modules:
        heads = len(module.slices)
        if module.basis_side == "input":
            last = Multiply(U2_NAME, transposed=True, blocks=heads)
            ops = (Multiply(U1_NAME), Multiply(0), last)
        else:
            first = Multiply(U2_NAME, blocks=heads)
            ops = (first, Multiply(0, transposed=True), Multiply(U1_NAME, transposed=True))
        modules[module.name] = ModuleChain(ops, (stored.cores[module.name],))
    return Chain(stored.layout, shared, modules, stored.ranks, stored.U1.dtype)


@dataclass
class Protected:
    """A group whose outliers were taken out before the method saw it.

    Attributes:
        method: what the method prepared of the rest.
        group: the weights as they were.
        masks: where the outliers of each module are.
        seconds: what preparing took, by stage.
    """

    method: Any
    group: Group
    masks: Mapping[str, Tensor]
    seconds: dict[str, float]


def with_outliers(method: Method) -> Method:
    """The method, and what it does where `MethodArgs.keep_outliers` asks for more than none.

    The result refuses `MethodArgs.scale_groups` where the method does not know them.
    """

    def prepare(group: Group) -> Any:
        args, layout, metrics = group.args, group.layout, group.metrics
        if not args.keep_outliers:
            return method.prepare(group)
        kept = replace(group, unfolding=group.unfolding.clone())
        masks = {}
        for module in layout.modules:
            W = kept.weight(module)
            mask = find_outliers(
                W,
                outlier_count(W.numel(), args.keep_outliers),
                metrics.get(f"{module.name}.max_abs"),
                metrics.get(f"{module.name}.out_max_abs"),
            )
            masks[module.name] = mask
            in_unfolding = mask if module.basis_side == "input" else mask.T
            group.unfolding[:, layout.columns(module)].masked_fill_(in_unfolding, 0)
        rest = method.prepare(replace(group, args=_without(args)))
        return Protected(rest, kept, masks, rest.seconds)

    def encode(
        prepared: Any, byte_budget: int, curve_budgets: Sequence[int] = (), *, reuse: bool = False
    ) -> Decomposed:
        if not isinstance(prepared, Protected):
            return method.encode(prepared, byte_budget, curve_budgets, reuse=reuse)
        group = prepared.group
        bounds(group.layout, byte_budget, group.value_dtype, group.args)
        taken = side_bytes(group.layout, group.value_dtype, group.args.keep_outliers)
        rest = method.encode(
            prepared.method,
            byte_budget - taken,
            [budget - taken for budget in curve_budgets],
            reuse=reuse,
        )
        found = rest.decomposition
        chain = as_chain(found) if isinstance(found, SharedTucker) else found
        modules = {}
        for module in group.layout.modules:
            mask = prepared.masks[module.name]
            missing = group.weight(module) - chain.module_weight(module.name)
            side = EncodedCore.quantized(missing * mask, FULL_BITS, group.value_dtype, mask=mask)
            modules[module.name] = replace(chain.modules[module.name], side=side)
        curve = [replace(point, byte_budget=point.byte_budget + taken) for point in rest.curve]
        clock = Stopwatch(group.unfolding.device)
        clock.seconds.update(rest.seconds)
        chains = StoredChains(modules, chain.shared, chain.ranks, rest.expected_squared_error)
        done = chain_result(group, chains, clock)
        return replace(
            done,
            curve=tuple(curve),
            singular_values=rest.singular_values,
            chosen=rest.chosen and replace(rest.chosen, loss=done.metric_squared_error / 2),
        )

    def require_known(args: MethodArgs) -> None:
        if not method.groups_inputs:
            require_default(method.name, args, "scale_groups")

    def bounds(
        layout: GroupLayout, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
    ) -> Bounds:
        require_known(args)
        if not args.keep_outliers:
            return method.bounds(layout, byte_budget, value_dtype, args)
        least = least_bytes(layout, value_dtype, args)
        if byte_budget < least:
            raise LestdError(
                f"the byte budget of a slice group is {byte_budget:,} bytes, but method "
                f"{method.name!r} with {args.keep_outliers:g} of the weights kept exactly needs "
                f"{least:,} bytes; raise keep or lower keep_outliers"
            )
        taken = side_bytes(layout, value_dtype, args.keep_outliers)
        rest = method.bounds(layout, byte_budget - taken, value_dtype, _without(args))
        return replace(
            rest,
            max_bytes=rest.max_bytes + taken,
            # A copy of the unfolding, the masks, and one module's residual.
            workspace_bytes=rest.workspace_bytes + 9 * layout.elements + taken,
        )

    def least_bytes(layout: GroupLayout, value_dtype: torch.dtype, args: MethodArgs) -> int:
        require_known(args)
        if not args.keep_outliers:
            return method.least_bytes(layout, value_dtype, args)
        if args.type_mode != MethodArgs.type_mode:
            raise LestdError(
                f"keep_outliers needs type_mode {MethodArgs.type_mode!r}, found "
                f"{args.type_mode!r}; change one of the two"
            )
        rest = method.least_bytes(layout, value_dtype, _without(args))
        return rest + side_bytes(layout, value_dtype, args.keep_outliers)

    def jumps(layout: GroupLayout, value_dtype: torch.dtype, args: MethodArgs) -> tuple[int, ...]:
        taken = side_bytes(layout, value_dtype, args.keep_outliers) if args.keep_outliers else 0
        return tuple(one + taken for one in method.jumps(layout, value_dtype, _without(args)))

    return replace(
        method,
        prepare=prepare,
        encode=encode,
        bounds=bounds,
        least_bytes=least_bytes,
        jumps=jumps,
        foresee=None,
    )


def _without(args: MethodArgs) -> MethodArgs:
    return replace(args, keep_outliers=0.0)
