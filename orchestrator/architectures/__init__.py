"""Model families: the names of their weights, and how these divide into slices.

Of most models this is found in their own modules (`orchestrator.architectures.infer`). A family
that is used much has a JSON file in this directory, which spares the driver Transformers' modelling
code, and goes before what would be found; adding one is adding a file. One in a user's own
directory (`user_file`) goes before both, and is held against the model as any that is given:

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

import os
from functools import cache
from importlib.resources import files
from pathlib import Path

import transformers
from pydantic import ValidationError
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lestd_kernels.errors import LestdError
from orchestrator.architectures.groups import LINEAR, SCOPES, Architecture, SliceGroup
from orchestrator.architectures.structure import LeftDense, Structure
from workers.checkpoint.tensors import ShardIndex
from workers.storage.untrusted_files import parse_json, read_regular

__all__ = [
    "DIRECTORY_VARIABLE",
    "LINEAR",
    "SCOPES",
    "Architecture",
    "LeftDense",
    "SliceGroup",
    "Structure",
    "check_family",
    "families",
    "find_architecture",
    "load_architecture",
    "parse_architecture",
    "read_architecture",
    "user_file",
]

DIRECTORY_VARIABLE = "LESTD_ARCHITECTURES"
"""Environment variable with the directory of a user's own descriptions."""

_SUFFIX = ".json"
_OUR_OWN = "orchestrator/architectures"


@cache
def families() -> tuple[str, ...]:
    """The families that have a file, sorted."""
    names = (file.name for file in files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)))


@cache
def load_architecture(family: str) -> Architecture:
    """The architecture of one of `families`; no other family's file is looked at.

    Raises:
        LestdError: its file is not a valid architecture.
    """
    file = files(__name__) / f"{family}{_SUFFIX}"
    found = parse_architecture(file.read_text(encoding="utf-8"), f"{_OUR_OWN}/{file.name}")
    assert isinstance(found, Architecture)
    return found


def user_file(family: str) -> Path | None:
    """The user's own description of a family: ``FAMILY.json`` in the directory that the environment
    variable `DIRECTORY_VARIABLE` names; None where there is none. Others are not looked at.

    Raises:
        LestdError: the variable names no directory.
    """
    named = os.environ.get(DIRECTORY_VARIABLE)
    if not named:
        return None
    directory = Path(named).absolute()
    if not directory.is_dir():
        raise LestdError(
            f"{DIRECTORY_VARIABLE} is {directory}, which is no directory; expected one with "
            f"descriptions of families (FAMILY{_SUFFIX}); correct or unset it"
        )
    file = directory / f"{family}{_SUFFIX}"
    return file if os.path.lexists(file) else None


def read_architecture(path: Path) -> Architecture | Structure:
    """The architecture that a user's file describes.

    Raises:
        LestdError: it cannot be read, or is neither of the two kinds of descriptions.
    """
    try:
        text = read_regular(path).decode()
        parse_json(text)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise LestdError(f"{path} cannot be read ({reason}); name a JSON file") from error
    return parse_architecture(text, str(path))


def parse_architecture(text: str, path: str) -> Architecture | Structure:
    """Parse a description of a family, or of a model's own structure, which has ``blocks``.

    Args:
        text: the JSON text.
        path: of the file, for messages.

    Raises:
        LestdError: names the file and each wrong field.
    """
    kind: type[Architecture | Structure] = Structure if '"blocks"' in text else Architecture
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()
        )
        module = "structure" if kind is Structure else "__init__"
        raise LestdError(
            f"{path} is not a valid architecture ({problems}); the fields are explained in "
            f"{_OUR_OWN}/{module}.py"
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
    if config.model_type in families():
        known = load_architecture(config.model_type)
        if not known.stacks_experts(index):
            return known
    # Transformers' modelling code is large, and families with a file do without.
    from orchestrator.architectures.infer import infer

    return infer(config, index)


def check_family(model_type: object) -> None:
    """Refuse a ``model_type`` of ``config.json`` that neither a file nor Transformers knows.

    Raises:
        LestdError: the family is unknown.
    """
    # Of a config.json that is no model's it may be of any type, hashable or not.
    if isinstance(model_type, str) and (model_type in families() or model_type in CONFIG_MAPPING):
        return
    raise LestdError(
        f"model family {model_type!r} is unknown to Transformers {transformers.__version__}, whose "
        "models lestd compresses; use a version that has it"
    )
