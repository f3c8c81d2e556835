"""Families whose projections are fused, and in which order their rows lie: declared, not guessed.

The order cannot be seen from outside: with another one everything still computes the same, and the
manifest calls a query a key. Each line was read off the family's attention in Transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Order = tuple[int, tuple[tuple[str, int], ...]]
"""How often, and what: ``(heads, (("q", 1), ("k", 1), ("v", 1)))`` for q, k, v of each head."""


def _concatenated(heads: int, kv_heads: int, _: Any) -> Order:
    return 1, (("q", heads), ("k", kv_heads), ("v", kv_heads))


def _per_head(heads: int, kv_heads: int, _: Any) -> Order:
    return heads, (("q", 1), ("k", 1), ("v", 1))


def _per_kv_head(heads: int, kv_heads: int, _: Any) -> Order:
    return kv_heads, (("q", heads // kv_heads), ("k", 1), ("v", 1))


def _falcon(heads: int, kv_heads: int, config: Any) -> Order:
    if config.new_decoder_architecture:
        return _per_kv_head(heads, kv_heads, config)
    order = _concatenated if config.multi_query else _per_head
    return order(heads, kv_heads, config)


def _gpt_bigcode(heads: int, kv_heads: int, config: Any) -> Order:
    order = _concatenated if config.multi_query else _per_head
    return order(heads, kv_heads, config)


def _codegen(heads: int, _: int, __: Any) -> Order:
    cores = 4  # mp_num of its code, the TPU cores that it was trained on.
    return cores, (("q", heads // cores), ("v", heads // cores), ("k", heads // cores))


QKV: dict[str, Callable[[int, int, Any], Order]] = {
    "bloom": _per_head,
    "codegen": _codegen,
    "dbrx": _concatenated,
    "falcon": _falcon,
    "gpt-sw3": _concatenated,
    "gpt2": _concatenated,
    "gpt_bigcode": _gpt_bigcode,
    "gpt_neox": _per_head,
    "gpt_neox_japanese": _per_head,
    "mpt": _concatenated,
    "openai-gpt": _concatenated,
    "persimmon": _per_head,
    "phi3": _concatenated,
    "phi4_multimodal": _concatenated,
}
"""Of a family, how rows of its fused q, k and v lie, by query and key/value heads and config."""

GATED_QUERIES = ("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
"""Families whose q_proj has the gate of each head's output behind its query."""

GATE_UP = ("glm", "glm4", "glm4v_text", "glm_ocr_text", "phi3", "phi4_multimodal", "zamba2")
"""Families whose fused feed-forward matrix has the gate above the other half."""
