"""The table of methods: how a slice group is decomposed. One file per method, one line here."""

from __future__ import annotations

from lestd_kernels.methods import (
    asvd,
    auto,
    gptq,
    hosvd,
    laser,
    lestd,
    magnitude,
    per_head_tucker,
    rtn,
    sparsegpt,
    svd,
    svd_llm,
    td_moe,
    tt,
    tucker,
    wanda,
)
from lestd_kernels.methods.common.base import (
    ACTIVATION,
    CALIBRATED,
    LOSS,
    NORM,
    WEIGHT,
    Bounds,
    Decomposed,
    Group,
    Method,
    MethodArgs,
    SliceStats,
)
from lestd_kernels.methods.common.outliers import with_outliers
from lestd_kernels.options import METRICS

METHODS: dict[str, Method] = {
    method.name: with_outliers(method)
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
        magnitude.METHOD,
        wanda.METHOD,
        rtn.METHOD,
        gptq.METHOD,
        sparsegpt.METHOD,
        auto.METHOD,
    )
}

__all__ = [
    "ACTIVATION",
    "CALIBRATED",
    "LOSS",
    "METHODS",
    "METRICS",
    "NORM",
    "WEIGHT",
    "Bounds",
    "Decomposed",
    "Group",
    "Method",
    "MethodArgs",
    "SliceStats",
]
