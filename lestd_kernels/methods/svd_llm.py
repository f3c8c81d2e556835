"""SVD-LLM: truncated SVD of every matrix in the metric of its calibration activations.

``S^T W`` is truncated, where S is the Cholesky factor of the inputs' Gram matrix, so that the
truncated energy is the error of the outputs. In the metric loss the outputs are whitened as well,
and the truncated energy is the loss to expect.

Reference: Wang, Zheng, Wan, Zhang, "SVD-LLM: Truncation-aware singular value decomposition for
large language model compression", ICLR 2025, section 3.1. The paper gives every matrix the same
ratio; here they share the bytes, see lestd_kernels.methods.common.low_rank_pairs.
"""

from __future__ import annotations

from lestd_kernels.methods.common.base import ACTIVATION, LOSS
from lestd_kernels.methods.common.low_rank_pairs import pair_method

METHOD = pair_method("svd_llm", (ACTIVATION, LOSS))
