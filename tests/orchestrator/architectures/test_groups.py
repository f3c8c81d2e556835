"""Feed-forward blocks and experts, found by name in real models, and expert by expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import CONFIGS, FAMILIES, save_tiny
from support.rewriting import rewrite
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lestd_kernels.errors import LestdError
from lestd_kernels.tensorize import dense_tensors, fold_weights, unfold_weights
from orchestrator.architectures import SliceGroup, find_architecture
from workers.checkpoint.tensors import ShardIndex, read_tensor

EXPERT_FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss")
FFN: dict[str, tuple[str, tuple[str, ...], str]] = {
    "opt": ("model.decoder.layers.{}", ("fc1", "fc2"), "final_layer_norm"),
    "gptj": ("transformer.h.{}.mlp", ("fc_in", "fc_out"), "ln_1"),
    "gpt_neox": (
        "gpt_neox.layers.{}.mlp",
        ("dense_h_to_4h", "dense_4h_to_h"),
        "post_attention_layernorm",
    ),
}
LLAMA_FFN = (
    "model.layers.{}.mlp",
    ("gate_proj", "up_proj", "down_proj"),
    "post_attention_layernorm",
)
"""Path, modules and preceding norm of the dense feed-forward block, from the families' code."""


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: save_tiny(family, root / family) for family in FAMILIES}


def groups_of(directory: Path, scope: str, **changes: Any) -> list[SliceGroup]:
    config = AutoConfig.from_pretrained(directory)
    for key, value in changes.items():
        setattr(config, key, value)
    index = ShardIndex.from_directory(directory)
    return find_architecture(config, index).groups(config, index, scope)


def matrices_of(group: SliceGroup) -> dict[str, Tensor]:
    return {source: read_tensor(ref) for source, ref in group.tensors.items()}


def weights_of(group: SliceGroup) -> dict[str, Tensor]:
    """Module -> weight (out, in), by way of the unfolding."""
    return fold_weights(unfold_weights(matrices_of(group), group.layout), group.layout)


def dense_layers(family: str) -> list[int]:
    layers = list(range(CONFIGS[family].num_hidden_layers))
    return {"qwen3_moe": [1], "mixtral": [], "gpt_oss": []}.get(family, layers)


def expert_layers(family: str) -> list[int]:
    layers = list(range(CONFIGS[family].num_hidden_layers))
    return {"qwen3_moe": [0, 2]}.get(family, layers) if family in EXPERT_FAMILIES else []


@pytest.mark.parametrize("family", [family for family in FAMILIES if dense_layers(family)])
def test_feed_forward_blocks(family: str, tiny_models: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models[family])
    path, names, norm = FFN.get(family, LLAMA_FFN)
    groups = groups_of(tiny_models[family], "ffn")
    assert [group.layer for group in groups] == dense_layers(family)
    for group in groups:
        assert (group.scope, group.block) == ("ffn", path.format(group.layer))
        assert group.tensor_prefix == group.block
        weights = weights_of(group)
        assert tuple(weights) == names
        for name in names:
            assert torch.equal(weights[name], model.get_submodule(f"{group.block}.{name}").weight)
        up, down = group.layout.modules[-2:]
        assert (up.slices, down.slices) == ((("up", 0),), (("down", 0),))
        assert (up.reads, down.reads) == ("in", "hidden")
        assert {m.slices for m in group.layout.modules[:-2]} <= {(("gate", 0),)}
        assert group.layout.head_dim == weights[up.name].shape[0]
        layer = path.format(group.layer).removesuffix(".mlp")
        gamma = model.get_submodule(f"{layer}.{norm}").weight
        assert torch.equal(read_tensor(group.norms["in"]), gamma)


