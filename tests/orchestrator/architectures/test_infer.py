"""Architectures found in modules: against the files of the known families, and on their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.families import FAMILIES, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.architectures import load_architecture
from orchestrator.architectures.infer import infer
from workers.checkpoint.tensors import ShardIndex


@pytest.mark.parametrize("scope", ["attention", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_modules_tell_is_what_the_family_s_file_says(
    family: str, scope: str, tmp_path: Path
) -> None:
    directory = save_tiny(family, tmp_path)
    config = AutoConfig.from_pretrained(directory)
    index = ShardIndex.from_directory(directory)
    stated = load_architecture(config.model_type).groups(config, index, scope)
    assert infer(config, index).groups(config, index, scope) == stated


@pytest.mark.parametrize("family", ["opt", "llama", "gpt_neox", "mixtral"])
def test_a_checkpoint_of_the_base_model(family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny(family, tmp_path / "full"))
    model.base_model.save_pretrained(tmp_path / "base")
    config = AutoConfig.from_pretrained(tmp_path / "base")
    index = ShardIndex.from_directory(tmp_path / "base")
    stated = load_architecture(config.model_type).groups(config, index, "all")
    assert infer(config, index).groups(config, index, "all") == stated
