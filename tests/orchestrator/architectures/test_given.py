"""Architecture files that say what is not so: refused before any work, in one sentence."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.cli import lestd
from support.families import save_tiny

from lestd_kernels.errors import LestdError
from orchestrator.architectures import (
    DIRECTORY_VARIABLE,
    load_architecture,
    parse_architecture,
    read_architecture,
)
from orchestrator.architectures.infer import infer
from orchestrator.source.checkpoint import Source, resolve_source

Change = Callable[[Any], object]
FAMILIES = ("llama", "opt", "qwen2")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return resolve_source(str(save_tiny("mixtral", tmp_path_factory.mktemp("model") / "model")))


@pytest.fixture(scope="module")
def found(source: Source) -> str:
    """What its modules show, as a file has it."""
    return infer(source.config, source.index).model_dump_json()


@pytest.mark.parametrize("family", ["opt", "gptj", "mixtral", "gpt_oss", "gpt_neox"])
def test_what_is_so_is_taken(family: str, tmp_path: Path) -> None:
    source = resolve_source(str(save_tiny(family, tmp_path / "model")))
    for known in (source.architecture, infer(source.config, source.index)):
        assert replace(source, given=known).groups("all")


def attention(file: Any) -> Any:
    [block] = (one for one in file["blocks"] if one["kind"] == "attention")
    return block


def experts(file: Any) -> Any:
    [block] = (one for one in file["blocks"] if one["kind"] == "experts")
    return block


def swap(modules: Any) -> None:
    """Gate and up, which have the same shape."""
    gate, up, _ = (one["stored"] for one in modules)
    modules[0]["stored"], modules[1]["stored"] = up, gate


def stored(name: str) -> dict[str, Any]:
    return {"tensor": name}


WRONG: list[tuple[Change, str]] = [
    (lambda f: attention(f).update(path="model.layers.{layer}.attention"), "no linear module"),
    (lambda f: attention(f).update(path="model.layers.{layer}.self_attn."), "no linear module"),
    (lambda f: attention(f)["modules"][1].update(name="v_proj"), "v_proj is named twice"),
    (lambda f: attention(f).update(layers=[0, 0]), "k_proj is named twice"),
    (lambda f: f["blocks"].append(attention(f)), "k_proj is named twice"),
    (
        lambda f: attention(f)["modules"][1].update(stored=stored("v_proj.weight")),
        "the weight of k_proj is not model.layers.0.self_attn.v_proj.weight",
    ),
    (
        lambda f: attention(f)["modules"][0].update(
            stored=stored("q_proj.weight") | {"transposed": True}
        ),
        "or stands otherwise in it",
    ),
    (lambda f: swap(experts(f)["modules"]), "the weight of expert_0.gate is not"),
    (lambda f: attention(f).update(compressed_path="elsewhere"), "belong below model.layers.0."),
    (lambda f: attention(f).update(norm="model.embed_tokens.weight"), "its norm is no vector"),
    (lambda f: attention(f).update(guard="x"), "experts need a guard"),
    (lambda f: experts(f).update(guard="x"), "no experts with a parameter x"),
    (lambda f: experts(f).update(experts=3), "5 experts of 48 and 20, with gate, up, down or"),
    (lambda f: experts(f)["modules"][0].update(name="up"), "named twice"),
    (lambda f: experts(f).update(experts=10**15), "slices in model.layers.{layer}.mlp.experts"),
    (lambda f: attention(f)["modules"][0].update(repeat=10**15), "more than the tensors have room"),
    (lambda f: attention(f)["modules"][0].update(slices=[["q", -1]]), "greater than or equal to 1"),
    (lambda f: attention(f)["modules"][0].update(slices=[["\x1b[31m", 1]]), "Input should be 'q'"),
    (
        lambda f: attention(f)["modules"][0].update(stored=stored("q") | {"part": [2, 2]}),
        "must be [k, n]",
    ),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_what_is_not_so_is_refused(
    change: Change, words: str, source: Source, found: str, tmp_path: Path
) -> None:
    file = json.loads(found)
    change(file)
    (tmp_path / "file.json").write_text(json.dumps(file))
    with pytest.raises(LestdError, match=re.escape(words)) as refused:
        replace(source, given=read_architecture(tmp_path / "file.json")).groups("all")
    assert "\n" not in str(refused.value)


def test_a_familys_file_is_held_against_the_model_too(source: Source, tmp_path: Path) -> None:
    file = json.loads(load_architecture("mixtral").model_dump_json())
    file["attention"]["modules"][1]["name"] = "v_proj"
    given = parse_architecture(json.dumps(file), "file.json")
    with pytest.raises(LestdError, match="v_proj is named twice"):
        replace(source, given=given).groups("attention")
    groups = replace(source, given=given).groups("experts")
    assert groups  # Of which the file says what is so.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.write_text("[" * 100_000), "nested too deeply"),
        (lambda path: path.write_bytes(b"\xff"), "utf-8"),
        (lambda path: path.write_text("null"), "should be an object"),
    ],
)
def test_a_file_that_is_none(
    make: Callable[[Path], object], words: str, source: Source, tmp_path: Path
) -> None:
    make(tmp_path / "file.json")
    options = ("--keep", 0.5, "--architecture", tmp_path / "file.json")
    refused = lestd("plan", source.directory, *options)
    assert refused.code == 2
    assert words in refused.err


def test_a_directory_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file there counts as if it were given; one that cannot be read stops its family alone."""
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(own))
    llama, opt = (save_tiny(name, tmp_path / name) for name in ("llama", "opt"))
    described = json.loads(load_architecture("llama").model_dump_json(exclude_none=True))
    (own / "opt.json").write_text("{")
    (own / "llama.json").write_text(json.dumps(described | {"ffn": None}))
    plan = lestd("plan", llama, "--keep", 0.5, "--scope", "all", "--json")
    assert {layer["scope"] for layer in json.loads(plan.out)["layers"]} == {"attention"}
    refused = lestd("plan", opt, "--keep", 0.5)
    assert refused.code == 2
    assert f"{own}/opt.json" in refused.err
    known = {
        one["family"]: one
        for one in json.loads(lestd("families", *FAMILIES, "--json").out)["families"]
    }
    assert [known[name]["known"] for name in FAMILIES] == [*("yours", "refused", "file")]
    assert known["llama"]["file"] == f"{own}/llama.json"
    # Held against the model before any work.
    described["attention"]["modules"][0]["name"] = "k_proj"
    (own / "llama.json").write_text(json.dumps(described))
    refused = lestd("plan", llama, "--keep", 0.5)
    assert refused.code == 2
    assert "model.layers.0.self_attn" in refused.err
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(own / "none"))
    assert "which is no directory" in lestd("plan", llama, "--keep", 0.5).err