def experts_of(block: nn.Module) -> dict[str, Tensor]:
    """Weights (out, in) of a loaded experts module, from the families' code."""
    fused: Any = block
    weights = {}
    for expert in range(fused.num_experts):
        gate_up, down = fused.gate_up_proj[expert], fused.down_proj[expert]
        if type(block).__name__ == "GptOssExperts":
            gate, up, down = gate_up[:, ::2].T, gate_up[:, 1::2].T, down.T
        else:
            gate, up = gate_up.chunk(2)
        weights |= dict(zip(expert_modules(expert), (gate, up, down), strict=True))
    return weights


def expert_modules(expert: int) -> list[str]:
    return [f"expert_{expert}.{role}" for role in ("gate", "up", "down")]


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_experts(family: str, tiny_models: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models[family])
    groups = groups_of(tiny_models[family], "experts")
    assert [group.layer for group in groups] == expert_layers(family)
    for group in groups:
        assert (group.scope, group.block) == ("experts", f"model.layers.{group.layer}.mlp.experts")
        expected = experts_of(model.get_submodule(group.block))
        weights = weights_of(group)
        assert list(weights) == list(expected)
        for name, weight in expected.items():
            assert torch.equal(weights[name], weight)
        for module in group.layout.modules:
            block, role = module.name.split(".")
            expert = int(block.removeprefix("expert_"))
            assert module.slices == ((role, expert),)
            assert module.reads == ("hidden" if role == "down" else "in") + f"_{expert}"
        d, f = CONFIGS[family].hidden_size, weights["expert_0.gate"].shape[0]
        assert (group.layout.width, group.layout.head_dim, group.layout.guard) == (
            d,
            f,
            "gate_up_proj",
        )
        read = sum(ref.stored_bytes for ref in group.tensors.values())
        assert read == 4 * group.layout.elements == sum(w.nbytes for w in expected.values())


