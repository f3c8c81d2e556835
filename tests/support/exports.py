"""Compressed models for the tests of `lestd export`."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from support.cli import lestd
from support.families import CONFIGS, attention_groups, random_tucker, save_tiny, write_compressed


def compress_example(model: Path, out: Path) -> Path:
    """Compress by the command line, to a shared Tucker form: with manifest, tokenizer and card."""
    options = ("--metric", "weight", "--keep", 0.4, "--executor", "serial")
    run = lestd("compress", model, *options, "--out", out)
    assert run.code == 0, run.err
    return out


def narrow_pair(root: Path, dtype: torch.dtype, mode: str = "identity") -> Path:
    """A compressed Llama whose tensors are all of `dtype`, half of them in each of two shards."""
    state = AutoModelForCausalLM.from_pretrained(
        save_tiny("llama", root / "dense", dtype), dtype="auto"
    ).state_dict()
    groups = {
        path: random_tucker(layout, mode, "bitmask", seed, dtype=dtype)
        for seed, (path, layout) in enumerate(attention_groups("llama").items())
    }
    config = CONFIGS["llama"].__class__(**CONFIGS["llama"].to_dict() | {"dtype": dtype})
    return write_compressed(state, config, groups, root / "compressed", shards=2)
