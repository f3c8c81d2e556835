"""Checkpoints that are quantized already are read as the dense models that they stand for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli import lestd
from support.compressing import compress
from support.every_family import save_any
from support.quantized import compressed_tensors, fp8, mxfp4, quantized
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

import workers.checkpoint.packed
from lestd_kernels.errors import LestdError
from orchestrator.source.checkpoint import resolve_source
from workers.checkpoint.tensors import copy_tensor, hash_tensor, read_tensor


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_any("qwen3", tmp_path_factory.mktemp("qwen3") / "dense")


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpt_oss")
    return mxfp4(save_any("gpt_oss", directory / "dense"), directory / "mxfp4")


def read_all(directory: Path) -> dict[str, Tensor]:
    tensors = resolve_source(str(directory)).index.tensors
    return {name: read_tensor(ref) for name, ref in tensors.items()}


def check_against_transformers(directory: Path, how: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=how, dtype=torch.bfloat16
    )
    expected = model.state_dict()
    found = read_all(directory)
    assert found.keys() == expected.keys()
    for name, one in found.items():
        assert one.dtype == expected[name].dtype
        assert torch.equal(one, expected[name]), name


@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_is_what_transformers_makes_of_it(
    scale: torch.dtype, dense: Path, tmp_path: Path
) -> None:
    source = quantized(dense, tmp_path / "fp8", *fp8((16, 32), scale))
    how = FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 32))
    check_against_transformers(source, how)


def test_mxfp4_is_what_transformers_makes_of_it(gpt_oss: Path) -> None:
    check_against_transformers(gpt_oss, Mxfp4Config(dequantize=True))


def test_fp8_in_blocks_that_do_not_divide_and_with_one_scale(dense: Path, tmp_path: Path) -> None:
    for number, block in enumerate([(40, 48), None]):
        source = quantized(dense, tmp_path / str(number), *fp8(block, torch.float32))
        stored = load_file(source / "model.safetensors")
        found = read_all(source)
        name = "model.layers.1.mlp.down_proj.weight"
        weight, scale = stored[name], stored[f"{name}_scale_inv"]
        for i, j in [(0, 0), (39, 47), (40, 48), (63, 95)]:
            own = scale[i // 40, j // 48] if block else scale
            expected = (weight[i, j].float() * own).bfloat16()
            assert found[name][i, j] == expected


SCHEMES = {
    "int4, groups": (4, "group"),
    "int4, groups, zero points": (4, "group", frozenset({"zero"})),
    "int4, groups in another order": (4, "group", frozenset({"order"})),
    "int8, channels": (8, "channel"),
    "int8, channels, zero points": (8, "channel", frozenset({"zero"})),
    "int8, not packed": (8, "channel", frozenset({"plain"})),
    "float8, one scale": (8, "tensor", frozenset(), "float"),
    "float8, channels": (8, "channel", frozenset(), "float"),
}


def in_python(stored: dict[str, Tensor], path: str, bits: int, i: int, j: int) -> float:
    """One weight, from the bits of the words that it lies in."""
    scale = stored[f"{path}.weight_scale"].float()
    scale = scale.reshape(1, 1) if scale.numel() == 1 else scale
    columns = 64 if path.endswith("gate_proj") else 96
    group = j * scale.shape[1] // columns
    if (order := stored.get(f"{path}.weight_g_idx")) is not None:
        group = int(order[j])

    def number(words: Tensor, at: int) -> int:
        unsigned = int(words[at // (32 // bits)]) % 2**32
        return (unsigned >> bits * (at % (32 // bits))) % 2**bits - 2 ** (bits - 1)

    if f"{path}.weight_packed" in stored:
        q: float = number(stored[f"{path}.weight_packed"][i], j)
    else:
        q = float(stored[f"{path}.weight"][i, j])
    if f"{path}.weight_zero_point" in stored:
        q -= number(stored[f"{path}.weight_zero_point"][:, group], i)
    value = q * float(scale[i if len(scale) > 1 else 0, group])
    return float(torch.tensor(value, dtype=torch.float64).bfloat16())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_tensors(
    scheme: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers.checkpoint.packed, "_ELEMENTS", 300)  # Some rows at a time.
    config, quantize = compressed_tensors(*SCHEMES[scheme])
    source = quantized(dense, tmp_path / "source", config, quantize)
    stored, found = load_file(source / "model.safetensors"), read_all(source)
    for path, shape in (("gate_proj", (96, 64)), ("down_proj", (64, 96))):
        path = f"model.layers.2.mlp.{path}"
        weight = found[f"{path}.weight"]
        assert weight.shape == shape
        for i, j in [(0, 0), (0, 1), (1, 0), (17, 31), (shape[0] - 1, shape[1] - 1)]:
            assert float(weight[i, j]) == in_python(stored, path, SCHEMES[scheme][0], i, j)
    assert not [name for name in found if "scale" in name or "zero" in name or "shape" in name]


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if "order" not in s])
def test_compressed_tensors_is_what_transformers_makes_of_it(
    scheme: str, dense: Path, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    config, quantize = compressed_tensors(*SCHEMES[scheme])
    source = quantized(dense, tmp_path / "source", config, quantize)
    how = CompressedTensorsConfig(**config | {"dequantize": True})
    check_against_transformers(source, how)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_the_result_is_that_of_the_dense_model(
    kind: str, dense: Path, gpt_oss: Path, tmp_path: Path
) -> None:
    source = gpt_oss
    if kind == "fp8":
        source = quantized(dense, tmp_path / "fp8", *fp8((16, 16), torch.float32))
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    save_file(read_all(source), unpacked / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (unpacked / "config.json").write_text(json.dumps(config))
    scope = "experts" if kind == "mxfp4" else "attention"
    options = ("--scope", scope, "--keep", 0.5, "--method", "svd")
    small, expected = (
        compress(one, tmp_path / f"{one.name}-out", *options) for one in (source, unpacked)
    )
    shards = sorted(path.name for path in expected.glob("*.safetensors"))
    assert shards == sorted(path.name for path in small.glob("*.safetensors"))
    for name in shards:
        assert (small / name).read_bytes() == (expected / name).read_bytes()
    assert (small / "config.json").read_bytes() == (expected / "config.json").read_bytes()
    plan = json.loads(lestd("plan", source, *options, "--json").out)["total"]
    file = source / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert plan["source_bytes"] == file.stat().st_size - header
    assert plan["model_bytes"] == sum(one.nbytes for one in read_all(source).values())
    said = lestd("plan", source, *options).out
    assert f"the source is quantized ({kind}): its" in " ".join(said.split())


def test_what_is_hashed_and_what_is_copied(gpt_oss: Path, tmp_path: Path) -> None:
    tensors = resolve_source(str(gpt_oss)).index.tensors
    ref = tensors["model.layers.0.mlp.experts.down_proj"]
    read, hashed = hashlib.sha256(), hashlib.sha256()
    weight = read_tensor(ref, read)
    hash_tensor(ref, hashed)
    assert read.digest() == hashed.digest()
    assert torch.equal(read_tensor(ref.matrix(2)), weight[2])
    with (tmp_path / "copy").open("wb") as file:
        copy_tensor(ref, file)
    assert (tmp_path / "copy").read_bytes() == weight.view(torch.uint8).numpy().tobytes()


DOWN = "model.layers.1.mlp.down_proj"
CT = compressed_tensors(4, "group", frozenset({"zero"}))
GROUPS = CT[0]["config_groups"]["group_0"]["weights"]
Change = Callable[[dict[str, Tensor], dict[str, Any]], object]
DAMAGED: dict[str, tuple[str, Change, str]] = {
    "no scale": (
        "fp8",
        lambda tensors, _: tensors.pop(f"{DOWN}.weight_scale_inv"),
        f"its scales, tensor {DOWN}.weight_scale_inv, are absent",
    ),
    "scales of another shape": (
        "fp8",
        lambda tensors, _: tensors.update({f"{DOWN}.weight_scale_inv": torch.ones(4, 5)}),
        "has the shape [4, 5], and [4, 6] was expected of the scales of",
    ),
    "scales that are integers": (
        "fp8",
        lambda tensors, _: tensors.update({f"{DOWN}.weight_scale_inv": torch.ones(4, 6).int()}),
        "is stored as I32, and scales as F32, BF16, F16, U8, F8_E8M0 were expected",
    ),
    "a block that is none": (
        "fp8",
        lambda _, config: config.update({"weight_block_size": [0, 16]}),
        "has the weight_block_size [0, 16], expected two positive numbers",
    ),
    "words too few": (
        "ct",
        lambda tensors, _: tensors.update(
            {f"{DOWN}.weight_packed": torch.ones(64, 11, dtype=torch.int32)}
        ),
        "expected I32 of [64, 12] for 96 columns of 4 bits",
    ),
    "several schemes": (
        "ct",
        lambda _, config: config["config_groups"].update(
            {"group_1": {"weights": GROUPS | {"num_bits": 8}}}
        ),
        "has 2 ways in which weights of the type 'int' are quantized",
    ),
    "another format": (
        "ct",
        lambda _, config: config.update({"format": "marlin-24"}),
        "a compressed-tensors checkpoint of the format marlin-24; read are float-quantized",
    ),
    "another strategy": (
        "ct",
        lambda _, config: config.update(
            {"config_groups": {"g": {"weights": GROUPS | {"strategy": "token"}}}}
        ),
        "with the strategy 'token'",
    ),
    "another number of bits": (
        "ct",
        lambda _, config: config.update(
            {"config_groups": {"g": {"weights": GROUPS | {"num_bits": "4"}}}}
        ),
        "has weights of '4' bits, expected 4 or 8",
    ),
    "weights of none of these": (
        "fp8",
        lambda tensors, _: tensors.update({f"{DOWN}.qweight": torch.ones(4, 4).int()}),
        "is stored as I32, and no scale beside it says what it stands for",
    ),
    "a method that is not read": (
        "fp8",
        lambda _, config: config.update({"quant_method": "awq"}),
        "is already quantized (quant_method 'awq' in config.json), and lestd dequantizes",
    ),
}


def damaged(kind: str, change: Change, dense: Path, root: Path) -> Path:
    form = fp8((16, 16), torch.float32) if kind == "fp8" else CT
    source = quantized(dense, root / "source", *form)
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps(config))
    return source


@pytest.mark.parametrize("what", DAMAGED)
def test_what_does_not_fit_is_refused_in_one_sentence(
    what: str, dense: Path, tmp_path: Path
) -> None:
    kind, change, sentence = DAMAGED[what]
    with pytest.raises(LestdError) as refused:
        resolve_source(str(damaged(kind, change, dense, tmp_path)))
    assert sentence in str(refused.value)
    assert "start from" in str(refused.value) or "use the config.json" in str(refused.value)


READ: dict[str, tuple[str, str, Tensor, str]] = {
    "a scale that is not finite": (
        "fp8",
        "weight_scale_inv",
        torch.full((4, 6), torch.inf),
        f"tensor {DOWN}.weight_scale_inv in",
    ),
    "a shape that is another": (
        "ct",
        "weight_shape",
        torch.tensor([64, 95]),
        "says [64, 95], and the packed weight beside it",
    ),
    "groups beyond the last": (
        "ct",
        "weight_g_idx",
        torch.full((96,), 12, dtype=torch.int32),
        "names groups beyond the 12 that there are",
    ),
}


@pytest.mark.parametrize("what", READ)
def test_what_only_the_contents_show(what: str, dense: Path, tmp_path: Path) -> None:
    kind, end, contents, sentence = READ[what]

    def change(tensors: dict[str, Tensor], _: object) -> None:
        tensors[f"{DOWN}.{end}"] = contents

    source = damaged(kind, change, dense, tmp_path)
    with pytest.raises(LestdError) as refused:
        read_tensor(resolve_source(str(source)).index.tensors[f"{DOWN}.weight"])
    assert sentence in str(refused.value)


def test_gguf_is_refused_with_the_way_out(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((dense / "config.json").read_bytes())
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(LestdError, match="GGUF is not read; get the safetensors model"):
        resolve_source(str(tmp_path))
