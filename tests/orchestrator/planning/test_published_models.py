"""Plans of published models, from their configurations and made-up headers; counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV3Config, Qwen3MoeConfig

from orchestrator.architectures.coverage import made_up_index
from orchestrator.architectures.infer import build_without_weights
from orchestrator.config.run import RunConfig
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.source.checkpoint import Source

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
