"""A model's architecture as it was found in its modules: numbers and names, layer by layer.

Where a `Description` names fields of config.json, this states what is there, so it says the same
whatever version of Transformers reads the model. As a JSON file::

    family         ``model_type`` of config.json
    transformers   version of the library whose modules were looked at
    blocks         slice groups, each with
        kind           "attention", "ffn", "experts" or "linear"
        layers         indices of the decoder layers that have such a block
        path           of the block in the loaded model, with ``{layer}``
        stored_path    of the block in the checkpoint
        compressed_path  of the block in a compressed model's checkpoint, where it must be another
        norm           tensor whose square scales the block's input, or null where none is known
        width          d, columns of the residual stream's side
        head_dim       p, the width of a slice
        experts        how many; 1 where there are none
        guard          see `lestd_kernels.tensorize.GroupLayout`
        modules        the block's linear modules, in the order of the unfolding:
            name           below the block
            basis_side     see `lestd_kernels.tensorize.ModuleLayout`
            slices         what follows one another in the matrix, as [projection, how many] ...
            repeat         ... and how often: q, k and v of each head in turn are repeated
            stored         where the weight lies, if not in ``<name>.weight``; fields as in the
                           package's docstring, with ``{expert}`` for each of the experts
    dense          modules that no block has, each with its layers and why
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import Field

from lestd_kernels.errors import LestdError
from lestd_kernels.tensorize import BasisSide, GroupLayout, ModuleLayout, StoredWeight, below
from orchestrator.architectures.description import Projection, Stored, _Described
from orchestrator.architectures.groups import (
    BLOCK_NAMES,
    LINEAR,
    Kind,
    SliceGroup,
    find_weights,
    reads,
)
from workers.checkpoint.tensors import ShardIndex

_MATRICES = 8
"""Of the largest size that a block has, at most."""


class FoundModule(_Described):
    """One linear module of a block."""

    name: str
    basis_side: BasisSide
    slices: tuple[tuple[Projection | Literal["linear"], Annotated[int, Field(ge=1)]], ...] = Field(
        min_length=1
    )
    repeat: int = Field(default=1, ge=1)
    stored: Stored | None = None


class FoundBlock(_Described):
    """Blocks of the same kind and sizes, one in each of some layers."""

    kind: Kind
    layers: tuple[int, ...] = Field(min_length=1)
    path: str
    stored_path: str
    compressed_path: str | None = None
    norm: str | None
    width: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    experts: int = Field(default=1, ge=1)
    guard: str | None = None
    modules: tuple[FoundModule, ...] = Field(min_length=1)

    def layout(self) -> GroupLayout:
        """The slice group of each of the blocks."""
        modules = [
            self._module(module, expert)
            for expert in range(self.experts)
            for module in self.modules
        ]
        return GroupLayout(self.width, self.head_dim, tuple(modules), self.guard)

    def slice_count(self) -> int:
        """Number of slices, without enumerating them."""
        of_one = (m.repeat * sum(count for _, count in m.slices) for m in self.modules)
        return self.experts * sum(of_one)

    def _module(self, module: FoundModule, expert: int) -> ModuleLayout:
        is_input = module.basis_side == "input"
        read = reads(self.kind, is_input).replace("{expert}", str(expert))
        if self.kind != "experts":
            return ModuleLayout(
                module.name, module.basis_side, _slices(module), read, _stored(module.stored, None)
            )
        slices = tuple((projection, expert) for projection, _ in _slices(module))
        stored = _stored(module.stored, expert)
        name = f"expert_{expert}.{module.name}"
        return ModuleLayout(name, module.basis_side, slices, read, stored)


class LeftDense(_Described):
    """A module that stays as it is."""

    layers: tuple[int, ...]
    module: str
    why: str


class Structure(_Described):
    """One model's architecture; fields as in the module's docstring."""

    family: str
    transformers: str
    blocks: tuple[FoundBlock, ...]
    dense: tuple[LeftDense, ...] = ()

    def groups(self, _: object, index: ShardIndex, scope: str) -> list[SliceGroup]:
        """The blocks in scope, by layer, found in the checkpoint and checked.

        Args:
            _: the model's config, from which nothing is needed.
            index: of the checkpoint.
            scope: one of `orchestrator.architectures.SCOPES`.

        Raises:
            LestdError: there is no block in scope; a weight is absent, has another shape than the
                model's modules, or a dtype that cannot be compressed, or differs within a block.
        """
        chosen = [block for block in self.blocks if scope in (block.kind, "all")]
        if not chosen:
            present = sorted({block.kind for block in self.blocks})
            why = "; ".join(dict.fromkeys(f"{one.module}: {one.why}" for one in self.dense))
            raise LestdError(
                f"scope {scope} asks for {BLOCK_NAMES.get(scope, 'blocks')}, and none was found "
                f"in this {self.family} model" + (f" ({why})" if why else "") + "; choose "
                f"{', '.join([*present, 'all'])}"
            )
        # Every slice has a row or a column of one of the block's matrices for itself.
        room = max([0, *(size for ref in index.tensors.values() for size in ref.shape)])
        for block in chosen:
            if (count := block.slice_count()) > _MATRICES * max(room, len(index.tensors)):
                raise LestdError(
                    f"the architecture has {count} slices in {block.path}, more than the tensors "
                    "have room for; use the one that belongs to the weights"
                )
        groups = [group for block in chosen for group in groups_of(block, index)]
        kinds = get_args(Kind)
        return sorted(groups, key=lambda group: (group.layer, kinds.index(group.scope)))


def groups_of(block: FoundBlock, index: ShardIndex) -> Iterator[SliceGroup]:
    """The slice groups of a block, one in each of its layers; raises as `Structure.groups`."""
    layout = block.layout()
    for layer in block.layers:
        path, stored, compressed, norm = (
            (one or "").replace("{layer}", str(layer))
            for one in (block.path, block.stored_path, block.compressed_path, block.norm)
        )
        tensors = find_weights(index, stored, layout)
        scale = index.tensors.get(norm)
        inputs = [m.reads for m in layout.modules if m.basis_side == "input"]
        norms = {} if scale is None else dict.fromkeys(inputs, scale)
        name = below(path, layout.modules[0].name) if block.kind == LINEAR else path
        prefix = compressed or stored
        elsewhere = stored if compressed else ""
        yield SliceGroup(layer, block.kind, name, prefix, layout, tensors, norms, elsewhere)


def _slices(module: FoundModule) -> tuple[tuple[str, int], ...]:
    """``(projection, number)`` of each slice of a module, in the order of its matrix."""
    numbers: dict[str, int] = {}
    slices = []
    for _ in range(module.repeat):
        for projection, count in module.slices:
            first = numbers.get(projection, 0)
            slices += [(projection, first + i) for i in range(count)]
            numbers[projection] = first + count
    return tuple(slices)


def _stored(described: Stored | None, expert: int | None) -> StoredWeight | None:
    if described is None:
        return None
    stacked = expert is not None and described.stacked
    return StoredWeight(
        described.tensor.replace("{expert}", str(expert)),
        expert if stacked else None,
        described.part,
        described.transposed,
        described.concatenated,
    )
