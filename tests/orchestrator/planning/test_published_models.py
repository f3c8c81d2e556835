"""Plans of published models, from their configurations and made-up headers; counted by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    Gemma3Config,
    Glm4MoeConfig,
    GptOssConfig,
    Llama4Config,
    Qwen3MoeConfig,
)

from orchestrator.architectures.coverage import made_up_index
from orchestrator.architectures.infer import build_without_weights
from orchestrator.config.run import RunConfig
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.source.checkpoint import Source
from orchestrator.source.quantized import as_dense
from workers.checkpoint.tensors import ShardIndex
from workers.contracts import TensorRef

ELEMENT_BYTES = 4  # Of the made-up headers.

QWEN3_235B = Qwen3MoeConfig(
    **{"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288},
    **{"num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4},
    **{"head_dim": 128, "moe_intermediate_size": 1536, "num_experts": 128},
    **{"num_experts_per_tok": 8, "tie_word_embeddings": False},
)
DEEPSEEK_V3 = DeepseekV3Config(
    **{"vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432},
    **{"num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128},
    **{"moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1},
    **{"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3},
    **{"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128},
    **{"qk_rope_head_dim": 64, "v_head_dim": 128},
)
GPT_OSS_120B = GptOssConfig(
    **{"vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880},
    **{"num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8},
    **{"head_dim": 64, "num_local_experts": 128, "num_experts_per_tok": 4},
)
GEMMA3_27B = Gemma3Config(
    text_config={
        **{"vocab_size": 262208, "hidden_size": 5376, "intermediate_size": 21504},
        **{"num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16},
        **{"head_dim": 128},
    },
    vision_config={
        **{"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27},
        **{"num_attention_heads": 16, "image_size": 896, "patch_size": 14},
        **{"vision_use_head": False},
    },
)
LLAMA4_MAVERICK = Llama4Config(
    text_config={
        **{"vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192},
        **{"intermediate_size_mlp": 16384, "num_hidden_layers": 48, "head_dim": 128},
        **{"num_attention_heads": 40, "num_key_value_heads": 8, "num_local_experts": 128},
        **{"num_experts_per_tok": 1, "interleave_moe_layer_step": 2},
    },
    vision_config={
        **{"hidden_size": 1408, "intermediate_size": 5632, "num_hidden_layers": 34},
        **{"num_attention_heads": 16, "image_size": 336, "patch_size": 14},
    },
)
GLM45 = Glm4MoeConfig(
    **{"vocab_size": 151552, "hidden_size": 5120, "intermediate_size": 12288},
    **{"num_hidden_layers": 92, "num_attention_heads": 96, "num_key_value_heads": 8},
    **{"head_dim": 128, "moe_intermediate_size": 1536, "n_routed_experts": 160},
    **{"n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3},
    **{"attention_bias": True, "use_qk_norm": True},
)


def plan_of(config: Any) -> Plan:
    index = made_up_index(build_without_weights(config))
    source = Source("published", None, Path(), index, config, config.to_dict())
    return make_plan(source, RunConfig(keep=0.4, scope="all", method="svd"))


def counted(plan: Plan) -> dict[str, tuple[int, set[int]]]:
    """Of each scope how many tasks there are, and how many elements a task may have."""
    found: dict[str, tuple[int, set[int]]] = {}
    for planned in plan.tasks:
        count, sizes = found.get(planned.task.scope, (0, set()))
        elements = planned.task.dense_bytes // ELEMENT_BYTES
        found[planned.task.scope] = count + 1, sizes | {elements}
    return found


@pytest.mark.slow
def test_qwen3_235b() -> None:
    plan = plan_of(QWEN3_235B)
    assert counted(plan) == {
        # q and o are 4096 x 8192, k and v 4096 x 512.
        "attention": (94, {2 * 4096 * 8192 + 2 * 4096 * 512}),
        "experts": (94, {128 * 3 * 4096 * 1536}),
    }
    assert plan.model_bytes // ELEMENT_BYTES == pytest.approx(235.1e9, rel=1e-3)
    assert plan.worker_memory_bytes > 128 * 3 * 4096 * 1536 * ELEMENT_BYTES


@pytest.mark.slow
def test_deepseek_v3() -> None:
    plan = plan_of(DEEPSEEK_V3)
    latent = {
        7168 * 1536,  # q_a
        1536 * 128 * (128 + 64),  # q_b
        7168 * (512 + 64),  # kv_a
        512 * 128 * (128 + 128),  # kv_b
        128 * 128 * 7168,  # o
    }
    assert counted(plan) == {
        "linear": (61 * 5, latent),
        "ffn": (61, {3 * 7168 * 18432, 3 * 7168 * 2048}),  # Dense layers, shared experts.
        "experts": (58, {256 * 3 * 7168 * 2048}),
    }
    assert plan.model_bytes // ELEMENT_BYTES == pytest.approx(671.0e9, rel=1e-3)


def hub_index(dense: ShardIndex) -> ShardIndex:
    """gpt-oss as it lies on the Hub: experts in MXFP4, all else in bfloat16."""
    tensors: dict[str, TensorRef] = {}
    for name, ref in dense.tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            place = (0, ref.stored_bytes // 2)
            tensors[name] = replace(ref, dtype="BF16", byte_range=place)
            continue
        experts, into, outputs = ref.shape
        blocks = (experts, outputs, into // 32, 16)
        size = experts * outputs * into // 32
        for end, shape, count in (("blocks", blocks, 16 * size), ("scales", blocks[:-1], size)):
            tensors[f"{name}_{end}"] = TensorRef(f"{name}_{end}", "x", shape, "U8", (0, count))
    return replace(dense, tensors=tensors)


@pytest.mark.slow
def test_gpt_oss_120b_as_it_lies_on_the_hub() -> None:
    config, method = GPT_OSS_120B, {"quant_method": "mxfp4"}
    stored = hub_index(made_up_index(build_without_weights(config)))
    index = as_dense(stored, method, torch.bfloat16)
    source = Source("x", None, Path(), index, config, config.to_dict(), quantization=method)
    plan = make_plan(source, RunConfig(keep=0.28, scope="all", method="rtn", value_bits=4))
    attention, experts = 2 * 2880 * (64 + 8) * 64, 128 * 3 * 2880 * 2880
    sizes = {(one.task.scope, one.task.dense_bytes) for one in plan.tasks}
    assert sizes == {("attention", 2 * attention), ("experts", 2 * experts)}
    assert len(plan.tasks) == 72
    assert plan.dense_bytes == 36 * 2 * (attention + experts)
    assert plan.budget_bytes == 36 * (int(0.28 * 2 * attention) + int(0.28 * 2 * experts))
    # Embedding and head; of a layer biases, two norms, sinks, router; the last norm.
    biases = 64 * 64 + 2 * 8 * 64 + 2880 + 128 * (2 * 2880 + 2880)
    layer = biases + 2 * 2880 + 64 + 128 * 2880 + 128
    others = 2 * 201088 * 2880 + 36 * layer + 2880
    assert plan.model_bytes == plan.dense_bytes + 2 * others
    # 32 numbers in 17 bytes; published are 65.3 GB.
    assert plan.source_bytes == 36 * (2 * attention + experts * 17 // 32) + 2 * others
    assert plan.source_bytes == pytest.approx(65.3e9, rel=2e-3)
    # The experts of a layer: as stored, once in float32, and packed.
    least = 2 * experts + 4 * experts + int(0.28 * 2 * experts)
    assert least < plan.worker_memory_bytes < 2.5 * least


@pytest.mark.slow
def test_gemma3_27b() -> None:
    plan = plan_of(GEMMA3_27B)
    attention = 2 * 5376 * (32 + 16) * 128
    ffn = 3 * 5376 * 21504
    assert counted(plan) == {"attention": (62, {attention}), "ffn": (62, {ffn})}
    # The norms of queries and keys, and four of the stream, in each layer; the tied embedding.
    text = 62 * (attention + ffn + 2 * 128 + 4 * 5376) + 5376 + 262208 * 5376
    vision = 27 * (4 * 1152 * 1153 + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152)
    vision += 1152 * (3 * 14 * 14 + 1) + (896 // 14) ** 2 * 1152 + 2 * 1152
    projector = 1152 * 5376 + 1152
    assert plan.model_bytes == ELEMENT_BYTES * (text + vision + projector)
    assert plan.dense_bytes == ELEMENT_BYTES * 62 * (attention + ffn)
    # Of the largest block the weights as stored, in float32, and compressed; beside these some
    # squares of 21504 x 21504, the inputs of its last matrix.
    least = (ELEMENT_BYTES + 4 + 0.4 * ELEMENT_BYTES) * ffn + 4 * 21504**2
    assert least < plan.worker_memory_bytes < least + 9 * 4 * 21504**2


@pytest.mark.slow
def test_llama_4_maverick() -> None:
    plan = plan_of(LLAMA4_MAVERICK)
    assert counted(plan) == {
        "attention": (48, {2 * 5120 * (40 + 8) * 128}),
        # Every other layer is dense, the others have a shared expert.
        "ffn": (48, {3 * 5120 * 16384, 3 * 5120 * 8192}),
        "experts": (24, {128 * 3 * 5120 * 8192}),
    }
    # The decoder alone is planned: embedding and head, routers, norms.
    others = 2 * 202048 * 5120 + 24 * 128 * 5120 + (2 * 48 + 1) * 5120
    assert plan.model_bytes == plan.dense_bytes + ELEMENT_BYTES * others
    assert plan.model_bytes // ELEMENT_BYTES == pytest.approx(400e9, rel=3e-3)


@pytest.mark.slow
def test_glm_4_5() -> None:
    plan = plan_of(GLM45)
    assert counted(plan) == {
        "attention": (92, {2 * 5120 * (96 + 8) * 128}),
        "ffn": (92, {3 * 5120 * 12288, 3 * 5120 * 1536}),
        "experts": (89, {160 * 3 * 5120 * 1536}),
    }
    # Published are 358 B, with the layer for a second token that Transformers leaves out.
    assert plan.model_bytes // ELEMENT_BYTES == pytest.approx(353e9, rel=5e-3)
