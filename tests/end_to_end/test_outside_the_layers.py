"""Modules outside of the decoder layers, which a run takes where --targets names them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from support.cli import lestd
from support.compressing import compress
from support.every_family import save_any
from support.families import save_tiny
from support.fresh_logits import logits_and_tokens
from transformers import AutoModelForCausalLM

from orchestrator.architectures.tiny import tiny_config
from orchestrator.model.export import export_dense
from workers.checkpoint.tensors import ShardIndex

IMAGE = 100  # The token that stands for a part of a picture.
SEES = f"""
import sys, torch, lestd_kernels
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText
draw = torch.Generator().manual_seed(1)
ids = torch.randint(3, 90, (1, 12), generator=draw)
ids[0, 2:6] = {IMAGE}
picture = torch.randn(1, 3, 64, 64, generator=draw)
logits = {{}}
for name in sys.argv[2:]:
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32).eval()
    with torch.no_grad():
        logits[name] = model(input_ids=ids, pixel_values=picture).logits.clone()
save_file(logits, sys.argv[1])
"""


def compressed(out: Path) -> list[str]:
    """Paths of the modules that are compressed."""
    entries = json.loads((out / "config.json").read_text())["quantization_config"]["groups"]
    return [f"{one['path']}.{name}".lstrip(".") for one in entries for name in one["modules"]]


def test_a_head_of_its_own(tmp_path: Path) -> None:
    dense = save_tiny("gpt_neox", tmp_path / "dense")  # Whose head has another name on disk.
    options = ("--scope", "linear", "--targets", "lm_head", "--method", "rtn", "--value-bits", 8)
    out = compress(dense, tmp_path / "out", *options, "--keep", 0.5)
    assert compressed(out) == ["lm_head"]
    export_dense(out, tmp_path / "export", torch.float32)
    names = ShardIndex.from_directory(dense).tensors.keys()
    assert ShardIndex.from_directory(tmp_path / "export").tensors.keys() == names
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "again")
    models = (out, tmp_path / "again", tmp_path / "export")
    (original, _), *found = logits_and_tokens(tmp_path / "found", dense, *models)
    for logits, tokens in found:
        torch.testing.assert_close(logits, found[-1][0])
        assert torch.equal(tokens, found[-1][1])
        assert not torch.allclose(logits, original)
    page = ("--out", tmp_path / "report.html")
    for command in (("verify", out), ("status", out), ("report", out, *page)):
        assert lestd(*command).code == 0


def test_a_tower_and_a_projector(tmp_path: Path) -> None:
    config = tiny_config("llava")
    config.image_token_id = config.image_token_index = IMAGE
    config.vision_config.image_size = 64
    dense = save_any("llava", tmp_path / "dense", config)
    options = ("--scope", "all", "--method", "svd", "--keep", 0.6, "--ignore", "head|language")
    out = compress(dense, tmp_path / "out", *options, "--targets", r"\.0\.mlp|vision|projector")
    assert not [one for one in compressed(out) if "language" in one or "head" in one]
    for end in ("self_attn.q_proj", "mlp.fc2", "multi_modal_projector.linear_1"):
        assert [one for one in compressed(out) if one.endswith(end)]
    export_dense(out, tmp_path / "export", torch.float32)
    models = [str(tmp_path / name) for name in ("dense", "out", "export")]
    command = [sys.executable, "-c", SEES, str(tmp_path / "found"), *models]
    subprocess.run(command, check=True)
    original, logits, expected = map(load_file(tmp_path / "found").__getitem__, models)
    most = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=most)
    assert (logits - original).abs().max() > 10 * most


def test_what_cannot_be_compressed_says_why(tmp_path: Path) -> None:
    tied, own = (save_tiny(name, tmp_path / name) for name in ("qwen2", "llama"))
    calibrated = ("--method", "svd_llm", "--calibrate-on", __file__)
    svd = ("--keep", 0.5, "--method", "svd", "--scope")
    for command, said in (
        ((tied, *svd, "linear", "--targets", "lm_head"), "lm_head stays dense: tied, its weight"),
        ((own, *svd, "linear", "--targets", "embed"), "embed_tokens stays dense: an embedding"),
        ((own, *svd, "attention", "--targets", "lm_head"), "such as lm_head, is of scope linear"),
        (
            (own, "--keep", 0.5, "--scope", "all", "--targets", "head", *calibrated),
            "and lm_head stands outside of them; leave it out with --ignore",
        ),
    ):
        refused = lestd("plan", *command)
        assert refused.code == 2
        assert said in refused.err
    plan = lestd("plan", own, "--keep", 0.5, "--scope", "all", "--targets", "head|attn", "--json")
    assert {layer["scope"] for layer in json.loads(plan.out)["layers"]} == {"attention"}
    assert "lm_head" in {one["module"] for one in json.loads(plan.out)["left_dense"]}
    plan = lestd("plan", own, *svd, "linear", "--targets", "head", "--metric", "norm", "--json")
    assert [one["metric"] for one in json.loads(plan.out)["layers"]] == ["norm"]
    plan = lestd("plan", own, *svd, "all", "--json")
    assert not [one for one in json.loads(plan.out)["layers"] if one["scope"] == "linear"]
