"""Directories and Hub ids: what is accepted, what is fetched, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import save_tiny
from support.hub import call_with_hub, serve_hub

from lestd_kernels.errors import LestdError
from orchestrator.source.checkpoint import BIN_FILE, BIN_INDEX_FILE, resolve_source
from orchestrator.source.convert import convert
from orchestrator.source.side_files import copy_side_files, is_side_file
from workers.checkpoint.tensors import INDEX_FILE, WEIGHTS_FILE, ShardIndex
from workers.storage.untrusted_files import MAX_SMALL_BYTES


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny("llama-gqa", tmp_path / "model")


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_local_directory(model: Path, scheme: str) -> None:
    source = resolve_source(f"{scheme}{model}")
    assert source.model == f"{scheme}{model}"
    assert source.revision is None
    assert source.directory == model
    assert source.index == ShardIndex.from_directory(model)
    assert source.config.num_key_value_heads == 2
    assert source.config_json == json.loads((model / "config.json").read_text())


def test_a_relative_directory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    source = resolve_source("model")
    assert source.model == "model"
    assert source.directory == model


def refused(model: Path | str, message: str, revision: str | None = None) -> str:
    with pytest.raises(LestdError, match=message) as caught:
        resolve_source(str(model), revision)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["no/such/thing", "./missing", "a b", "..", "-x"])
def test_neither_a_directory_nor_a_hub_id(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    expected = "has no config.json" if name == ".." else "neither a directory nor a Hub id"
    assert name.strip(".") in refused(name, expected)


def test_offline_and_not_in_the_cache() -> None:
    """The test run sets HF_HUB_OFFLINE."""
    refused("lestd-tests/no-such-model", "the Hub cannot be reached")


def test_a_file(model: Path) -> None:
    refused(model / "config.json", "is a file; give the directory")


def test_a_directory_has_no_revision(model: Path) -> None:
    refused(model, "has no revision 'v1'", "v1")


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("file:///no/such/thing", None, "does not exist; expected file:///PATH"),
        ("file://relative", None, "does not exist; expected file:///PATH"),
        ("nonsense://bucket/model", None, "Protocol not known: nonsense"),
        ("zip://model::s3://bucket/a.zip", None, "is not the URL of a directory"),
        ("s3://bucket/model?versionId=3", None, "is not the URL of a directory"),
        ("s3://bucket/model", "v1", "has no revision 'v1'"),
        ("hf://org/name@v1", "v2", "names another revision than --revision v2"),
        ("hf://org", None, "the Hub cannot be reached"),
        ("hf://a/b/c", None, "neither a directory nor a Hub id"),
    ],
)
def test_urls_that_name_no_model(name: str, revision: str | None, message: str) -> None:
    refused(name, message, revision)


def test_no_config(model: Path) -> None:
    (model / "config.json").unlink()
    refused(model, r"has no config\.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "[" * 100_000, '{"a": "\xff"}'])
def test_config_that_is_no_json_object(model: Path, text: str) -> None:
    (model / "config.json").write_bytes(text.encode("latin-1"))
    refused(model, r"config\.json (is not valid JSON|must hold a JSON object)")


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": "two"},
        {"hidden_size": [1]},
        {"num_attention_heads": "4"},
        {"num_attention_heads": 0},
        {"dtype": "foo"},
    ],
)
def test_config_that_transformers_refuses(model: Path, change: dict[str, Any]) -> None:
    edit_config(model, **change)
    refused(model, r"config\.json is not a config that Transformers accepts")


def test_no_weights(model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()
    refused(model, "has no weights: expected model.safetensors")
    save_file({"a": torch.ones(1)}, model / "adapter_model.safetensors")
    refused(model, "has no weights: expected model.safetensors")


@pytest.mark.parametrize("name", [BIN_FILE, BIN_INDEX_FILE])
def test_pickled_weights_name_the_command(tmp_path: Path, name: str) -> None:
    model = save_tiny("gptj", tmp_path / "my model")
    for path in model.glob("*.safetensors*"):
        path.unlink()
    (model / name).write_bytes(b"never read")
    (model / "a.pth").write_bytes(b"never read")
    message = refused(model, "has only pickled weights")
    assert name in message
    assert message.endswith(f"lestd convert '{model}' 'my model-safetensors'")


@pytest.mark.parametrize("name", ["consolidated.00.pth", "weights.pt", "training_args.bin"])
def test_other_pickles_are_not_said_to_be_convertible(model: Path, name: str) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()
    (model / name).write_bytes(b"never read")
    message = refused(model, "has no safetensors weights, only pickled files")
    assert name in message
    assert "lestd convert cannot rewrite" in message
    with pytest.raises(LestdError, match="has no pickled weights: expected"):
        convert(str(model), model.with_name("out"))


def test_pickles_beside_safetensors_do_not_matter(model: Path) -> None:
    (model / "training_args.bin").write_bytes(b"never read")
    (model / "pytorch_model.bin").write_bytes(b"never read")
    assert resolve_source(str(model)).index.tensors


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "is already quantized .quant_method 'gptq'"),
        ({"bits": 4}, "is already quantized .quant_method None"),
        ({"quant_method": "lestd"}, "is already compressed by LeSTD"),
        ("abc", "is already quantized .quant_method None"),
    ],
)
def test_quantized_sources(model: Path, quantization: Any, message: str) -> None:
    edit_config(model, quantization_config=quantization)
    refused(model, message)


@pytest.mark.parametrize("model_type", ["no-such-family", None, 3, ["llama"], {"llama": 1}, {}])
def test_unknown_families(model: Path, model_type: Any) -> None:
    edit_config(model, model_type=model_type)
    refused(model, re.escape(f"model family {model_type!r} is unknown to Transformers 5."))


def test_no_code_of_the_model_is_run(model: Path, tmp_path: Path) -> None:
    edit_config(model, auto_map={"AutoConfig": "evil.EvilConfig"})
    (model / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass EvilConfig: pass\n"
    )
    assert resolve_source(str(model)).config.model_type == "llama"
    assert not (tmp_path / "ran").exists()


def test_a_damaged_shard_is_refused(model: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert str(shard) in refused(model, "truncated")


def test_side_files() -> None:
    yes = ["config.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "LICENSE.txt",
           "NOTICE", "README.md", "vocab.json", "qwen.tiktoken"]  # fmt: skip
    no = ["modeling.py", "pytorch_model.bin", "model.safetensors", INDEX_FILE, "../config.json",
          "pytorch_model.bin.index.json", "rust_model.ot", "model.pt", "script.sh"]  # fmt: skip
    assert all(map(is_side_file, yes))
    assert not any(map(is_side_file, no))


def test_side_files_are_copied_and_links_followed(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "folder.json").mkdir(parents=True)
    target.mkdir()
    (tmp_path / "blob").write_bytes(b"linked")
    (source / "vocab.json").symlink_to(tmp_path / "blob")
    (source / "LICENSE").write_bytes(b"terms")
    (source / "modeling.py").write_bytes(b"code")
    copy_side_files(source, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        "vocab.json": b"linked",
        "LICENSE": b"terms",
    }
    assert not (target / "vocab.json").is_symlink()


# The Hub.


def merge_shards(directory: Path) -> None:
    tensors = {}
    for shard in directory.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (directory / INDEX_FILE).unlink()
    save_file(tensors, directory / WEIGHTS_FILE)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything asked of the Hub, in one process; then again with the Hub gone."""
    root = tmp_path_factory.mktemp("hub")
    sharded = save_tiny("qwen3", root / "org" / "sharded")
    (sharded / "modeling_evil.py").write_text("raise SystemExit(1)")
    (sharded / "pytorch_model.bin").write_bytes(b"never fetched")
    (sharded / "consolidated.safetensors").write_bytes(b"never fetched")
    (sharded / "onnx").mkdir()
    (sharded / "onnx" / "model.safetensors").write_bytes(b"never fetched")
    (sharded / "tokenizer.json").write_text("{}")

    # One shard longer than a first range, and a header that is too.
    large = save_tiny("llama", root / "org" / "large")
    merge_shards(large)
    tensors = load_file(large / WEIGHTS_FILE) | {"zz": torch.zeros(3_000_000)}
    tensors |= {f"extra.{'x' * 200}.{i}": torch.zeros(1) for i in range(1500)}
    save_file(tensors, large / WEIGHTS_FILE)

    for name in ("pickled", "quantized", "noconfig", "gated", "broken", "norange", "truncated"):
        merge_shards(save_tiny("gptj", root / "org" / name))
    (root / "org" / "pickled" / WEIGHTS_FILE).rename(root / "org" / "pickled" / "pytorch_model.bin")
    edit_config(root / "org" / "quantized", quantization_config={"quant_method": "awq"})
    (root / "org" / "noconfig" / "config.json").unlink()
    for name in ("gated", "broken"):
        (root / "org" / name / f".{name}").touch()
    (root / "org" / "norange" / ".no-range").touch()
    (sharded / ".drop-once").touch()
    with (save_tiny("gptj", root / "org" / "huge") / "config.json").open("r+b") as file:
        file.truncate(MAX_SMALL_BYTES + 1)
    (save_tiny("gptj", root / "org" / "endless") / ".endless").touch()
    content = (root / "org" / "truncated" / WEIGHTS_FILE).read_bytes()
    (root / "org" / "truncated" / WEIGHTS_FILE).write_bytes(content[:-5])
    lacking = save_tiny("gptj", root / "org" / "lacking")
    next(lacking.glob("*.safetensors")).unlink()

    names = ("pickled", "quantized", "noconfig", "gated", "broken", "norange", "truncated",
             "lacking", "nobody", "sharded@v2", "huge", "endless")  # fmt: skip
    refusals = [
        ["resolve_source", f"org/{name.partition('@')[0]}", name.partition("@")[2] or None]
        for name in names
    ]
    home = tmp_path_factory.mktemp("home")
    collected: dict[str, Any] = {"root": root}
    with serve_hub(root) as hub:
        collected["commit"] = hub.commit("org/sharded")
        headers = [["resolve_source", "org/sharded"], ["resolve_source", "hf://org/large@main"]]
        collected["headers"] = call_with_hub(hub.url, home, [*headers, *refusals])
        collected["sent"] = dict(hub.sent_bytes)
        hub.sent_bytes.clear()
        found = call_with_hub(
            hub.url,
            home,
            [
                ["side_files", "org/sharded"],
                ["snapshot", "org/sharded", "v1"],
                ["snapshot", "org/large", None],
                ["resolve_source", "org/sharded", "v1"],
                ["resolve_source", "org/large"],
            ],
        )
        collected["found"], collected["downloaded"] = found, dict(hub.sent_bytes)
    collected["offline"] = call_with_hub(
        hub.url,
        home,
        [
            ["resolve_source", "org/sharded", "v1"],
            ["resolve_source", "org/large"],
            ["resolve_source", "org/nobody"],
            ["resolve_source", "org/lacking"],
            ["resolve_source", "org/truncated"],
        ],
    )
    refused_pairs = zip(refusals, collected["headers"][2:], strict=True)
    collected["refused"] = {
        f"{model}@{revision}" if revision else model: answer.get("error")
        for (_, model, revision), answer in refused_pairs
    }
    return collected


