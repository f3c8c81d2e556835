"""What rounding and pruning with feedback cost, foreseen from the weights as they are.

An error e of element (i, j), when those after it make up for it as well as they can, costs ``(e
L_A,ii L_B,jj)^2`` (lestd_kernels.linalg.common_step): of rounding it is what the nearest level is
away, of pruning the weight. Inputs are taken in the order of falling activation, in which least is
lost. What feedback moves the later weights by is left out, so that two bits cost up to twice as
much as is foreseen, and pruning most of a matrix several times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lestd_kernels.linalg.error_feedback import DAMPING, inverse_factor, largest
from lestd_kernels.linalg.metric import diagonal_of
from lestd_kernels.linalg.two_sided_feedback import output_factor
from lestd_kernels.methods.common.base import Group
from lestd_kernels.storage.few_bits import (
    FULL_BITS,
    grid_has_zero,
    group_scales,
    levels,
    nearest_codes,
    spread_scales,
)
from lestd_kernels.tensorize import ModuleLayout


class Costs(NamedTuple):
    """What an error of one costs in each element of a module: the product of both.

    Attributes:
        inputs: ``(in,)``, float32, L_A,ii squared.
        outputs: ``(out,)``, L_B,jj squared.
    """

    inputs: Tensor
    outputs: Tensor


def costs_of(group: Group) -> dict[str, Costs]:
    """Module name -> what its errors cost; modules that nothing reaches have none."""
    known: dict[str, Tensor] = {}
    found = {}
    for module in group.layout.modules:
        W, metric = group.weight(module), group.metric(module)
        if module.reads not in known:
            known[module.reads] = _inputs(metric.input, W)
        outputs = _outputs(metric.output, W)
        if bool(known[module.reads].any()) and bool(outputs.any()):
            found[module.name] = Costs(known[module.reads], outputs)
    return found


def _inputs(A: Tensor | None, W: Tensor) -> Tensor:
    if A is None or A.dim() != 2:
        return W.new_ones(len(W)) if A is None else diagonal_of(A)
    order = A.diagonal().argsort(descending=True, stable=True)
    found = torch.empty_like(A[0])
    found[order] = _undamped(inverse_factor(A[order][:, order]).diagonal())
    return found * float(A.diagonal().double().mean())


def _outputs(B: Tensor | None, W: Tensor) -> Tensor:
    width = W.shape[1]
    if B is None or B.dim() == 1:
        return W.new_ones(width) if B is None else B
    mean = float(diagonal_of(B).double().mean())
    V = output_factor(B, unit=mean or None)
    assert V is not None, "outputs that count beside each other have a factor"
    return _undamped(V.diagonal(dim1=1, dim2=2).reshape(-1)[:width]) * mean


def _undamped(diagonal: Tensor) -> Tensor:
    """L squared, from the inverse's factor: where few tokens came, damping is all there is."""
    return (diagonal.square().reciprocal() - DAMPING).clamp(min=0)


def _weighted(squares: Tensor, costs: Costs) -> float:
    return float((costs.inputs @ squares @ costs.outputs).double())


def _rounding(W: Tensor, bits: int, value_dtype: torch.dtype, mask: Tensor | None) -> Tensor:
    """Squared error of each element that is stored, rounded to the nearest level."""
    if bits == FULL_BITS:
        return torch.zeros_like(W)
    stored = W.reshape(-1) if mask is None else W[mask]
    has_zero = grid_has_zero(mask is None, bits)
    spread = spread_scales(group_scales(stored, bits, value_dtype, has_zero), len(stored))
    codes = nearest_codes(stored, spread, bits, has_zero)
    squares = (stored - levels(codes, spread, bits, has_zero)).square()
    return squares.view_as(W) if mask is None else torch.zeros_like(W).masked_scatter(mask, squares)


def foreseen_rounding(group: Group, costs: Mapping[str, Costs], bits: int) -> dict[str, float]:
    """Module name -> squared error of its weights, all of them rounded to so many bits."""
    found = {}
    for module in group.layout.modules:
        if own := costs.get(module.name):
            W = group.weight(module)
            found[module.name] = _weighted(_rounding(W, bits, group.value_dtype, None), own)
    return found


def foreseen_pruning(
    group: Group,
    costs: Mapping[str, Costs],
    bits: int,
    count_of: Callable[[ModuleLayout], int],
) -> float:
    """Squared error of weights of which some are kept, those that cost most, and rounded."""
    total = 0.0
    for module in group.layout.modules:
        if not (own := costs.get(module.name)):
            continue
        W, count, mask = group.weight(module), count_of(module), None
        squares = torch.zeros_like(W)
        if count < W.numel():
            mask = largest(W.square() * own.inputs[:, None] * own.outputs, count)
            squares = W.square() * ~mask
        squares += _rounding(W, bits, group.value_dtype, mask)
        total += _weighted(squares, own)
    return total
