"""Tucker with dense cores by truncated HOSVD: `tucker` without the sweeps of HOOI.

Reference: De Lathauwer, De Moor, Vandewalle, "A multilinear singular value decomposition", SIMAX
21(4), 2000.
"""

from __future__ import annotations

from dataclasses import replace

from lestd_kernels.methods import tucker
from lestd_kernels.methods.common.base import Group
from lestd_kernels.methods.common.shared_basis import Prepared


def prepare(group: Group) -> Prepared:
    """See `Method.prepare`."""
    args = replace(group.args, hooi_max_iter=0)
    return tucker.METHOD.prepare(replace(group, args=args))  # type: ignore[no-any-return]


METHOD = replace(tucker.METHOD, name="hosvd", prepare=prepare)
