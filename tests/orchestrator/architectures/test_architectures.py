"""Every family's attention, found by name in real models of Transformers, and head by head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import CONFIGS, FAMILIES, save_tiny
from support.rewriting import rewrite
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig

from lestd_kernels.errors import LestdError
from lestd_kernels.tensorize import fold_weights, unfold_weights
from orchestrator.architectures import (
    SliceGroup,
    families,
    find_architecture,
    load_architecture,
    parse_architecture,
)
from workers.checkpoint.tensors import ShardIndex, read_tensor

KNOWN = (
    *(
        "gpt_neox",
        "gpt_oss",
        "gptj",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "opt",
        "qwen2",
        "qwen3",
    ),
    "qwen3_moe",
    "smollm3",
)


def groups_of(directory: Path, scope: str = "attention") -> list[SliceGroup]:
    config = AutoConfig.from_pretrained(directory)
    index = ShardIndex.from_directory(directory)
    return find_architecture(config, index).groups(config, index, scope)


def weights_of(group: SliceGroup) -> dict[str, torch.Tensor]:
    return {name: read_tensor(ref) for name, ref in group.tensors.items()}


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: save_tiny(family, root / family) for family in FAMILIES}


def test_the_known_families() -> None:
    assert families() == KNOWN


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_the_modules_of_the_loaded_model(
    family: str, tiny_models: dict[str, Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models[family])
    groups = groups_of(tiny_models[family])
    assert [group.layer for group in groups] == list(range(model.config.num_hidden_layers))
    for group in groups:
        block = model.get_submodule(group.block)
        linear = {name for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        assert set(group.tensors) == linear == {m.name for m in group.layout.modules}
        weights = weights_of(group)
        folded = fold_weights(unfold_weights(weights, group.layout), group.layout)
        for name in linear:
            expected = block.get_submodule(name).weight
            assert torch.equal(folded[name], expected)
            assert torch.equal(weights[name], expected)


def mark_heads(config: Any, group: SliceGroup) -> dict[str, torch.Tensor]:
    """Weights whose every element says which head of which projection it belongs to.

    Written from each family's attention code, not from the layout: Q, K and V of a head are rows
    (of the fused matrix viewed as heads x 3 x head_dim, for GPT-NeoX), O of a head is columns.
    """
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    d = config.hidden_size
    p = getattr(config, "head_dim", None) or d // heads
    number = torch.arange(heads).float()
    kv_number = torch.arange(kv_heads).float()
    q = 100 + number.repeat_interleave(p)[:, None].expand(-1, d)
    k = 200 + kv_number.repeat_interleave(p)[:, None].expand(-1, d)
    v = 300 + kv_number.repeat_interleave(p)[:, None].expand(-1, d)
    o = 400 + number.repeat_interleave(p)[None, :].expand(d, -1)
    if "query_key_value" in group.tensors:
        fused = torch.stack([t.reshape(heads, p, d) for t in (q, k, v)], dim=1)
        return {"query_key_value": fused.reshape(3 * heads * p, d), "dense": o}
    output = "out_proj" if "out_proj" in group.tensors else "o_proj"
    return {"q_proj": q, "k_proj": k, "v_proj": v, output: o}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_slice_is_the_head_it_claims_to_be(family: str, tiny_models: dict[str, Path]) -> None:
    config = CONFIGS[family]
    group = groups_of(tiny_models[family])[0]
    p = group.layout.head_dim
    unfolding = unfold_weights(mark_heads(config, group), group.layout)
    assert len(group.layout.slices) == len(set(group.layout.slices))
    for position, (projection, head) in enumerate(group.layout.slices):
        piece = unfolding[:, position * p : (position + 1) * p]
        expected = {"q": 100.0, "k": 200.0, "v": 300.0, "o": 400.0}[projection] + head
        assert torch.equal(piece, torch.full((config.hidden_size, p), expected))
    counts = {t: sum(s[0] == t for s in group.layout.slices) for t in "qkvo"}
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert counts == {
        "q": config.num_attention_heads,
        "k": kv_heads,
        "v": kv_heads,
        "o": config.num_attention_heads,
    }


def test_fused_heads_are_those_the_model_uses(tiny_models: dict[str, Path]) -> None:
    """The interleaving of GPT-NeoX, seen from outside: silence one head's query slice on disk,
    and only that head's attention becomes uniform."""
    directory = tiny_models["gpt_neox"]
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    group = groups_of(directory)[0]
    p = group.layout.head_dim
    head = 2
    unfolding = unfold_weights(weights_of(group), group.layout)
    position = group.layout.slices.index(("q", head))
    unfolding[:, position * p : (position + 1) * p] = 0
    block = model.get_submodule(group.block)
    with torch.no_grad():
        folded = fold_weights(unfolding, group.layout)
        block.query_key_value.weight.copy_(folded["query_key_value"])
        block.query_key_value.bias.zero_()
        tokens = torch.arange(6)[None] + 5
        attention = model(tokens, output_attentions=True).attentions[0][0]
    uniform = torch.tril(torch.ones(6, 6)) / torch.arange(1, 7)[:, None]
    is_uniform = [torch.allclose(attention[h], uniform, atol=1e-6) for h in range(4)]
    assert is_uniform == [h == head for h in range(4)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_the_base_model(
    family: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Published OPT checkpoints start at ``decoder.layers``: they leave ``model.`` out."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models[family])
    model.base_model.save_pretrained(tmp_path / "base")
    full, base = groups_of(tiny_models[family]), groups_of(tmp_path / "base")
    prefix = model.base_model_prefix + "."
    for group, expected in zip(base, full, strict=True):
        assert group.block == expected.block == prefix + group.tensor_prefix
        assert expected.tensor_prefix == expected.block
        for name, ref in group.tensors.items():
            assert ref.name == f"{group.tensor_prefix}.{name}.weight"
            assert torch.equal(read_tensor(ref), read_tensor(expected.tensors[name]))


def test_heads_times_head_dim_may_differ_from_the_width(tiny_models: dict[str, Path]) -> None:
    layout = groups_of(tiny_models["qwen3"])[0].layout
    config = CONFIGS["qwen3"]
    assert layout.head_dim == config.head_dim
    assert config.num_attention_heads * layout.head_dim != layout.width == config.hidden_size


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_weight_is_named(
    family: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    name = next(iter(groups_of(tiny_models[family])[1].tensors.values())).name
    directory = rewrite(tmp_path / "m", tiny_models[family], lambda tensors: tensors.pop(name))
    with pytest.raises(LestdError, match=rf"tensor {name} is absent") as caught:
        groups_of(directory)
    assert str(directory) in str(caught.value)


def test_a_checkpoint_without_any_layer(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    directory = rewrite(tmp_path / "m", tiny_models["llama"], lambda tensors: tensors.clear())
    with pytest.raises(LestdError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight is absent"):
        groups_of(directory)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"hidden_size": 32}, r"q_proj\.weight .* \[48, 48\], and config.json says"),
        ("llama-gqa", {"num_key_value_heads": 4}, r"k_proj\.weight .* \[24, 48\], .* \[48, 48\]"),
        ("qwen3", {"head_dim": 10}, r"q_proj\.weight .* \[56, 40\], and config.json says \[40, 40"),
        ("llama", {"num_hidden_layers": 3}, r"layers\.2\.self_attn\.q_proj\.weight is absent"),
    ],
)
def test_shapes_that_disagree_with_config_json(
    family: str, change: dict[str, int], message: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    directory = rewrite(tmp_path / "m", tiny_models[family], lambda tensors: None)
    config = json.loads((directory / "config.json").read_text()) | change
    if change.keys() & {"hidden_size"}:
        config.pop("head_dim", None)
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(LestdError, match=message):
        groups_of(directory)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.float64, "F64")],
)
def test_a_dtype_that_cannot_be_compressed(
    dtype: torch.dtype, name: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    weight = "model.layers.1.self_attn.v_proj.weight"
    directory = rewrite(
        tmp_path / "m",
        tiny_models["llama"],
        lambda tensors: tensors.update({weight: tensors[weight].to(dtype)}),
    )
    with pytest.raises(LestdError, match=rf"{weight} in .* is stored as {name}, and only BF16"):
        groups_of(directory)


def test_mixed_dtypes_in_a_block(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    weight = "model.layers.1.self_attn.v_proj.weight"
    directory = rewrite(
        tmp_path / "m",
        tiny_models["llama"],
        lambda tensors: tensors.update({weight: tensors[weight].bfloat16()}),
    )
    with pytest.raises(LestdError, match=rf"{weight} in .* stored as BF16 and .*q_proj.* as F32"):
        groups_of(directory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    for group in groups_of(save_tiny("gptj", tmp_path, dtype=dtype)):
        assert {w.dtype for w in weights_of(group).values()} == {dtype}


@pytest.mark.parametrize(
    "change", [{"num_attention_heads": 0}, {"num_key_value_heads": 3}, {"hidden_size": 0}]
)
def test_impossible_head_counts(change: dict[str, int], tiny_models: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(tiny_models["llama"])
    for key, value in change.items():
        setattr(config, key, value)
    with pytest.raises(LestdError, match=r"config\.json has .* attention heads"):
        load_architecture(config.model_type).layout(config)


@pytest.mark.parametrize("layers", [0, -1])
def test_a_config_without_layers(layers: int, tiny_models: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(tiny_models["llama"])
    config.num_hidden_layers = layers
    index = ShardIndex.from_directory(tiny_models["llama"])
    with pytest.raises(LestdError, match=rf"num_hidden_layers {layers}; expected at least 1"):
        find_architecture(config, index).groups(config, index, "attention")


def test_a_fused_module_needs_equal_head_counts(tiny_models: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(tiny_models["gpt_neox"])
    config.num_key_value_heads = 2
    with pytest.raises(LestdError, match="query_key_value fuses projections with 4 and 2 heads"):
        load_architecture(config.model_type).layout(config)


def test_a_family_that_transformers_does_not_have_is_refused(tiny_models: dict[str, Path]) -> None:
    config = OPTConfig()
    config.model_type = "nobody"
    index = ShardIndex.from_directory(tiny_models["opt"])
    with pytest.raises(LestdError, match=r"'nobody' is unknown to Transformers 5\."):
        find_architecture(config, index)


Q = {"name": "q", "projections": ["q"], "basis_side": "input"}
ATTENTION = {"path": "a", "norm": "n", "modules": [Q]}
EXPERTS = {
    **{"path": "e", "norm": "n", "hidden_width": "f", "count": "c", "guard": "g"},
    "modules": [Q | {"stored": {"tensor": "t"}}],
}
VALID = {
    "family": "x",
    "layer_path": "m.{layer}",
    "base_model_prefix": "m.",
    "attention": ATTENTION,
    "experts": EXPERTS,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modul": []}, "modul: Extra inputs"),
        ({"layer_path": "m.a"}, "layer_path: .*exactly once"),
        ({"attention": None}, "attention: "),
        ({"attention": ATTENTION | {"modules": []}}, r"attention\.modules: .*at least 1"),
        (
            {"attention": ATTENTION | {"modules": [Q | {"basis_side": "left"}]}},
            r"attention\.modules\.0\.basis_side",
        ),
        (
            {"attention": ATTENTION | {"modules": [Q | {"projections": ["w"]}]}},
            r"attention\.modules\.0\.projections",
        ),
        (
            {"attention": ATTENTION | {"modules": [Q | {"projections": []}]}},
            r"attention\.modules\.0\.projections",
        ),
        ({"experts": EXPERTS | {"modules": [Q]}}, r"experts\.modules\.0\.stored: Field required"),
        ({"ffn": ATTENTION}, r"ffn\.hidden_width: Field required"),
        ({"family": 3}, "family: "),
    ],
)
def test_a_wrong_architecture_file_is_refused(change: dict[str, Any], message: str) -> None:
    assert parse_architecture(json.dumps(VALID), "x.json").family == "x"
    with pytest.raises(LestdError, match=rf"x\.json is not a valid .*{message}"):
        parse_architecture(json.dumps(VALID | change), "x.json")
    with pytest.raises(LestdError, match=r"x\.json is not a valid .*JSON"):
        parse_architecture("{", "x.json")