@pytest.mark.parametrize(("position", "name"), [(0, "sharded"), (1, "large")])
def test_headers_of_the_hub_are_those_of_the_files(
    answers: dict[str, Any], position: int, name: str
) -> None:
    directory = answers["root"] / "org" / name
    expected = ShardIndex.from_directory(directory).tensors
    found = answers["headers"][position]["tensors"]
    assert list(found) == list(expected)
    for tensor, (shard, shape, dtype, byte_range) in found.items():
        ref = expected[tensor]
        assert (tuple(shape), dtype, tuple(byte_range)) == (ref.shape, ref.dtype, ref.byte_range)
        assert shard.startswith(f"hf://org/{name}@")
        assert shard.endswith("/" + Path(ref.shard).name)


def test_headers_are_all_that_is_fetched(answers: dict[str, Any]) -> None:
    size = (answers["root"] / "org" / "large" / WEIGHTS_FILE).stat().st_size
    assert size > 12_000_000
    assert answers["sent"][f"org/large/{WEIGHTS_FILE}"] < 2_000_000
    ours = {key for key in answers["sent"] if key.startswith("org/sharded/")}
    shards = {
        f"org/sharded/{s}"
        for s in ShardIndex.from_directory(answers["root"] / "org/sharded").shards
    }
    assert ours == shards | {"org/sharded/config.json", f"org/sharded/{INDEX_FILE}"}


