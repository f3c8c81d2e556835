"""LASER: a few matrices of a block are cut to a small rank, the others are left as they are.

Within the byte budget the fewest matrices are cut, those that lose the least relative energy by
it, to a twentieth of their full rank; the last one gets the largest rank that fits. Budgets below
that lower the rank of all.

Reference: Sharma, Ash, Misra, "The truth is in there: Improving reasoning in language models with
layer-selective rank reduction", ICLR 2024, section 4. The paper chooses the matrices by search on a
task; here the error chooses.
"""

from __future__ import annotations

from functools import partial

from lestd_kernels.linalg.low_rank import largest_rank
from lestd_kernels.methods.common.base import NORM, WEIGHT
from lestd_kernels.methods.common.low_rank_pairs import (
    Choice,
    PreparedPairs,
    choose_ranks,
    dense_module_bytes,
    module_bytes,
    pair_method,
)
from lestd_kernels.tensorize import ModuleLayout

_SMALL_SHARE = 20


def _choose(prepared: PreparedPairs, byte_budget: int) -> Choice:
    layout, args = prepared.layout, prepared.args
    value_bytes = prepared.value_dtype.itemsize

    def small(module: ModuleLayout) -> int:
        return -(-min(layout.weight_shape(module)) // _SMALL_SHARE)

    def lost(module: ModuleLayout) -> float:
        return float(prepared.spectra[module.name].energies[small(module) :].sum())

    choice: dict[str, int | None] = {module.name: None for module in layout.modules}
    stored = sum(dense_module_bytes(layout, module, value_bytes, args) for module in layout.modules)
    for module in sorted(layout.modules, key=lost):
        if stored <= byte_budget:
            return choice
        size = partial(module_bytes, layout, module, value_bytes=value_bytes, args=args)
        stored -= dense_module_bytes(layout, module, value_bytes, args)
        full = min(layout.weight_shape(module))
        rank = max(small(module), largest_rank(size, full, byte_budget - stored))
        choice[module.name] = rank
        stored += size(rank)
    return choice if stored <= byte_budget else choose_ranks(prepared, byte_budget)


METHOD = pair_method("laser", (WEIGHT, NORM), choose=_choose)
