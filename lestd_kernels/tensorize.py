"""Weights of one attention block <-> the unfolding of their slice group.

Shapes used throughout lestd_kernels:
    d   model width (rows of every slice)        p   head width (columns of every slice)
    S   slices in the group                      h   query heads; h_kv key/value heads
A slice group is S equally shaped slices W_s (d x p). Row-vector convention, y = x W: the
nn.Linear weights of Q, K and V hold W transposed, so head i owns *rows* [i p, (i+1) p); that of
O is already (d, h p), so head i owns *columns*. The mode-1 unfolding lays the slices side by
side: (d, S p), column s p + r is column r of slice s.

Reference: LeSTD (ICLR 2026), section "Tensorization"; TensorLLM (arXiv 2501.15674), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

BasisSide = Literal["input", "output"]
PROJECTIONS = ("q", "k", "v", "o")


@dataclass(frozen=True)
class ModuleLayout:
    """How one linear module of the checkpoint divides into slices.

    Attributes:
        name: the module inside its block, such as ``"q_proj"``; its tensor is ``name + ".weight"``.
        basis_side: the side of the module that U1 stands on. ``"input"`` (Q, K, V): the weight is
            ``(S_m p, d)`` on disk. ``"output"`` (O): the weight is ``(d, S_m p)`` on disk.
        slices: ``(projection, head)`` of each slice in storage order; projection is one of
            ``"q" "k" "v" "o"``. A fused, per-head interleaved QKV lists q0 k0 v0 q1 k1 v1 ...
        reads: name of the input that the module reads, by which its metric is found; modules that
            read the same tensor have the same.
    """

    name: str
    basis_side: BasisSide
    slices: tuple[tuple[str, int], ...]
    reads: str = "in"


@dataclass(frozen=True)
class GroupLayout:
    """A slice group: the modules that share U1 (d x R1) and U2 (p x R2), in unfolding order."""

    width: int
    head_dim: int
    modules: tuple[ModuleLayout, ...]

    @property
    def slices(self) -> tuple[tuple[str, int], ...]:
        """``(projection, head)`` of every slice, in unfolding order."""
        return tuple(s for module in self.modules for s in module.slices)

    def weight_shape(self, module: ModuleLayout) -> tuple[int, int]:
        """Shape of the module's weight as ``nn.Linear`` holds it, ``(out, in)``."""
        columns = len(module.slices) * self.head_dim
        return (columns, self.width) if module.basis_side == "input" else (self.width, columns)

    def columns(self, module: ModuleLayout) -> slice:
        """Where the module's columns stand in the unfolding."""
        first = 0
        for one in self.modules:
            stop = first + len(one.slices) * self.head_dim
            if one == module:
                return slice(first, stop)
            first = stop
        raise ValueError(f"{module.name} is not of this group")

    @property
    def elements(self) -> int:
        """Number of weight elements in the group, ``S d p``."""
        return self.width * self.head_dim * len(self.slices)

    @property
    def dense_flops_per_token(self) -> int:
        """Multiply-adds of the dense modules for one token; equals `elements`."""
        return self.elements


def unfold_weights(weights: Mapping[str, Tensor], layout: GroupLayout) -> Tensor:
    """Lay a block's weights out as the mode-1 unfolding of their slice group.

    Args:
        weights: module name -> weight ``(out, in)``, any floating dtype, all on one device.
        layout: the group.

    Returns:
        Tensor ``(d, S p)``, float32, contiguous, on the weights' device.

    Raises:
        ValueError: a weight's shape is not what the layout says.
    """
    first = weights[layout.modules[0].name]
    total = len(layout.slices) * layout.head_dim
    unfolding = torch.empty(layout.width, total, dtype=torch.float32, device=first.device)
    column = 0
    for module in layout.modules:
        weight = weights[module.name]
        expected = layout.weight_shape(module)
        if tuple(weight.shape) != expected:
            raise ValueError(
                f"{module.name}.weight has shape {tuple(weight.shape)}, expected {expected}"
            )
        stop = column + len(module.slices) * layout.head_dim
        unfolding[:, column:stop] = weight.T if module.basis_side == "input" else weight
        column = stop
    return unfolding


def fold_weights(unfolding: Tensor, layout: GroupLayout) -> dict[str, Tensor]:
    """Invert `unfold_weights`: ``(d, S p)`` -> module name -> weight ``(out, in)``, contiguous."""
    weights = {}
    column = 0
    for module in layout.modules:
        stop = column + len(module.slices) * layout.head_dim
        block = unfolding[:, column:stop]
        weights[module.name] = (block.T if module.basis_side == "input" else block).contiguous()
        column = stop
    return weights


def entry_slices(name: str, module: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    """Slices of a module from its entry; regular over heads and types where it states types."""
    if "types" not in module:
        return tuple((name, i) for i in range(module["slices"]))
    types = module["types"]
    heads = module["slices"] // len(types)
    return tuple((PROJECTIONS[t], i) for i in range(heads) for t in types)
