"""SparseGPT: pruning with error feedback, composed with values in few bits.

Two passes: the first prunes, feeding errors back, and leaves the positions; the second starts
again from the weights, rounds what is kept and feeds back what rounding and pruning lose. So every
group's members are known when its scale is chosen.

Reference: Frantar, Alistarh, "SparseGPT: Massive language models can be accurately pruned in
one-shot", ICML 2023, section 3; section 3.5 for the composition with quantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lestd_kernels.formats.chain import ModuleChain
from lestd_kernels.formats.ops import Multiply
from lestd_kernels.linalg.error_feedback import inverse_factor, prune, round_with_feedback
from lestd_kernels.linalg.metric import Metric, diagonal_of
from lestd_kernels.linalg.two_sided_feedback import round_both_ways
from lestd_kernels.methods.common.base import ACTIVATION, LOSS, Group, MethodArgs
from lestd_kernels.methods.common.foresight import Costs, foreseen_pruning
from lestd_kernels.methods.common.per_module import module_method, split_budget
from lestd_kernels.methods.common.pruning import largest_nnz, least_module_bytes
from lestd_kernels.methods.common.quantizing import of_least_error
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.tensorize import ModuleLayout


def encode_module(
    W: Tensor, metric: Metric, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
) -> tuple[ModuleChain, float]:
    """Prune one module ``(in, out)`` in its metric, and round what is left."""
    assert metric.input is not None, "in a calibrated metric every module has a Gram matrix"
    bits = args.value_bits
    rows, columns = W.shape
    count, codec = largest_nnz(rows, columns, byte_budget, value_dtype.itemsize, bits)
    U = inverse_factor(metric.input)
    outputs = None if metric.output is None else diagonal_of(metric.output)
    mask = prune(W, U, count, outputs) if codec != "dense" else None

    plain, scales = round_with_feedback(W, U, bits, value_dtype, mask)

    def candidate(V: Tensor | None) -> ModuleChain:
        # Elements that make up for pruned ones have grown beyond the scales of W.
        rounded = plain
        if V is not None:
            rounded, _ = round_both_ways(W, U, V, bits, value_dtype, mask, scales)
        stored = EncodedCore.quantized(rounded, bits, value_dtype, scales, codec, mask)
        return ModuleChain((Multiply(0),), (stored,))

    lost = 0.0 if mask is None else metric.squares(W * ~mask)
    return of_least_error(W, metric, candidate), lost


def foresee(group: Group, byte_budget: int, costs: Mapping[str, Costs]) -> float:
    """See `Method.foresee`."""
    shares, bits = split_budget(group.layout, byte_budget), group.args.value_bits

    def count_of(module: ModuleLayout) -> int:
        (rows, columns), value_bytes = group.weight(module).shape, group.value_dtype.itemsize
        return largest_nnz(rows, columns, shares[module.name], value_bytes, bits)[0]

    return foreseen_pruning(group, costs, bits, count_of)


METHOD = replace(
    module_method("sparsegpt", encode_module, least_module_bytes, (ACTIVATION, LOSS)),
    foresee=foresee,
)
