"""Indexes, range reads and atomic writes, against safetensors' own reader and writer."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save, save_file

from lestd_kernels.errors import LestdError
from workers.checkpoint.checks import check_finite
from workers.checkpoint.digests import sample_digests
from workers.checkpoint.headers import DTYPES
from workers.checkpoint.tensors import (
    INDEX_FILE,
    WEIGHTS_FILE,
    ShardIndex,
    digest_safetensors,
    hash_tensor,
    read_header,
    read_tensor,
    read_weight_map,
    write_safetensors,
    write_safetensors_stream,
)
from workers.contracts import TensorRef
from workers.storage.files import atomic_write, explain_os_errors, file_sha256

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random bytes seen as `dtype`: every bit pattern, NaN included."""
    torch_dtype = DTYPES[dtype]
    count = torch.Size(shape).numel() * torch_dtype.itemsize
    top = 2 if dtype == "BOOL" else 256
    raw = torch.randint(0, top, (count,), generator=torch.Generator().manual_seed(seed))
    return raw.to(torch.uint8).view(torch_dtype).reshape(shape)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def written(tensors: dict[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    write_safetensors(file, tensors)
    return file.getvalue()


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    specs = draw(st.dictionaries(NAMES, st.tuples(st.sampled_from(list(DTYPES)), SHAPES)))
    return {
        name: random_tensor(dtype, shape, seed)
        for seed, (name, (dtype, shape)) in enumerate(specs.items())
    }


@given(state_dicts())
@settings(deadline=None, max_examples=60)
def test_written_bytes_are_those_of_safetensors(tensors: dict[str, torch.Tensor]) -> None:
    content = save(tensors, metadata={"format": "pt"})
    assert written(tensors) == content
    assert digest_safetensors(tensors) == (hashlib.sha256(content).hexdigest(), len(content))


@given(state_dicts())
@settings(deadline=None, max_examples=40)
def test_header_and_reads_agree_with_safetensors(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]
) -> None:
    path = tmp_path_factory.mktemp("shard") / WEIGHTS_FILE
    save_file(tensors, path, metadata={"anything": "at all"})
    header = read_header(path)
    assert header.keys() == tensors.keys()
    for name, ref in header.items():
        digest = hashlib.sha256()
        tensor = read_tensor(ref, digest)
        assert tensor.dtype == tensors[name].dtype
        assert tensor.shape == tensors[name].shape
        assert raw(tensor) == raw(tensors[name])
        again = hashlib.sha256()
        hash_tensor(ref, again)
        expected = hashlib.sha256(raw(tensors[name])).hexdigest()
        assert digest.hexdigest() == again.hexdigest() == expected


@given(state_dicts(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_stream_of_some_tensors_from_two_shards(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor], random: Any
) -> None:
    directory = tmp_path_factory.mktemp("shards")
    halves: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, tensor in tensors.items():
        halves[random.randrange(2)][name] = tensor
    refs = []
    for number, half in enumerate(halves):
        save_file(half, directory / f"{number}.safetensors")
        refs += list(read_header(directory / f"{number}.safetensors").values())
    refs = [ref for ref in refs if random.random() < 0.7]
    random.shuffle(refs)
    atomic_write(directory / "new", lambda file: write_safetensors_stream(file, refs))
    kept = {ref.name: tensors[ref.name] for ref in refs}
    assert (directory / "new").read_bytes() == save(kept, metadata={"format": "pt"})
    with safe_open(directory / "new", "pt") as file:
        assert set(file.keys()) == kept.keys()
        for name, tensor in kept.items():
            if tensor.dtype != torch.float8_e8m0fnu:  # Written, but not read, by safetensors 0.8.
                assert raw(file.get_tensor(name)) == raw(tensor)


def refuse(*args: object, **options: object) -> int:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def nothing(*args: object, **options: object) -> int:
    return 0


def a_little(source: int, target: int, count: int, offset_src: int) -> int:
    """Copies 5 MiB in all, then finds that it cannot."""
    if offset_src > 5 * 2**20:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return os.write(target, os.pread(source, min(count, 2**20), offset_src))


@pytest.mark.parametrize("kernel_copy", ["as it is", None, refuse, nothing, a_little])
def test_stream_of_a_tensor_longer_than_its_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_copy: Any
) -> None:
    """Whatever copy_file_range does, and where there is none."""
    if kernel_copy is None:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    elif callable(kernel_copy):
        monkeypatch.setattr(os, "copy_file_range", kernel_copy, raising=False)
    tensors = {"big": random_tensor("U8", (33 * 2**20 + 7,), 1), "b": random_tensor("F32", (3,), 2)}
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    refs = read_header(tmp_path / WEIGHTS_FILE).values()
    atomic_write(tmp_path / "new", lambda file: write_safetensors_stream(file, refs))
    assert (tmp_path / "new").read_bytes() == save(tensors, metadata={"format": "pt"})


def test_views_and_shared_tensors_are_written_as_they_look() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"t": base.T, "row": base[1], "column": base[:, 2], "same": base, "0d": base[0, 0]}
    found = load(written(tensors))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_directory_in_place_of_a_shard(tmp_path: Path) -> None:
    with pytest.raises(LestdError, match="cannot be read"):
        read_header(tmp_path)


