"""Where the weights of the blocks lie that were found in a model's modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lestd_kernels.modules.experts import expert_modules, into_experts, is_transposed
from lestd_kernels.tensorize import BasisSide, below
from orchestrator.architectures.description import Stored
from orchestrator.architectures.groups import Kind
from orchestrator.architectures.norms import input_norms
from orchestrator.architectures.stored_names import StoredNames
from orchestrator.architectures.structure import FoundBlock, FoundModule
from workers.checkpoint.tensors import ShardIndex

_ROLES: tuple[tuple[str, BasisSide], ...] = (("gate", "input"), ("up", "input"), ("down", "output"))

Sizes = tuple[int, int]
"""``(in, out)`` of a linear module."""


class Unfit(Exception):  # noqa: N818 - no error
    """Why modules are no block; the sentence says it."""


def sizes_of(module: Any) -> Sizes:
    """``(in, out)`` of a linear module."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    return int(module.in_features), int(module.out_features)


def described(
    name: str, side: BasisSide, slices: tuple[tuple[str, int], ...], repeat: int = 1
) -> FoundModule:
    """A module whose place is not known yet; arguments as its fields."""
    fields = {"name": name, "basis_side": side, "slices": slices, "repeat": repeat}
    return FoundModule.model_validate(fields)


class Places:
    """Finds the weights of one model.

    Args:
        model: on the meta device.
        index: of its checkpoint.
    """

    def __init__(self, model: Any, index: ShardIndex) -> None:
        self._stored = StoredNames(model, {name: ref.shape for name, ref in index.tensors.items()})
        self._norms = input_norms(model)

    def block(
        self,
        kind: Kind,
        path: str,
        width: int,
        head_dim: int,
        modules: list[FoundModule],
        leaves: Mapping[str, nn.Module],
    ) -> FoundBlock:
        """A block, with the places of its weights.

        Args:
            kind: of block.
            path: of the module in the model that has the linear modules.
            width: d.
            head_dim: p.
            modules: without their places.
            leaves: the linear modules by name.

        Raises:
            Unfit: a weight is not one tensor, or those of a compressed model would not be found.
        """
        places: dict[str, Stored] = {}
        for module in modules:
            parameter = below(path, f"{module.name}.weight")
            stored = self._stored.of(parameter)
            if stored is None or len(stored.tensors) > 1 or len(stored.tensors[0]) > 1:
                raise Unfit(
                    f"{module.name}.weight is not one tensor of the checkpoint, and how it is made "
                    "of others is not known"
                )
            places[module.name] = Stored(
                tensor=stored.tensors[0][0],
                part=stored.part,
                transposed=isinstance(leaves[module.name], Conv1D) != stored.transposed,
                concatenated=stored.part != (0, 1),
            )
        prefix = _common_path(place.tensor for place in places.values())
        landing = self._landing(path, prefix, [module.name for module in modules])
        if landing is None:
            raise Unfit("Transformers would take its compressed tensors for others")
        norms = {self._norms.get(below(path, m.name)) for m in modules if m.basis_side == "input"}
        found = [_below(module, places[module.name], prefix) for module in modules]
        return FoundBlock(
            kind=kind,
            layers=(0,),
            path=path,
            stored_path=prefix,
            compressed_path=None if landing == prefix else landing,
            norm=self._stored_norm(norms),
            width=width,
            head_dim=head_dim,
            modules=tuple(found),
        )

    def _landing(self, path: str, prefix: str, names: list[str]) -> str | None:
        """Where tensors of compressed modules may lie in a checkpoint, to be loaded into them."""
        for landing in (prefix, path):
            if (landing or not prefix) and all(
                self._stored.lands(below(landing, name), below(path, name)) for name in names
            ):
                return landing
        return None

    def _stored_norm(self, norms: set[str | None]) -> str | None:
        """The tensor of the norm that all modules read, if they read one."""
        [norm] = norms if len(norms) == 1 else [None]
        stored = None if norm is None else self._stored.of(norm)
        return None if stored is None else stored.name

    def experts(self, path: str, module: Any) -> FoundBlock:
        """The block of a layer's experts.

        Args:
            path: of the module in the model.
            module: which `is_experts`.

        Raises:
            Unfit: as `block` does, or the experts are of a kind that has no compressed form.
        """
        into = into_experts(module)
        if not isinstance(getattr(module, into, None), nn.Parameter):
            raise Unfit(f"experts without a parameter {into} have no compressed form")
        if getattr(module, "has_post_expert_norm", False) and getattr(module, "has_bias", False):
            raise Unfit("experts with a norm behind a bias have no compressed form")
        parts_of_into = len(expert_modules(module)[0]) - 1
        stacked, flip = getattr(module, into).shape, is_transposed(module)
        count, width, hidden = module.down_proj.shape
        if flip:
            width, hidden = hidden, width
        rows = parts_of_into * hidden
        expected = (width, rows) if flip else (rows, width)
        if tuple(stacked) != (count, *expected):
            raise Unfit(f"{into} is {tuple(stacked)}, expected {(count, *expected)}")
        places: list[Stored] = []
        for name, parts in ((into, parts_of_into), ("down_proj", 1)):
            stored = self._stored.of(f"{path}.{name}")
            if stored is None or len(stored.tensors) not in (1, parts):
                raise Unfit(f"it is not known how {name} is stored in the checkpoint")
            flipped = flip != stored.transposed
            if len(stored.tensors[0]) == 1 and len(stored.tensors) == 1:
                [tensor] = stored.tensors[0]
                interleaved = not getattr(module, "is_concatenated", True)
                places += [
                    Stored(
                        tensor=tensor,
                        part=(k, parts),
                        transposed=flipped,
                        concatenated=parts > 1 and not interleaved,
                    )
                    for k in range(parts)
                ]
            elif len(stored.tensors) == parts and not flip:
                places += [
                    Stored(tensor=one[0] if len(one) == 1 < count else _of_any_expert(one, count))
                    for one in stored.tensors
                ]
            else:
                raise Unfit(f"{name} is joined of {len(stored.tensors)} kinds of tensors")
        prefix = _common_path(place.tensor for place in places)
        for names in expert_modules(module):
            landing = self._landing(path, prefix, [f"expert_0.{name}" for name in names])
            if landing is not None:
                break
        else:
            raise Unfit("Transformers would take its compressed tensors for others")
        modules = [
            _below(described(name, side, ((role, 1),)), place, prefix)
            for name, (role, side), place in zip(names, _ROLES[-len(names) :], places, strict=True)
        ]
        return FoundBlock(
            kind="experts",
            layers=(0,),
            path=path,
            stored_path=prefix,
            compressed_path=None if landing == prefix else landing,
            norm=self._stored_norm({self._norms.get(path)}),
            width=width,
            head_dim=hidden,
            experts=count,
            guard=into,
            modules=tuple(modules),
        )