def test_side_files_are_fetched_and_nothing_else(answers: dict[str, Any]) -> None:
    side_files = {"config.json", "generation_config.json", "tokenizer.json"}
    assert set(answers["found"][0]["files"]) == side_files | {INDEX_FILE}


@pytest.mark.parametrize(("position", "name"), [(3, "sharded"), (4, "large")])
def test_a_snapshot_in_the_cache_is_used(answers: dict[str, Any], position: int, name: str) -> None:
    source = answers["found"][position]
    directory = Path(source["directory"])
    assert source["revision"] == directory.name
    expected = ShardIndex.from_directory(answers["root"] / "org" / name)
    assert list(source["tensors"]) == list(expected.tensors)
    for shard, *_ in source["tensors"].values():
        assert Path(shard).parent == directory


def test_what_is_in_the_cache_is_found_without_the_hub(answers: dict[str, Any]) -> None:
    sharded, large, nobody, *without_weights = answers["offline"]
    assert sharded == answers["found"][3]
    assert large == answers["found"][4]
    assert "the Hub cannot be reached" in nobody["error"]
    for name, answer in zip(("lacking", "truncated"), without_weights, strict=True):
        said = f"the Hub cannot be reached and the local cache lacks org/{name}'s weights"
        assert answer["error"].startswith(said)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("org/pickled", "lestd convert org/pickled pickled-safetensors"),
        ("org/quantized", "already quantized (quant_method 'awq'"),
        ("org/noconfig", "has no config.json"),
        ("org/gated", "is gated: accept its terms at http://127.0.0.1"),
        ("org/broken", "the Hub answered 500 for org/broken"),
        ("org/truncated", "is truncated: tensor"),
        ("org/lacking", "names it"),
        ("org/nobody", "neither a directory here nor a model on the Hub"),
        ("org/sharded@v2", "has no revision 'v2'"),
        ("org/huge", f"has {MAX_SMALL_BYTES + 1} bytes, expected at most {MAX_SMALL_BYTES}"),
        ("org/endless", "sends more bytes than it said there are"),
    ],
)
def test_refusals_of_the_hub(answers: dict[str, Any], model: str, words: str) -> None:
    error = answers["refused"][model]
    assert error is not None
    assert words in error
    assert "\n" not in error


def test_a_server_without_ranges(answers: dict[str, Any]) -> None:
    """Reading headers stops before the shard is sent."""
    assert "does not answer range requests" in answers["refused"]["org/norange"]
