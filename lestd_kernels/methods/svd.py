"""Truncated SVD of every matrix: the baseline of all low-rank methods.

In the metric ``norm`` the rows are scaled by the weight of the preceding norm.

Reference: Eckart, Young, "The approximation of one matrix by another of lower rank", Psychometrika
1(3), 1936.
"""

from __future__ import annotations

from lestd_kernels.methods.common.base import NORM, WEIGHT
from lestd_kernels.methods.common.low_rank_pairs import pair_method

METHOD = pair_method("svd", (WEIGHT, NORM))
