"""Holds a description that was given against the model that it is of.

A file that a user names, or a run that was begun with another version of Transformers, may say what
is not so. Without this it would show when the compressed model is loaded, after all the work, or
not at all, where a tensor is named in the place of another of the same shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from lestd_kernels.errors import LestdError
from lestd_kernels.modules.build import is_linear
from lestd_kernels.modules.experts import expert_modules, is_experts, is_transposed
from lestd_kernels.tensorize import GroupLayout, StoredWeight
from orchestrator.architectures.groups import LINEAR, SliceGroup, find_weights
from orchestrator.architectures.infer import build_without_weights
from orchestrator.architectures.placing import Places, Unfit, described, sizes_of
from workers.checkpoint.tensors import ShardIndex
from workers.contracts import TensorRef


def require_modules(
    groups: Sequence[SliceGroup], config: PretrainedConfig, index: ShardIndex
) -> None:
    """Refuse slice groups that are not what Transformers' modules of the model are.

    Args:
        groups: as a description has them.
        config: the model's.
        index: of its checkpoint.

    Raises:
        LestdError: a module is not in the model, has another shape there, is named twice, or its
            weight is another tensor; or Transformers cannot build the model.
    """
    model = build_without_weights(config)
    places = Places(model, index)
    seen: set[str] = set()
    for group in groups:
        path = group.block.rpartition(".")[0] if group.scope == LINEAR else group.block
        block = _submodule(model, path)
        names = [module.name for module in group.layout.modules]
        full = [f"{path}.{name}" if path else name for name in names]
        problem = _wrong_modules(block, group) or _wrong_tensors(group, path, block, places, index)
        width = group.layout.width
        if problem is None and any(ref.shape != (width,) for ref in group.norms.values()):
            problem = f"its norm is no vector of {width}"
        if twice := sorted({name for name in full if full.count(name) > 1} | (seen & {*full})):
            problem = f"{twice[0]} is named twice"
        if problem is not None:
            raise LestdError(
                f"the architecture that was given says of {group.block} what is not so of this "
                f"{config.model_type} model: {problem}; correct it, or begin anew with what lestd "
                "plan MODEL --show-architecture prints"
            )
        seen.update(full)


def _submodule(model: Any, path: str) -> nn.Module | None:
    try:
        found: nn.Module = model.get_submodule(path)
    except AttributeError:
        return None
    return found


def _wrong_modules(block: Any, group: SliceGroup) -> str | None:
    """What is wrong with a block's modules; None where they are in the model as described."""
    layout = group.layout
    if (group.scope == "experts") != (layout.guard is not None):
        return "experts need a guard, and nothing else has one"
    if group.scope != "experts":
        for module in layout.modules:
            linear = block and _submodule(block, module.name)
            if linear is None or not is_linear(linear):
                return f"it has no linear module {module.name}"
            if (shape := sizes_of(linear)[::-1]) != (expected := layout.weight_shape(module)):
                return f"{module.name} is {list(shape)} in the model, and {list(expected)} there"
        return None
    guard = getattr(block, str(layout.guard), None)
    if not is_experts(block) or not isinstance(guard, nn.Parameter):
        return f"there are no experts with a parameter {layout.guard}"
    count, width, hidden = block.down_proj.shape
    if is_transposed(block):
        width, hidden = hidden, width
    described = [module.name for module in layout.modules]
    known = (
        [f"expert_{e}.{name}" for e in range(count) for name in one]
        for one in expert_modules(block)
    )
    if described not in known or (layout.width, layout.head_dim) != (width, hidden):
        each = " or ".join(", ".join(names) for names in expert_modules(block))
        return f"it has {count} experts of {width} and {hidden}, with {each} each"
    return None


def _wrong_tensors(
    group: SliceGroup, path: str, block: Any, places: Places, index: ShardIndex
) -> str | None:
    """What is wrong with where a block's weights lie; None where Transformers finds them there."""
    try:
        if group.scope == "experts":
            found = places.experts(path, block)
        else:
            modules = [
                described(one.name, one.basis_side, tuple((p, 1) for p, _ in one.slices))
                for one in group.layout.modules
            ]
            leaves = {one.name: block.get_submodule(one.name) for one in modules}
            width, head_dim = group.layout.width, group.layout.head_dim
            found = places.block(group.scope, path, width, head_dim, modules, leaves)
    except Unfit as why:
        return str(why)
    prefix = found.compressed_path or found.stored_path
    if prefix != group.tensor_prefix:
        return f"its compressed tensors belong below {prefix}, not below {group.tensor_prefix}"
    layout = found.layout()
    expected = _weights(layout, find_weights(index, found.stored_path, layout))
    given = _weights(group.layout, group.tensors)
    for name, (tensor, *how) in given.items():
        if (tensor, *how) != expected[name]:
            return f"the weight of {name} is not {tensor}, or stands otherwise in it"
    return None


def _weights(layout: GroupLayout, tensors: Mapping[str, TensorRef]) -> dict[str, tuple[Any, ...]]:
    """Where the weight of each module lies, by the module's name."""
    usual = StoredWeight("")
    return {
        module.name: (ref.name, ref.byte_range, how.part, how.transposed, how.concatenated)
        for module in layout.modules
        for ref, how in [(tensors[module.source], module.stored or usual)]
    }
