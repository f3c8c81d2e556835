"""GPTQ: rounding to few bits with error feedback; of fixed size, as lestd_kernels.methods.rtn.

Inputs are rounded in the order of falling activation where that costs nothing: where groups of 64
do not reach from one input to the next, so that every input brings its own scales with it, or where
the scales are those of the weights as they are, which groups along the inputs have ("static
groups" of the authors' program). In the metric loss errors are fed back along the outputs as well.

Reference: Frantar et al., "GPTQ: Accurate post-training quantization for generative pre-trained
transformers", ICLR 2023; the order is the option "act-order" of the authors' program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lestd_kernels.formats.chain import ModuleChain
from lestd_kernels.linalg.error_feedback import inverse_factor
from lestd_kernels.linalg.metric import Metric, diagonal_of
from lestd_kernels.linalg.two_sided_feedback import round_both_ways, round_to_scales
from lestd_kernels.methods.common.base import ACTIVATION, LOSS, Group, MethodArgs
from lestd_kernels.methods.common.foresight import Costs, foreseen_rounding
from lestd_kernels.methods.common.per_module import module_method, split_budget
from lestd_kernels.methods.common.quantizing import (
    INPUTS,
    fitting_bits,
    least_module_bytes,
    of_least_error,
    rounded_module,
    with_jumps,
)
from lestd_kernels.storage.few_bits import GROUP, group_scales
from lestd_kernels.tensorize import ModuleLayout


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
    """See `Method.foresee`."""
    shares, value_bytes = split_budget(group.layout, byte_budget), group.value_dtype.itemsize

    def bits_of(module: ModuleLayout) -> int:
        elements = group.weight(module).numel()
        return fitting_bits(elements, shares[module.name], value_bytes, group.args)

    return foreseen_rounding(group, costs, bits_of)


METHOD = replace(
    with_jumps(module_method("gptq", encode_module, least_module_bytes, (ACTIVATION, LOSS))),
    foresee=foresee,
)
