"""ASVD: truncated SVD of every matrix with its rows scaled by the size of their activations.

``diag(s) W`` is truncated with ``s_i = mean(|x_i|)^alpha``, alpha = 0.5.

Reference: Yuan et al., "ASVD: Activation-aware singular value decomposition for compressing large
language models", arXiv 2312.05821, 2023, section 3.2.
"""

from __future__ import annotations

from torch import Tensor

from lestd_kernels.methods.common.base import ACTIVATION, MethodArgs, Metrics
from lestd_kernels.methods.common.low_rank_pairs import pair_method

_ALPHA = 0.5


def _scaling(metrics: Metrics, module: str, args: MethodArgs) -> Tensor | None:
    """Squares of the scaling; from the Gram matrix' diagonal where means were not recorded."""
    gram = metrics.get(module)
    means = metrics.get(f"{module}.mean_abs")
    if means is None and gram is not None:
        means = gram.diagonal().sqrt()
    return None if means is None else means.pow(2 * _ALPHA)


METHOD = pair_method("asvd", (ACTIVATION,), _scaling)
