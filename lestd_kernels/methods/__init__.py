"""The table of methods: how a slice group is decomposed. One file per method, one line here."""

from __future__ import annotations

from lestd_kernels.methods import (
    asvd,
    hosvd,
    laser,
    lestd,
    per_head_tucker,
    svd,
    svd_llm,
    td_moe,
    tt,
    tucker,
)
from lestd_kernels.methods.base import (
    ACTIVATION,
    METRICS,
    NORM,
    WEIGHT,
    Bounds,
    Decomposed,
    Method,
    MethodArgs,
    SliceStats,
)

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        lestd.METHOD,
        tucker.METHOD,
        hosvd.METHOD,
        per_head_tucker.METHOD,
        td_moe.METHOD,
        tt.METHOD,
        svd.METHOD,
        svd_llm.METHOD,
        asvd.METHOD,
        laser.METHOD,
    )
}

__all__ = [
    "ACTIVATION",
    "METHODS",
    "METRICS",
    "NORM",
    "WEIGHT",
    "Bounds",
    "Decomposed",
    "Method",
    "MethodArgs",
    "SliceStats",
]
