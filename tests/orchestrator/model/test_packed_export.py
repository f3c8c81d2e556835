"""`lestd export --compressed-tensors`: the same values, as another library reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.cli import lestd
from support.compressing import compress
from transformers import AutoModelForCausalLM, LlamaConfig

from orchestrator.model.reader import open_compressed

OPTIONS = ("--scale-groups", "inputs", "--keep", 0.9, "--scope", "all")
TEXT = "the cat sat on the mat and the dog on the log " * 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packed") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=91,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def export(compressed: Path, out: Path) -> Path:
    run = lestd("export", compressed, "--compressed-tensors", out)
    assert run.code == 0, run.err
    return out


def stored_tensors(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in directory.glob("*.safetensors"):
        tensors |= load_file(shard)
    return tensors


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_codes_and_scales_unpack_to_our_weights(model: Path, tmp_path: Path, bits: int) -> None:
    compressed = compress(
        model, tmp_path / "out", "--method", "rtn", "--value-bits", bits, *OPTIONS
    )
    tensors = stored_tensors(export(compressed, tmp_path / "packed"))
    seen = 0
    for group in open_compressed(compressed).groups:
        for name, expected in group.to_dense().items():
            path = name.removesuffix(".weight")
            out, inputs = tensors.pop(f"{path}.weight_shape").tolist()
            packed = tensors.pop(f"{path}.weight_packed")
            scale = tensors.pop(f"{path}.weight_scale")
            assert packed.shape == (out, inputs * bits // 32)
            assert scale.shape == (out, inputs // 64)
            # Bit by bit: value j of a row is its bits j * bits and on, the lowest first.
            words = packed.to(torch.int64) & 0xFFFFFFFF
            stream = (words[:, :, None] >> torch.arange(32) & 1).flatten(1)
            codes = (stream.view(out, inputs, bits) << torch.arange(bits)).sum(dim=2)
            exact = (codes - 2 ** (bits - 1)) * scale.double().repeat_interleave(64, dim=1)
            assert torch.equal(exact.to(scale.dtype).float(), expected)
            seen += 1
    assert seen == 14
    assert not [name for name in tensors if "packed" in name or "proj" in name]
    groups = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    [one] = groups["config_groups"].values()
    assert (one["weights"]["num_bits"], len(one["targets"])) == (bits, 14)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--method", "svd", "--keep", 0.5), "not stored as one matrix"),
        (("--method", "watersic", "--keep", 0.3), "not in few bits of a fixed grid"),
        (("--method", "rtn", "--value-bits", 4, "--keep", 0.9), "groups of outputs"),
        (
            ("--method", "rtn", "--value-bits", 4, "--keep-outliers", 0.01, *OPTIONS),
            "outliers are kept beside it",
        ),
    ],
)
def test_what_has_no_such_form_is_refused_before_a_byte_is_written(
    model: Path, tmp_path: Path, options: tuple[object, ...], why: str
) -> None:
    compressed = compress(model, tmp_path / "out", *options)
    run = lestd("export", compressed, "--compressed-tensors", tmp_path / "packed")
    assert run.code == 2
    assert why in " ".join(run.err.split())
    assert not (tmp_path / "packed").exists()


def test_one_form_at_a_time(model: Path, tmp_path: Path) -> None:
    for given in ((), ("--dense", tmp_path / "a", "--compressed-tensors", tmp_path / "b")):
        run = lestd("export", model, *given)
        assert run.code != 0
        assert "either --dense DIR or --compressed-tensors DIR" in " ".join(run.err.split())
    run = lestd("compress", model, "--out", tmp_path / "out", "--keep", 0.5, *OPTIONS[:2])
    assert run.code != 0
    assert "supports only scale_groups 'outputs'" in " ".join(run.err.split())


@pytest.mark.slow
@pytest.mark.parametrize(("method", "bits"), [("rtn", 8), ("rtn", 4), ("gptq", 8), ("gptq", 4)])
def test_transformers_computes_the_same_with_compressed_tensors(
    tiny_llama: Path, tmp_path: Path, method: str, bits: int
) -> None:
    pytest.importorskip("compressed_tensors")
    (tmp_path / "text").write_text(TEXT)
    calibration = ("--calibrate-on", tmp_path / "text", "--samples", 4, "--sample-tokens", 64)
    compressed = compress(
        tiny_llama,
        tmp_path / "out",
        *("--method", method, "--value-bits", bits, *OPTIONS),
        *(calibration if method == "gptq" else ()),
    )
    packed = export(compressed, tmp_path / "packed")
    ids = torch.arange(3, 67).view(2, 32)
    with torch.no_grad():
        ours, theirs, dense = (
            AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32)(ids).logits
            for one in (compressed, packed, tiny_llama)
        )
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-4)
    assert (ours - dense).abs().max() > 0.01
