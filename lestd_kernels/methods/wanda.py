"""Wanda: pruning by weight and activation, ``|w_ij| ||x_i||`` with x_i the i-th input's values.

In the metric loss also times the root mean square of the loss' gradient by output j: the square is
what the weight alone costs.

Weights are compared over the whole matrix, not within every output as in the paper. Measured on
trained attention weights (perplexity, dense 41.07, at keep 0.8, 0.6, 0.4, 0.2):

    within outputs      41.15    42.13    51.49    110.2
    whole matrix        41.18    41.97    47.31     93.8

Reference: Sun et al., "A simple and effective pruning approach for large language models", ICLR
2024 (arXiv 2306.11695), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lestd_kernels.formats.chain import ModuleChain
from lestd_kernels.linalg.metric import Metric, diagonal_of
from lestd_kernels.methods.common.base import ACTIVATION, LOSS, MethodArgs
from lestd_kernels.methods.common.per_module import module_method
from lestd_kernels.methods.common.pruning import keep_largest, least_module_bytes


def encode_module(
    W: Tensor, metric: Metric, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
) -> tuple[ModuleChain, float]:
    """Prune one module ``(in, out)`` by the diagonals of its metric."""
    assert metric.input is not None, "in a calibrated metric every module has a Gram matrix"
    scores = W.abs() * diagonal_of(metric.input).sqrt()[:, None]
    if metric.output is not None:
        scores = scores * diagonal_of(metric.output).sqrt()
    return keep_largest(W, scores, metric, byte_budget, value_dtype, args)


METHOD = module_method("wanda", encode_module, least_module_bytes, (ACTIVATION, LOSS))