def mark(family: str, tensors: dict[str, Tensor]) -> None:
    """Overwrite every expert's weights by what they are, from the families' code."""
    for name, tensor in tensors.items():
        if ".experts." not in name or name.endswith("_bias"):
            continue
        if family == "gpt_oss":
            number = torch.arange(len(tensor)).float()[:, None, None]
            if "gate_up" in name:
                tensor[..., ::2], tensor[..., 1::2] = 100 + number, 200 + number
            else:
                tensor.copy_((300 + number).expand_as(tensor))
            continue
        number_text, role = name.partition(".experts.")[2].removesuffix(".weight").split(".")
        known = {
            "gate_proj": 100,
            "up_proj": 200,
            "down_proj": 300,
            "w1": 100,
            "w3": 200,
            "w2": 300,
        }
        tensor.fill_(known[role] + int(number_text))


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_every_slice_is_the_expert_it_claims_to_be(
    family: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    directory = rewrite(tmp_path / "m", tiny_models[family], lambda t: mark(family, t))
    group = groups_of(directory, "experts")[0]
    unfolding = unfold_weights(matrices_of(group), group.layout)
    f = group.layout.head_dim
    assert len(set(group.layout.slices)) == len(group.layout.slices) == unfolding.shape[1] // f
    for position, (role, expert) in enumerate(group.layout.slices):
        expected = {"gate": 100.0, "up": 200.0, "down": 300.0}[role] + expert
        assert bool((unfolding[:, position * f : (position + 1) * f] == expected).all())


@pytest.mark.parametrize("scope", ["ffn", "experts"])
@pytest.mark.parametrize("family", ["opt", "llama", *EXPERT_FAMILIES])
def test_the_checkpoints_tensors_come_back(
    family: str, scope: str, tiny_models: dict[str, Path]
) -> None:
    if not (dense_layers(family) if scope == "ffn" else expert_layers(family)):
        with pytest.raises(LestdError, match="model has none"):
            groups_of(tiny_models[family], scope)
        return
    group = groups_of(tiny_models[family], scope)[0]
    names = {ref.name for ref in group.tensors.values()}
    index = ShardIndex.from_directory(tiny_models[family])
    tensors = dense_tensors(weights_of(group), group.layout)
    assert {f"{group.tensor_prefix}.{name}" for name in tensors} == names
    for name, tensor in tensors.items():
        stored = read_tensor(index.tensors[f"{group.tensor_prefix}.{name}"])
        assert torch.equal(tensor, stored)


@pytest.mark.parametrize(
    ("family", "scope", "message"),
    [
        ("llama", "experts", "asks for experts, and this llama .* choose attention, ffn or all"),
        ("mixtral", "ffn", "feed-forward blocks, .*; choose attention, experts or all"),
    ],
)
def test_a_scope_that_the_model_has_not(
    family: str, scope: str, message: str, tiny_models: dict[str, Path]
) -> None:
    with pytest.raises(LestdError, match=message):
        groups_of(tiny_models[family], scope)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_is_every_block_of_every_layer(family: str, tiny_models: dict[str, Path]) -> None:
    groups = groups_of(tiny_models[family], "all")
    kinds = [(group.layer, group.scope) for group in groups]
    expected = [
        (layer, kind)
        for layer in range(CONFIGS[family].num_hidden_layers)
        for kind, where in (
            ("attention", [layer]),
            ("ffn", dense_layers(family)),
            ("experts", expert_layers(family)),
        )
        if layer in where
    ]
    assert kinds == expected
    assert len({group.block for group in groups}) == len(groups)
    names = [ref.name for group in groups for ref in group.tensors.values()]
    ranges = {(r.shard, r.byte_range) for g in groups for r in g.tensors.values()}
    assert len(ranges) == len(names)  # No byte belongs to two matrices.


@pytest.mark.parametrize("family", ["opt", *EXPERT_FAMILIES])
def test_a_checkpoint_of_the_base_model(
    family: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models[family])
    model.base_model.save_pretrained(tmp_path / "base")
    full = groups_of(tiny_models[family], "all")
    base = groups_of(tmp_path / "base", "all")
    for group, expected in zip(base, full, strict=True):
        assert group.block == expected.block
        assert group.tensor_prefix == expected.tensor_prefix.removeprefix("model.")
        for source, matrix in matrices_of(expected).items():
            assert torch.equal(read_tensor(group.tensors[source]), matrix)


def test_the_layers_with_experts(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """decoder_sparse_step: every second layer has experts, and a missing block is an error."""
    directory = tiny_models["qwen3_moe"]
    with pytest.raises(LestdError, match=r"layers\.0\.mlp\.gate_proj\.weight is absent"):
        groups_of(directory, "all", decoder_sparse_step=2)
    with pytest.raises(LestdError, match=r"mlp\.experts\.4\.gate_proj\.weight is absent"):
        groups_of(directory, "experts", num_experts=5)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"intermediate_size": 60}, r"gate_proj\.weight .* \[72, 48\], .* \[60, 48\]"),
        ("gpt_oss", {"num_local_experts": 6}, r"gate_up_proj .* \[5, 40, 40\], .* \[6, 40, 40\]"),
        ("gpt_oss", {"intermediate_size": 10}, r"gate_up_proj .* \[5, 40, 40\], .* \[5, 40, 20\]"),
        ("mixtral", {"num_local_experts": 0}, "20 and 0 as width and number of the experts"),
    ],
)
def test_shapes_that_disagree_with_config_json(
    family: str, change: dict[str, int], message: str, tiny_models: dict[str, Path]
) -> None:
    with pytest.raises(LestdError, match=message):
        groups_of(tiny_models[family], "all", **change)


def test_gpt_j_states_its_width_or_has_four_times_the_models(tmp_path: Path) -> None:
    assert CONFIGS["gptj"].n_inner is None
    directory = save_tiny("gptj", tmp_path / "m")
    [*_, group] = groups_of(directory, "ffn")
    assert group.layout.head_dim == 160
    with pytest.raises(LestdError, match=r"\[160, 40\], and config.json says \[90, 40\]"):
        groups_of(directory, "ffn", n_inner=90)


def test_a_model_that_norms_afterwards(tiny_models: dict[str, Path]) -> None:
    groups = groups_of(tiny_models["opt"], "all", do_layer_norm_before=False)
    assert not any(group.norms for group in groups)
