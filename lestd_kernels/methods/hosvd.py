"""Tucker with dense cores by truncated HOSVD: `tucker` without the sweeps of HOOI.

Reference: De Lathauwer, De Moor, Vandewalle, "A multilinear singular value decomposition", SIMAX
21(4), 2000.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lestd_kernels.methods import tucker
from lestd_kernels.methods.common.base import Bounds, Group, MethodArgs
from lestd_kernels.methods.common.shared_basis import Prepared
from lestd_kernels.tensorize import GroupLayout


def prepare(group: Group) -> Prepared:
    """See `Method.prepare`."""
    args = replace(group.args, hooi_max_iter=0)
    return tucker.METHOD.prepare(replace(group, args=args))  # type: ignore[no-any-return]


def bounds(
    layout: GroupLayout, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
) -> Bounds:
    """See `Method.bounds`."""
    found = tucker.METHOD.bounds(layout, byte_budget, value_dtype, args)
    # The copies of a product along one mode.
    return replace(found, workspace_bytes=found.workspace_bytes + 8 * layout.elements)


METHOD = replace(tucker.METHOD, name="hosvd", prepare=prepare, bounds=bounds)
