"""The experts module in the compressed domain, against that of Transformers."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.compressing import compress
from support.families import CONFIGS, save_tiny
from support.scopes import dense_chain, groups_of, rotated_chain, write_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lestd_kernels.peft_plugin
from lestd_kernels.modules.experts import CompressedExperts
from lestd_kernels.modules.registry import MODULES

EXPERT_FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss")
PATH = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> dense directory; beside it one compressed without loss, ``<family>-rotated``."""
    root = tmp_path_factory.mktemp("experts")
    for family in EXPERT_FAMILIES:
        source = save_tiny(family, root / family)
        write_model(source, groups_of(source, "all"), rotated_chain, root / f"{family}-rotated")
    return {family: root / family for family in EXPERT_FAMILIES}


def rotated(dense: Path) -> Path:
    return dense.with_name(f"{dense.name}-rotated")


def blocks(dense: Path) -> tuple[nn.Module, CompressedExperts]:
    """The experts of the first layer: Transformers' own and the compressed ones."""
    one, other = (AutoModelForCausalLM.from_pretrained(path) for path in (dense, rotated(dense)))
    # Its own loop over the experts, the plainest of Transformers' ways.
    one.set_experts_implementation("eager")
    return one.get_submodule(PATH), other.get_submodule(PATH)


def routing(kind: str, tokens: int, experts: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(tokens, 2, generator=generator)
    if kind == "all to two":
        return torch.tensor([[3, 1]]).expand(tokens, 2).contiguous(), weights
    if kind == "one has none":  # Expert 2.
        choices = torch.tensor([0, 1, *range(3, experts)])
    else:
        choices = torch.arange(experts)
    picked = [torch.randperm(len(choices), generator=generator)[:2] for _ in range(tokens)]
    index = torch.stack([choices[one] for one in picked]) if tokens else torch.empty(0, 2)
    return index.long(), weights


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("any", 23), ("any", 1), ("all to two", 7), ("one has none", 11), ("any", 0)],
)
def test_every_routing_gives_what_transformers_gives(
    family: str, kind: str, tokens: int, models: dict[str, Path]
) -> None:
    dense, compressed = blocks(models[family])
    x = torch.randn(tokens, CONFIGS[family].hidden_size)
    index, weights = routing(kind, tokens, compressed.num_experts)
    with torch.no_grad():
        expected, found = dense(x, index, weights), compressed(x, index, weights)
    assert found.shape == x.shape
    assert torch.allclose(found, expected, rtol=1e-4, atol=2e-5)


