"""The shapes of known models, for checkpoints that are made: their configs, and their tensors."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

_LLAMA: dict[str, Any] = {"model_type": "llama", "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _LLAMA
    | {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 200,
        "max_position_embeddings": 256,
    },
    "llama-1b": _LLAMA  # Llama-3.2-1B
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama-13b": _LLAMA  # Llama-2-13b
    | {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "llama-70b": _LLAMA  # Llama-2-70b
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "opt-30b": {
        "model_type": "opt",
        "hidden_size": 7168,
        "word_embed_proj_dim": 7168,
        "ffn_dim": 28672,
        "num_hidden_layers": 48,
        "num_attention_heads": 56,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}
"""Name -> the arguments of its config; what is absent is the family's default."""

_FUSED_EXPERTS = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")


def make_config(shape: str, layers: int | None = None, **changes: Any) -> PretrainedConfig:
    """The config of one of `SHAPES`, with other `layers`, and any other argument changed."""
    if layers is not None:
        changes["num_hidden_layers"] = layers
    config: PretrainedConfig = AutoConfig.for_model(**SHAPES[shape] | changes)
    return config


def tensor_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor as it lies on disk: each expert apart, no tied weight twice."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = model.all_tied_weights_keys
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        fused = _FUSED_EXPERTS.fullmatch(name)
        if fused is None:
            shapes |= {} if name in tied else {name: tuple(tensor.shape)}
            continue
        experts, rows, columns = tensor.shape
        names = ["down_proj"] if fused[2] == "down_proj" else ["gate_proj", "up_proj"]
        for expert in range(experts):
            for part in names:
                shapes[f"{fused[1]}.{expert}.{part}.weight"] = (rows // len(names), columns)
    return shapes
