"""Model families: where each keeps its attention projections, and how they divide into heads.

A family is one JSON file in this directory, and adding one is adding a file:

    family              the family, as ``model_type`` in config.json calls it
    attention_path      path of the attention block in ``AutoModelForCausalLM``, with ``{layer}``
    base_model_prefix   the part of that path that a checkpoint may leave out
    modules             the block's linear modules, in the order of the unfolding:
        name            name of the module; its tensor is ``<name>.weight``, ``(out, in)``
        projections     ["q"], ["k"], ["v"] or ["o"]; several for a fused module, whose heads are
                        interleaved: q, k and v of head 0, then of head 1, ...
        basis_side      the side that U1 stands on: "input" where the module reads the residual
                        stream (Q, K, V), "output" where it writes it (O)

Sizes are not written down here: they come from the model's config.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from transformers import PretrainedConfig

from lestd_kernels.errors import LestdError
from lestd_kernels.tensorize import BasisSide, GroupLayout, ModuleLayout
from workers.checkpoint import ShardIndex
from workers.contracts import TensorRef

COMPRESSIBLE_DTYPES = ("BF16", "F16", "F32")
"""safetensors names of the dtypes that a compressed weight may have."""


@dataclass(frozen=True)
class SliceGroup:
    """One block of one layer: its slice group and where its weights lie.

    Attributes:
        layer: index of the decoder layer.
        scope: ``"attention"``, ``"ffn"`` or ``"experts"``.
        group: path of the block in the loaded model.
        tensor_prefix: path of the block in the checkpoint's tensor names; differs from `group`
            only where the checkpoint leaves the base model's prefix out.
        layout: how the weights divide into slices.
        tensors: module name -> its weight, in the layout's order; one dtype.
        norms: `ModuleLayout.reads` -> weight of the norm that makes this input, where one does.
    """

    layer: int
    scope: str
    group: str
    tensor_prefix: str
    layout: GroupLayout
    tensors: dict[str, TensorRef]
    norms: dict[str, TensorRef]


class AttentionModule(BaseModel):
    """One linear module of an attention block; fields as in the module's docstring."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    projections: tuple[Literal["q", "k", "v", "o"], ...] = Field(min_length=1)
    basis_side: BasisSide


