"""Models that lie elsewhere: on a Hub that drops connections, in an S3 store, behind any URL."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from support.cli import IMPATIENT, PATIENCE, digest_tree, lestd, run_lestd, start_lestd
from support.hub import Hub, hub_environment, serve_hub
from support.s3 import s3_server

from lestd_kernels.errors import LestdError
from orchestrator.manifest.manifest import Manifest
from orchestrator.model import untouched
from orchestrator.model.untouched import fetch_shard
from orchestrator.source.checkpoint import resolve_source
from workers.checkpoint import tensors as checkpoint
from workers.checkpoint.digests import sample_digests, shard_stats
from workers.checkpoint.tensors import INDEX_FILE, ShardIndex, hash_tensor, read_header, read_tensor
from workers.storage import ranges
from workers.storage.ranges import file_version, read_ranges, stat

OPTIONS = ["--metric", "weight", "--executor", "serial", "--device", "cpu", "--keep", 0.4]


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example in three shards, in a directory like that of a Hub."""
    directory = tmp_path_factory.mktemp("hub") / "org" / "tiny"
    shutil.copytree(tiny_llama, directory)
    tensors = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    weight_map = {}
    for i in range(3):
        names = sorted(tensors)[i::3]
        shard = f"model-{i + 1}.safetensors"
        save_file({name: tensors[name] for name in names}, directory / shard)
        weight_map |= dict.fromkeys(names, shard)
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.fixture(scope="module")
def local(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run from the directory itself gives, and beside it its run directory."""
    out = tmp_path_factory.mktemp("local") / "out"
    done = lestd("compress", model, "--out", out, *OPTIONS)
    assert done.code == 0, done.err
    return out


def without_card(tree: dict[str, str]) -> dict[str, str]:
    """The card names where the model came from."""
    return {name: digest for name, digest in tree.items() if name != "README.md"}


# A Hub.


def overhead(index: ShardIndex) -> int:
    """Bytes of one look at all headers and samples."""
    samples = sum(min(ref.stored_bytes, 2 * 64 * 1024) for ref in index.tensors.values())
    sizes = [(Path(index.location) / shard).stat().st_size for shard in index.shards]
    return samples + sum(min(256 * 1024, size) for size in sizes)


def test_a_run_from_a_hub_that_drops_connections_killed_and_resumed(
    model: Path, local: Path, tmp_path: Path
) -> None:
    index = ShardIndex.from_directory(model)
    names = json.loads((local / INDEX_FILE).read_text())["weight_map"]
    copied = {name for name in names if name in index.tensors}
    places = {
        (f"org/tiny/{Path(ref.shard).name}", *ref.byte_range): name
        for name, ref in index.tensors.items()
    }
    last = max(place for place, name in places.items() if name in copied)
    out = tmp_path / "out"
    command = ["compress", "org/tiny", "--out", out, *OPTIONS]
    with serve_hub(model.parents[1]) as hub:
        hub.flaky, hub.hold = True, last
        environment = hub_environment(hub.url, tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}
        process = start_lestd(*command, program=IMPATIENT, env=environment)
        assert hub.held.wait(PATIENCE), process.communicate(timeout=PATIENCE)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=PATIENCE)
        assert not out.exists()
        before = {places[request] for request in hub.asked if request in places}
        hub.asked.clear()
        hub.hold = None

        done = run_lestd(*command, program=IMPATIENT, env=environment)
        assert done.code == 0, done.err
        after = {places[request] for request in hub.asked if request in places}
        sent = sum(n for name, n in hub.sent_bytes.items() if name.endswith(".safetensors"))
    assert before
    assert not before & after
    # A tensor's bytes once, whatever was dropped; headers and samples by both processes. What was
    # on its way when a connection broke may be lost.
    expected = index.stored_bytes + 2 * overhead(index)
    assert expected <= sent < 1.1 * expected
    assert hub.faults > 10
    assert without_card(digest_tree(out)) == without_card(digest_tree(local))
    assert "org/tiny" in (out / "README.md").read_text()
    assert not (tmp_path / "out.run" / untouched.UNTOUCHED_DIR).exists()
    snapshot = next((tmp_path / "home").rglob("snapshots/*"))
    assert not list(snapshot.glob("*.safetensors"))


# Byte ranges.


@pytest.fixture
def flaky_file(tmp_path: Path) -> Iterator[tuple[Hub, str, bytes]]:
    """A file on a web server whose every second answer fails."""
    content = torch.randint(0, 256, (1_000_003,), dtype=torch.uint8).numpy().tobytes()
    (tmp_path / "org" / "raw").mkdir(parents=True)
    (tmp_path / "org" / "raw" / "file").write_bytes(content)
    with serve_hub(tmp_path) as hub:
        hub.flaky = True
        yield hub, f"{hub.url}/org/raw/resolve/main/file", content


def test_chunks_of_a_range_are_fetched_in_spite_of_faults(
    flaky_file: tuple[Hub, str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, url, content = flaky_file
    monkeypatch.setattr(ranges, "_CHUNK_BYTES", 100_000)
    monkeypatch.setattr(ranges, "_STORE_ANSWER_BYTES", 60_000)
    monkeypatch.setattr("workers.storage.retries._FIRST_PAUSE_SECONDS", 0.01)
    version = file_version(*stat(url))
    assert version.startswith("1000003 bytes with ETag ")
    first, second = bytearray(900_000), bytearray(7)
    read_ranges(url, version, [(5, memoryview(first)), (999_996, memoryview(second))])
    assert bytes(first) == content[5:900_005]
    assert bytes(second) == content[-7:]
    assert hub.faults > 10


def test_a_server_that_ignores_ranges_is_refused(flaky_file: tuple[Hub, str, bytes]) -> None:
    hub, url, _ = flaky_file
    hub.flaky = False
    (hub.root / "org" / "raw" / ".no-range").touch()
    version = file_version(*stat(url))
    with pytest.raises(LestdError, match="does not answer range requests"):
        read_ranges(url, version, [(5, memoryview(bytearray(10)))])


def test_a_server_that_is_gone_ends_in_a_sentence(
    flaky_file: tuple[Hub, str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, url, _ = flaky_file
    version = file_version(*stat(url))
    monkeypatch.setattr("workers.storage.retries._FIRST_PAUSE_SECONDS", 0.001)
    shutil.rmtree(hub.root / "org")
    with pytest.raises(LestdError, match=r"does not exist|cannot be read") as caught:
        read_ranges(url, version, [(5, memoryview(bytearray(10)))])
    assert "\n" not in str(caught.value)


# A store: in memory, and on an S3 server.


def remember(directory: Path, name: str) -> str:
    """Copy a directory into fsspec's store in memory; its URL."""
    store = fsspec.filesystem("memory")
    for path in directory.rglob("*"):
        if path.is_file():
            store.pipe_file(f"/{name}/{path.relative_to(directory)}", path.read_bytes())
    return f"memory://{name}"


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, str]:
    """Tensors that are sampled in part, touch, overlap and are empty: on disk, and elsewhere."""
    directory = tmp_path / "shards"
    (directory / "sub").mkdir(parents=True)
    sizes = {"big": 300_000, "c": 0, "d": 100, "a": 140_000, "b": 65_536}
    first = {name: torch.randint(0, 256, (n,), dtype=torch.uint8) for name, n in sizes.items()}
    save_file(first | {"wide": torch.rand(7, 5)}, directory / "1.safetensors")
    save_file({"e": torch.rand(200, 200).bfloat16()}, directory / "sub" / "2.safetensors")
    weight_map = dict.fromkeys([*first, "wide"], "1.safetensors") | {"e": "sub/2.safetensors"}
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return directory, remember(directory, f"shards-{tmp_path.name}")


