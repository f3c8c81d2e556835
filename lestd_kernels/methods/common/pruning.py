"""What the pruning methods have in common: how many weights a byte budget has room for.

Shapes: W (in, out) of a module, stored with its zeros left out, in the codec of fewest bytes.
"""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

from lestd_kernels.formats.chain import ModuleChain
from lestd_kernels.formats.ops import Multiply
from lestd_kernels.linalg.error_feedback import largest
from lestd_kernels.linalg.metric import Metric
from lestd_kernels.methods.common.base import MethodArgs
from lestd_kernels.storage.codecs import CODECS, Codec
from lestd_kernels.storage.matrix import EncodedCore


def largest_nnz(
    rows: int, columns: int, byte_budget: int, value_bytes: int, value_bits: int
) -> tuple[int, str]:
    """The most values that fit a byte budget, and the codec for them; -1 where none fits."""
    counts = range(rows * columns + 1)

    def most(codec: Codec) -> int:
        def stored(nnz: int) -> int:
            return codec.stored_bytes(rows, columns, nnz, value_bytes, value_bits)

        return bisect_right(counts, byte_budget, key=stored) - 1

    best = max(CODECS.values(), key=most)
    return most(best), best.name


def least_module_bytes(rows: int, columns: int, value_bytes: int, args: MethodArgs) -> int:
    """Bytes of one value, with its index."""
    return min(
        codec.stored_bytes(rows, columns, 1, value_bytes, args.value_bits)
        for codec in CODECS.values()
    )


def keep_largest(
    W: Tensor,
    scores: Tensor,
    metric: Metric,
    byte_budget: int,
    value_dtype: torch.dtype,
    args: MethodArgs,
) -> tuple[ModuleChain, float]:
    """One module ``(in, out)``: its weights of the largest scores, as many as fit."""
    rows, columns = W.shape
    count, codec = largest_nnz(rows, columns, byte_budget, value_dtype.itemsize, args.value_bits)
    mask = largest(scores, count) & (W != 0)
    kept = EncodedCore.quantized(W * mask, args.value_bits, value_dtype, codec=codec, mask=mask)
    return ModuleChain((Multiply(0),), (kept,)), metric.squares(W * ~mask)
