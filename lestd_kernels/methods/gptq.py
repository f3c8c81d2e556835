"""GPTQ: rounding to few bits with error feedback; of fixed sizes, as lestd_kernels.methods.rtn.

Inputs are rounded in the order of falling activation where that costs nothing: where groups of 64
do not reach from one input to the next, so that every input brings its own scales with it, or where
the scales are those of the weights as they are, which groups along the inputs have ("static
groups" of the authors' program). In the metric loss errors are fed back along the outputs as well,
and every module has bits of its own: those of which the least error is foreseen in the bytes of its
group. With groups along the inputs all have the same, since servers fuse modules.

Reference: Frantar et al., "GPTQ: Accurate post-training quantization for generative pre-trained
transformers", ICLR 2023; the order is the option "act-order" of the authors' program.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lestd_kernels.formats.chain import ModuleChain
from lestd_kernels.linalg.error_feedback import inverse_factor
from lestd_kernels.linalg.metric import Metric, diagonal_of
from lestd_kernels.linalg.two_sided_feedback import round_both_ways, round_to_scales
from lestd_kernels.methods.common.base import ACTIVATION, LOSS, Group, MethodArgs
from lestd_kernels.methods.common.foresight import Costs, costs_of, foreseen_rounding
from lestd_kernels.methods.common.per_module import evenly, module_method
from lestd_kernels.methods.common.quantizing import (
    INPUTS,
    best_shares,
    fitting_bits,
    least_module_bytes,
    of_least_error,
    rounded_module,
    with_jumps,
)
from lestd_kernels.storage.few_bits import (
    FULL_BITS,
    GROUP,
    QUANTIZED_BITS,
    group_scales,
    values_bytes,
)
from lestd_kernels.tensorize import GroupLayout

# More sizes than these of a group are not looked at one by one: they lie close together.
_MOST_SIZES = 128
# What a module that no token reaches counts, of what the others do: little, but a large budget is
# not to leave it in two bits.
_UNREACHED = 0.01


def encode_module(
    W: Tensor, metric: Metric, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
) -> tuple[ModuleChain, float]:
    """Round one module ``(in, out)`` in its metric."""
    gram = metric.input
    assert gram is not None, "in a calibrated metric every module has a Gram matrix"
    bits = fitting_bits(W.numel(), byte_budget, value_dtype.itemsize, args)
    order = torch.arange(len(W), device=W.device)
    along = args.scale_groups == INPUTS
    if along or W.shape[1] % GROUP == 0:
        order = diagonal_of(gram).argsort(descending=True, stable=True)
    back = order.argsort()
    U = inverse_factor(gram[order][:, order])

    def along_inputs(V: Tensor | None) -> ModuleChain:
        scales = group_scales(W.T.reshape(-1), bits, value_dtype, has_zero=True)
        spread = scales.view(W.shape[1], -1).T.repeat_interleave(GROUP, dim=0)
        rounded = round_to_scales(W[order], U, V, spread[order], bits, value_dtype)[back]
        return rounded_module(rounded, bits, value_dtype, args.scale_groups, scales)

    def along_outputs(V: Tensor | None) -> ModuleChain:
        rounded, scales = round_both_ways(W[order], U, V, bits, value_dtype)
        assert scales is not None
        if W.shape[1] % GROUP == 0:
            rounded, scales = rounded[back], scales.view(len(W), -1)[back].view(-1)
        return rounded_module(rounded, bits, value_dtype, args.scale_groups, scales)

    candidate = along_inputs if along else along_outputs
    return of_least_error(W, metric, candidate), 0.0


def foresee(group: Group, byte_budget: int, costs: Mapping[str, Costs]) -> float:
    """See `Method.foresee`; for the bits that are asked for."""
    return sum(foreseen_rounding(group, costs, group.args.value_bits).values())


def _has_own_bits(args: MethodArgs) -> bool:
    """Whether every module has bits of its own."""
    return args.metric == LOSS and args.value_bits == FULL_BITS and args.scale_groups != INPUTS


def divide(group: Group) -> Callable[[int], Mapping[str, int]]:
    """The bytes of every module, which are those of its bits; see `module_method`."""
    if not _has_own_bits(group.args):
        return evenly(group)
    costs, value_bytes = costs_of(group), group.value_dtype.itemsize
    each = [float(own.inputs.mean() * own.outputs.mean()) for own in costs.values()]
    least = _UNREACHED * sum(each) / len(each) if each else 1.0
    for module in group.layout.modules:
        if module.name not in costs:
            W = group.weight(module)
            costs[module.name] = Costs(torch.full_like(W[:, 0], least), torch.ones_like(W[0]))
    errors = {bits: foreseen_rounding(group, costs, bits) for bits in QUANTIZED_BITS}
    choices = {}
    for module in group.layout.modules:
        elements = group.weight(module).numel()
        choices[module.name] = [
            (values_bytes(elements, bits, value_bytes), errors[bits][module.name])
            for bits in QUANTIZED_BITS
        ]
    return best_shares(choices)


_EVEN = with_jumps(
    module_method("gptq", encode_module, least_module_bytes, (ACTIVATION, LOSS), divide)
)


def jumps(layout: GroupLayout, value_dtype: torch.dtype, args: MethodArgs) -> tuple[int, ...]:
    """All sizes that a group can have, where they are few; else those of the same bits in all."""
    if not _has_own_bits(args):
        return _EVEN.jumps(layout, value_dtype, args)
    sizes = {0}
    for module in layout.modules:
        rows, columns = layout.weight_shape(module)
        own = (values_bytes(rows * columns, bits, value_dtype.itemsize) for bits in QUANTIZED_BITS)
        sizes = {before + size for before, size in itertools.product(sizes, list(own))}
        if len(sizes) > _MOST_SIZES:
            return _EVEN.jumps(layout, value_dtype, args)
    return tuple(sorted(sizes))


METHOD = replace(_EVEN, jumps=jumps, foresee=foresee)
