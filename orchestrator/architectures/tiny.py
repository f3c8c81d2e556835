"""The configuration of a tiny model of any family that Transformers has.

Every family's own defaults, with each size that is known by name made small; what the sizes make of
one another (kinds of layers, for one) stays the family's own. A model of it has all kinds of
modules that the family has, and is built in well under a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, LAYERS = 64, 4, 2, 16, 96, 4
VOCABULARY, POSITIONS, EXPERTS = 128, 64, 4

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "embedding_dim"), WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "attention_hidden_size", "lru_width"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("attention_heads", "swa_num_attention_heads", "index_n_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), KV_HEADS),
    **dict.fromkeys(("num_kv_heads", "num_query_groups", "num_global_key_value_heads"), KV_HEADS),
    **dict.fromkeys(("swa_num_kv_heads",), KV_HEADS),
    **dict.fromkeys(("head_dim", "kv_channels", "dim_head", "swa_head_dim"), HEAD_DIM),
    **dict.fromkeys(("index_head_dim", "v_head_dim", "global_head_dim"), HEAD_DIM),
    **dict.fromkeys(("qk_nope_head_dim", "linear_head_dim"), HEAD_DIM),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), HEAD_DIM),
    **dict.fromkeys(("swa_v_head_dim",), HEAD_DIM),
    "qk_rope_head_dim": 8,
    "qk_head_dim": HEAD_DIM + 8,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 24),
    "o_lora_rank": 16,
    "o_groups": 2,
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dff", "dim_ff"), HIDDEN),
    **dict.fromkeys(("ffn_hidden_size", "shared_intermediate_size", "decoder_ffn_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size"), HIDDEN),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size",), 32),
    **dict.fromkeys(("shared_experts_intermediate_size",), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size",), 32),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), EXPERTS),
    **dict.fromkeys(("moe_num_experts",), EXPERTS),
    "zero_expert_num": 2,
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group"), 1),
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), POSITIONS),
    **dict.fromkeys(("model_max_length", "context_length"), POSITIONS),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), 1),
    "eos_token_id": 2,
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size"), 16),
    **dict.fromkeys(("attention_window_size", "local_attention", "attention_chunk_size"), 16),
    "rotary_dim": 8,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), HEAD_DIM),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 16),
    "mamba_d_ssm": 128,
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "adapter_rank"), 8),
    "index_topk": 8,
    "hc_lowrank": 16,
    "router_hidden_size": 16,
    "prompt_length": 4,
    "block_multiple_of": 16,
    "gated_norm_rank": 8,
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("dropout", "attention_dropout", "hidden_dropout"), 0.0),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "activation_dropout"), 0.0),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    **dict.fromkeys(("layerdrop", "residual_dropout", "residual_dropout_prob"), 0.0),
}
# Where a family's sizes depend on one another in a way of its own.
_HYBRID_TYPES = ["linear_attention", "full_attention"] * 2
_NO_TIED_HEADS = {"num_key_value_heads": HEADS}
_INDEXER = {
    **{"indexer_n_heads": HEADS, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_DIM},
    **{"indexer_budget": 8, "indexer_compress_ratio": 4},
}
_ZAMBA = {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * WIDTH // HEADS}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_COMPASS = {
    "rope_parameters": {"full_attention": _ROPE},
    "layer_types": ["full_attention"] * LAYERS,
}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    **{
        family: {"text_config": {"embed_dim": WIDTH, "layers": LAYERS}}
        for family in ("kosmos-2", "kosmos-2.5")
    },
    **{
        family: {"text_config": {"rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}}}
        for family in (
            *("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl"),
            *("qwen2_5_vl", "qwen2_vl"),
        )
    },
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": HIDDEN, "hidden_size": WIDTH, "moe_num_experts": EXPERTS},
    },
    "dots1": {"max_window_layers": 2, "n_shared_experts": 1, "n_routed_experts": EXPERTS},
    "dots3_note": {"text_config": _NO_TIED_HEADS},
    "dots3_note_text": _NO_TIED_HEADS,
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [32, 32],
            "rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]},
        }
    },
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 5},
    # Half of each head's channels have a position.
    "glm4v_moe": {"text_config": {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite_docling": {"vision_config": {"out_hidden_size": WIDTH}},
    "granitemoehybrid": {"layer_types": _HYBRID_TYPES},
    "hunyuan_vl": {"text_config": {"rope_parameters": _ROPE | {"mrope_section": [2, 2, 2, 2]}}},
    "inkling2": {"vision_config": {"text_hidden_size": WIDTH}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _HYBRID_TYPES},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "molmo2": {"adapter_config": {"vision_feature_layer": [2, 1]}},
    "muse_spark": {
        "audio_config": {"out_hidden_size": WIDTH, "hidden_sizes": [8, 16, 32, WIDTH]},
        "out_hidden_size": 4 * WIDTH,
        "projector_hidden_size": WIDTH,
    },
    **{
        family: {
            "audio_config": {
                **{"encoder_attention_heads": HEADS, "output_dim": WIDTH},
                **{"encoder_ffn_dim": HIDDEN, "encoder_layers": 2},
            },
            "text_config": {"rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}},
            # Published models have it and generation reads it; the defaults do not have it.
            "vision_start_token_id": 151_652,
        }
        for family in ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
    },
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    # Its cache rounds the widths of queries and values up to a multiple of 64.
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0},
    "zamba": _ZAMBA | {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2},
    "zamba2": _ZAMBA | {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(family: str) -> PretrainedConfig:
    """The configuration of a tiny model of a family.

    Args:
        family: its ``model_type``.

    Raises:
        Exception: as the family's own configuration does where it does not accept the sizes.
    """
    cls: Any = CONFIG_MAPPING[family]
    config: PretrainedConfig = cls(**_sizes(cls(), _OF_FAMILY.get(family, {})))
    return config


def _sizes(default: PretrainedConfig, more: Mapping[str, Any]) -> dict[str, Any]:
    """Of the fields that a configuration has those that are made small, of parts too."""
    small = {
        name: _SIZES[name]
        for name in default.to_dict()
        if name in _SIZES and name not in default.attribute_map
    }
    if "qk_rope_head_dim" in small and "head_dim" in small:  # There it is that of the rotary part.
        small["head_dim"] = small["qk_rope_head_dim"]
    if "kv_lora_rank" in small and "num_key_value_heads" in small:  # One for each query.
        small["num_key_value_heads"] = HEADS
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:  # Halves of a head's channels.
        small["rope_parameters"] = rope | {"mrope_section": [2, 3, 3]}
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PretrainedConfig):
            small[name] = _sizes(part, {})
            if "model_type" in part.to_dict():
                small[name]["model_type"] = part.model_type
    for name, value in more.items():
        small[name] = small[name] | value if isinstance(value, dict) and name in small else value
    return small
