"""Finds a model's architecture in its own modules, which Transformers builds without weights.

What a module is is read off its name, what it is like off its shape: head counts and widths are
not taken from config.json, which only has to agree. What is not recognised as part of a block
becomes a group of its own, and what cannot stays dense, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

from lestd_kernels.errors import LestdError
from lestd_kernels.modules.build import is_linear
from lestd_kernels.modules.experts import is_experts
from orchestrator.architectures.recognise import Recognised, Recogniser
from orchestrator.architectures.structure import FoundBlock, LeftDense, Structure
from workers.checkpoint.tensors import ShardIndex
from workers.host.loading import auto_class

_MOST_SHOWN = 300
_COUNTS = ("num_hidden_layers", "num_layers")


def infer(config: PretrainedConfig, index: ShardIndex) -> Structure:
    """The architecture of a model of any family that Transformers has.

    Args:
        config: the model's.
        index: of its checkpoint.

    Raises:
        LestdError: Transformers has no such decoder, no list of layers is found in it, or nothing
            that can be compressed.
    """
    model = build_without_weights(config)
    path, layers = decoder_layers(model)
    recogniser = Recogniser(model, index)
    found = _Found()
    for number, layer in enumerate(layers):
        found.add(number, recogniser.of_layer(f"{path}.{number}", layer))
    blocks = tuple(
        block.model_copy(update={"layers": tuple(numbers)})
        for block, numbers in found.blocks.values()
    )
    dense = tuple(
        LeftDense(layers=tuple(numbers), module=module, why=why)
        for (module, why), numbers in found.dense.items()
    )
    if not blocks:
        seen = "; ".join(f"{one.module}: {one.why}" for one in dense) or "no linear module"
        raise LestdError(
            f"nothing in the layers of this {config.model_type} model can be compressed; found "
            f"{seen}"
        )
    return Structure(
        family=config.model_type, transformers=transformers.__version__, blocks=blocks, dense=dense
    )


def build_without_weights(config: PretrainedConfig) -> Any:
    """The causal language model of a configuration, on the meta device; no code of a model is run.

    Raises:
        LestdError: Transformers has none, or cannot build it.
    """
    if config.is_encoder_decoder:
        raise LestdError(
            f"model family {config.model_type!r} has an encoder beside its decoder, and lestd "
            "compresses decoders alone"
        )
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config, trust_remote_code=False)
    except Exception as error:  # The code of each family fails in its own way.
        reason = " ".join(str(error).split())
        if len(reason) > _MOST_SHOWN:
            reason = f"{reason[:_MOST_SHOWN]}..."
        raise LestdError(
            f"Transformers {transformers.__version__} has no causal language model for this "
            f"config.json of the family {config.model_type!r} ({reason}); use the config.json that "
            "belongs to the weights, or a version of Transformers that has the family"
        ) from error
    return model.eval()


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder's layers.

    Raises:
        LestdError: there is none, or several might be.
    """
    config = model.config.get_text_config(decoder=True)
    seen: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer, _ in seen)
        if isinstance(module, nn.ModuleList) and not inside and _has_matrices(module):
            seen.append((path, module))
    counts = {getattr(config, name, None) for name in _COUNTS}
    fitting = [one for one in seen if len(one[1]) in counts]
    # Towers of other inputs are no part of the decoder, or stand deeper in the model.
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    parts = {id(one) for one in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    if any(id(one) in parts for _, one in fitting):
        fitting = [one for one in fitting if id(one[1]) in parts]
    depth = min((path.count(".") for path, _ in fitting), default=0)
    fitting = [one for one in fitting if one[0].count(".") == depth]
    if len(fitting) != 1:
        shown = ", ".join(f"{path} of {len(one)}" for path, one in seen) or "none"
        raise LestdError(
            f"the decoder layers of this {model.config.model_type} model cannot be told: expected "
            f"one list of {_or_none(counts)} layers, as config.json says, found {shown}"
        )
    return fitting[0]


def _or_none(counts: set[Any]) -> str:
    return " or ".join(sorted(str(one) for one in counts if one is not None)) or "?"


def _has_matrices(layers: nn.ModuleList) -> bool:
    return any(is_linear(one) or is_experts(one) for one in layers.modules())


_PATHS = ("path", "stored_path", "compressed_path", "norm")


@dataclass
class _Found:
    """What is alike in several layers, once."""

    blocks: dict[str, tuple[FoundBlock, list[int]]] = field(default_factory=dict)
    dense: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def add(self, number: int, recognised: Recognised) -> None:
        for one in recognised.blocks:
            paths = {name: getattr(one, name) for name in _PATHS}
            any_layer = {k: v and _of_any_layer(v, number) for k, v in paths.items()}
            block = one.model_copy(update=any_layer)
            self.blocks.setdefault(block.model_dump_json(), (block, []))[1].append(number)
        for path, why in recognised.dense:
            self.dense.setdefault((_of_any_layer(path, number), why), []).append(number)


def _of_any_layer(path: str, number: int) -> str:
    """A path with ``{layer}`` in the place of the layer's number, the first one in it."""
    parts = path.split(".")
    if str(number) in parts:
        parts[parts.index(str(number))] = "{layer}"
    return ".".join(parts)
