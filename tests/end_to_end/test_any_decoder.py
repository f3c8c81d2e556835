"""Models whose architecture is found in their modules: one family of each layout, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli import lestd
from support.compressing import compress
from support.every_family import save_any
from support.families import save_tiny
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import orchestrator.architectures
from orchestrator.architectures import families, find_architecture, load_architecture
from orchestrator.architectures.tiny import tiny_config
from orchestrator.model.export import export_dense
from orchestrator.source.checkpoint import resolve_source
from workers.checkpoint.tensors import ShardIndex, read_tensor
from workers.host.loading import auto_class

LAYOUTS = {
    "cosmos3_edge": "tensors without the path of the tower that the model has them in",
    "deepseek_v3": "latent attention, dense and sparse layers, shared experts",
    "gemma3": "a wrapper with other towers, whose tensors have other names",
    "gpt2": "transposed weights",
    "granitemoe": "experts that the checkpoint keeps elsewhere",
    "llama4_text": "experts that are given every token",
    "muse_spark": "experts with a norm behind them",
    "nemotron_h": "experts without a gate",
    "phi3": "fused q, k, v and fused gate, up",
    "phimoe": "a router whose name the library looks for everywhere",
    "qwen3_next": "linear attention beside heads with gated queries",
    "qwen3_omni_moe_thinker": "experts that are initialized through the block that holds them",
    "step3p7": "gates and ups of all experts in a tensor each",
}


def logits_of(directory: Path, auto: Any = AutoModelForCausalLM) -> Tensor:
    model = auto.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.randint(3, 90, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits


def check(dense: Path, root: Path) -> None:
    """Compress all of a model: it computes as its dense export does, and after it is saved."""
    out = compress(dense, root / "out", "--scope", "all", "--method", "svd", "--keep", 0.6)
    export_dense(out, root / "export", torch.float32)
    auto = auto_class(AutoConfig.from_pretrained(dense))
    found, expected = logits_of(out, auto), logits_of(root / "export", auto)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (found - logits_of(dense, auto)).abs().max() > 1e-3 * expected.abs().max()
    auto.from_pretrained(out).save_pretrained(root / "again")
    # The same bits in another place of a mapped file, where kernels may round in another way.
    again = logits_of(root / "again", auto)
    assert (again - found).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", LAYOUTS)
def test_one_family_of_each_layout(family: str, tmp_path: Path) -> None:
    check(save_any(family, tmp_path / "dense"), tmp_path)


@pytest.mark.parametrize("family", ["qwen3_5_moe", "gemma3"])
def test_a_model_that_reads_images_loads_with_and_without_them(family: str, tmp_path: Path) -> None:
    """The checkpoint is the whole model's; the decoder is compressed, the rest copied."""
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(tiny_config(family))
    whole.save_pretrained(tmp_path / "dense")
    out = compress(
        tmp_path / "dense", tmp_path / "out", "--scope", "all", "--method", "svd", "--keep", 0.6
    )
    dense, small = (ShardIndex.from_directory(one).tensors for one in (tmp_path / "dense", out))
    towers = [name for name in dense if "visual" in name or "vision" in name]
    assert towers
    for name in towers:
        assert torch.equal(read_tensor(dense[name]), read_tensor(small[name]))
    loaded = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.randint(3, 90, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = loaded(input_ids=ids).logits
    torch.testing.assert_close(found, logits_of(out))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_were_saved_in_one_tensor(family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny(family, tmp_path / "model"))
    model.save_pretrained(tmp_path / "dense", save_original_format=False)
    check(tmp_path / "dense", tmp_path)


def test_what_was_found_is_shown_saved_and_given(tmp_path: Path) -> None:
    dense = save_any("phi3", tmp_path / "dense")
    shown = lestd("plan", dense, "--show-architecture")
    assert shown.code == 0
    found = json.loads(shown.out)
    [qkv, _] = found["blocks"][0]["modules"]
    assert qkv["slices"] == [["q", 4], ["k", 2], ["v", 2]]
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(found | {"blocks": found["blocks"][:1]}))
    plan = lestd("plan", dense, "--keep", 0.5, "--scope", "all", "--architecture", file, "--json")
    assert {layer["scope"] for layer in json.loads(plan.out)["layers"]} == {"attention"}
    file.write_text(shown.out.replace('"path"', '"pth"'))
    refused = lestd("plan", dense, "--keep", 0.5, "--architecture", file)
    assert refused.code == 2
    assert f"{file} is not a valid architecture" in refused.err


