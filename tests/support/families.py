"""Tiny random models of every supported family, saved as sharded safetensors.

Every parameter is random, biases and norms too, so that a mistake anywhere shows in the logits.
Sizes are small and odd-ish on purpose: 7 divides the vocabulary's and nothing else's, head widths
are not powers of two, and where the family allows it heads x head_dim is not the hidden size.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from lestd_kernels.formats.shared_tucker import CORE_NAME, SharedTucker
from lestd_kernels.storage.codecs import CODECS
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.tensorize import GroupLayout, ModuleLayout

VOCABULARY = 91
POSITIONS = 64

_COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_LLAMA_LIKE = {
    **_COMMON,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
}

CONFIGS: dict[str, PretrainedConfig] = {
    "opt": OPTConfig(
        **_COMMON | {"tie_word_embeddings": True},
        hidden_size=48,
        ffn_dim=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=48,
        dropout=0.0,
    ),
    "gptj": GPTJConfig(
        **{k: v for k, v in _COMMON.items() if k != "max_position_embeddings"},
        n_positions=POSITIONS,
        n_embd=40,
        n_layer=2,
        n_head=4,
        rotary_dim=6,
    ),
    "llama": LlamaConfig(**_LLAMA_LIKE),
    "llama-gqa": LlamaConfig(**_LLAMA_LIKE | {"num_key_value_heads": 2, "attention_bias": True}),
    "mistral": MistralConfig(**_LLAMA_LIKE | {"num_key_value_heads": 1, "sliding_window": 8}),
    "qwen2": Qwen2Config(**_LLAMA_LIKE | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": Qwen3Config(
        **_LLAMA_LIKE | {"hidden_size": 40, "num_key_value_heads": 2}, head_dim=14
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **_LLAMA_LIKE | {"hidden_size": 40, "num_key_value_heads": 2, "num_hidden_layers": 3},
        head_dim=14,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    ),
    "mixtral": MixtralConfig(
        **_LLAMA_LIKE | {"num_key_value_heads": 2, "intermediate_size": 20},
        num_local_experts=5,
        num_experts_per_tok=2,
    ),
    "gpt_oss": GptOssConfig(
        **_LLAMA_LIKE | {"hidden_size": 40, "num_key_value_heads": 2, "intermediate_size": 20},
        head_dim=14,
        sliding_window=8,
        num_local_experts=5,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    ),
    "granite": GraniteConfig(**_LLAMA_LIKE | {"num_key_value_heads": 2}),
    "smollm3": SmolLM3Config(**_LLAMA_LIKE | {"num_key_value_heads": 2}),
    "gpt_neox": GPTNeoXConfig(
        **_COMMON,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
        },
    ),
}
FAMILIES: tuple[str, ...] = tuple(CONFIGS)
MHA_FAMILIES: tuple[str, ...] = ("opt", "gptj", "llama", "gpt_neox")
"""Families whose tiny model has as many key/value heads as query heads."""


def save_tiny(
    family: str,
    directory: Path,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "50KB",
    seed: int = 0,
) -> Path:
    """Write a seeded random model of `family` to `directory` and return `directory`."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.15 * noise)
            else:
                parameter.copy_(0.2 * noise + (0.0 if name.endswith("bias") else 1.0))
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def attention_groups(family: str) -> dict[str, GroupLayout]:
    """Path of every attention block -> its slice group, written down by hand, as an oracle."""
    config = CONFIGS[family]
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    path, output = {
        "opt": ("model.decoder.layers.{}.self_attn", "out_proj"),
        "gptj": ("transformer.h.{}.attn", "out_proj"),
        "gpt_neox": ("gpt_neox.layers.{}.attention", "dense"),
    }.get(family, ("model.layers.{}.self_attn", "o_proj"))

    modules = [
        ModuleLayout("q_proj", "input", tuple(("q", i) for i in range(heads))),
        ModuleLayout("k_proj", "input", tuple(("k", i) for i in range(kv_heads))),
        ModuleLayout("v_proj", "input", tuple(("v", i) for i in range(kv_heads))),
    ]
    if family == "gpt_neox":
        fused = tuple((projection, i) for i in range(heads) for projection in "qkv")
        modules = [ModuleLayout("query_key_value", "input", fused)]
    modules.append(ModuleLayout(output, "output", tuple(("o", i) for i in range(heads))))
    layout = GroupLayout(config.hidden_size, head_dim, tuple(modules))
    return {path.format(layer): layout for layer in range(config.num_hidden_layers)}