# The index.


def sharded(directory: Path, changes: Callable[[dict[str, str]], None] = lambda m: None) -> Path:
    """Two shards with tensors a, b and c, and an index after `changes`."""
    (directory / "sub").mkdir(parents=True)
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, directory / "1.safetensors")
    save_file({"c": torch.ones(4, 5)}, directory / "sub" / "2.safetensors")
    weight_map = {"a": "1.safetensors", "b": "1.safetensors", "c": "sub/2.safetensors"}
    changes(weight_map)
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def test_index_of_shards(tmp_path: Path) -> None:
    directory = sharded(tmp_path / "model")
    index = ShardIndex.from_directory(directory)
    assert index.shards == ("1.safetensors", "sub/2.safetensors")
    assert list(index.tensors) == ["a", "b", "c"]
    assert index.stored_bytes == 4 * (2 + 3 + 20)
    ref = index.tensors["c"]
    assert ref.shard == str(directory / "sub" / "2.safetensors")
    assert ref.shape == (4, 5)
    assert ref.stored_bytes == 80


def test_single_file_goes_before_an_index(tmp_path: Path) -> None:
    directory = sharded(tmp_path / "model")
    save_file({"z": torch.ones(1)}, directory / WEIGHTS_FILE)
    assert list(ShardIndex.from_directory(directory).tensors) == ["z"]


def test_relative_directory_gives_absolute_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    index = ShardIndex.from_directory(Path("model"))
    assert index.tensors["a"].shard == str(tmp_path / "model" / "1.safetensors")


def test_links_are_followed(tmp_path: Path) -> None:
    directory = sharded(tmp_path / "model")
    (directory / "1.safetensors").rename(tmp_path / "blob")
    (directory / "1.safetensors").symlink_to("../blob")
    index = ShardIndex.from_directory(directory)
    assert torch.equal(read_tensor(index.tensors["a"]), torch.ones(2))
    assert sample_digests(index).keys() == {"1.safetensors", "sub/2.safetensors"}


@pytest.mark.parametrize(
    "shard",
    [
        "../1.safetensors",
        "sub/../../x",
        "/etc/passwd",
        "",
        ".",
        "..",
        "./1.safetensors",
        "a\0b",
        "a\nb",
        3,
    ],
)
def test_an_index_that_leaves_the_directory_is_refused(tmp_path: Path, shard: Any) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")  # "../1.safetensors" exists.
    directory = sharded(tmp_path / "model", lambda weight_map: weight_map.update(a=shard))
    with pytest.raises(LestdError, match="not a path inside its directory") as caught:
        ShardIndex.from_directory(directory)
    assert repr(shard) in str(caught.value)
    assert str(directory / INDEX_FILE) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": []}}',
        "[" * 10**5,
    ],
)
def test_an_invalid_index_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / INDEX_FILE
    path.write_text(text)
    with pytest.raises(LestdError, match="not a valid index"):
        read_weight_map(path)


def test_an_absent_shard_is_refused(tmp_path: Path) -> None:
    directory = sharded(tmp_path / "model")
    (directory / "1.safetensors").unlink()
    with pytest.raises(LestdError, match=r"1\.safetensors is absent, but .* names it"):
        ShardIndex.from_directory(directory)


def test_an_absent_tensor_is_refused(tmp_path: Path) -> None:
    directory = sharded(tmp_path / "model", lambda m: m.update(d="sub/2.safetensors"))
    with pytest.raises(LestdError, match=r"tensor d is absent from .*sub/2\.safetensors"):
        ShardIndex.from_directory(directory)


def test_a_tensor_indexed_in_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    directory = sharded(tmp_path / "model", lambda m: m.update(a="sub/2.safetensors"))
    with pytest.raises(LestdError, match=r"tensor a is absent from .*sub/2\.safetensors"):
        ShardIndex.from_directory(directory)


