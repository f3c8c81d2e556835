"""Fused projections lie as they are declared: each slice acts as the head that it is said to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.every_family import check_heads, save_any
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.architectures.fused import GATED_QUERIES, QKV
from orchestrator.architectures.infer import infer
from orchestrator.architectures.tiny import tiny_config
from workers.checkpoint.tensors import ShardIndex

VARIANTS: dict[str, dict[str, Any]] = {
    **{family: {} for family in (*QKV, "qwen3_next", "qwen3_5_text")},
    "falcon, by kv head": {"new_decoder_architecture": True},
    "falcon, by head": {"multi_query": False, "num_kv_heads": 4},
    "gpt_bigcode, by head": {"multi_query": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_slice_acts_as_the_head_that_it_is_said_to_be(variant: str, tmp_path: Path) -> None:
    config = tiny_config(variant.partition(",")[0])
    for name, value in VARIANTS[variant].items():
        setattr(config, name, value)
    directory = save_any(variant, tmp_path, config)
    config = AutoConfig.from_pretrained(directory)
    index = ShardIndex.from_directory(directory)
    group = infer(config, index).groups(config, index, "attention")[0]
    check_heads(AutoModelForCausalLM.from_pretrained(directory), group)


def test_every_family_with_gated_queries_is_one_that_was_looked_at() -> None:
    # The others have these two's attention, under another name of the model.
    assert {name.partition("_moe")[0].removesuffix("_text") for name in GATED_QUERIES} == {
        "qwen3_next",
        "qwen3_5",
    }