def random_tucker(
    layout: GroupLayout,
    mode: str,
    codec: str,
    seed: int = 0,
    ranks: tuple[int, int] = (17, 7),
    density: float = 0.3,
    dtype: torch.dtype = torch.float32,
) -> SharedTucker:
    """A group with random orthonormal factors and random sparse cores, stored in `codec`.

    `mode` is ``"identity"``, or ``"learned"`` with R3 = 3.
    """
    generator = torch.Generator().manual_seed(seed)
    R1, R2 = ranks

    def orthonormal(rows: int, rank: int) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, rank, generator=generator)).Q.to(dtype)

    def core(columns: int) -> EncodedCore:
        keep = torch.rand(R1, columns, generator=generator) < density
        M = (torch.randn(R1, columns, generator=generator) * keep).to(dtype)
        return EncodedCore(codec, R1, columns, int(M.count_nonzero()), CODECS[codec].encode(M))

    U1, U2 = orthonormal(layout.width, R1), orthonormal(layout.head_dim, R2)
    if mode == "learned":
        heads = len(layout.slices) // 4
        cores = {CORE_NAME: core(3 * heads * R2)}
        return SharedTucker(layout, U1, U2, cores, orthonormal(4, 3))
    cores = {module.name: core(len(module.slices) * R2) for module in layout.modules}
    return SharedTucker(layout, U1, U2, cores)


def write_compressed(
    dense: dict[str, Tensor],
    config: PretrainedConfig,
    groups: dict[str, SharedTucker],
    directory: Path,
    shards: int = 3,
) -> Path:
    """Write a compressed model from a dense state dict, by hand, and return `directory`."""
    gone = {f"{path}.{m.name}.weight" for path, g in groups.items() for m in g.layout.modules}
    tensors = {name: tensor for name, tensor in dense.items() if name not in gone}
    for path, group in groups.items():
        tensors |= group.named_tensors(path)
    directory.mkdir(parents=True)
    weight_map = {}
    for i in range(shards):
        file = f"part-{i}.safetensors"
        names = sorted(tensors)[i::shards]
        save_file({n: tensors[n] for n in names}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    quantization_config = {
        "quant_method": "lestd",
        "format_version": 1,
        "groups": [group.describe(path) for path, group in groups.items()],
    }
    config_json = config.to_dict() | {"quantization_config": quantization_config}
    (directory / "config.json").write_text(json.dumps(config_json))
    return directory


def save_pair(family: str, mode: str, codec: str, root: Path) -> tuple[Path, PreTrainedModel]:
    """A compressed directory below `root`, and the dense model with W-hat put back."""
    dense = AutoModelForCausalLM.from_pretrained(save_tiny(family, root / "dense"))
    groups = {
        path: random_tucker(layout, mode, codec, seed)
        for seed, (path, layout) in enumerate(attention_groups(family).items())
    }
    # As on disk, where experts are apart and no tied weight is; GPT-NeoX's head has an older name.
    state = {
        name.replace("embed_out", "lm_head"): tensor
        for shard in sorted((root / "dense").glob("*.safetensors"))
        for name, tensor in load_file(shard).items()
    }
    directory = write_compressed(state, dense.config, groups, root / "compressed")
    with torch.no_grad():
        for path, group in groups.items():
            for name, weight in group.to_dense().items():
                dense.get_submodule(f"{path}.{name}").weight.copy_(weight)
    return directory, dense


def edited(directory: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a compressed directory whose quantization_config went through `change`."""
    target.mkdir()
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    change(config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config))
    return target
