"""A slice group in the coordinates of its shared bases, of whatever kind the group is.

Shapes: see lestd_kernels.tensorize and stage1. Attention has both bases, U1 and U2. The columns of
feed-forward blocks and experts are hidden units, each for itself: U2 = I, and the group is seen as
slices of a few columns with one core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lestd_kernels.linalg.stage1 import Bases, Ranks, gram_matrix, hosvd, leading_eigenvectors
from lestd_kernels.methods.common.base import MethodArgs
from lestd_kernels.methods.common.shared_basis import group_shape, scale_to_one, type_major
from lestd_kernels.search.budget import GroupShape
from lestd_kernels.search.tucker_ranks import RotatedCore
from lestd_kernels.tensorize import PROJECTIONS, GroupLayout, ModuleLayout

# Columns that count as a slice where U2 = I: one candidate of R2.
_NARROW = 8


@dataclass(frozen=True)
class SampledShape(GroupShape):
    """Sizes of some of a group's slices, which pay for their share of the factors.

    Attributes:
        share: slices / slices of the whole group.
    """

    share: float = 1.0

    def factor_bytes(self, ranks: Ranks) -> int:
        """Bytes that the slices pay for U1 and U2."""
        return round(super().factor_bytes(ranks) * self.share)


@dataclass(frozen=True)
class Rotated:
    """A group in the coordinates of its shared bases.

    Attributes:
        unfolding: ``(d, S p)``, float32, divided by `scale`.
        layout: the group's own.
        shape: sizes of the group that is rotated: the same, or with narrow slices and one core
            where U2 = I.
        core: all of it.
        U1: ``(d, d)``, leading directions first.
        squares: of the singular values of the mode-1 unfolding, in units of scale^2.
        scale: power of two that the unfolding was divided by.
    """

    unfolding: Tensor
    layout: GroupLayout
    shape: GroupShape
    core: RotatedCore
    U1: Tensor
    squares: Tensor
    scale: float

    def module_part(self, parts: Sequence[Tensor], module: int) -> Tensor:
        """The matrix ``(d, S_m p)`` of a module in tensors of the shapes of the core's parts."""
        if len(parts) == len(self.layout.modules):
            return parts[module].flatten(1)
        columns = self.layout.columns(self.layout.modules[module])
        return parts[0].flatten(1)[:, columns]


def rotate(
    unfolding: Tensor, layout: GroupLayout, value_dtype: torch.dtype, share: float = 1.0
) -> Rotated:
    """Find the shared bases of a group and rotate it.

    Args:
        unfolding: ``(d, S p)``, float32; scaled in place.
        layout: the group.
        value_dtype: of stored values.
        share: see `SampledShape`.
    """
    whole = all(projection in PROJECTIONS for projection, _ in layout.slices)
    plain = group_shape(layout if whole else _narrow(layout), value_dtype, MethodArgs())
    shape = SampledShape(**vars(plain), share=share)
    scale = scale_to_one(unfolding)
    W = type_major(unfolding, shape)
    if whole:
        bases = hosvd(W)
    else:
        squares, U1 = leading_eigenvectors(gram_matrix(unfolding))
        p, one = W.new_ones(shape.layout.head_dim), W.new_ones(1, 1)
        bases = Bases(U1, p.diag(), one, (squares, p.double(), one.double().view(-1)))
    core = RotatedCore(W, bases, shape.core_slices)
    return Rotated(unfolding, layout, shape, core, bases.U1, bases.spectra[0], scale)


def _narrow(layout: GroupLayout) -> GroupLayout:
    """The group with slices of few columns, as one module: for it U2 is next to nothing."""
    p = max(n for n in range(1, _NARROW + 1) if layout.head_dim % n == 0)
    count = layout.head_dim // p * len(layout.slices)
    slices = tuple(("slice", number) for number in range(count))
    return GroupLayout(layout.width, p, (ModuleLayout("all", "input", slices),))
