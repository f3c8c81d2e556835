"""GPTQ: rounding to few bits with error feedback; of fixed size, as lestd_kernels.methods.rtn.

Inputs are rounded in the order of falling activation where that costs nothing: where groups of 64
do not reach from one input to the next, so that every input brings its own scales with it. In the
metric loss errors are fed back along the outputs as well.

Reference: Frantar et al., "GPTQ: Accurate post-training quantization for generative pre-trained
transformers", ICLR 2023; the order is the option "act-order" of the authors' program.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lestd_kernels.formats.chain import ModuleChain
from lestd_kernels.formats.ops import Multiply
from lestd_kernels.linalg.error_feedback import inverse_factor
from lestd_kernels.linalg.metric import Metric, diagonal_of
from lestd_kernels.linalg.two_sided_feedback import round_both_ways
from lestd_kernels.methods.common.base import ACTIVATION, LOSS, MethodArgs
from lestd_kernels.methods.common.per_module import module_method
from lestd_kernels.methods.common.quantizing import (
    fitting_bits,
    least_module_bytes,
    of_least_error,
    with_jumps,
)
from lestd_kernels.storage.few_bits import GROUP
from lestd_kernels.storage.matrix import EncodedCore


def encode_module(
    W: Tensor, metric: Metric, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
) -> tuple[ModuleChain, float]:
    """Round one module ``(in, out)`` in its metric."""
    gram = metric.input
    assert gram is not None, "in a calibrated metric every module has a Gram matrix"
    bits = fitting_bits(W.numel(), byte_budget, value_dtype.itemsize, args)
    order = torch.arange(len(W), device=W.device)
    if W.shape[1] % GROUP == 0:
        order = diagonal_of(gram).argsort(descending=True, stable=True)
    back = order.argsort()
    U = inverse_factor(gram[order][:, order])

    def candidate(V: Tensor | None) -> EncodedCore:
        rounded, scales = round_both_ways(W[order], U, V, bits, value_dtype)
        assert scales is not None
        if W.shape[1] % GROUP == 0:
            rounded, scales = rounded[back], scales.view(len(W), -1)[back].view(-1)
        return EncodedCore.quantized(rounded, bits, value_dtype, scales, codec="dense")

    stored = of_least_error(W, metric, candidate)
    return ModuleChain((Multiply(0),), (stored,)), 0.0


METHOD = with_jumps(module_method("gptq", encode_module, least_module_bytes, (ACTIVATION, LOSS)))
