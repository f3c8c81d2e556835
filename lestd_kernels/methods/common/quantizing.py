"""What the quantizing methods have in common: how many bits a byte budget has room for.

Shapes: W (in, out) of a module; groups of 64 lie along its rows, so along the outputs.
"""

from __future__ import annotations

from lestd_kernels.methods.common.base import MethodArgs
from lestd_kernels.storage.few_bits import FULL_BITS, QUANTIZED_BITS, values_bytes


def fitting_bits(elements: int, byte_budget: int, value_bytes: int, args: MethodArgs) -> int:
    """The bits asked for, or with 16, which stands for none, the most that fit the budget."""
    if args.value_bits != FULL_BITS:
        return args.value_bits
    return next(
        bits for bits in QUANTIZED_BITS if values_bytes(elements, bits, value_bytes) <= byte_budget
    )


def least_module_bytes(rows: int, columns: int, value_bytes: int, args: MethodArgs) -> int:
    """Bytes at the bits asked for, or at the fewest."""
    bits = min(QUANTIZED_BITS) if args.value_bits == FULL_BITS else args.value_bits
    return values_bytes(rows * columns, bits, value_bytes)