def test_a_run_goes_on_with_what_it_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of Transformers may show another architecture."""
    dense, out = save_any("phi3", tmp_path / "dense"), tmp_path / "out"
    compress(dense, out, "--keep", 0.5)
    architecture = resolve_source(str(dense)).architecture
    other = architecture.model_copy(update={"transformers": "6.0.0"})
    monkeypatch.setattr("orchestrator.source.checkpoint.find_architecture", lambda *_: other)
    again = lestd("compress", dense, "--out", out, "--executor", "serial", "--keep", 0.5)
    assert again.code == 0, again.err
    fresh = lestd("compress", dense, "--out", out, "--executor", "serial", "--keep", 0.5, "--fresh")
    assert fresh.code == 0
    run = json.loads((tmp_path / "out.run" / "run.json").read_text())
    assert run["fingerprint"]["source"]["architecture"]["transformers"] == "6.0.0"


def test_a_matrix_of_its_own_needs_a_method_that_shares_nothing(tmp_path: Path) -> None:
    dense = save_any("deepseek_v3", tmp_path / "dense")
    refused = lestd("plan", dense, "--keep", 0.5, "--scope", "linear")
    assert refused.code == 2
    assert "method 'lestd' needs several that share a basis; choose one of tt, svd" in refused.err
    scopes = {
        method: {
            layer["scope"]
            for layer in json.loads(
                lestd(
                    *("plan", dense, "--keep", 0.5, "--scope", "all"),
                    *("--method", method, "--json"),
                ).out
            )["layers"]
        }
        for method in ("lestd", "svd")
    }
    assert scopes == {"lestd": {"ffn", "experts"}, "svd": {"ffn", "experts", "linear"}}


def test_targets_and_ignore_choose_blocks_by_their_paths(tmp_path: Path) -> None:
    dense = save_any("deepseek_v3", tmp_path / "dense")
    command = ("plan", dense, "--keep", 0.5, "--scope", "all", "--method", "svd")
    plan = lestd(*command, "--targets", "_proj$", "--ignore", r"shared|experts|layers\.0", "--json")
    blocks = {layer["block"] for layer in json.loads(plan.out)["layers"]}
    assert "model.layers.1.self_attn.kv_b_proj" in blocks
    assert not [one for one in blocks if "mlp" in one or "layers.0" in one]
    refused = lestd(*command, "--targets", "nothing")
    assert refused.code == 2
    assert "leave nothing of scope all to compress, whose blocks are called model." in refused.err
    refused = lestd(*command, "--targets", "(")
    assert refused.code == 2
    assert "expected a regular expression of RE2, found '('" in refused.err


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_the_metric_of_a_norm_that_does_not_scale_the_input(family: str, tmp_path: Path) -> None:
    """Gemma's norms act as 1 + w, and OLMo 2 has none before a block."""
    dense = save_any(family, tmp_path / "dense")
    refused = lestd("plan", dense, "--keep", 0.5, "--metric", "norm")
    assert refused.code == 2
    assert "no norm is known whose weight multiplies the input of model.layers.0" in refused.err


def test_an_unreadable_description_stops_its_own_family_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = save_tiny("llama", tmp_path / "dense")
    own = Path(orchestrator.architectures.__file__).parent / "llama.json"
    (tmp_path / "llama.json").write_text(own.read_text())
    (tmp_path / "opt.json").write_text("{")
    monkeypatch.setattr("orchestrator.architectures.files", lambda _: tmp_path)
    for cached in (families, load_architecture):
        cached.cache_clear()
    try:
        source = resolve_source(str(dense))
        assert find_architecture(source.config, source.index).family == "llama"
    finally:
        for cached in (families, load_architecture):
            cached.cache_clear()
