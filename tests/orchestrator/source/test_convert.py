"""Pickled checkpoints -> safetensors: the same tensors, and no code run on the way."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.families import save_tiny
from support.hub import call_with_hub, serve_hub
from support.pickles import assert_same, pickled, read_all, single
from transformers import AutoModelForCausalLM

from lestd_kernels.errors import LestdError
from orchestrator.source.checkpoint import BIN_FILE, BIN_INDEX_FILE, resolve_source
from orchestrator.source.convert import convert
from workers.checkpoint.tensors import INDEX_FILE, WEIGHTS_FILE, ShardIndex


@pytest.mark.parametrize("zip_format", [True, False])
def test_sharded_pickles(tmp_path: Path, zip_format: bool) -> None:
    model, out = tmp_path / "model", tmp_path / "deep" / "out"
    expected = pickled(model, _use_new_zipfile_serialization=zip_format)
    with pytest.raises(LestdError, match="lestd convert"):
        resolve_source(str(model))
    seen: list[tuple[int, int]] = []
    index = convert(str(model), out, progress=lambda done, total: seen.append((done, total)))
    count = len(list(model.glob("*.bin")))
    assert count > 1
    assert seen == [(i + 1, count) for i in range(count)]
    assert_same(read_all(out), expected)
    assert index == ShardIndex.from_directory(out) == resolve_source(str(out)).index
    assert (
        index.stored_bytes == json.loads((out / INDEX_FILE).read_text())["metadata"]["total_size"]
    )
    assert {path.name for path in out.iterdir()} - set(index.shards) == {
        "config.json", "generation_config.json", "tokenizer.json", INDEX_FILE
    }  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_tied_shared_and_strided_tensors(tmp_path: Path) -> None:
    base = torch.arange(60.0).reshape(6, 10)
    expected = {
        "embedding": base,
        "head": base,
        "transposed": base.T,
        "row": base[2],
        "column": base[:, 3],
        "expanded": torch.ones(1, 4).expand(3, 4),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.ones(2, 3)),
        "mask": torch.tensor([True, False]),
    }
    model = single(tmp_path / "model", expected)
    convert(str(model), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [WEIGHTS_FILE]
    assert_same(load_file(tmp_path / "out" / WEIGHTS_FILE), expected)


def test_an_index_of_one_shard_gives_one_file(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    torch.save({"a": torch.ones(2)}, model / "x.bin")
    (model / BIN_INDEX_FILE).write_text('{"weight_map": {"a": "x.bin"}}')
    assert convert(str(model), tmp_path / "out").shards == (WEIGHTS_FILE,)


def test_the_index_says_which_copy_of_a_tied_tensor_counts(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    torch.save({"a": torch.ones(2), "b": torch.ones(3)}, model / "1.bin")
    torch.save({"a": torch.zeros(2), "c": torch.ones(4)}, model / "2.bin")
    weight_map = {"a": "2.bin", "b": "1.bin", "c": "2.bin"}
    (model / BIN_INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    convert(str(model), tmp_path / "out")
    assert_same(
        read_all(tmp_path / "out"), {"a": torch.zeros(2), "b": torch.ones(3), "c": torch.ones(4)}
    )


def test_two_conversions_give_the_same_bytes(tmp_path: Path) -> None:
    pickled(tmp_path / "model")
    for name in ("one", "two"):
        convert(str(tmp_path / "model"), tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


# What must not be run.


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, zip_format: bool, nested: bool) -> None:
    ran = tmp_path / "ran"
    evil = {"a": torch.ones(2), "b": Evil(ran)} if nested else Evil(ran)
    model = single(tmp_path / "model", evil, _use_new_zipfile_serialization=zip_format)
    with pytest.raises(LestdError, match="nothing in it was run") as caught:
        convert(str(model), tmp_path / "out")
    assert str(model / BIN_FILE) in str(caught.value)
    assert "system" in str(caught.value)
    assert "weights_only" not in str(caught.value)  # PyTorch's own message says how to run it.
    assert "\n" not in str(caught.value)
    assert not ran.exists()
    assert not (tmp_path / "out").exists()
    # The trap works: whoever unpickles it without care runs it.
    if not zip_format and not nested:
        with pytest.raises((RuntimeError, AttributeError, TypeError)):
            torch.load(model / BIN_FILE, weights_only=False).keys()
        assert ran.exists()


def test_a_plain_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / BIN_FILE).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(LestdError, match="nothing in it was run"):
        convert(str(model), tmp_path / "out")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds a list; expected a map"),
        (torch.ones(2), "holds a Tensor; expected a map"),
        ({"state_dict": {"a": torch.ones(2)}}, "holds a dict under 'state_dict'"),
        ({"a": 3}, "holds a int under 'a'"),
        ({3: torch.ones(2)}, "holds a Tensor under 3"),
        ({"a": torch.eye(3).to_sparse()}, "tensor a in .* is torch.sparse_coo"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "tensor a in .* of torch.complex128"),
    ],
)
def test_a_pickle_of_something_else(tmp_path: Path, content: Any, message: str) -> None:
    model = single(tmp_path / "model", content)
    with pytest.raises(LestdError, match=message):
        convert(str(model), tmp_path / "out")


@pytest.mark.parametrize("kept", [0, 1, 10, 300, -1])
@pytest.mark.parametrize("zip_format", [True, False])
def test_a_truncated_pickle(tmp_path: Path, kept: int, zip_format: bool) -> None:
    model = single(
        tmp_path / "model", {"a": torch.ones(200)}, _use_new_zipfile_serialization=zip_format
    )
    path = model / BIN_FILE
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(LestdError, match=r"download it again|source you trust") as caught:
        convert(str(model), tmp_path / "out")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out").exists()


# Directories and indexes.


@pytest.mark.parametrize("name", ["../x.bin", "/x.bin", "a/../../x.bin"])
def test_an_index_that_leaves_the_directory(tmp_path: Path, name: str) -> None:
    pickled(tmp_path / "model")
    torch.save({"a": torch.ones(1)}, tmp_path / "x.bin")
    index = json.dumps({"weight_map": {"a": name}})
    (tmp_path / "model" / BIN_INDEX_FILE).write_text(index)
    with pytest.raises(LestdError, match="not a path inside its directory"):
        convert(str(tmp_path / "model"), tmp_path / "out")


def test_absent_shard_and_absent_tensor(tmp_path: Path) -> None:
    model = tmp_path / "model"
    pickled(model)
    path = model / BIN_INDEX_FILE
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = "pytorch_model-0.bin"
    path.write_text(json.dumps(index))
    with pytest.raises(LestdError, match=r"tensor ghost is absent from .*pytorch_model-0\.bin"):
        convert(str(model), tmp_path / "out")
    (model / "pytorch_model-1.bin").unlink()
    with pytest.raises(LestdError, match=r"pytorch_model-1\.bin is absent, but .* names it"):
        convert(str(model), tmp_path / "out2")


def test_nothing_to_convert(tmp_path: Path) -> None:
    with pytest.raises(LestdError, match="has no pickled weights"):
        convert(str(tmp_path), tmp_path / "out")
    model = save_tiny("llama", tmp_path / "model")
    with pytest.raises(LestdError, match="has safetensors weights already"):
        convert(str(model), tmp_path / "out")
    with pytest.raises(LestdError, match="has no revision 'v1'"):
        convert(str(model), tmp_path / "out", "v1")
    with pytest.raises(LestdError, match="the Hub cannot be reached"):
        convert("lestd-tests/no-such-model", tmp_path / "out")


def test_an_output_that_is_taken_is_refused(tmp_path: Path) -> None:
    pickled(tmp_path / "model")
    for out in (tmp_path / "full", tmp_path / "file"):
        (out / "x").mkdir(parents=True) if out.name == "full" else out.write_text("mine")
        with pytest.raises(LestdError, match="exists and is not empty"):
            convert(str(tmp_path / "model"), out)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert convert(str(tmp_path / "model"), tmp_path / "empty").tensors


def test_a_model_of_the_hub(tmp_path: Path) -> None:
    expected = pickled(tmp_path / "hub" / "org" / "opt")
    (tmp_path / "hub" / "org" / "opt" / "flax_model.msgpack").write_bytes(b"never fetched")
    (tmp_path / "hub" / "org" / "opt" / "optimizer.bin").write_bytes(b"never fetched")
    evil = single(tmp_path / "hub" / "org" / "evil", {"a": Evil(tmp_path / "ran")})
    (evil / "config.json").write_text("{}")
    out = tmp_path / "out"
    with serve_hub(tmp_path / "hub") as hub:
        answers = call_with_hub(
            hub.url,
            tmp_path / "home",
            [["convert", "org/opt", str(out)], ["convert", "org/evil", str(tmp_path / "out2")]],
        )
        fetched = {Path(key).name for key in hub.sent_bytes if key.startswith("org/opt/")}
    assert answers[0] == {"tensors": sorted(expected)}
    assert_same(read_all(out), expected)
    bins = {path.name for path in (tmp_path / "hub" / "org" / "opt").glob("pytorch_model-*.bin")}
    side_files = {"config.json", "generation_config.json", "tokenizer.json", BIN_INDEX_FILE}
    assert fetched == bins | side_files
    assert "nothing in it was run" in answers[1]["error"]
    assert not (tmp_path / "ran").exists()
