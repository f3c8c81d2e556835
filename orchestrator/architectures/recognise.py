"""What the linear modules of one decoder layer are: parts of a block, groups of their own, or dense."""

from __future__ import annotations

import inspect
import os.path
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lestd_kernels.modules.build import is_linear
from lestd_kernels.tensorize import BasisSide
from orchestrator.architectures.description import Stored
from orchestrator.architectures.fused import GATE_UP, GATED_QUERIES, QKV
from orchestrator.architectures.groups import LINEAR, Kind
from orchestrator.architectures.norms import input_norms
from orchestrator.architectures.stored_names import StoredNames
from orchestrator.architectures.structure import FoundBlock, FoundModule
from workers.checkpoint.tensors import ShardIndex

_QUERY = ("q_proj", "query", "project_q", "Wq", "wq")
_KEY = ("k_proj", "key", "project_k", "Wk", "wk")
_VALUE = ("v_proj", "value", "project_v", "Wv", "wv")
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")
_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj", "attention_out", "wo", "Wo", "o")
# Gate, up and down of a feed-forward block, or up and down.
_FEED_FORWARD = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("fc_in", "fc_out"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)
_FUSED_FEED_FORWARD = (("gate_up_proj", "down_proj"),)
_HEAD_DIMS = ("head_dim", "attention_head_size", "head_size", "dim_head")
# Parameters of an attention block beside its projections; any other makes it one of another kind.
_SINKS = ("sinks",)
# Of a smaller matrix there is nothing to gain: routers and gates that choose a scalar.
_LEAST_SIDE = 8
_ROUTER = re.compile(r"router|^gate$|switch|expert")

Sizes = tuple[int, int]
"""``(in, out)`` of a linear module."""


@dataclass
class Recognised:
    """What was found in one layer: blocks, and paths of what stays dense with the reasons."""

    blocks: list[FoundBlock] = field(default_factory=list)
    dense: list[tuple[str, str]] = field(default_factory=list)


class _Unfit(Exception):  # noqa: N818 - no error
    """Why modules are no block; the sentence says it."""


def is_experts(module: Any) -> bool:
    """Whether a module holds all experts of a layer as Transformers stacks them."""
    return hasattr(module, "_apply_gate") and isinstance(
        getattr(module, "down_proj", None), nn.Parameter
    )


