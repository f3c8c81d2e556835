"""Conversions that are killed, that meet a full disk, or that meet each other."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pickles import assert_same, pickled, read_all, single

from lestd_kernels.errors import LestdError
from orchestrator.source import convert as module
from orchestrator.source.convert import convert
from workers.checkpoint.tensors import ShardIndex


def test_a_killed_conversion_continues(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    expected = pickled(model)
    program = """
import os, signal, sys
from pathlib import Path
from orchestrator.source.convert import convert
def die(done, total):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], Path(sys.argv[2]), progress=die)
"""
    killed = subprocess.run([sys.executable, "-c", program, str(model), str(out)])
    assert killed.returncode == -9
    assert not out.exists()
    building = tmp_path / "out.converting"
    shards = sorted(building.glob("*.safetensors"))
    assert len(shards) == 2
    (building / ".tmp-1-left").write_bytes(b"half")
    inodes = {path.name: path.stat().st_ino for path in shards}
    convert(str(model), out)
    assert {name: (out / name).stat().st_ino for name in inodes} == inodes
    assert not list(out.glob(".tmp-*"))
    assert_same(read_all(out), expected)


@pytest.mark.parametrize("renamed", [False, True])
def test_a_conversion_killed_at_its_last_steps_is_finished(tmp_path: Path, renamed: bool) -> None:
    """Just before the directory gets its name, and just after: only its marker is left then."""
    model, out = tmp_path / "model", tmp_path / "out"
    expected = pickled(model)
    program = """
import os, signal, sys
from pathlib import Path
from orchestrator.source.convert import convert
real = Path.replace
def die(path, target):
    if Path(target) == Path(sys.argv[2]):
        if sys.argv[3] == "True":
            real(path, target)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path, target)
Path.replace = die
convert(sys.argv[1], Path(sys.argv[2]))
"""
    killed = subprocess.run([sys.executable, "-c", program, str(model), str(out), str(renamed)])
    assert killed.returncode == -9
    assert out.exists() == renamed
    left = out if renamed else tmp_path / "out.converting"
    inodes = {path.name: path.stat().st_ino for path in left.glob("*.safetensors")}
    assert len(inodes) == len(list(model.glob("*.bin")))
    if renamed:  # Of other weights, the same directory is not to be taken for theirs.
        pickled(tmp_path / "other", "gptj")
        with pytest.raises(LestdError, match="exists and is not empty"):
            convert(str(tmp_path / "other"), out)
    assert convert(str(model), out) == ShardIndex.from_directory(out)
    assert {name: (out / name).stat().st_ino for name in inodes} == inodes
    assert not (out / module._MARKER).exists()
    assert_same(read_all(out), expected)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "other") == [
        "model", "out"
    ]  # fmt: skip
    with pytest.raises(LestdError, match="exists and is not empty"):
        convert(str(model), out)


def test_two_conversions_into_one_directory(tmp_path: Path) -> None:
    """The second is refused and harms nothing, whatever it converts."""
    model, out = tmp_path / "model", tmp_path / "out"
    expected = pickled(model)
    other = single(tmp_path / "other", {"a": torch.ones(2)})

    def meanwhile(done: int, total: int) -> None:
        for name in (model, other):
            with pytest.raises(LestdError, match=r"another process converts into .*out\.convert"):
                convert(str(name), out)

    convert(str(model), out, progress=meanwhile)
    assert_same(read_all(out), expected)


def test_one_that_waited_finds_the_directory_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked before the first was done, and got the lock after."""
    model, out = tmp_path / "model", tmp_path / "out"
    expected = pickled(model)
    real, first = module.fcntl.flock, True

    def flock(*arguments: Any) -> None:
        nonlocal first
        if first:
            first = False
            convert(str(model), out)
        real(*arguments)

    monkeypatch.setattr(module.fcntl, "flock", flock)
    with pytest.raises(LestdError, match="exists and is not empty"):
        convert(str(model), out)
    assert_same(read_all(out), expected)
    assert not (out / module._MARKER).exists()


def test_a_marker_cut_short_is_written_anew(tmp_path: Path) -> None:
    pickled(tmp_path / "model")
    building = tmp_path / "out.converting"
    building.mkdir()
    (building / module._MARKER).write_bytes(b'{"source": "/mod')
    assert convert(str(tmp_path / "model"), tmp_path / "out").tensors
    assert not building.exists()


def test_a_place_where_no_directory_can_be(tmp_path: Path) -> None:
    pickled(tmp_path / "model")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "out.converting").write_text("mine")
    for out in (tmp_path / "file" / "out", tmp_path / "out"):
        with pytest.raises(LestdError, match=r"\.converting cannot be made"):
            convert(str(tmp_path / "model"), out)


def test_leftovers_of_something_else_are_not_used(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    pickled(model)
    building = tmp_path / "out.converting"
    building.mkdir()
    (building / "precious").write_text("mine")
    with pytest.raises(LestdError, match=r"out\.converting was not left by a conversion"):
        convert(str(model), out)
    assert [path.name for path in building.iterdir()] == ["precious"]
    assert (building / "precious").read_text() == "mine"
    shutil.rmtree(building)

    first = sorted(model.glob("*.bin"))[0]
    good = first.read_bytes()
    last = sorted(model.glob("*.bin"))[-1]
    kept = last.read_bytes()
    last.write_bytes(b"damaged")
    with pytest.raises(LestdError, match=last.name):
        convert(str(model), out)
    last.write_bytes(kept)
    first.write_bytes(good + b" ")
    with pytest.raises(LestdError, match="they have changed since; remove it"):
        convert(str(model), out)


def test_a_full_disk_keeps_finished_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third shard meets a full device: /dev/full answers as one does."""
    model, out = tmp_path / "model", tmp_path / "out"
    expected = pickled(model)
    real, calls = module.write_safetensors, []

    def full_at_third(file: Any, tensors: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            with open("/dev/full", "wb", buffering=0) as device:  # noqa: PTH123
                device.write(b"x")
        real(file, tensors)

    monkeypatch.setattr(module, "write_safetensors", full_at_third)
    with pytest.raises(LestdError, match=r"no space left while writing .*convert continue"):
        convert(str(model), out)
    assert len(list((tmp_path / "out.converting").glob("*.safetensors"))) == 2
    assert not out.exists()
    convert(str(model), out)
    assert_same(read_all(out), expected)