def _common_path(names: Iterable[str]) -> str:
    """The path that all names have in common, without the last part of any, or an expert's."""
    paths = [name.split(".") for name in names]
    shortest = min(map(len, paths))
    parts = []
    for together in list(zip(*paths, strict=False))[:-1]:
        if len(set(together)) > 1:
            break
        parts.append(together[0])
    # The module's own name and "weight" stand below the block.
    if all(path[-1] == "weight" for path in paths):
        parts = parts[: shortest - 2]
    if "{expert}" in parts:
        parts = parts[: parts.index("{expert}")]
    return ".".join(parts)


def _of_any_expert(names: tuple[str, ...], count: int) -> str:
    """A name with ``{expert}`` in the place of the experts' numbers."""
    if len(names) == count > 1:
        first, second = (name.split(".") for name in names[:2])
        differ = [i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b]
        if len(first) == len(second) and len(differ) == 1 and first[differ[0]] == "0":
            template = ".".join(
                "{expert}" if i == differ[0] else part for i, part in enumerate(first)
            )
            if all(template.replace("{expert}", str(e)) == name for e, name in enumerate(names)):
                return template
    raise Unfit(f"{len(names)} tensors such as {names[0]} are not those of {count} experts")


def _below(module: FoundModule, place: Stored, prefix: str) -> FoundModule:
    """The module with its place below the block's stored path, where that is not as usual."""
    below = place.model_copy(update={"tensor": place.tensor.removeprefix(f"{prefix}.")})
    usual = Stored(tensor=f"{module.name}.weight")
    return module if below == usual else module.model_copy(update={"stored": below})
