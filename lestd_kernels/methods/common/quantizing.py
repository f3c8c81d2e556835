"""What the quantizing methods have in common: bits for a byte budget, and the better feedback.

Shapes: W (in, out) of a module; groups of 64 lie along its rows, so along the outputs.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lestd_kernels.linalg.error_feedback import output_factor
from lestd_kernels.linalg.metric import Metric
from lestd_kernels.methods.common.base import MethodArgs
from lestd_kernels.storage.few_bits import FULL_BITS, QUANTIZED_BITS, values_bytes
from lestd_kernels.storage.matrix import EncodedCore


def fitting_bits(elements: int, byte_budget: int, value_bytes: int, args: MethodArgs) -> int:
    """The bits asked for, or with 16, which stands for none, the most that fit the budget."""
    if args.value_bits != FULL_BITS:
        return args.value_bits
    return next(
        bits for bits in QUANTIZED_BITS if values_bytes(elements, bits, value_bytes) <= byte_budget
    )


def of_least_error(
    W: Tensor, metric: Metric, candidate: Callable[[Tensor | None], EncodedCore]
) -> EncodedCore:
    """The better of rounding with feedback along the outputs too, and without.

    Args:
        W: ``(in, out)``, float32.
        metric: of the module.
        candidate: what is stored with the factor of `output_factor`, or with None.
    """
    V = output_factor(metric.output)
    plain = candidate(None)
    if V is None:
        return plain
    both = candidate(V)
    plain_error, both_error = (metric.squares(W - one.decode().float()) for one in (plain, both))
    return both if both_error < plain_error else plain


def least_module_bytes(rows: int, columns: int, value_bytes: int, args: MethodArgs) -> int:
    """Bytes at the bits asked for, or at the fewest."""
    bits = min(QUANTIZED_BITS) if args.value_bits == FULL_BITS else args.value_bits
    return values_bytes(rows * columns, bits, value_bytes)
