"""Weights of one block of a layer <-> the unfolding of their slice group.

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
GUARD_SHAPE, GUARD_DTYPE = (0,), torch.uint8
"""Of the tensor that a compressed model keeps under a guard's name, see `GroupLayout`."""


@dataclass(frozen=True)
class StoredWeight:
    """Location of a weight in a dense checkpoint that has no matrix ``<module>.weight`` there.

    Attributes:
        tensor: name of its tensor below the block.
        index: of its matrix in a tensor that stacks several along the first axis; None where the
            tensor is the matrix.
        part: ``(k, n)`` where the matrix interleaves n weights by their outputs: output j of this
            one is output ``j n + k`` of the matrix.
        transposed: whether the matrix is ``(in, out)``.
        concatenated: whether the n weights of the matrix follow one another instead.
    """

    tensor: str
    index: int | None = None
    part: tuple[int, int] = (0, 1)
    transposed: bool = False
    concatenated: bool = False


@dataclass(frozen=True)
class ModuleLayout:
    """How one linear module of the checkpoint divides into slices.

    Attributes:
        name: the module inside its block, such as ``"q_proj"`` or ``"expert_3.gate"``.
        basis_side: the side of the module that U1 stands on. ``"input"`` (Q, K, V): the weight is
            ``(S_m p, d)`` on disk. ``"output"`` (O): the weight is ``(d, S_m p)`` on disk.
        slices: ``(projection, number)`` of each slice in storage order; projection is one of
            ``"q" "k" "v" "o" "gate" "up" "down"``, or ``"linear"`` of a matrix that is a group of
            its own; number that of the head or expert. A fused, per-head interleaved QKV lists
            q0 k0 v0 q1 k1 v1 ...
        reads: name of the input that the module reads, by which its metric is found; modules that
            read the same tensor have the same.
        stored: where the weight lies in the dense checkpoint, if not in ``<name>.weight``.
    """

    name: str
    basis_side: BasisSide
    slices: tuple[tuple[str, int], ...]
    reads: str = "in"
    stored: StoredWeight | None = None

    @property
    def source(self) -> str:
        """Name of the matrix that holds the weight in the dense checkpoint, below the block."""
        if self.stored is None:
            return self.name
        index = "" if self.stored.index is None else f"[{self.stored.index}]"
        return self.stored.tensor + index


@dataclass(frozen=True)
class GroupLayout:
    """A slice group: the modules that share U1 (d x R1) and U2 (p x R2), in unfolding order.

    Attributes:
        width: d, the model's width.
        head_dim: p, the width of a head; of a feed-forward block or an expert the hidden width.
        modules: in unfolding order.
        guard: name of a dense parameter below the block, where none is called as a module is: a
            compressed model has an empty tensor of that name, so that a loader that does not know
            the format meets a shape that it cannot use.
    """

    width: int
    head_dim: int
    modules: tuple[ModuleLayout, ...]
    guard: str | None = None

    @property
    def slices(self) -> tuple[tuple[str, int], ...]:
        """``(projection, head)`` of every slice, in unfolding order."""
        return tuple(s for module in self.modules for s in module.slices)

    def weight_shape(self, module: ModuleLayout) -> tuple[int, int]:
        """Shape of the module's weight as ``nn.Linear`` holds it, ``(out, in)``."""
        columns = len(module.slices) * self.head_dim
        return (columns, self.width) if module.basis_side == "input" else (self.width, columns)

    def source_shape(self, module: ModuleLayout) -> tuple[int, int]:
        """Shape of the matrix `ModuleLayout.source` in the dense checkpoint."""
        out, inputs = self.weight_shape(module)
        if module.stored is None:
            return out, inputs
        out *= module.stored.part[1]
        return (inputs, out) if module.stored.transposed else (out, inputs)

    def guard_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Guard tensor of a compressed model, if it has one, below `prefix` (a block's path)."""
        if self.guard is None:
            return {}
        return {below(prefix, self.guard): torch.empty(GUARD_SHAPE, dtype=GUARD_DTYPE)}

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


def below(path: str, name: str) -> str:
    """Path of what is called `name` below `path`; either may be empty, for the model or the path's
    own module."""
    return f"{path}.{name}" if path and name else path or name


def unfold_weights(weights: Mapping[str, Tensor], layout: GroupLayout) -> Tensor:
    """Lay a block's weights out as the mode-1 unfolding of their slice group.

    Args:
        weights: `ModuleLayout.source` -> its matrix, mostly module name -> weight ``(out, in)``;
            any floating dtype, all on one device.
        layout: the group.

    Returns:
        Tensor ``(d, S p)``, float32, contiguous, on the weights' device.

    Raises:
        ValueError: a weight's shape is not what the layout says.
    """
    first = weights[layout.modules[0].source]
    total = len(layout.slices) * layout.head_dim
    unfolding = torch.empty(layout.width, total, dtype=torch.float32, device=first.device)
    column = 0
    for module in layout.modules:
        matrix = weights[module.source]
        expected = layout.source_shape(module)
        if tuple(matrix.shape) != expected:
            name = module.source if module.stored else f"{module.name}.weight"
            raise ValueError(f"{name} has shape {tuple(matrix.shape)}, expected {expected}")
        weight = _weight_of(matrix, module.stored)
        stop = column + len(module.slices) * layout.head_dim
        unfolding[:, column:stop] = weight.T if module.basis_side == "input" else weight
        column = stop
    return unfolding


def _weight_of(matrix: Tensor, stored: StoredWeight | None) -> Tensor:
    """The weight ``(out, in)`` in its matrix of the dense checkpoint, a view."""
    if stored is None:
        return matrix
    which, parts = stored.part
    by_output = matrix.T if stored.transposed else matrix
    return by_output.chunk(parts)[which] if stored.concatenated else by_output[which::parts]


def dense_tensors(weights: Mapping[str, Tensor], layout: GroupLayout) -> dict[str, Tensor]:
    """Weights by module -> the tensors of the dense checkpoint.

    Args:
        weights: module name -> weight ``(out, in)``.
        layout: the group.

    Returns:
        Name below the block -> tensor.
    """
    counts: dict[str, int] = {}
    for module in layout.modules:
        if module.stored is not None and module.stored.index is not None:
            before = counts.get(module.stored.tensor, 0)
            counts[module.stored.tensor] = max(before, 1 + module.stored.index)
    tensors: dict[str, Tensor] = {}
    for module in layout.modules:
        weight, stored = weights[module.name], module.stored
        if stored is None:
            tensors[f"{module.name}.weight"] = weight
            continue
        if stored.tensor not in tensors:
            stack = () if stored.index is None else (counts[stored.tensor],)
            tensors[stored.tensor] = weight.new_empty(*stack, *layout.source_shape(module))
        tensor = tensors[stored.tensor]
        matrix = tensor if stored.index is None else tensor[stored.index]
        _weight_of(matrix, stored).copy_(weight)
    return tensors


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
