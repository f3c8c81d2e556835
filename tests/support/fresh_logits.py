"""Logits and greedy tokens of models, computed in a process that has loaded nothing before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.paths import ROOT, TESTS
from workers.host.loading import load_model

# The decoder in models that cannot be called without a picture.
_TEXT_PART = {
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), "language_model"),
    **dict.fromkeys(("kosmos-2", "kosmos-2.5"), "text_model"),
}


def reader_of_text(model: Any) -> tuple[Any, dict[str, Tensor]]:
    """What computes the logits of two texts, and what it is given beside them."""
    family = model.config.model_type
    if family == "blip":  # Its decoder is not one by itself: it attends to the picture.
        size = model.config.vision_config.image_size
        generator = torch.Generator().manual_seed(2)
        return model, {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
    return getattr(model, _TEXT_PART[family]) if family in _TEXT_PART else model, {}


def logits_and_tokens(out: Path, *models: Path) -> list[tuple[Tensor, Tensor]]:
    """Logits ``(2, 12, V)`` and tokens of each model, in a fresh process.

    Args:
        out: file for the results.
        models: their directories.
    """
    command = [sys.executable, "-m", "support.fresh_logits", str(out), *map(str, models)]
    path = os.pathsep.join((str(TESTS), str(ROOT)))
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(out)
    return [(found[f"{name} logits"], found[f"{name} tokens"]) for name in models]


def _main(out: str, *models: str) -> None:
    torch.set_num_threads(1)
    tokens = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    found = {}
    for name in models:
        model, more = reader_of_text(load_model(name, "float32", "cpu"))
        limits: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        with torch.no_grad():
            found[f"{name} logits"] = model(input_ids=tokens, **more).logits.clone()
            found[f"{name} tokens"] = model.generate(input_ids=tokens, **limits, **more)
    save_file({name: one.contiguous() for name, one in found.items()}, out)


if __name__ == "__main__":
    _main(*sys.argv[1:])
