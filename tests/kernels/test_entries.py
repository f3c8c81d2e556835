"""Damaged entries of ``quantization_config``: refused in a sentence, or the same model."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import CONFIGS, attention_groups, edited, random_tucker, save_pair, save_tiny
from support.low_rank import decompose
from support.scopes import groups_of
from transformers import AutoModelForCausalLM, PreTrainedModel

from lestd_kernels import LestdError
from lestd_kernels.formats.chain import Chain
from lestd_kernels.formats.entries import groups_sha256
from lestd_kernels.formats.entry_schema import check_groups
from lestd_kernels.formats.kinds import KINDS
from lestd_kernels.methods import METHODS, MethodArgs
from lestd_kernels.modules.build import build_groups
from lestd_kernels.tensorize import GUARD_DTYPE, GUARD_SHAPE
from lestd_kernels.transformers_plugin import LestdConfig
from orchestrator.source.checkpoint import load_config

DAMAGES = 75


def tucker_entries(family: str, mode: str) -> list[dict[str, Any]]:
    groups = attention_groups(family).items()
    stored = {path: random_tucker(layout, mode, "csr") for path, layout in groups}
    return [group.describe(path) for path, group in stored.items()]


def chain_entries() -> list[dict[str, Any]]:
    """Permutations, blocks, few bits, and side matrices."""
    paths = list(attention_groups("llama"))
    layout = attention_groups("llama")[paths[0]]
    found = []
    for path, method in zip(paths, ("tt", "per_head_tucker"), strict=True):
        more = {"value_bits": 4, "keep_outliers": 0.01}
        done = decompose(method, layout, 0.6, torch.float16, **more)
        assert isinstance(done.decomposition, Chain)
        found.append(done.decomposition.describe(path))
    return found


def expert_entries() -> list[dict[str, Any]]:
    """Mixtures, a guard, and dense tensors that stack experts and interleave gate and up."""
    with TemporaryDirectory() as directory:
        groups = groups_of(save_tiny("gpt_oss", Path(directory)), "experts")
    found = []
    for group in groups:
        W = torch.randn(group.layout.width, group.layout.elements // group.layout.width)
        budget, args = 2 * group.layout.elements, MethodArgs(td_moe_mode="compress")
        done = METHODS["td_moe"].decompose(W, group.layout, budget, torch.float32, args)
        found.append(done.decomposition.describe(group.block))
    return found


ENTRIES = {
    "gpt_oss": expert_entries,
    "llama": lambda: tucker_entries("llama", "identity"),
    "opt": lambda: tucker_entries("opt", "learned"),
    "chains": chain_entries,
}


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container below a value, with each of its keys."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield value, key
        yield from places(value[key])


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def damaged(groups: list[dict[str, Any]], draw: random.Random) -> list[dict[str, Any]]:
    """Groups of which one place is not what it was."""
    groups = copy.deepcopy(groups)
    parent, key = draw.choice(list(places({"groups": groups}))[1:])
    other, other_key = draw.choice(list(places(groups)))
    change = draw.choice(["value", "value", "remove", "copy", "again", "near"])
    if change == "value":
        values = [None, True, "", "x", "model", -1, 0, 1, 2**31, 10**30, 1.5, float("nan")]
        parent[key] = draw.choice([*values, [], {}, [None], {"a": 1}, deep(900), str(parent[key])])
    elif change == "remove":
        del parent[key]
    elif change == "copy":
        parent[key] = copy.deepcopy(other[other_key])
    elif change == "near" and type(parent[key]) is int:
        parent[key] += draw.choice([-1, 1])
    elif isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    else:
        parent[f"{key}x"] = copy.deepcopy(parent[key])
    return groups


def on_meta(family: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family])).eval()


@pytest.mark.parametrize("name", ENTRIES)
def test_damaged_entries_are_refused_or_make_a_model(name: str) -> None:
    """Without their digest, as an attacker would leave it out: no raw error, nothing cut off."""
    groups, draw = ENTRIES[name](), random.Random(name)
    family = name if name in CONFIGS else "llama"
    refused = 0
    for _ in range(DAMAGES):
        bad = damaged(groups, draw)
        said = ""
        try:
            check_groups(bad)
            model = on_meta(family)
            build_groups(model, bad)
        except LestdError as error:
            said = str(error)
        if said:
            refused += 1
            assert said.startswith("config.json: ")
            assert len(said) < 500
            assert said.isprintable()
            continue
        specs = [KINDS[entry["kind"]].stored_specs(entry) for entry in bad]
        found = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        for key, (shape, dtype) in [item for spec in specs for item in spec.items()]:
            if dtype != GUARD_DTYPE or shape != GUARD_SHAPE:  # In memory it has another name.
                assert found[key] == shape
        if family != "gpt_oss":  # Its experts count their tokens.
            model(torch.ones(1, 3, dtype=torch.long, device="meta"))
    assert DAMAGES * 0.6 < refused < DAMAGES


@pytest.mark.parametrize("name", ENTRIES)
def test_the_digest_tells_every_damage(name: str) -> None:
    groups, draw = ENTRIES[name](), random.Random(name)
    config = {"format_version": 1, "groups": groups, "groups_sha256": groups_sha256(groups)}
    sorted_keys = json.loads(json.dumps(config, sort_keys=True))
    assert LestdConfig.from_dict(sorted_keys).groups == groups
    for _ in range(DAMAGES):
        bad = damaged(groups, draw)
        if json.dumps(bad, sort_keys=True) != json.dumps(groups, sort_keys=True):
            with pytest.raises(LestdError):
                LestdConfig.from_dict(config | {"groups": bad})


def factor_at(path: str):
    return lambda c: c["groups"][0]["factors"].update(U1=path)


MISPLACED = {
    "in a module that it takes away": factor_at("model.layers.0.self_attn.q_proj.lestd_u1"),
    "where another matrix is stored": factor_at("model.layers.0.self_attn.q_proj"),
    "which has something there": factor_at("model.layers.0.mlp"),
    "in a ModuleList": factor_at("model.layers.9"),
    "found CompressedLinear": lambda c: c["groups"].append(
        c["groups"][0] | {"path": "layers.0.self_attn"}
    ),
    "names model.layers.0.self_attn.q_proj": lambda c: c["groups"].append(c["groups"][0]),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair("llama", "identity", "csr", tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("found", MISPLACED)
def test_nothing_is_placed_where_something_is_or_where_it_is_lost(pair, tmp_path, found) -> None:
    bad = edited(pair[0], tmp_path / "bad", MISPLACED[found])
    with pytest.raises(LestdError) as caught:
        AutoModelForCausalLM.from_pretrained(bad)
    assert found in str(caught.value)


def retyped(dtype: torch.dtype):
    return lambda tensor: tensor.to(dtype)


def with_first(tensor: torch.Tensor, order: list[int]) -> torch.Tensor:
    signed = tensor.view(torch.int16)  # PyTorch gathers no unsigned numbers.
    return torch.cat((signed[order], signed[2:])).view(tensor.dtype)


def swapped(tensor: torch.Tensor) -> torch.Tensor:
    """The first two column indices, of one row, in the wrong order."""
    return with_first(tensor, [1, 0])


def repeated(tensor: torch.Tensor) -> torch.Tensor:
    return with_first(tensor, [0, 0])


@pytest.mark.parametrize(
    ("tensor", "damage", "found"),
    [
        ("columns", swapped, "do not rise"),
        ("columns", repeated, "do not rise"),
        ("columns", retyped(torch.int64), "is I64 "),
        ("row_pointers", retyped(torch.int64), "is I64 "),
        ("row_pointers", lambda tensor: tensor[:-1].clone(), "expected I32 [18]"),
        ("weight", retyped(torch.int32), "is I32 "),
    ],
)
def test_damaged_tensors_are_refused(pair, tmp_path, tensor, damage, found) -> None:
    bad = edited(pair[0], tmp_path / "bad", lambda config: None)
    name = f"model.layers.1.self_attn.k_proj.{tensor}"
    [shard] = [f for f in bad.glob("*.safetensors") if name in load_file(f)]
    tensors = load_file(shard)
    tensors[name] = damage(
        tensors[name].view(torch.int16) if tensor == "columns" else tensors[name]
    )
    if tensors[name].dtype == torch.int16:
        tensors[name] = tensors[name].view(torch.uint16)
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(LestdError, match="copy the model again") as caught:
        AutoModelForCausalLM.from_pretrained(bad)
    assert found in str(caught.value).replace("\\", "")
    assert "model.layers.1.self_attn.k_proj" in str(caught.value)
    assert str(bad) in str(caught.value)


def test_what_was_loaded_is_materialised_and_part_of_the_model(pair) -> None:
    model = AutoModelForCausalLM.from_pretrained(pair[0])
    block = model.model.layers[1].self_attn
    lost = block.lestd_u1
    block.lestd_u1 = None
    with pytest.raises(LestdError, match=r"q_proj is damaged, what it shares .* not part of"):
        model.hf_quantizer.postprocess_model(model)
    block.lestd_u1 = lost
    lost.weight = torch.nn.Parameter(lost.weight.detach().to("meta"))
    with pytest.raises(LestdError, match="lestd_u1 is damaged, its weight was not loaded"):
        model.hf_quantizer.postprocess_model(model)


@pytest.mark.parametrize("quantization", [{"quant_method": {}}, {}, ["lestd"], "lestd"])
def test_a_configuration_of_no_method_is_refused(pair, tmp_path, quantization) -> None:
    bad = edited(pair[0], tmp_path / "bad", lambda config: None)
    config = json.loads((bad / "config.json").read_text()) | {"quantization_config": quantization}
    (bad / "config.json").write_text(json.dumps(config))
    with pytest.raises(LestdError, match=r"config\.json"):
        load_config(bad)
