"""Inputs of matrices that are groups of their own, of Conv1D, and of experts of several kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.activations import all_blocks, some_samples
from support.every_family import save_any
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from orchestrator.compression.calibration import calibrate
from orchestrator.execution.serial import SerialExecutor
from orchestrator.source.checkpoint import resolve_source
from workers.checkpoint.tensors import read_tensor


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt2", "llama4_text", "nemotron_h"])
def test_gram_matrices_are_those_of_a_plain_forward(family: str, tmp_path: Path) -> None:
    source, samples = resolve_source(str(save_any(family, tmp_path / "model"))), some_samples()
    blocks = all_blocks(source)
    found = calibrate(source, blocks, samples, SerialExecutor(), tmp_path / "calibration").refs
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float64, experts_implementation="eager"
    )
    rows: dict[str, list[Tensor]] = {}

    def keep(name: str) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))

        return hook

    def keep_each(path: str) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            for e, given in enumerate(args[0].reshape(module.num_experts, -1, args[0].shape[-1])):
                rows.setdefault(f"{path}.in_{e}", []).append(given[given.any(-1)])

        return hook

    def keep_routed(path: str) -> object:
        """Of experts without a gate."""

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            for e, up in enumerate(module.up_proj):
                given = args[0][(args[1] == e).any(-1)]
                rows.setdefault(f"{path}.in_{e}", []).append(given)
                rows.setdefault(f"{path}.hidden_{e}", []).append(module.act_fn(given @ up.T))

        return hook

    for block in blocks:
        module = model.get_submodule(block.path)
        if family == "nemotron_h" and block.path.endswith(".experts"):
            module.register_forward_pre_hook(keep_routed(block.path))
        elif family == "llama4_text" and block.path.endswith("experts"):
            module.register_forward_pre_hook(keep_each(block.path))
        elif hasattr(module, "weight"):
            module.register_forward_pre_hook(keep(f"{block.path}.in"))
        elif not block.path.endswith("experts"):
            for name, reads in block.modules.items():
                if f"{block.path}.{reads}" not in rows:
                    rows[f"{block.path}.{reads}"] = []
                    module.get_submodule(name).register_forward_pre_hook(
                        keep(f"{block.path}.{reads}")
                    )
    with torch.no_grad():
        for window in samples.token_ids:
            model(torch.tensor([window]), use_cache=False)
    assert rows
    for name, parts in rows.items():
        X = torch.cat(parts)
        gram = read_tensor(found[name]).double()
        assert (gram - X.T @ X).norm() <= 1e-4 * (X.T @ X).norm(), name
        assert int(read_tensor(found[f"{name}.tokens"])) == len(X)
