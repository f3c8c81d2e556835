"""What the linear modules of a decoder layer are: of a block, groups of their own, or dense."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lestd_kernels.modules.build import is_linear
from lestd_kernels.modules.experts import is_experts
from orchestrator.architectures.fused import GATE_UP, GATED_QUERIES, QKV
from orchestrator.architectures.groups import LINEAR
from orchestrator.architectures.placing import (
    Places,
    Sizes,
    Unfit,
    described,
    sizes_of,
)
from orchestrator.architectures.structure import FoundBlock
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
_IN_COMMON = "having its weight in common with another"
_TIED = (
    "tied, its weight is another module's too (mostly the embedding), which would change with it; "
    "to compress it save the model with a copy of its own and tie_word_embeddings false"
)
_EMBEDDING = (
    "an embedding: its rows are looked up, and the modules of a compressed model only multiply"
)
# Experts that no module of a compressed model stands in for.
_NO_FORM = {
    "DbrxExpertGLU": "the experts' matrices are one tensor, which the module around it cuts up",
    "JetMoeParallelExperts": "experts whose matrices are called apart, by the block's own code",
    "LongcatFlashExperts": "some of the experts have no down_proj, and compute nothing",
}
# Of a smaller matrix there is nothing to gain: routers and gates that choose a scalar.
_LEAST_SIDE = 8
_ROUTER = re.compile(r"router|^gate$|switch|expert")


@dataclass
class Recognised:
    """What was found in one layer: blocks, and paths of what stays dense with the reasons."""

    blocks: list[FoundBlock] = field(default_factory=list)
    dense: list[tuple[str, str]] = field(default_factory=list)


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
        self._places = Places(model, index)
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
                if self._tied & {f"{path}.{name}" for name, _ in module.named_parameters()}:
                    found.dense.append((path, _IN_COMMON))
                else:
                    self._try(found, path, self._places.experts, path, module)
            elif is_linear(module):
                parent, _, name = path.rpartition(".")
                if why := self._why_dense(path, module):
                    found.dense.append((path, why))
                else:
                    parents.setdefault(parent, {})[name] = module
            else:
                found.dense += _other_matrices(path, module)
        for parent, leaves in parents.items():
            self._of_parent(found, parent, leaves)
        return found

    def outside(self, layers_path: str) -> Recognised:
        """What stands outside of the decoder layers: each matrix is a group of its own.

        Args:
            layers_path: path of the list of the layers in the model.
        """
        found = Recognised()
        for path, module in self._model.named_modules():
            if path.startswith(f"{layers_path}."):
                continue
            if isinstance(module, nn.Embedding):
                found.dense.append((path, _EMBEDDING))
            elif is_linear(module):
                parent, _, name = path.rpartition(".")
                if why := self._why_dense(path, module):
                    found.dense.append((path, _TIED if why == _IN_COMMON else why))
                else:
                    self._try(found, path, self._single, parent, name, module)
            else:
                found.dense += _other_matrices(path, module)
        return found

    def _try(self, found: Recognised, path: str, make: Any, *args: Any) -> bool:
        """Add the block that `make` makes; where it cannot, its reason."""
        try:
            found.blocks.append(make(*args))
        except Unfit as why:
            found.dense.append((path, str(why)))
            return False
        return True

    def _of_parent(self, found: Recognised, parent: str, leaves: dict[str, nn.Module]) -> None:
        """Blocks of the linear modules that one module has, and groups of those that are left."""
        left = dict(leaves)
        for make in (self._attention, self._feed_forward):
            try:
                block = make(parent, left)
            except Unfit as why:
                found.dense.append((parent, f"no {make.__name__[1:]} block: {why}"))
                continue
            if block is not None:
                found.blocks.append(block)
                for one in block.modules:
                    del left[one.name]
        for name, module in left.items():
            self._try(found, f"{parent}.{name}", self._single, parent, name, module)

    def _why_dense(self, path: str, module: nn.Module) -> str | None:
        """Why a linear module is not touched, if it is not."""
        parent_path, _, name = path.rpartition(".")
        if self._times[id(module)] > 1:
            return "standing in several layers at once"
        if f"{path}.weight" in self._tied:
            return _IN_COMMON
        sizes = sizes_of(module)
        if min(sizes) < _LEAST_SIDE or (_ROUTER.search(name) and sizes[1] <= min(sizes)):
            experts = _numbers(self._config.to_dict(), "expert")
            if min(sizes) < _LEAST_SIDE or sizes[1] in experts:
                return "a router, or a small matrix"
        slicing = int(getattr(self._config, "pretraining_tp", 1) or 1)
        if _reads_weight(self._model.get_submodule(parent_path), name, slicing):
            return "read by the model's code itself, not only called"
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
            raise Unfit(f"it has {others} beside its projections, as attention has not")
        if getattr(module, "is_cross_attention", False) or "cross" in path.rpartition(".")[2]:
            raise Unfit("it attends to something else than the tokens before")
        head_dim = self._head_dim(module)
        inner, width = sizes_of(leaves[o])
        heads, rest = divmod(inner, head_dim)
        if rest:
            raise Unfit(f"{o} reads {inner} channels, no multiple of the head width {head_dim}")
        self._check_heads(heads)
        if separate:
            found = self._separate(leaves, (str(q), str(k), str(v)), heads, head_dim, width)
        else:
            fused = str(fused)
            found = [(fused, *self._fused(fused, sizes_of(leaves[fused]), heads, head_dim, width))]
        modules = [described(name, "input", slices, repeat) for name, repeat, slices in found]
        modules.append(described(o, "output", (("o", heads),)))
        return self._places.block("attention", path, width, head_dim, modules, leaves)

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
            raise Unfit(f"its projections read {q_in}, {k_in} and {v_in} channels, not {width}")
        kv_heads, rest = divmod(k_out, head_dim)
        if rest or v_out != k_out or not kv_heads or heads % kv_heads:
            raise Unfit(
                f"{heads} query heads of {head_dim}, and keys of {k_out} and values of {v_out} "
                "channels, are not heads of one width"
            )
        query: tuple[int, tuple[tuple[str, int], ...]] = (1, (("q", heads),))
        if q_out == 2 * heads * head_dim and self._family in GATED_QUERIES:
            query = (heads, (("q", 1), ("gate", 1)))
        elif q_out != heads * head_dim:
            raise Unfit(f"{names[0]} has {q_out} rows, {heads} heads of {head_dim} were expected")
        kv = [(name, 1, ((p, kv_heads),)) for name, p in zip(names[1:], "kv", strict=True)]
        return [(names[0], *query), *kv]

    def _fused(
        self, name: str, sizes: Sizes, heads: int, head_dim: int, width: int
    ) -> tuple[int, tuple[tuple[str, int], ...]]:
        kv_heads, rest = divmod(sizes[1] - heads * head_dim, 2 * head_dim)
        if self._family not in QKV:
            raise Unfit(
                f"{name} ({sizes[1]} x {sizes[0]}) fuses q, k and v, in an order that is not known "
                f"of {self._family}"
            )
        if sizes[0] != width or rest or kv_heads < 1 or heads % kv_heads:
            raise Unfit(f"{name} is {sizes[1]} x {sizes[0]}, no q, k and v of width {head_dim}")
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
        raise Unfit("neither the block nor config.json tells the width of a head")

    def _check_heads(self, heads: int) -> None:
        """That config.json agrees with the number of heads."""
        if heads not in _numbers(self._config.to_dict(), "head"):
            raise Unfit(f"its shapes make it {heads} heads, which config.json does not have")

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
                described(name, "input", ((projection, 1),))
                for name, projection in zip(into, projections, strict=True)
            ]
        elif found[0][1] == (width, 2 * hidden) and len(into) == 1:
            if self._family not in GATE_UP:
                raise Unfit(
                    f"{into[0]} ({2 * hidden} x {width}) fuses gate and up, in an order that is "
                    f"not known of {self._family}"
                )
            modules = [described(into[0], "input", (("gate", 1), ("up", 1)))]
        else:
            raise Unfit(f"{dict(found)} and {out} {hidden, width} do not fit one another")
        modules.append(described(out, "output", (("down", 1),)))
        return self._places.block("ffn", path, width, hidden, modules, leaves)

    def _single(self, path: str, name: str, module: nn.Module) -> FoundBlock:
        inputs, outputs = sizes_of(module)
        one = described(name, "input", ((LINEAR, 1),))
        return self._places.block(LINEAR, path, inputs, outputs, [one], {name: module})


def _other_matrices(path: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """Matrices that a module has which is neither linear nor experts."""
    for name, parameter in module.named_parameters(recurse=False):
        if sum(size > 1 for size in parameter.shape) > 1:
            kind = type(module).__name__
            yield f"{path}.{name}", _NO_FORM.get(kind, f"of a {kind}, which is no linear module")


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
    cls: Any = type(parent)
    source = _source_of(cls)
    if slicing == 1 and "pretraining_tp" in source:
        return False
    return re.search(rf"\.{re.escape(name)}\.weight\b(?!\.(dtype|device))", source) is not None


def _numbers(config: Any, about: str, counts: bool = False) -> set[int]:
    """The numbers that a configuration and its parts have under names with `about` in them."""
    if isinstance(config, dict):
        found = [_numbers(v, about, counts or about in str(k)) for k, v in config.items()]
    elif isinstance(config, list):
        found = [_numbers(one, about, counts) for one in config]
    else:
        return {config} if counts and type(config) is int else set()
    return set().union(*found)


@cache
def _source_of(cls: Any) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""
