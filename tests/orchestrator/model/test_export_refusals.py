"""`lestd export` refuses in one sentence, and leaves nothing behind."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli import Finished, digest_tree, lestd
from support.exports import compress_example, narrow_pair
from support.families import edited
from torch import Tensor

from workers.checkpoint.tensors import INDEX_FILE


@pytest.fixture(scope="module")
def compressed(tmp_path_factory, tiny_llama) -> Path:
    return compress_example(tiny_llama, tmp_path_factory.mktemp("example") / "small")


def assert_refused(run: Finished, out: Path, *expected: object) -> None:
    assert run.code == 2
    assert run.out == ""
    errors = [line for line in run.err.splitlines() if not line.startswith("export: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    for part in expected:
        assert str(part) in errors[0]
    assert not out.exists()
    assert not [p for p in out.parent.iterdir() if p.name.startswith(f".{out.name}")]


def test_what_is_no_compressed_model_is_refused(tiny_llama, compressed, tmp_path):
    out = tmp_path / "out"
    assert_refused(lestd("export", tiny_llama, "--dense", out), out, tiny_llama, "not a model")
    assert_refused(lestd("export", tmp_path / "no", "--dense", out), out, "no", "config.json")
    file = tmp_path / "file"
    file.write_text("x")
    assert_refused(lestd("export", file, "--dense", out), out, "file")
    assert_refused(lestd("export", compressed.with_name("small.run"), "--dense", out), out, "run")
    other = edited(compressed_flat(compressed, tmp_path), tmp_path / "o", lambda q: None)
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (other / "config.json").write_text(json.dumps(config))
    assert_refused(lestd("export", other, "--dense", out), out, "'gptq'")


def test_a_place_inside_of_the_compressed_model_is_refused(compressed):
    out = compressed / "dense"
    assert_refused(lestd("export", compressed, "--dense", out), out, "lies inside of", "elsewhere")


def compressed_flat(compressed: Path, tmp_path: Path) -> Path:
    """A copy of the compressed example without its manifest, so that nothing states a sha256."""
    return Path(
        shutil.copytree(compressed, tmp_path / "flat", ignore=shutil.ignore_patterns("manifest"))
    )


def taken_by_a_file(out: Path) -> None:
    out.write_text("mine")


def taken_by_files(out: Path) -> None:
    out.mkdir()
    (out / "mine").write_text("mine")


def taken_by_a_link(out: Path) -> None:
    (out.parent / "elsewhere").mkdir()
    out.symlink_to(out.parent / "elsewhere")


@pytest.mark.parametrize("take", [taken_by_a_file, taken_by_files, taken_by_a_link])
def test_what_is_at_out_stays(compressed, tmp_path, take):
    take(tmp_path / "out")
    before = digest_tree(tmp_path), sorted(path.name for path in tmp_path.rglob("*"))
    run = lestd("export", compressed, "--dense", tmp_path / "out")
    assert run.code == 2
    assert run.err.startswith(f"error: {tmp_path / 'out'} already exists")
    assert before == (digest_tree(tmp_path), sorted(path.name for path in tmp_path.rglob("*")))
    # The model itself is no place for its reconstruction.
    digests = digest_tree(compressed)
    assert lestd("export", compressed, "--dense", compressed).code == 2
    assert digest_tree(compressed) == digests


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x40
    path.write_bytes(content)


def copy_of(compressed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compressed, tmp_path / "copy"))


@pytest.mark.parametrize("shard", ["lestd-00002-self_attn", "dense-00001-of-00001"])
def test_a_flipped_bit_is_found_by_the_manifest(compressed, tmp_path, shard):
    model = copy_of(compressed, tmp_path)
    flip(model / f"{shard}.safetensors", -9)
    out = tmp_path / "out"
    assert_refused(lestd("export", model, "--dense", out), out, shard, "sha256")


@pytest.mark.parametrize("cut", [100, 5, 10_000])
def test_a_truncated_shard_is_refused(compressed, tmp_path, cut):
    model, out = copy_of(compressed, tmp_path), tmp_path / "out"
    shard = model / "lestd-00001-self_attn.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - cut if cut > 99 else cut)
    assert_refused(lestd("export", model, "--dense", out), out, shard, "truncated")
    shard.unlink()
    assert_refused(lestd("export", model, "--dense", out), out, shard, "absent")


@pytest.mark.parametrize("files", [[], {"x": 1}, None])
def test_a_damaged_manifest_is_refused(compressed, tmp_path, files):
    model, out = copy_of(compressed, tmp_path), tmp_path / "out"
    about = json.loads((model / "manifest" / "model.json").read_text())
    shard = "lestd-00000-self_attn.safetensors"
    about["files"] = {shard: "x"} if files == {"x": 1} else files
    (model / "manifest" / "model.json").write_text(json.dumps(about))
    assert_refused(lestd("export", model, "--dense", out), out, "manifest")


def rewrite(shard: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})


BLOCK = "model.layers.0.self_attn"
Q = f"{BLOCK}.q_proj"
DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "full mask": (lambda t: t[f"{Q}.mask"].fill_(255), f"the tensors of {BLOCK}"),
    "mask": (lambda t: t[f"{Q}.mask"][:9].zero_(), f"the tensors of {BLOCK}"),
    "NaN": (lambda t: t[f"{Q}.weight"].fill_(float("nan")), f"{Q}.weight is not finite"),
    "short": (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:-1].clone()}), "has shape"),
    "dtype": (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].half()}), "is F16"),
    "integers": (
        lambda t: t.update({f"{BLOCK}.lestd_u1.weight": t[f"{BLOCK}.lestd_u1.weight"].int()}),
        "is I32, expected BF16 or F16 or F32",
    ),
    "index dtype": (lambda t: t.update({f"{Q}.mask": t[f"{Q}.mask"].to(torch.int8)}), "is I8"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_that_no_manifest_knows_of_is_refused(compressed, tmp_path, damage):
    change, expected = DAMAGES[damage]
    model, out = compressed_flat(compressed, tmp_path), tmp_path / "out"
    rewrite(model / "lestd-00000-self_attn.safetensors", change)
    run = lestd("export", model, "--dense", out)
    assert_refused(run, out, "lestd-00000-self_attn.safetensors", expected)


def test_a_tensor_that_is_nowhere_is_refused(compressed, tmp_path):
    model, out = compressed_flat(compressed, tmp_path), tmp_path / "out"
    rewrite(model / "lestd-00000-self_attn.safetensors", lambda t: t.pop(f"{Q}.mask"))
    index = json.loads((model / INDEX_FILE).read_text())
    del index["weight_map"][f"{Q}.mask"]
    (model / INDEX_FILE).write_text(json.dumps(index))
    assert_refused(lestd("export", model, "--dense", out), out, f"lacks the tensor {Q}.mask")


CONFIG_DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version": (lambda q: q.update(format_version=99), "format_version 99"),
    "no groups": (lambda q: q.update(groups=[]), "names no groups"),
    "groups": (lambda q: q.update(groups={"a": 1}), "names no groups"),
    "kind": (lambda q: q["groups"][0].update(kind="new"), "groups[0]"),
    "codec": (lambda q: q["groups"][1]["modules"]["k_proj"].update(codec="zip"), "'zip'"),
    "no ranks": (lambda q: q["groups"][3].pop("ranks"), "'ranks'"),
    "side": (lambda q: q["groups"][0]["modules"]["v_proj"].update(basis_side="up"), "'up'"),
    "rank": (lambda q: q["groups"][0]["ranks"].update(R1=7), "has shape"),
    "no entry": (lambda q: q["groups"].__setitem__(2, None), "groups[2]"),
    "slices": (lambda q: q["groups"][0]["modules"]["q_proj"].update(slices="8"), "groups[0]"),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGES)
def test_a_damaged_config_is_refused(compressed, tmp_path, damage):
    change, expected = CONFIG_DAMAGES[damage]
    flat, out = compressed_flat(compressed, tmp_path), tmp_path / "out"
    model = edited(flat, tmp_path / "model", change)
    assert_refused(lestd("export", model, "--dense", out), out, "config.json", expected)


def test_float16_that_overflows_asks_for_float32(tmp_path):
    directory = narrow_pair(tmp_path, torch.float16)
    for shard in directory.glob("part-*.safetensors"):
        rewrite(shard, lambda t: [x.fill_(60_000.0) for n, x in t.items() if "lestd_u" in n])
    out = tmp_path / "out"
    assert_refused(lestd("export", directory, "--dense", out), out, "--dtype float32")
    assert lestd("export", directory, "--dense", out, "--dtype", "float32").code == 0


# Interruptions.


def test_what_a_killed_export_left_is_removed(compressed, tmp_path):
    leftover = tmp_path / ".out.exporting"
    (leftover / "new").mkdir(parents=True)
    (leftover / ".lestd").touch()
    (leftover / "new" / "model-00001-of-00009.safetensors").write_text("half")
    assert lestd("export", compressed, "--dense", tmp_path / "out").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 5


def test_two_exports_into_one_directory_exclude_each_other(compressed, tmp_path):
    building = tmp_path / ".out.exporting"
    building.mkdir()
    handle = os.open(building, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    run = lestd("export", compressed, "--dense", tmp_path / "out")
    assert run.code == 2
    assert "another process exports" in run.err
    assert building.exists()
    os.close(handle)
    assert lestd("export", compressed, "--dense", tmp_path / "out").code == 0