class Architecture(BaseModel):
    """One model family; fields as in the module's docstring."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: str
    attention_path: str
    base_model_prefix: str
    modules: tuple[AttentionModule, ...] = Field(min_length=1)

    @field_validator("attention_path")
    @classmethod
    def _has_one_layer(cls, path: str) -> str:
        if path.count("{layer}") != 1:
            raise ValueError("must contain {layer} exactly once")
        return path

    def layout(self, config: PretrainedConfig) -> GroupLayout:
        """The slice group of every attention block of a model with this config.

        Raises:
            LestdError: the config's head counts or widths are not possible.
        """
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads or config.hidden_size < 1:
            raise LestdError(
                f"config.json has {heads} attention heads, {kv_heads} key/value heads and a "
                f"hidden size of {config.hidden_size}; expected positive numbers, the first a "
                "multiple of the second; use the config.json that belongs to the weights"
            )
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        counts = {"q": heads, "k": kv_heads, "v": kv_heads, "o": heads}
        modules = []
        for module in self.modules:
            if len({counts[p] for p in module.projections}) > 1:
                raise LestdError(
                    f"{module.name} fuses projections with {heads} and {kv_heads} heads, and "
                    f"{self.family} has one layout only for equal numbers; config.json must "
                    "have num_key_value_heads equal to num_attention_heads"
                )
            module_heads = range(counts[module.projections[0]])
            slices = tuple((p, head) for head in module_heads for p in module.projections)
            reads = "in" if module.basis_side == "input" else "heads"
            modules.append(ModuleLayout(module.name, module.basis_side, slices, reads))
        return GroupLayout(config.hidden_size, head_dim, tuple(modules))

    def groups(self, config: PretrainedConfig, index: ShardIndex, scope: str) -> list[SliceGroup]:
        """The blocks of every layer that a scope names, found in the checkpoint and checked.

        Raises:
            LestdError: there is no layer, a weight is absent, its shape is not what config.json
                says, or its dtype is not one that can be compressed, or differs within a block.
        """
        if config.num_hidden_layers < 1:
            raise LestdError(
                f"config.json has num_hidden_layers {config.num_hidden_layers}; expected at least "
                "1; use the config.json that belongs to the weights"
            )
        layout = self.layout(config)
        prefix = self._checkpoint_prefix(index)
        groups = []
        for layer in range(config.num_hidden_layers):
            path = self.attention_path.replace("{layer}", str(layer))
            tensor_prefix = path.removeprefix(prefix)
            tensors = {
                module.name: _find_weight(index, f"{tensor_prefix}.{module.name}.weight")
                for module in layout.modules
            }
            for module in layout.modules:
                _check_weight(tensors[module.name], layout.weight_shape(module))
            _check_same_dtype(list(tensors.values()))
            groups.append(SliceGroup(layer, "attention", path, tensor_prefix, layout, tensors, {}))
        return groups

    def _checkpoint_prefix(self, index: ShardIndex) -> str:
        """The part of `attention_path` that the checkpoint leaves out, perhaps nothing."""
        full = self.attention_path.partition("{layer}")[0]
        short = full.removeprefix(self.base_model_prefix)
        has_full = any(name.startswith(full) for name in index.tensors)
        has_short = any(name.startswith(short) for name in index.tensors)
        return self.base_model_prefix if has_short and not has_full else ""


def _find_weight(index: ShardIndex, name: str) -> TensorRef:
    if name not in index.tensors:
        raise LestdError(
            f"tensor {name} is absent from the checkpoint in {index.location}, which its "
            "config.json says it has; download it again, or use the config.json that belongs to it"
        )
    return index.tensors[name]


def _check_weight(ref: TensorRef, expected: tuple[int, int]) -> None:
    if ref.shape != expected:
        raise LestdError(
            f"tensor {ref.name} in {ref.shard} has the shape {list(ref.shape)}, and config.json "
            f"says {list(expected)}; use the config.json that belongs to the weights"
        )
    if ref.dtype not in COMPRESSIBLE_DTYPES:
        raise LestdError(
            f"tensor {ref.name} in {ref.shard} is stored as {ref.dtype}, and only "
            f"{', '.join(COMPRESSIBLE_DTYPES)} can be compressed; start from the model before it "
            "was quantized or converted"
        )


def _check_same_dtype(refs: list[TensorRef]) -> None:
    first = refs[0]
    for ref in refs[1:]:
        if ref.dtype != first.dtype:
            raise LestdError(
                f"tensor {ref.name} in {ref.shard} is stored as {ref.dtype} and {first.name} as "
                f"{first.dtype}; the weights of one attention block must have one dtype, save "
                "the model in one"
            )


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


def find_architecture(config: PretrainedConfig) -> Architecture:
    """The family of a model with this config.

    Raises:
        LestdError: the family is unknown; lists those known and says how to add one.
    """
    check_family(config.model_type)
    return architectures()[config.model_type]


def check_family(model_type: object) -> None:
    """Refuse a ``model_type`` of ``config.json`` that no architecture file describes.

    Raises:
        LestdError: the family is unknown; lists those known and says how to add one.
    """
    known = architectures()
    # Of a config.json that is no model's it may be of any type, hashable or not.
    if not isinstance(model_type, str) or model_type not in known:
        raise LestdError(
            f"model family {model_type!r} is unknown; known are {', '.join(known)}; to add one, "
            "put a JSON file like llama.json into orchestrator/architectures with its family, "
            "attention_path, base_model_prefix and modules (name, projections, basis_side), as "
            "explained in that directory's __init__.py"
        )
