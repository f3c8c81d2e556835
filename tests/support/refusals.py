"""Refusals of the command line."""

import json
from pathlib import Path

from support.cli import Finished

SERIAL = ("--executor", "serial", "--keep", 0.5)


def refused(result: Finished, *words: str, code: int = 2) -> None:
    """One sentence on standard error that has these words, and nothing on standard output."""
    assert result.code == code, (result.out, result.err)
    assert "Traceback" not in result.err
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.err
    for word in words:
        assert word in errors[0], errors[0]
    assert result.out == ""


def shard_of(model: Path, tensor: str) -> Path:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    return model / index["weight_map"][tensor]


Q1 = "model.layers.1.self_attn.q_proj.weight"
