"""Pickled checkpoints, written for tests, and what a conversion makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from orchestrator.source.checkpoint import BIN_FILE, BIN_INDEX_FILE
from support.families import save_tiny
from workers.checkpoint.tensors import INDEX_FILE, ShardIndex


def pickled(directory: Path, family: str = "opt", **save: Any) -> dict[str, torch.Tensor]:
    """A tiny model whose weights are sharded pickles; returns its tensors."""
    save_tiny(family, directory, dtype=torch.float16)
    tensors: dict[str, torch.Tensor] = {}
    weight_map = {}
    for number, shard in enumerate(sorted(directory.glob("*.safetensors"))):
        part = load_file(shard)
        name = f"pytorch_model-{number}.bin"
        torch.save(part, directory / name, **save)
        tensors |= part
        weight_map |= dict.fromkeys(part, name)
        shard.unlink()
    (directory / INDEX_FILE).unlink()
    (directory / BIN_INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    (directory / "modeling_x.py").write_text("raise SystemExit")
    (directory / "tokenizer.json").write_text("{}")
    return tensors


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in ShardIndex.from_directory(directory).shards:
        tensors |= load_file(directory / shard)
    return tensors


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def single(directory: Path, content: Any, **save: Any) -> Path:
    directory.mkdir(exist_ok=True)
    torch.save(content, directory / BIN_FILE, **save)
    return directory
