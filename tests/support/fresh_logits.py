"""Logits and greedy tokens of models, computed in a process that has loaded nothing before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

_PROGRAM = """
import sys
import torch
from safetensors.torch import save_file
from workers.host.loading import load_model
torch.set_num_threads(1)
out, *models = sys.argv[1:]
tokens = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
found = {}
for name in models:
    model = load_model(name, "float32", "cpu")
    with torch.no_grad():
        found[f"{name} logits"] = model(input_ids=tokens).logits.clone()
        made = model.generate(tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        found[f"{name} tokens"] = made
save_file({name: one.contiguous() for name, one in found.items()}, out)
"""


def logits_and_tokens(out: Path, *models: Path) -> list[tuple[Tensor, Tensor]]:
    """Logits ``(2, 12, V)`` and tokens ``(2, 17)`` of each model, in a fresh process.

    Args:
        out: file for the results.
        models: their directories.
    """
    command = [sys.executable, "-c", _PROGRAM, str(out), *map(str, models)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(out)
    return [(found[f"{name} logits"], found[f"{name} tokens"]) for name in models]