class Recogniser:
    """Looks through the layers of one model.

    Args:
        model: on the meta device.
        index: of its checkpoint.
    """

    def __init__(self, model: Any, index: ShardIndex) -> None:
        self._model = model
        self._config: Any = model.config.get_text_config(decoder=True)
        self._family: str = self._config.model_type
        self._index = index
        self._stored = StoredNames(model, index.tensors)
        self._norms = input_norms(model)
        self._times = Counter(id(one) for _, one in model.named_modules(remove_duplicate=False))
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        self._tied = {*tied, *map(str, tied.values())}

    def of_layer(self, layer_path: str, layer: nn.Module) -> Recognised:
        """What a layer consists of.

        Args:
            layer_path: its path in the model.
            layer: the layer.
        """
        found = Recognised()
        parents: dict[str, dict[str, nn.Module]] = {}
        for path, module in layer.named_modules(prefix=layer_path):
            if is_experts(module):
                self._try(found, path, self._experts, path, module)
            elif is_linear(module):
                parent, _, name = path.rpartition(".")
                if why := self._why_dense(path, module):
                    found.dense.append((path, why))
                else:
                    parents.setdefault(parent, {})[name] = module
        for parent, leaves in parents.items():
            self._of_parent(found, parent, leaves)
        return found

    def _try(self, found: Recognised, path: str, make: Any, *args: Any) -> bool:
        """Add the block that `make` makes; where it cannot, its reason."""
        try:
            found.blocks.append(make(*args))
        except _Unfit as why:
            found.dense.append((path, str(why)))
            return False
        return True

    def _of_parent(self, found: Recognised, parent: str, leaves: dict[str, nn.Module]) -> None:
        """Blocks of the linear modules that one module has, and groups of those that are left."""
        left = dict(leaves)
        for make in (self._attention, self._feed_forward):
            try:
                block = make(parent, left)
            except _Unfit as why:
                found.dense.append((parent, f"no {make.__name__[1:]} block: {why}"))
                continue
            if block is not None:
                found.blocks.append(block)
                for module in block.modules:
                    del left[module.name]
        for name, module in left.items():
            self._try(found, f"{parent}.{name}", self._single, parent, name, module)

    def _why_dense(self, path: str, module: nn.Module) -> str | None:
        """Why a linear module is not touched, if it is not."""
        parent_path, _, name = path.rpartition(".")
        if self._times[id(module)] > 1:
            return "it stands in several layers at once"
        if f"{path}.weight" in self._tied:
            return "its weight is another's, too"
        sizes = sizes_of(module)
        if min(sizes) < _LEAST_SIDE or (_ROUTER.search(name) and sizes[1] <= min(sizes)):
            experts = {v for k, v in self._config.to_dict().items() if "expert" in k}
            if min(sizes) < _LEAST_SIDE or sizes[1] in {e for e in experts if type(e) is int}:
                return f"a router or a small matrix, {sizes[1]} x {sizes[0]}"
        slicing = getattr(self._config, "pretraining_tp", 1) or 1
        if _reads_weight(self._model.get_submodule(parent_path), name, slicing):
            return "the code of the model reads its weight, not only its output"
        return None

    def _attention(self, path: str, leaves: Mapping[str, nn.Module]) -> FoundBlock | None:
        """The block of the heads, if these modules are one."""
        q, k, v, o, fused = (
            next((name for name in names if name in leaves), None)
            for names in (_QUERY, _KEY, _VALUE, _OUTPUT, _FUSED)
        )
        separate = q is not None and k is not None and v is not None
        if o is None or not (separate or fused is not None):
            return None
        module = self._model.get_submodule(path)
        if others := _own_parameters(module):
            raise _Unfit(f"it has {others} beside its projections, as attention has not")
        if getattr(module, "is_cross_attention", False) or "cross" in path.rpartition(".")[2]:
            raise _Unfit("it attends to something else than the tokens before")
        head_dim = self._head_dim(module)
        inner, width = sizes_of(leaves[o])
        heads, rest = divmod(inner, head_dim)
        if rest:
            raise _Unfit(f"{o} reads {inner} channels, no multiple of the head width {head_dim}")
        self._check_heads(heads)
        if separate:
            assert q and k and v
            found = self._separate(leaves, (q, k, v), heads, head_dim, width)
        else:
            assert fused is not None
            found = [(fused, *self._fused(fused, sizes_of(leaves[fused]), heads, head_dim, width))]
        modules = [_described(name, "input", slices, repeat) for name, repeat, slices in found]
        modules.append(_described(o, "output", (("o", heads),)))
        return self._block("attention", path, width, head_dim, modules, leaves)

    def _separate(
        self,
        leaves: Mapping[str, nn.Module],
        names: tuple[str, str, str],
        heads: int,
        head_dim: int,
        width: int,
    ) -> list[tuple[str, int, tuple[tuple[str, int], ...]]]:
        (q_in, q_out), (k_in, k_out), (v_in, v_out) = (sizes_of(leaves[name]) for name in names)
        if {q_in, k_in, v_in} != {width}:
            raise _Unfit(f"its projections read {q_in}, {k_in} and {v_in} channels, not {width}")
        kv_heads, rest = divmod(k_out, head_dim)
        if rest or v_out != k_out or not kv_heads or heads % kv_heads:
            raise _Unfit(
                f"{heads} query heads of {head_dim}, and keys of {k_out} and values of {v_out} "
                "channels, are not heads of one width"
            )
        query: tuple[int, tuple[tuple[str, int], ...]] = (1, (("q", heads),))
        if q_out == 2 * heads * head_dim and self._family in GATED_QUERIES:
            query = (heads, (("q", 1), ("gate", 1)))
        elif q_out != heads * head_dim:
            raise _Unfit(f"{names[0]} has {q_out} rows, {heads} heads of {head_dim} were expected")
        kv = [(name, 1, ((p, kv_heads),)) for name, p in zip(names[1:], "kv", strict=True)]
        return [(names[0], *query), *kv]

    def _fused(
        self, name: str, sizes: Sizes, heads: int, head_dim: int, width: int
    ) -> tuple[int, tuple[tuple[str, int], ...]]:
        kv_heads, rest = divmod(sizes[1] - heads * head_dim, 2 * head_dim)
        if self._family not in QKV:
            raise _Unfit(
                f"{name} ({sizes[1]} x {sizes[0]}) fuses q, k and v, in an order that is not known "
                f"of {self._family}"
            )
        if sizes[0] != width or rest or kv_heads < 1 or heads % kv_heads:
            raise _Unfit(f"{name} is {sizes[1]} x {sizes[0]}, no q, k and v of width {head_dim}")
        return QKV[self._family](heads, kv_heads, self._config)

    def _head_dim(self, module: nn.Module) -> int:
        known = (getattr(module, name, None) for name in _HEAD_DIMS)
        own = next((one for one in known if type(one) is int and one > 0), None)
        if own is not None:
            return own
        config = self._config
        stated = getattr(config, "head_dim", None)
        heads = getattr(config, "num_attention_heads", None)
        if type(stated) is int and stated > 0:
            return stated
        if type(heads) is int and heads > 0:
            return int(config.hidden_size // heads)
        raise _Unfit("neither the block nor config.json tells the width of a head")

    def _check_heads(self, heads: int) -> None:
        """That config.json agrees with the number of heads."""
        stated: set[int] = set()
        for name in {*self._config.to_dict(), *self._config.attribute_map}:
            value = getattr(self._config, name, None)
            if "head" in name:
                stated.update(value if isinstance(value, list) else [value])
        if heads not in stated:
            raise _Unfit(f"its shapes make it {heads} heads, which config.json does not have")

    def _feed_forward(self, path: str, leaves: Mapping[str, nn.Module]) -> FoundBlock | None:
        for names in (*_FEED_FORWARD, *_FUSED_FEED_FORWARD):
            if all(name in leaves for name in names):
                break
        else:
            return None
        *into, out = names
        hidden, width = sizes_of(leaves[out])
        found = [(name, sizes_of(leaves[name])) for name in into]
        if all(sizes == (width, hidden) for _, sizes in found):
            projections = ("gate", "up")[-len(into) :]
            modules = [
                _described(name, "input", ((projection, 1),))
                for name, projection in zip(into, projections, strict=True)
            ]
        elif found[0][1] == (width, 2 * hidden) and len(into) == 1:
            if self._family not in GATE_UP:
                raise _Unfit(
                    f"{into[0]} ({2 * hidden} x {width}) fuses gate and up, in an order that is "
                    f"not known of {self._family}"
                )
            modules = [_described(into[0], "input", (("gate", 1), ("up", 1)))]
        else:
            raise _Unfit(f"{dict(found)} and {out} {hidden, width} do not fit one another")
        modules.append(_described(out, "output", (("down", 1),)))
        return self._block("ffn", path, width, hidden, modules, leaves)

    def _single(self, path: str, name: str, module: nn.Module) -> FoundBlock:
        inputs, outputs = sizes_of(module)
        described = _described(name, "input", ((LINEAR, 1),))
        return self._block(LINEAR, path, inputs, outputs, [described], {name: module})

    def _block(
        self,
        kind: Kind,
        path: str,
        width: int,
        head_dim: int,
        modules: list[FoundModule],
        leaves: Mapping[str, nn.Module],
    ) -> FoundBlock:
        """A block, with the places of its weights."""
        places: dict[str, Stored] = {}
        for module in modules:
            parameter = f"{path}.{module.name}.weight"
            stored = self._stored.of(parameter)
            if stored is None or len(stored.tensors) > 1 or len(stored.tensors[0]) > 1:
                raise _Unfit(
                    f"{parameter} is not one tensor of the checkpoint, and it is not known how it "
                    "is made of others"
                )
            places[module.name] = Stored(
                tensor=stored.tensors[0][0],
                part=stored.part,
                transposed=isinstance(leaves[module.name], Conv1D) != stored.transposed,
                concatenated=stored.part != (0, 1),
            )
        prefix = _common_path(place.tensor for place in places.values())
        for module in modules:
            if not self._stored.lands(f"{prefix}.{module.name}", f"{path}.{module.name}"):
                raise _Unfit(
                    f"Transformers would take {prefix}.{module.name} of a compressed model for "
                    "something else"
                )
        norms = {self._norms.get(f"{path}.{m.name}") for m in modules if m.basis_side == "input"}
        found = [_below(module, places[module.name], prefix) for module in modules]
        return FoundBlock(
            kind=kind,
            layers=(0,),
            path=path,
            stored_path=prefix,
            norm=self._stored_norm(norms),
            width=width,
            head_dim=head_dim,
            modules=tuple(found),
        )

    def _stored_norm(self, norms: set[str | None]) -> str | None:
        """The tensor of the norm that all modules read, if they read one."""
        [norm] = norms if len(norms) == 1 else [None]
        stored = None if norm is None else self._stored.of(norm)
        return None if stored is None else stored.name

    def _experts(self, path: str, module: Any) -> FoundBlock:
        if not module.has_gate or module.has_post_expert_norm:
            raise _Unfit("experts without a gate, or with a norm behind, have no compressed form")
        gate_up = module.gate_up_proj.shape
        count, width, hidden = module.down_proj.shape
        if module.is_transposed:
            width, hidden = hidden, width
        expected = (width, 2 * hidden) if module.is_transposed else (2 * hidden, width)
        if tuple(gate_up) != (count, *expected):
            raise _Unfit(f"gate_up_proj is {tuple(gate_up)}, expected {(count, *expected)}")
        places: list[Stored] = []
        for name, parts in (("gate_up_proj", 2), ("down_proj", 1)):
            stored = self._stored.of(f"{path}.{name}")
            if stored is None or len(stored.tensors) not in (1, parts):
                raise _Unfit(f"it is not known how {name} is stored in the checkpoint")
            flipped = bool(module.is_transposed) != stored.transposed
            if len(stored.tensors[0]) == 1 and len(stored.tensors) == 1:
                [tensor] = stored.tensors[0]
                interleaved = not module.is_concatenated
                places += [
                    Stored(
                        tensor=tensor,
                        part=(k, parts),
                        transposed=flipped,
                        concatenated=parts > 1 and not interleaved,
                    )
                    for k in range(parts)
                ]
            elif len(stored.tensors) == parts and not module.is_transposed:
                places += [Stored(tensor=_of_any_expert(one, count)) for one in stored.tensors]
            else:
                raise _Unfit(f"{name} is joined of {len(stored.tensors)} kinds of tensors")
        prefix = _common_path(place.tensor for place in places)
        roles: tuple[tuple[str, BasisSide], ...]
        roles = (("gate", "input"), ("up", "input"), ("down", "output"))
        for role, _ in roles:
            if not self._stored.lands(f"{prefix}.expert_0.{role}", f"{path}.expert_0.{role}"):
                raise _Unfit(
                    f"Transformers would take {prefix}.expert_0.{role} of a compressed model for "
                    "something else"
                )
        modules = [
            _below(_described(role, side, ((role, 1),)), place, prefix)
            for (role, side), place in zip(roles, places, strict=True)
        ]
        return FoundBlock(
            kind="experts",
            layers=(0,),
            path=path,
            stored_path=prefix,
            norm=self._stored_norm({self._norms.get(path)}),
            width=width,
            head_dim=hidden,
            experts=count,
            guard="gate_up_proj",
            modules=tuple(modules),
        )


def sizes_of(module: Any) -> Sizes:
    """``(in, out)`` of a linear module."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    return int(module.in_features), int(module.out_features)


def _described(
    name: str, side: BasisSide, slices: tuple[tuple[str, int], ...], repeat: int = 1
) -> FoundModule:
    return FoundModule(name=name, basis_side=side, slices=slices, repeat=repeat)


def _own_parameters(module: nn.Module) -> str:
    """What a module has that tells of another kind of layer: parameters, convolutions."""
    own = [name for name, _ in module.named_parameters(recurse=False) if name not in _SINKS]
    own += [
        name
        for name, child in module.named_children()
        if "conv" in type(child).__name__.lower() and not isinstance(child, Conv1D)
    ]
    return ", ".join(own)


def _reads_weight(parent: nn.Module, name: str, slicing: int) -> bool:
    """Whether the code of a module reads the weight of its part, but for its dtype and device.

    Some families slice weights as in training where `slicing`, their pretraining_tp, is above 1.
    """
    try:
        source = inspect.getsource(type(parent))
    except (OSError, TypeError):
        return False
    if slicing == 1 and "pretraining_tp" in source:
        return False
    return re.search(rf"\.{re.escape(name)}\.weight\b(?!\.(dtype|device))", source) is not None


def _common_path(names: Iterable[str]) -> str:
    """The path that all names have in common, without the last part of any, or an expert's."""
    paths = [name.split(".") for name in names]
    common = os.path.commonprefix(paths)
    shortest = min(map(len, paths))
    parts = list(common[: shortest - 1])
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
    raise _Unfit(f"{len(names)} tensors such as {names[0]} are not those of {count} experts")


def _below(module: FoundModule, place: Stored, prefix: str) -> FoundModule:
    """The module with its place below the block's stored path, where that is not as usual."""
    below = place.model_copy(update={"tensor": place.tensor.removeprefix(f"{prefix}.")})
    usual = Stored(tensor=f"{module.name}.weight")
    return module if below == usual else module.model_copy(update={"stored": below})