def test_tensors_of_a_url_are_those_of_the_files(
    shards: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, url = shards
    monkeypatch.setattr(ranges, "_CHUNK_BYTES", 10_000)
    monkeypatch.setattr(ranges, "_STORE_ANSWER_BYTES", 3_000)
    monkeypatch.setattr(checkpoint, "_FETCH_BYTES", 70_000)
    monkeypatch.setattr(checkpoint, "_FIRST_FETCH_BYTES", 20)
    expected = ShardIndex.from_directory(directory)
    weight_map = checkpoint.read_weight_map(directory / INDEX_FILE)
    index = ShardIndex.from_url(url, weight_map)
    assert index.shards == expected.shards
    assert index.location == url
    for name, ref in index.tensors.items():
        there = expected.tensors[name]
        assert replace(ref, shard=there.shard, version="") == there
        assert ref.shard == url + there.shard.removeprefix(str(directory))
        found, other, whole = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        assert torch.equal(read_tensor(ref, whole), read_tensor(there, other))
        hash_tensor(ref, found)
        assert found.digest() == whole.digest() == other.digest()
    assert sample_digests(index) == sample_digests(expected)
    assert [size for size, _ in shard_stats(index).values()] == [
        size for size, _ in shard_stats(expected).values()
    ]


def test_a_file_that_was_replaced_or_cut_is_noticed(shards: tuple[Path, str]) -> None:
    _, url = shards
    ref = read_header(f"{url}/1.safetensors")["big"]
    store, path = fsspec.core.url_to_fs(ref.shard)
    content = store.cat_file(path)
    store.pipe_file(path, content + b"more")
    with pytest.raises(LestdError, match="has changed since its header was read: it had") as caught:
        read_tensor(ref)
    assert ref.shard in str(caught.value)
    store.pipe_file(path, content[: ref.byte_range[0] + 5])
    with pytest.raises(LestdError, match=f"has changed .* and has {ref.byte_range[0] + 5} bytes"):
        read_tensor(ref)
    with pytest.raises(LestdError, match=r"1\.safetensors is truncated"):
        read_header(ref.shard)
    store.rm(path)
    with pytest.raises(LestdError, match=r"1\.safetensors does not exist"):
        read_tensor(ref)


@pytest.mark.parametrize("damage", ["none", "progress", "shorter", "other"])
def test_an_interrupted_shard_goes_on_after_its_last_whole_tensor(
    shards: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    directory, url = shards
    refs = list(read_header(f"{url}/1.safetensors").values())
    copy, fetched = checkpoint.copy_tensor, []

    def copy_three(ref: Any, file: Any) -> None:
        if len(fetched) == 3:
            file.write(b"half of it")
            raise KeyboardInterrupt
        fetched.append(ref.name)
        copy(ref, file)

    monkeypatch.setattr(untouched, "copy_tensor", copy_three)
    kept = tmp_path / "untouched"
    with pytest.raises(KeyboardInterrupt):
        fetch_shard(refs, kept, "dense")
    if damage == "progress":
        (kept / "dense.json").write_text('{"bytes": ')
    if damage == "shorter":
        (kept / "dense").write_bytes((kept / "dense").read_bytes()[:50])
    if damage == "other":
        refs = [replace(ref, version="of another content") for ref in refs]
        monkeypatch.setattr(ranges, "check_unchanged", lambda *_: None)
    again: list[str] = []
    monkeypatch.setattr(
        untouched, "copy_tensor", lambda ref, file: (again.append(ref.name), copy(ref, file))
    )
    path = fetch_shard(refs, kept, "dense")
    expected = save(load_file(directory / "1.safetensors"), metadata={"format": "pt"})
    assert path.read_bytes() == expected
    if damage == "none":
        assert not set(fetched) & set(again)
        assert len(fetched) + len(again) == len(refs)
    else:
        assert len(again) == len(refs)
    again.clear()
    assert fetch_shard(refs, kept, "dense").read_bytes() == expected
    assert not again


@pytest.fixture(scope="module")
def s3(model: Path) -> Iterator[Any]:
    """A bucket with the model, and this process's environment set for it."""
    with s3_server():
        store = fsspec.filesystem("s3")
        store.put(str(model), "models/org/tiny", recursive=True)
        yield store


def test_plan_of_a_model_in_s3(s3: Any, model: Path) -> None:
    found = lestd("plan", "s3://models/org/tiny/", "--keep", 0.4, "--json")
    assert found.code == 0, found.err
    assert found.out == lestd("plan", model, "--keep", 0.4, "--json").out.replace(
        str(model), "s3://models/org/tiny/"
    )


def test_compress_a_model_in_s3(s3: Any, local: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = lestd("compress", "s3://models/org/tiny", "--out", out, *OPTIONS)
    assert done.code == 0, done.err
    assert digest_tree(out) == digest_tree(local)


def test_a_run_goes_on_from_a_copy_of_its_source_elsewhere(
    s3: Any, local: Path, tmp_path: Path
) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(local.with_name("out.run"), run_dir)
    rows = Manifest(run_dir / "manifest").groups().to_pylist()
    done = lestd("compress", "s3://models/org/tiny", "--out", out, "--run-dir", run_dir, *OPTIONS)
    assert done.code == 0, done.err
    assert Manifest(run_dir / "manifest").groups().to_pylist() == rows
    assert digest_tree(out) == digest_tree(local)


def spoiled(s3: Any, name: str) -> str:
    """A model with something wrong in the bucket; its URL."""
    path = f"models/org/{name}"
    s3.copy("models/org/tiny", path, recursive=True)
    if name == "bare":
        s3.rm(f"{path}/config.json")
    if name == "truncated":
        s3.pipe_file(f"{path}/model-2.safetensors", s3.cat_file(f"{path}/model-2.safetensors")[:-9])
    if name == "lacking":
        s3.rm(f"{path}/model-2.safetensors")
    if name == "pickled":
        s3.rm(f"{path}/{INDEX_FILE}")
        s3.pipe_file(f"{path}/pytorch_model.bin", b"never read")
    for word, shard in {"climbing": "../tiny/model-1.safetensors", "chained": "a::b"}.items():
        if name == word:
            index = json.loads(s3.cat_file(f"{path}/{INDEX_FILE}"))
            index["weight_map"] = dict.fromkeys(index["weight_map"], shard)
            s3.pipe_file(f"{path}/{INDEX_FILE}", json.dumps(index).encode())
    return f"s3://{path}"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bare", "has no config.json"),
        ("truncated", "model-2.safetensors is truncated: tensor"),
        ("lacking", "model-2.safetensors does not exist"),
        ("pickled", "has only pickled weights"),
        ("climbing", "is not a path inside its directory"),
        ("chained", "has characters that mean something in a URL"),
        ("s3://models/nothing/here", "does not exist"),
        ("s3://no-such-bucket/model", "does not exist"),
        ("s3://B/model", "s3://B/model"),
    ],
)
def test_what_is_wrong_in_a_bucket_is_said_in_a_sentence(s3: Any, name: str, words: str) -> None:
    url = name if ranges.is_url(name) else spoiled(s3, name)
    began = time.monotonic()
    found = lestd("plan", url, "--keep", 0.4)
    assert (found.code, found.out) == (2, "")
    assert words in found.err
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    assert time.monotonic() - began < 120


def test_keys_that_climb_are_no_files_of_the_model(s3: Any) -> None:
    path = "models/org/climber"
    s3.copy("models/org/tiny", path, recursive=True)
    for key in ("../evil.json", "a/../../../evil.json", "../../LICENSE", "/etc/evil.json"):
        s3.pipe_file(f"{path}/{key}", b"{}")
    s3.pipe_file(f"{path}/templates/tool.jinja", b"T")
    assert any("/../" in key for key in s3.find("models/org/climber/.."))
    directory = resolve_source(f"s3://{path}").fetch_side_files()
    assert (directory / "templates" / "tool.jinja").read_bytes() == b"T"
    assert not [*directory.parent.rglob("evil.json"), *directory.parent.rglob("LICENSE")]


def test_s3_without_credentials(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    type(s3).clear_instance_cache()
    found = lestd("plan", "s3://models/org/tiny", "--keep", 0.4)
    type(s3).clear_instance_cache()
    assert found.code == 2
    assert "credentials" in found.err


def test_the_package_of_a_store_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    found = lestd("plan", "gs://bucket/model", "--keep", 0.4)
    assert found.code == 2
    assert "pip install 'lestd[gcs]'" in found.err
