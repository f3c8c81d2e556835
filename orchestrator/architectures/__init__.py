"""Model families: where each keeps its weights, and how they divide into slices.

A family is one JSON file in this directory, and adding one is adding a file:

    family              the family, as ``model_type`` in config.json calls it
    layer_path          path of a decoder layer in ``AutoModelForCausalLM``, with ``{layer}``
    base_model_prefix   the part of that path that a checkpoint may leave out
    attention           the attention block
    ffn                 the dense feed-forward block; absent where every layer has experts
    experts             the experts; absent where there are none

and a block:

    path                path of the block below the layer; "" for modules of the layer itself
    norm                the norm whose output the block reads, below the layer
    modules             the block's linear modules, in the order of the unfolding:
        name            name of the module; its tensor is ``<name>.weight``, ``(out, in)``
        projections     ["q"], ["k"], ["v"], ["o"], ["gate"], ["up"] or ["down"]; several for a
                        fused module, whose heads are interleaved: q, k and v of head 0, of head 1
        basis_side      the side that U1 stands on: "input" where the module reads the residual
                        stream (q, k, v, gate, up), "output" where it writes it (o, down)
    hidden_width        ffn and experts: name of the width between up and down in config.json

and experts:

    stored_path         path of the block in the checkpoint, where it is another one
    count               name of the number of experts in config.json
    guard               the parameter of the block in Transformers that stands for all of them
    modules             once for every expert, as module ``expert_<number>.<name>``, and
        stored.tensor       its tensor below the block: with ``{expert}`` one for each expert,
                            without, one that stacks them all along its first axis
        stored.part         [k, n] where the tensor interleaves n modules: columns k, k + n, ...
        stored.transposed   true where the tensor is ``(in, out)``

Sizes are not written down here: they come from the model's config.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import transformers
from pydantic import ValidationError
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from lestd_kernels.errors import LestdError
from orchestrator.architectures.groups import LINEAR, SCOPES, Architecture, SliceGroup
from orchestrator.architectures.structure import Structure
from workers.checkpoint.tensors import ShardIndex

__all__ = [
    "LINEAR",
    "SCOPES",
    "Architecture",
    "SliceGroup",
    "architectures",
    "check_family",
    "find_architecture",
    "parse_architecture",
]


@cache
def architectures() -> dict[str, Architecture]:
    """Every known family: model type -> architecture, sorted.

    Raises:
        LestdError: a file is not a valid architecture.
    """
    known = {}
    for file in sorted(files(__name__).iterdir(), key=lambda file: file.name):
        if file.name.endswith(".json"):
            architecture = parse_architecture(file.read_text(encoding="utf-8"), file.name)
            known[architecture.family] = architecture
    return known


def parse_architecture(text: str, file_name: str) -> Architecture:
    """Parse one architecture file.

    Raises:
        LestdError: names the file and each wrong field.
    """
    try:
        return Architecture.model_validate_json(text)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()
        )
        raise LestdError(
            f"orchestrator/architectures/{file_name} is not a valid architecture ({problems}); "
            "the fields are explained in orchestrator/architectures/__init__.py"
        ) from error


def find_architecture(config: PretrainedConfig, index: ShardIndex) -> Architecture | Structure:
    """The architecture of a model: that of its family's file, or what its modules tell.

    Args:
        config: the model's.
        index: of its checkpoint.

    Raises:
        LestdError: Transformers does not have the family, or nothing in the model is recognised.
    """
    check_family(config.model_type)
    known = architectures()
    if config.model_type in known:
        return known[config.model_type]
    # Transformers' modelling code is large, and families with a file do without.
    from orchestrator.architectures.infer import infer

    return infer(config, index)


def check_family(model_type: object) -> None:
    """Refuse a ``model_type`` of ``config.json`` that neither a file nor Transformers knows.

    Raises:
        LestdError: the family is unknown.
    """
    # Of a config.json that is no model's it may be of any type, hashable or not.
    if isinstance(model_type, str) and (
        model_type in architectures() or model_type in CONFIG_MAPPING_NAMES
    ):
        return
    raise LestdError(
        f"model family {model_type!r} is unknown to Transformers {transformers.__version__}, whose "
        "models lestd compresses; use a version that has it"
    )
