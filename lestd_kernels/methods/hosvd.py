"""Tucker with dense cores by truncated HOSVD: `tucker` without the sweeps of HOOI.

Reference: De Lathauwer, De Moor, Vandewalle, "A multilinear singular value decomposition", SIMAX
21(4), 2000.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lestd_kernels.methods import tucker
from lestd_kernels.methods.common.base import MethodArgs, Metrics
from lestd_kernels.methods.common.shared_basis import Prepared
from lestd_kernels.tensorize import GroupLayout


def prepare(
    unfolding: Tensor,
    layout: GroupLayout,
    value_dtype: torch.dtype,
    args: MethodArgs,
    metrics: Metrics,
) -> Prepared:
    """See `Method.prepare`."""
    args = replace(args, hooi_max_iter=0)
    return tucker.METHOD.prepare(unfolding, layout, value_dtype, args, metrics)  # type: ignore[no-any-return]


METHOD = replace(tucker.METHOD, name="hosvd", prepare=prepare)
