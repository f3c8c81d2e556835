"""What of each family that Transformers has can be compressed: the table of ``lestd families``.

Each family's tiny model is built without weights, and its checkpoint is made up of the names that
Transformers would save it under: nothing is read, nothing computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from lestd_kernels.errors import LestdError
from orchestrator.architectures import find_architecture, read_architecture, user_file
from orchestrator.architectures.given import require_modules
from orchestrator.architectures.groups import Architecture
from orchestrator.architectures.infer import build_without_weights, decoder_layers
from orchestrator.architectures.structure import Structure
from orchestrator.architectures.tiny import tiny_config
from workers.checkpoint.tensors import ShardIndex
from workers.contracts import TensorRef

_MOST_SHOWN = 200

Known = Literal["file", "modules", "yours", "refused", "untried"]


@dataclass(frozen=True)
class Coverage:
    """What is known of one family.

    Attributes:
        family: its ``model_type``.
        known: by its own file, by what its modules show, by the user's file, or not at all; or
            untried, where there is no tiny model to tell by.
        attention: share of the decoder layers that have an attention block.
        covered: elements of matrices in the decoder layers that some task compresses / all.
        why: what stays dense, or is no block, with the reasons; or why nothing is known.
        file: the user's file, where that is what is known.
    """

    family: str
    known: Known
    attention: float
    covered: float
    why: tuple[str, ...]
    file: str | None = None


def decoder_families() -> tuple[str, ...]:
    """The families with a model that writes text and is no encoder's, sorted."""
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys()
    return tuple(sorted(causal | MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys()))


def coverage(family: str) -> Coverage | None:
    """What of a family's tiny model can be compressed; None where it has an encoder beside it."""
    try:
        config = tiny_config(family)
        if config.is_encoder_decoder:
            return None
        model = build_without_weights(config)
        index = made_up_index(model)
    except Exception as error:  # The code of each family fails in its own way.
        reason = " ".join(str(error).split())[:_MOST_SHOWN]
        return Coverage(family, "untried", 0.0, 0.0, (f"no tiny model of it: {reason}",))
    file = user_file(family)
    yours = None if file is None else str(file)
    try:
        build_without_weights(model.config)  # What it is saved as may be no model of its own.
        found = find_architecture(config, index) if file is None else read_architecture(file)
        groups = found.groups(config, index, "all")
        if file is not None:
            require_modules(groups, config, index)
        path, layers = decoder_layers(model)
    except LestdError as error:
        return Coverage(family, "refused", 0.0, 0.0, (str(error),), yours)
    matrices = {
        f"{path}.{name}": parameter.numel()
        for name, parameter in layers.named_parameters()
        if parameter.dim() > 1
    }
    covered = sum(group.layout.elements for group in groups)
    attention = {group.layer for group in groups if group.scope == "attention"}
    known: Known = "file" if isinstance(found, Architecture) else "modules"
    if file is not None:
        known = "yours"
    return Coverage(
        family,
        known,
        len(attention) / len(layers),
        covered / sum(matrices.values()),
        tuple(dict.fromkeys(_reasons(found))),
        yours,
    )


def _reasons(found: Architecture | Structure) -> Iterator[str]:
    modules: dict[str, list[str]] = {}
    for one in found.dense if isinstance(found, Structure) else ():
        name = one.module.partition("{layer}.")[2] or one.module
        if name not in modules.setdefault(one.why, []):
            modules[one.why].append(name)
    for why, names in modules.items():
        yield f"{', '.join(names)}: {why}"


def made_up_index(model: Any) -> ShardIndex:
    """The index of the checkpoint that Transformers would write of a model without weights."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    state = {name: one for name, one in model.state_dict().items() if name not in tied}
    tensors = {}
    for name, tensor in sorted(revert_weight_conversion(model, state).items()):
        stored = 4 * math.prod(tensor.shape)
        tensors[name] = TensorRef(name, "made up", tuple(tensor.shape), "F32", (0, stored))
    return ShardIndex("a made-up checkpoint", ("made up",), tensors)
