"""Compressed models that cannot be loaded: each is refused loudly, and says what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.families import edited, save_pair
from transformers import AutoModelForCausalLM

import lestd_kernels  # noqa: F401  (registers the format)
from lestd_kernels import LestdError


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return save_pair("llama", "identity", "bitmask", tmp_path_factory.mktemp("llama"))[0]


WITHOUT_IMPORT = """
import sys, torch
from transformers import AutoModelForCausalLM
for offload in ({}, {"device_map": {"": "disk"}, "offload_folder": sys.argv[1]}):
    for directory in sys.argv[2:]:
        try:
            model = AutoModelForCausalLM.from_pretrained(directory, **offload)
            model(torch.ones(1, 3, dtype=torch.long))
            print("RAN")
        except (RuntimeError, ValueError) as error:
            print(type(error).__name__, str(error).replace(chr(10), " "))
assert not any(name.startswith("lestd") for name in sys.modules)
"""


def test_transformers_without_the_import_fails_loudly(tmp_path):
    """A 1-D weight where a matrix is expected: refused at loading, offloaded to disk at the run."""
    stored_as = [("llama", "identity", "bitmask"), ("opt", "learned", "dense")]
    stored_as += [("gpt_neox", "identity", "csr")]
    directories = [str(save_pair(*case, tmp_path / case[0])[0]) for case in stored_as]
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_IMPORT, str(tmp_path / "offload"), *directories],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = run.stdout.splitlines()
    assert len(lines) == 6
    for line in lines[:3]:
        assert line.startswith("RuntimeError You set `ignore_mismatched_sizes` to `False`")
    for line in lines[3:]:
        assert "this looks incorrect" in line
    assert "Unknown quantization type, got lestd" in run.stderr
    assert "MISMATCH" in run.stderr


def group_change(**values):
    return lambda config: config["groups"][0].update(values)


def q_proj(config):
    return dict(config["groups"][0]["modules"]["q_proj"])


BAD_CONFIGS = {
    "format_version 9": lambda config: config.update(format_version=9),
    "unknown key 'grups'": lambda config: config.update(grups=[]),
    "basis_side 'left'": lambda c: c["groups"][0]["modules"]["q_proj"].update(basis_side="left"),
    "kind 'tensor_train'": group_change(kind="tensor_train"),
    "value_type 'int4'": group_change(value_type="int4"),
    "pattern '3:5'": lambda c: c["groups"][0]["modules"]["k_proj"].update(pattern="3:5"),
    "codec 'zip'": lambda c: c["groups"][0]["modules"]["k_proj"].update(codec="zip"),
    "model.layers.7.self_attn": group_change(path="model.layers.7.self_attn"),
    "found NoneType": lambda c: c["groups"][0]["modules"].update(extra_proj=q_proj(c)),
    "found SiLU": lambda c: c["groups"][0].update(
        path="model.layers.0.mlp", modules={"act_fn": q_proj(c)}
    ),
    "(36, 48)": lambda c: c["groups"][0]["modules"]["v_proj"].update(slices=3),
    "has no 'ranks'": lambda c: c["groups"][1].pop("ranks"),
    "disagree about the shape": lambda c: (
        c["groups"][1].update(factors=c["groups"][0]["factors"])
        or c["groups"][1]["ranks"].update(R1=9)
    ),
}


@pytest.mark.parametrize("found", BAD_CONFIGS)
def test_bad_configuration_is_refused_in_one_sentence(directory, tmp_path, found):
    bad = edited(directory, tmp_path / "bad", BAD_CONFIGS[found])
    with pytest.raises(LestdError) as caught:
        AutoModelForCausalLM.from_pretrained(bad)
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_tensor_is_refused_and_named(directory, tmp_path):
    bad = edited(directory, tmp_path / "bad", lambda config: None)
    name = "model.layers.1.self_attn.lestd_u2.weight"
    for file in bad.glob("*.safetensors"):
        tensors = load_file(file)
        if tensors.pop(name, None) is not None:
            save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LestdError, match=name):
        AutoModelForCausalLM.from_pretrained(bad)


def clear_lowest(tensor):
    tensor[tensor.nonzero()[0]] &= tensor[tensor.nonzero()[0]] - 1


def fill(tensor):
    tensor.fill_(255)


def fall(tensor):
    tensor[3] = tensor[-1] + 1


def beyond(tensor):
    tensor[0] = 60000


@pytest.mark.parametrize(
    ("codec", "tensor", "damage", "found"),
    [
        ("bitmask", "mask", clear_lowest, "the mask marks"),
        ("bitmask", "mask", fill, "the mask marks"),
        ("csr", "row_pointers", fall, "the row pointers do not rise"),
        ("csr", "columns", beyond, "a column index is outside"),
    ],
)
def test_a_damaged_core_is_refused_and_named(tmp_path, codec, tensor, damage, found):
    """What would go unseen, and give other weights."""
    directory, _ = save_pair("llama", "identity", codec, tmp_path)
    name = f"model.layers.1.self_attn.k_proj.{tensor}"
    [shard] = [f for f in directory.glob("*.safetensors") if name in load_file(f)]
    tensors = load_file(shard)
    damage(tensors[name])
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(LestdError, match=found) as error:
        AutoModelForCausalLM.from_pretrained(directory)
    assert "model.layers.1.self_attn.k_proj" in str(error.value)
    assert str(directory) in str(error.value)
