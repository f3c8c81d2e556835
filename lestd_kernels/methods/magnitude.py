"""Magnitude pruning: the largest weights of every matrix, as many as fit, the others zero.

Reference: Han et al., "Learning both weights and connections for efficient neural networks",
NeurIPS 2015, section 3.1, without its retraining.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lestd_kernels.formats.chain import ModuleChain
from lestd_kernels.linalg.metric import Metric
from lestd_kernels.methods.common.base import MethodArgs
from lestd_kernels.methods.common.per_module import module_method
from lestd_kernels.methods.common.pruning import keep_largest, least_module_bytes


def encode_module(
    W: Tensor, metric: Metric, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
) -> tuple[ModuleChain, float]:
    """Prune one module ``(in, out)`` by ``|w|``."""
    return keep_largest(W, W.abs(), metric, byte_budget, value_dtype, args)


METHOD = module_method("magnitude", encode_module, least_module_bytes)
