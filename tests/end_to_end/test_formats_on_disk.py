"""Low-rank and tensor methods from the command line to a loaded model, on real model families."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.cli import digest_tree, lestd
from support.families import save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from orchestrator.manifest.manifest import Manifest


def slow(*case: object) -> object:
    return pytest.param(*case, marks=pytest.mark.slow)


CASES = [
    slow("llama", "svd", "all", ()),
    slow("llama", "laser", "ffn", ()),
    ("mistral", "per_head_tucker", "attention", ()),
    slow("gpt_neox", "per_head_tucker", "attention", ("--value-bits", 4, "--factor-bits", 8)),
    slow("gpt_neox", "hosvd", "attention", ()),
    ("opt", "tt", "ffn", ()),
    slow("llama", "tt", "all", ("--metric", "norm", "--value-bits", 8)),
    ("qwen3_moe", "svd", "experts", ("--value-bits", 4, "--factor-bits", 4, "--metric", "norm")),
    ("qwen3_moe", "td_moe", "experts", ()),
    slow("mixtral", "td_moe", "experts", ("--td-moe-mode", "compress")),
    slow("gpt_oss", "td_moe", "experts", ("--value-bits", 8, "--factor-bits", 8)),
]


def logits_of(directory: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = torch.arange(3, 51).view(2, 24)
    with torch.no_grad():
        return model(tokens).logits  # type: ignore[no-any-return]


FEW_BITS = 0.01
"""The export rounds a value to bfloat16, a model that is loaded in float32 multiplies its code."""


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def bytes_on_disk(directory: Path, prefix: str) -> int:
    total = 0
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        mine = [tensor for name, tensor in tensors.items() if name.startswith(prefix)]
        total += sum(tensor.numel() * tensor.element_size() for tensor in mine)
    return total


@pytest.mark.parametrize(("family", "method", "scope", "more"), CASES)
def test_a_model_on_disk_computes_what_its_dense_export_does(
    family: str, method: str, scope: str, more: tuple[object, ...], tmp_path: Path
) -> None:
    source = save_tiny(family, tmp_path / "source", torch.bfloat16)
    out, dense, keep = tmp_path / "out", tmp_path / "dense", 0.6
    command = ("compress", source, "--out", out, "--keep", keep, "--executor", "serial")
    command += ("--method", method, "--scope", scope, *more)
    run = lestd(*command)
    assert run.code == 0, run.err
    exported = lestd("export", out, "--dense", dense, "--dtype", "float32")
    assert exported.code == 0, exported.err
    expected = logits_of(dense)
    difference = relative(logits_of(out), expected)
    assert difference < (FEW_BITS if "--value-bits" in more else 1e-4)
    assert relative(logits_of(source), expected) > 10 * max(difference, 1e-3)
    for row in Manifest(out).groups().to_pylist():
        assert row["method"] == method
        assert row["stored_bytes"] <= keep * row["dense_bytes"]

    # Half of the work is lost, and done again to the same bytes.
    first = digest_tree(out)
    shutil.rmtree(out)
    payloads = sorted((tmp_path / "out.run").rglob("*.safetensors"))
    payloads[0].unlink()
    again = lestd(*command)
    assert again.code == 0, again.err
    assert digest_tree(out) == first


@pytest.mark.parametrize("method", ["svd_llm", "asvd"])
def test_a_calibrated_model_on_disk(
    method: str, tiny_llama: Path, wikitext: Path, tmp_path: Path
) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    needed = lestd("compress", tiny_llama, "--out", out, "--keep", 0.3, "--method", method)
    assert needed.code != 0
    assert "calibrate" in needed.err
    calibrate = ("--calibrate-on", wikitext, "--samples", 4, "--sample-tokens", 64)
    run = lestd(
        *("compress", tiny_llama, "--out", out, "--keep", 0.3, "--method", method, "--include"),
        *("0,2", "--executor", "serial", "--value-bits", 8, "--factor-bits", 8, *calibrate),
    )
    assert run.code == 0, run.err
    assert lestd("export", out, "--dense", dense, "--dtype", "float32").code == 0
    assert relative(logits_of(out), logits_of(dense)) < FEW_BITS
    rows = Manifest(out).groups().to_pylist()
    assert [row["metric"] for row in rows] == ["activation"] * 2
    for row in rows:
        block = f"{row['block']}."
        stored = bytes_on_disk(out, block)
        assert 0.29 * row["dense_bytes"] < row["stored_bytes"] == stored <= 0.3 * row["dense_bytes"]


def test_words_of_methods_that_do_not_go_with_a_scope(tiny_llama: Path, tmp_path: Path) -> None:
    for method, scope in (("td_moe", "attention"), ("per_head_tucker", "ffn")):
        command = ("plan", tiny_llama, "--keep", 0.5, "--method", method, "--scope", scope)
        refused = lestd(*command)
        assert refused.code != 0
        assert f"method '{method}' decomposes" in refused.err.replace("\n", " ")