@pytest.mark.parametrize("named", ["1.safetensors", "sub/2.safetensors"])
def test_the_index_decides_between_two_copies_and_leaves_out_what_it_does_not_name(
    tmp_path: Path, named: str
) -> None:
    directory = sharded(tmp_path / "model", lambda m: m.update(a=named))
    tensors = {"c": torch.ones(1), "a": torch.ones(1), "left.over": torch.ones(1)}
    save_file(tensors, directory / "sub" / "2.safetensors")
    index = ShardIndex.from_directory(directory)
    assert index.tensors["a"].shard == str(directory / named)
    assert "left.over" not in index.tensors


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LestdError, match="holds no safetensors checkpoint"):
        ShardIndex.from_directory(tmp_path)


# Reading.


def test_a_shard_that_shrank_or_vanished_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_FILE
    save_file({"a": torch.ones(100)}, path)
    ref = read_header(path)["a"]
    os.truncate(path, ref.byte_range[1] - 1)
    with pytest.raises(LestdError, match=f"ends at byte {ref.byte_range[1] - 1}, but tensor a"):
        read_tensor(ref)
    with pytest.raises(LestdError, match="ends at byte"):
        atomic_write(tmp_path / "new", lambda file: write_safetensors_stream(file, [ref]))
    path.unlink()
    with pytest.raises(LestdError, match="cannot be read"):
        read_tensor(ref)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("index", [(0, 0), (2, 3), (4, 6)])
def test_the_first_value_that_is_not_finite_is_named(
    dtype: torch.dtype, value: float, index: tuple[int, int]
) -> None:
    ref = TensorRef("layer.weight", "/model/1.safetensors", (5, 7), "F32", (0, 0))
    tensor = torch.full((5, 7), torch.finfo(dtype).max, dtype=dtype)
    check_finite(tensor, ref)
    tensor[index] = value
    tensor[4, 6] = float("nan") if index != (4, 6) else value
    expected = (
        rf"layer\.weight in /model/1\.safetensors has {value} at index \[{index[0]}, {index[1]}\]"
    )
    with pytest.raises(LestdError, match=expected):
        check_finite(tensor, ref)


def test_sample_digests_see_the_ends_of_every_tensor(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_FILE
    tensors = {"a": random_tensor("U8", (200_000,), 0), "b": random_tensor("F16", (50,), 1)}
    save_file(tensors, path)
    index = ShardIndex.from_directory(tmp_path)
    before = sample_digests(index)
    assert before == sample_digests(index)
    content = path.read_bytes()
    a, b = index.tensors["a"].byte_range, index.tensors["b"].byte_range
    for at in (a[0], a[0] + 65_535, a[1] - 65_536, a[1] - 1, b[0], b[1] - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert sample_digests(index) != before
    path.write_bytes(content)
    assert sample_digests(index) == before
    save_file({"c" if k == "b" else k: v for k, v in tensors.items()}, path)
    assert sample_digests(ShardIndex.from_directory(tmp_path)) != before


# Writing.


def test_atomic_write_replaces_and_follows_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    umask = os.umask(0o027)
    try:
        atomic_write(path, lambda file: file.write(b"new"))
    finally:
        os.umask(umask)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert file_sha256(path) == hashlib.sha256(b"new").hexdigest()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file: Any) -> None:
        file.write(b"half")
        assert path.read_bytes() == b"old"
        assert len(list(tmp_path.glob(".tmp-*"))) == 1
        raise error

    with pytest.raises(error):
        atomic_write(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_explained() -> None:
    with (
        pytest.raises(LestdError, match=r"no space left while writing /dev/full \(No space left"),
        explain_os_errors(Path("/dev/full")),
        open("/dev/full", "wb", buffering=0) as file,  # noqa: PTH123
    ):
        file.write(b"x")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_quota_and_size_limits_are_explained(tmp_path: Path, number: int) -> None:
    with (
        pytest.raises(LestdError, match="free some or write elsewhere"),
        explain_os_errors(tmp_path / "file"),
    ):
        raise OSError(number, os.strerror(number))


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), explain_os_errors(tmp_path / "file"):
        raise PermissionError(errno.EACCES, "no")


def test_a_write_that_hits_a_limit_midway_leaves_nothing(tmp_path: Path) -> None:
    """A real limit of the kernel, in a process of its own."""
    program = """
import sys, torch
from pathlib import Path
from lestd_kernels.errors import LestdError
from workers.checkpoint.tensors import write_safetensors
from workers.storage.files import atomic_write
try:
    atomic_write(Path(sys.argv[1]), lambda f: write_safetensors(f, {"a": torch.ones(1 << 20)}))
except LestdError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "payload")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)),
    )
    assert done.stdout.startswith(f"no space left while writing {tmp_path / 'payload'}"), done
    assert list(tmp_path.iterdir()) == []
