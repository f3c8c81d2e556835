"""What the quantizing methods have in common: bits for a byte budget, and the better feedback.

Shapes: W (in, out) of a module; groups of 64 lie along its rows, so along the outputs. With
`MethodArgs.scale_groups` ``"inputs"`` they lie along its columns, and W^T (out, in) is stored, on
the grid with a zero: the layout ``pack-quantized`` of the library compressed-tensors, see
orchestrator/model/packed_export.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lestd_kernels.errors import LestdError
from lestd_kernels.formats.chain import ModuleChain
from lestd_kernels.formats.ops import Multiply
from lestd_kernels.linalg.metric import Metric
from lestd_kernels.linalg.two_sided_feedback import output_factor
from lestd_kernels.methods.common.base import Method, MethodArgs
from lestd_kernels.storage.few_bits import FULL_BITS, GROUP, QUANTIZED_BITS, values_bytes
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.tensorize import GroupLayout


def fitting_bits(elements: int, byte_budget: int, value_bytes: int, args: MethodArgs) -> int:
    """The bits asked for, or with 16, which stands for none, the most that fit the budget."""
    if args.value_bits != FULL_BITS:
        return args.value_bits
    return next(
        bits for bits in QUANTIZED_BITS if values_bytes(elements, bits, value_bytes) <= byte_budget
    )


INPUTS = "inputs"


def rounded_module(
    W: Tensor,
    bits: int,
    value_dtype: torch.dtype,
    scale_groups: str,
    scales: Tensor | None = None,
) -> ModuleChain:
    """The chain of a module that is one matrix in few bits.

    Args:
        W: ``(in, out)``, float32.
        bits: of a value.
        value_dtype: of the scales.
        scale_groups: see `MethodArgs`.
        scales: float32, one per group as it is stored, where they are chosen already.
    """
    along = scale_groups == INPUTS
    stored = EncodedCore.quantized(
        W.T if along else W, bits, value_dtype, scales, codec="dense", with_zero=along or None
    )
    return ModuleChain((Multiply(0, transposed=along),), (stored,))


def of_least_error(
    W: Tensor, metric: Metric, candidate: Callable[[Tensor | None], ModuleChain]
) -> ModuleChain:
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
    plain_error, both_error = (metric.squares(W - one.weight(len(W), {})) for one in (plain, both))
    return both if both_error < plain_error else plain


def with_jumps(method: Method) -> Method:
    """A quantizer, with the sizes of its bits, or of those asked for."""

    def jumps(layout: GroupLayout, value_dtype: torch.dtype, args: MethodArgs) -> tuple[int, ...]:
        every: tuple[Any, ...] = (
            QUANTIZED_BITS if args.value_bits == FULL_BITS else (args.value_bits,)
        )
        return tuple(
            method.least_bytes(layout, value_dtype, replace(args, value_bits=bits))
            for bits in every
        )

    return replace(method, jumps=jumps, groups_inputs=True)


def least_module_bytes(rows: int, columns: int, value_bytes: int, args: MethodArgs) -> int:
    """Bytes at the bits asked for, or at the fewest.

    Raises:
        LestdError: groups are to lie along inputs that they do not divide.
    """
    if args.scale_groups == INPUTS and rows % GROUP:
        raise LestdError(
            f"scale_groups 'inputs' needs modules whose inputs are a multiple of {GROUP}, found "
            f"one of {rows}; leave it out, or --exclude that module"
        )
    bits = min(QUANTIZED_BITS) if args.value_bits == FULL_BITS else args.value_bits
    return values_bytes(rows * columns, bits, value_bytes)


Choice = tuple[int, float]
"""Bytes of a module, and the squared error to expect in them."""


def best_shares(choices: Mapping[str, Sequence[Choice]]) -> Callable[[int], dict[str, int]]:
    """Of modules with a few choices each: byte budget -> the bytes of each of least error in all.

    Exact: of all ways to store the first modules those are kept that no other beats in bytes and
    error. From one module to the next there are only so many sums of their bytes, as long as these
    have a large common divisor.
    """
    size, error = np.zeros(1, np.int64), np.zeros(1)
    # Of every module and way: the module's choice, and the way of the modules before it.
    steps: list[tuple[npt.NDArray[np.int8], npt.NDArray[np.int32]]] = []
    for own in choices.values():
        sizes = (size[:, None] + np.array([one for one, _ in own])).reshape(-1)
        errors = (error[:, None] + np.array([one for _, one in own])).reshape(-1)
        order = np.lexsort((errors, sizes))
        least = np.minimum.accumulate(errors[order])
        kept = order[np.append(True, least[1:] < least[:-1])]
        size, error = sizes[kept], errors[kept]
        steps.append(((kept % len(own)).astype(np.int8), (kept // len(own)).astype(np.int32)))

    def shares(byte_budget: int) -> dict[str, int]:
        way = int(np.searchsorted(size, byte_budget, side="right")) - 1
        if way < 0:
            raise ValueError(f"{byte_budget} bytes for modules that need {size[0]} together")
        found = {}
        for name, (choice, before) in zip(reversed(list(choices)), reversed(steps), strict=True):
            found[name] = choices[name][choice[way]][0]
            way = int(before[way])
        return found

    return shares
