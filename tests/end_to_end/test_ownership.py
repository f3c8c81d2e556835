"""What is not ours is left alone, and what is ours belongs to one run: through the command line."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli import PATIENCE, Finished, digest_tree, lestd, run_lestd, start_lestd
from support.families import save_tiny
from support.refusals import Q1, SERIAL, refused, shard_of
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.run.directory import RunDirectory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "model")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def compress(model: Path, out: Path, *options: object) -> Finished:
    return lestd("compress", model, "--out", out, *SERIAL, *options)


@pytest.mark.parametrize("fresh", [(), ("--fresh",)])
def test_directories_must_not_lie_in_one_another(
    model: Path, out: Path, tmp_path: Path, fresh: tuple[str, ...]
) -> None:
    before = digest_tree(model)
    for options in (
        ("--run-dir", out),
        ("--run-dir", out / "run"),
        ("--run-dir", tmp_path),
        ("--run-dir", model),
    ):
        refused(compress(model, out, *options, *fresh), "lies in")
    refused(compress(model, tmp_path, *fresh), "lies in")
    refused(compress(model, model, *fresh), "lies in")
    assert digest_tree(model) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_run_json_of_somebody_else_is_left_alone(model: Path, out: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "experiment"
    run_dir.mkdir()
    (run_dir / "run.json").write_text('{"lr": 0.1}')
    for fresh in ((), ("--fresh",)):
        refused(compress(model, out, "--run-dir", run_dir, *fresh), "run.json")
        (run_dir / "thesis.txt").write_text("years of work")
        refused(compress(model, out, "--run-dir", run_dir, *fresh), "thesis.txt")
        (run_dir / "thesis.txt").unlink()
    refused(lestd("clean", out, "--run-dir", run_dir, "--force"), str(run_dir))
    assert (run_dir / "run.json").read_text() == '{"lr": 0.1}'


def test_a_model_of_another_run_is_not_taken_for_ours(
    model: Path, out: Path, tmp_path: Path
) -> None:
    other = save_tiny("llama", tmp_path / "other", seed=1)
    assert compress(other, out, "--run-dir", tmp_path / "a").code == 0
    before = digest_tree(out)
    refused(compress(model, out, "--run-dir", tmp_path / "b"), "source.shards", str(out))
    assert digest_tree(out) == before
    assert compress(model, out, "--run-dir", tmp_path / "b", "--fresh").code == 0
    assert digest_tree(out) != before


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_change_that_the_samples_miss_is_found(
    tmp_path: Path, out: Path, allocation: str
) -> None:
    """In the middle of a tensor that is larger than the sampled ends."""
    torch.manual_seed(0)
    model = tmp_path / "model"
    config = LlamaConfig(
        hidden_size=288,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=32,
    )
    LlamaForCausalLM(config).save_pretrained(model)
    options = ("--allocation", allocation)
    assert compress(model, out, *options).code == 0
    if allocation == "global":  # As a run that was killed in its first pass.
        shutil.rmtree(out)
        shutil.rmtree(out.with_name("out.run") / "manifest" / "groups")
    shard = model / "model.safetensors"
    tensors = load_file(shard)
    tensors[Q1][144, 144] += 1
    save_file(tensors, shard, {"format": "pt"})
    refused(compress(model, out, *options), "have changed since", Q1)


def test_touching_the_source_is_not_changing_it(model: Path, out: Path) -> None:
    assert compress(model, out).code == 0
    os.utime(shard_of(model, Q1), (1, 1))
    again = compress(model, out)
    assert again.code == 0
    assert "already complete" in again.out


def test_experts_that_one_tensor_stacks_are_the_same_after_a_touch(
    tmp_path: Path, out: Path
) -> None:
    model = save_tiny("gpt_oss", tmp_path / "gpt_oss")
    options = ("--scope", "experts", "--method", "svd")
    assert compress(model, out, *options).code == 0
    shutil.rmtree(out)
    for shard in model.glob("*.safetensors"):
        os.utime(shard, (1, 1))
    assert compress(model, out, *options).code == 0


@pytest.mark.parametrize("made", [(), ("run.json",), ("run.json", "plan.json")])
def test_a_run_that_was_killed_while_it_began_can_begin(
    model: Path, out: Path, tmp_path: Path, made: tuple[str, ...]
) -> None:
    """Whatever of its files were there."""
    assert compress(model, tmp_path / "whole").code == 0
    run_dir = tmp_path / "out.run"
    (run_dir / "payloads").mkdir(parents=True)
    (run_dir / "lock").touch()
    (run_dir / ".tmp-1-abc").write_bytes(b"half")
    for name in made:
        (run_dir / name).write_bytes((tmp_path / "whole.run" / name).read_bytes())
    assert compress(model, out).code == 0
    assert digest_tree(out) == digest_tree(tmp_path / "whole")


def test_a_file_that_was_put_into_the_model_is_never_deleted(model: Path, out: Path) -> None:
    assert compress(model, out).code == 0
    (out / "notes.txt").write_text("mine")
    next((out.parent / "out.run" / "payloads").iterdir()).unlink()
    for fresh in ((), ("--fresh",)):
        refused(compress(model, out, *fresh), "notes.txt")
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert compress(model, out).code == 0


def test_leftovers_of_a_killed_replacement_do_no_harm(model: Path, out: Path) -> None:
    assert compress(model, out).code == 0
    whole = digest_tree(out)
    building = out.with_name(".out.assembling")
    for left in ("old", "removed"):
        (building / "new").mkdir(parents=True)
        (building / ".lestd").touch()
        (building / "new" / "half").write_bytes(b"half")
        out.rename(building / left)
        assert compress(model, out).code == 0
        assert digest_tree(out) == whole
        assert not building.exists()
    assert compress(model, out, "--fresh").code == 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["model", "out", "out.run"]


def test_after_clean_the_same_command_finds_the_model_complete(model: Path, out: Path) -> None:
    assert compress(model, out).code == 0
    assert lestd("clean", out).code == 0
    again = compress(model, out)
    assert again.code == 0
    assert "already complete" in again.out
    refused(compress(model, out, "--keep", 0.4), "config.keep")
    assert not out.with_name("out.run").exists()


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_an_output_that_cannot_be_renamed_onto_is_refused_before_any_work(
    model: Path, out: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "file":
        out.write_text("x")
    else:
        target = tmp_path / "target"
        out.symlink_to(target)
        if kind == "link":
            target.mkdir()
    refused(compress(model, out), str(out), "choose a new name")
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize("place", ["/proc/out", "{}/file/out"])
def test_a_place_that_cannot_be_written_is_one_sentence(
    model: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("x")
    refused(compress(model, Path(place.format(tmp_path))), "out.run", "check the path")


def test_the_root_directory_is_no_model(model: Path) -> None:
    refused(compress(model, Path("/")), "/")
    for command in ("status", "verify", "clean"):
        refused(lestd(command, "/"), "/")


def test_relative_names_of_the_output(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compress(model, out).code == 0
    monkeypatch.chdir(out)
    assert json.loads(lestd("status", ".", "--json").out)["state"] == "complete"
    assert lestd("verify", "../out/").code == 0


def test_asking_for_the_status_does_not_disturb_a_driver(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            run.is_locked()

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(50):
            with run.locked():
                assert run.is_locked()
    finally:
        stop.set()
        asking.join()


def test_lost_slice_rows_are_missed(model: Path, out: Path) -> None:
    assert compress(model, out).code == 0
    whole = digest_tree(out)
    slices = sorted((out.parent / "out.run" / "manifest" / "slices").iterdir())
    slices[0].unlink()
    slices[1].write_bytes(b"damaged")
    assert lestd("verify", out).code == 1
    assert compress(model, out).code == 0
    assert lestd("verify", out).code == 0
    assert digest_tree(out) == whole


def test_verify_checks_every_file_of_the_model(model: Path, out: Path) -> None:
    assert compress(model, out).code == 0
    assert lestd("clean", out).code == 0
    for name in ("config.json", "dense-00001-of-*.safetensors", "model.safetensors.index.json"):
        path = next(out.glob(name))
        content = path.read_bytes()
        path.write_bytes(content[:-2] + b"\n\n")
        result = lestd("verify", out)
        assert result.code == 1
        assert str(path) in result.out
        path.write_bytes(content)
    assert lestd("verify", out).code == 0


@pytest.fixture
def second_disk(tmp_path: Path) -> Iterator[Path]:
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system at /dev/shm")
    directory = shm / f"lestd-test-{os.getpid()}"
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


def test_the_run_directory_may_lie_on_another_disk(
    model: Path, out: Path, tmp_path: Path, second_disk: Path
) -> None:
    assert compress(model, out, "--run-dir", second_disk / "run").code == 0
    assert compress(model, tmp_path / "one").code == 0
    assert digest_tree(out) == digest_tree(tmp_path / "one")


def test_two_drivers_of_one_output_end_in_one_model(model: Path, out: Path, tmp_path: Path) -> None:
    processes = [
        start_lestd("compress", model, "--out", out, *SERIAL, "--run-dir", tmp_path / name)
        for name in ("a", "b")
    ]
    ended = [(p.communicate(timeout=PATIENCE), p.returncode) for p in processes]
    assert min(code for _, code in ended) == 0
    for (_, err), code in ended:
        assert code in (0, 2)
        assert "Traceback" not in err
    assert compress(model, tmp_path / "alone").code == 0
    assert digest_tree(out) == digest_tree(tmp_path / "alone")


@pytest.mark.slow
def test_a_terminal_that_knows_only_ascii(model: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = run_lestd("plan", model, "--keep", 0.5, env=environment)
    assert result.code == 0
    assert "2 tasks" in result.out