def test_the_clamped_activation_of_gpt_oss_and_its_biases(models: dict[str, Path]) -> None:
    """At inputs so large that the limit of its activation is reached."""
    dense, compressed = blocks(models["gpt_oss"])
    index, weights = routing("any", 9, 5)
    x = 50 * torch.randn(9, 40)
    with torch.no_grad():
        expected = dense(x, index, weights)
        assert torch.allclose(compressed(x, index, weights), expected, rtol=1e-4, atol=1e-3)
        for name in ("gate_up_proj_bias", "down_proj_bias"):
            bias = compressed.get_parameter(name)
            assert bool(bias.abs().min() > 0)
            kept = bias.clone()
            bias.zero_()
            other = compressed(x, index, weights)
            bias.copy_(kept)
            assert not torch.allclose(other, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_what_the_experts_share_is_applied_once_per_token(
    family: str, models: dict[str, Path]
) -> None:
    _, compressed = blocks(models[family])
    rows: list[int] = []
    shared = compressed.get_submodule("lestd_q")
    shared.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    index, weights = routing("any", 13, compressed.num_experts)
    with torch.no_grad():
        compressed(torch.randn(13, CONFIGS[family].hidden_size), index, weights)
    assert rows == [13, 13]  # Gates and ups together, and downs.


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_gradients_are_those_of_the_dense_experts(family: str, models: dict[str, Path]) -> None:
    dense, compressed = blocks(models[family])
    index, weights = routing("one has none", 11, compressed.num_experts)
    x = torch.randn(11, CONFIGS[family].hidden_size)
    found = []
    for block in (dense, compressed):
        inputs = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        block(inputs[0], index, inputs[1]).square().sum().backward()
        found.append([one.grad for one in inputs])
    for expected, actual in zip(*found, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-4)
    for name, parameter in compressed.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached == ("expert_2" not in name), name


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_copies(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "half", dtype=dtype)
    chain = functools.partial(dense_chain, dtype=dtype)
    out = write_model(source, groups_of(source, "experts"), chain, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert {m.weight.dtype for m in model.modules() if isinstance(m, MODULES)} == {dtype}
    single = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    index, weights = routing("any", 19, 4)
    x = torch.randn(19, CONFIGS[family].hidden_size).to(dtype)
    with torch.no_grad():
        # Block by block: a router may choose otherwise for another last bit.
        expected = dense.get_submodule(PATH)(x.float(), index, weights)
        exact = single.get_submodule(PATH)(x.float(), index, weights)
        half = model.get_submodule(PATH)(x, index, weights.to(dtype))
        ids = torch.arange(3, 40)[None]
        assert torch.equal(model(ids).logits, copy.deepcopy(model)(ids).logits)
    assert torch.allclose(exact, expected, rtol=1e-4, atol=1e-5)
    assert half.dtype == dtype
    assert (half - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_disk_offload_and_a_device_map(
    family: str, models: dict[str, Path], tmp_path: Path
) -> None:
    directory = rotated(models[family])
    expected = AutoModelForCausalLM.from_pretrained(directory).eval()
    names = [f"model.layers.{i}" for i in range(expected.config.num_hidden_layers)]
    others = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    device_map = dict.fromkeys(names, "disk") | dict.fromkeys(others, "cpu")
    for options in (
        {"device_map": device_map, "offload_folder": tmp_path / "offload"},
        {"device_map": "auto"},
    ):
        model = AutoModelForCausalLM.from_pretrained(directory, **options).eval()
        ids = torch.arange(3, 40)[None]
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_generation(family: str, models: dict[str, Path]) -> None:
    dense, model = (
        AutoModelForCausalLM.from_pretrained(path).eval()
        for path in (models[family], rotated(models[family]))
    )
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    mask = (ids != 0).long()
    expected = dense.generate(ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_adapters_on_experts(family: str, models: dict[str, Path]) -> None:
    """An adapter reads the module's own input, not what the shared factor has made of it."""
    lestd_kernels.peft_plugin.register()
    directory = rotated(models[family])
    plain = AutoModelForCausalLM.from_pretrained(directory).eval()
    config = LoraConfig(r=2, target_modules=r".*expert_\d+\.(gate|down)", init_lora_weights=True)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(directory), config).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = plain(ids).logits
        assert torch.allclose(adapted(ids).logits, expected, rtol=1e-4, atol=1e-5)
    adapted(ids).logits.sum().backward()
    trained = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in trained)


@pytest.mark.parametrize(
    ("method", "factors"),
    [("tucker", {"lestd_u1": 2}), ("lestd", {"lestd_u1": 1, "lestd_u1_output": 1})],
)
def test_the_factors_that_methods_share(
    method: str, factors: dict[str, int], tmp_path: Path
) -> None:
    """Once for the gates and ups, once for the downs, whichever side a factor stands on."""
    source = save_tiny("gpt_oss", tmp_path / "source")
    options = ("--scope", "experts", "--method", method, "--keep", 0.6)
    model = AutoModelForCausalLM.from_pretrained(compress(source, tmp_path / "out", *options))
    rows: dict[str, list[int]] = {name: [] for name in factors}

    def count(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        rows[name].append(len(args[0]))

    for name in factors:
        factor = model.get_submodule(PATH).get_submodule(name)
        factor.register_forward_hook(functools.partial(count, name))
    with torch.no_grad():
        model(torch.arange(3, 20)[None])
    assert rows == {name: [17] * times for name, times in factors.items()}
