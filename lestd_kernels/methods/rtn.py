"""Round to nearest: every weight in few bits, groups of 64 with one scale; of fixed size.

The baseline that every other quantizer is measured against. It stores its own size, the largest
bit width that fits the budget, or the one that `value_bits` asks for.

Reference: the baseline "RTN" of Frantar et al., "GPTQ", ICLR 2023, section 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lestd_kernels.formats.chain import ModuleChain
from lestd_kernels.linalg.metric import Metric
from lestd_kernels.methods.common.base import MethodArgs
from lestd_kernels.methods.common.per_module import module_method
from lestd_kernels.methods.common.quantizing import (
    fitting_bits,
    least_module_bytes,
    rounded_module,
    with_jumps,
)


def encode_module(
    W: Tensor, metric: Metric, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
) -> tuple[ModuleChain, float]:
    """Round one module ``(in, out)``."""
    bits = fitting_bits(W.numel(), byte_budget, value_dtype.itemsize, args)
    return rounded_module(W, bits, value_dtype, args.scale_groups), 0.0


METHOD = with_jumps(module_method("rtn", encode_module, least_module_bytes))
