"""Bad input, through the command line: one sentence, a non-zero exit, finished work kept."""

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli import PATIENCE, Finished, digest_tree, lestd, run_lestd, start_lestd
from support.families import save_tiny
from support.refusals import Q1, SERIAL, refused, shard_of

from orchestrator.run.directory import RunDirectory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sharded tiny Llama with an index."""
    return save_tiny("llama", tmp_path / "model")


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_header(shard: Path, change: Callable[[dict], None]) -> None:
    content = shard.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def truncated_shard(model: Path) -> tuple[str, ...]:
    shard = shard_of(model, Q1)
    shard.write_bytes(shard.read_bytes()[:-7])
    return (shard.name, "truncated")


def header_that_lies_about_offsets(model: Path) -> tuple[str, ...]:
    shard = shard_of(model, Q1)

    def shift(header: dict) -> None:
        header[Q1]["data_offsets"][1] -= 4

    edit_header(shard, shift)
    return (shard.name, Q1)


def absent_tensor(model: Path) -> tuple[str, ...]:
    shard = shard_of(model, Q1)
    tensors = load_file(shard)
    del tensors[Q1]
    save_file(tensors, shard, {"format": "pt"})
    return (shard.name, Q1, "absent")


def shapes_that_disagree_with_the_config(model: Path) -> tuple[str, ...]:
    edit_json(model / "config.json", lambda c: c.update(num_attention_heads=8, head_dim=12))
    return ("q_proj.weight", "[48, 48]", "[96, 48]")


def index_that_leaves_the_directory(model: Path) -> tuple[str, ...]:
    edit_json(
        model / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({Q1: "../x.safetensors"}),
    )
    return ("model.safetensors.index.json", "../x.safetensors")


def unknown_family(model: Path) -> tuple[str, ...]:
    edit_json(model / "config.json", lambda c: c.update(model_type="zamba9"))
    return ("zamba9", "Transformers", "use a version that has it")


def quantized_source(model: Path) -> tuple[str, ...]:
    edit_json(
        model / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"})
    )
    return ("gptq", "quantized")


def absent_shard(model: Path) -> tuple[str, ...]:
    shard = shard_of(model, Q1)
    shard.unlink()
    return (shard.name, "absent")


def broken_config(model: Path) -> tuple[str, ...]:
    (model / "config.json").write_text("{")
    return ("config.json", "JSON")


def integer_weights(model: Path) -> tuple[str, ...]:
    shard = shard_of(model, Q1)
    tensors = load_file(shard)
    tensors[Q1] = tensors[Q1].to(torch.int8)
    save_file(tensors, shard, {"format": "pt"})
    return (Q1, "I8")


@pytest.mark.parametrize(
    "break_it",
    [
        truncated_shard,
        header_that_lies_about_offsets,
        absent_tensor,
        shapes_that_disagree_with_the_config,
        index_that_leaves_the_directory,
        unknown_family,
        quantized_source,
        absent_shard,
        broken_config,
        integer_weights,
    ],
)
@pytest.mark.parametrize("command", ["plan", "compress"])
def test_a_bad_checkpoint_is_refused_before_any_work(
    model: Path, tmp_path: Path, break_it: Callable[[Path], tuple[str, ...]], command: str
) -> None:
    words = break_it(model)
    if command == "plan":
        refused(lestd("plan", model, "--keep", 0.5), *words)
    else:
        refused(lestd("compress", model, "--out", tmp_path / "out", *SERIAL), *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_and_the_rest_is_kept(
    model: Path, tmp_path: Path, value: float
) -> None:
    shard = shard_of(model, Q1)
    good = shard.read_bytes()
    tensors = load_file(shard)
    tensors[Q1][5, 3] = value
    tensors[Q1][6, 1] = float("nan")
    save_file(tensors, shard, {"format": "pt"})
    out = tmp_path / "out"
    result = lestd("compress", model, "--out", out, *SERIAL)
    refused(result, Q1, shard.name, "[5, 3]", str(value), code=1)
    assert not out.exists()
    state = json.loads(lestd("status", out, "--json").out)
    assert [layer["state"] for layer in state["layers"]] == ["done", "failed"]
    assert Q1 in state["layers"][1]["message"]
    # The repaired checkpoint is another source: its shard is named, and nothing is mixed.
    shard.write_bytes(good)
    refused(lestd("compress", model, "--out", out, *SERIAL), shard.name, "--fresh")


def test_pickled_weights_are_refused_with_the_command_that_converts_them(tmp_path: Path) -> None:
    model = save_tiny("gptj", tmp_path / "model", max_shard_size="10GB")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    out = tmp_path / "out"
    result = lestd("compress", model, "--out", out, *SERIAL)
    refused(result, "pytorch_model.bin", f"lestd convert {model}")
    converted = tmp_path / "converted"
    assert lestd("convert", model, converted).code == 0
    assert lestd("compress", converted, "--out", out, *SERIAL).code == 0
    assert (out / "config.json").is_file()


class _Malicious:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self._path),)


def test_a_malicious_pickle_is_refused_and_not_run(model: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    shutil.copy(model / "config.json", bad)
    torch.save({"weight": _Malicious(tmp_path / "pwned")}, bad / "pytorch_model.bin")
    refused(lestd("convert", bad, tmp_path / "converted"), "pytorch_model.bin")
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--keep", 0), ("keep", "0")),
        (("--keep", 1), ("keep", "1")),
        (("--keep", -0.5), ("keep", "-0.5")),
        (("--keep", "nan"), ("keep", "nan")),
        (("--keep", 0.001), ("layer 0", "rank")),
        (("--keep", 0.5, "--method", "svdd"), ("svdd", "tucker")),
        (("--keep", 0.5, "--include", "7"), ("layer 7",)),
        (("--keep", 0.5, "--max-flops", 0.001), ("max_flops",)),
        (("--keep-model", 0.1), ("keep_model", "0.1")),
        ((), ("keep",)),
    ],
)
def test_an_impossible_request_is_refused_before_any_work(
    model: Path, tmp_path: Path, options: tuple[object, ...], words: tuple[str, ...]
) -> None:
    refused(lestd("plan", model, *options), *words)
    refused(
        lestd("compress", model, "--out", tmp_path / "out", "--executor", "serial", *options),
        *words,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_cluster_that_does_not_answer_is_named(model: Path, tmp_path: Path) -> None:
    command = ("compress", model, "--out", tmp_path / "out", "--keep", 0.5)
    refused(lestd(*command, "--address", "127.0.0.1:1"), "127.0.0.1:1", "does not answer")


@pytest.mark.ray
@pytest.mark.slow
def test_the_address_of_a_cluster_that_died_does_no_harm(model: Path, tmp_path: Path) -> None:
    """``ray start`` leaves one behind; a cluster of its own is started then."""
    with tempfile.TemporaryDirectory() as ray_dir:  # Sockets need a shorter path than tmp_path.
        (Path(ray_dir) / "ray").mkdir()
        (Path(ray_dir) / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        environment["RAY_TMPDIR"] = ray_dir
        command = ("compress", model, "--out", tmp_path / "out", "--keep", 0.5)
        result = run_lestd(*command, env=environment)
        assert result.code == 0, result.err
        assert "GCS" not in result.err


def test_learned_types_need_as_many_key_as_query_heads(tmp_path: Path) -> None:
    model = save_tiny("llama-gqa", tmp_path / "model")
    refused(lestd("plan", model, "--keep", 0.5, "--type-mode", "learned"), "learned", "identity")


def test_a_misspelt_key_is_named(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("kep: 0.5\n")
    refused(lestd("plan", model, "--config", run), "run.yaml", "kep", "keep")
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("worker: 2\n")
    result = lestd("compress", model, *SERIAL, "--out", tmp_path / "o", "--cluster", cluster)
    refused(result, "cluster.yaml", "worker", "workers")


def test_a_model_that_is_nowhere_is_named(tmp_path: Path) -> None:
    refused(lestd("plan", tmp_path / "nothing", "--keep", 0.5), "nothing")
    refused(lestd("plan", "no-such-owner/no-such-model", "--keep", 0.5), "no-such-model")


def test_an_output_that_is_not_ours_is_left_alone(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for fresh in ((), ("--fresh",)):
        refused(lestd("compress", model, "--out", out, *SERIAL, *fresh), str(out), "not empty")
    assert (out / "thesis.txt").read_text() == "years of work"
    run_dir = tmp_path / "mine"
    run_dir.mkdir()
    (run_dir / "notes.txt").write_text("keep me")
    options = ("--out", tmp_path / "new", "--run-dir", run_dir, *SERIAL, "--fresh")
    refused(lestd("compress", model, *options), str(run_dir), "not empty")
    refused(lestd("clean", tmp_path / "new", "--run-dir", run_dir, "--force"), str(run_dir))
    assert (run_dir / "notes.txt").read_text() == "keep me"


@pytest.mark.slow
def test_two_drivers_cannot_share_a_run(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with RunDirectory(tmp_path / "out.run").locked():
        result = run_lestd("compress", model, "--out", out, *SERIAL)
        refused(result, "another driver", f"process {os.getpid()}", "out.run")
        refused(run_lestd("clean", out, "--force"), "out.run")
    assert lestd("compress", model, "--out", out, *SERIAL).code == 0


def test_a_changed_configuration_or_source_is_named(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert lestd("compress", model, "--out", out, *SERIAL).code == 0
    before = digest_tree(out)
    changed = ("--executor", "serial", "--keep", 0.4, "--method", "tucker")
    refused(
        lestd("compress", model, "--out", out, *changed),
        "config.keep (was 0.5, is 0.4)",
        'config.method (was "lestd", is "tucker")',
        "--fresh",
    )
    shard = shard_of(model, Q1)
    tensors = load_file(shard)
    tensors[Q1][0, 0] += 1
    save_file(tensors, shard, {"format": "pt"})
    refused(lestd("compress", model, "--out", out, *SERIAL), f"source.shards.{shard.name}")
    assert digest_tree(out) == before
    assert lestd("compress", model, "--out", out, *SERIAL, "--fresh").code == 0
    assert digest_tree(out) != before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 40 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_refused_before_the_first_task(tiny_llama: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(38 * 2**20))
    result = lestd("compress", tiny_llama, "--out", small_disk / "out", *SERIAL)
    refused(result, "free", "needs", str(small_disk))


def test_a_disk_that_fills_up_in_the_middle_keeps_what_is_done(
    many_layers: Path, undisturbed: dict[str, str], small_disk: Path
) -> None:
    out = small_disk / "out"
    groups = small_disk / "out.run" / "manifest" / "groups"
    process = start_lestd(
        "compress", many_layers, "--out", out, "--run-dir", small_disk / "out.run", *SERIAL
    )
    while process.poll() is None and len(list(groups.glob("*.parquet"))) < 1:
        time.sleep(0.001)
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    out_text, err = process.communicate(timeout=PATIENCE)
    refused(Finished(process.returncode, out_text, err), "no space left", code=process.returncode)
    assert process.returncode in (1, 2)
    done = {path: path.stat().st_ino for path in groups.glob("*.parquet")}
    assert done
    ballast.unlink()
    assert lestd("compress", many_layers, "--out", out, *SERIAL).code == 0
    assert {path: path.stat().st_ino for path in done} == done
    assert digest_tree(out) == undisturbed


@pytest.mark.slow
def test_a_file_size_limit_is_a_full_disk_too(tiny_llama: Path, tmp_path: Path) -> None:
    """Layers 0 and 1 stay below the limit, layer 2 does not; it is named, and 0 and 1 are kept."""
    run = tmp_path / "run.yaml"
    run.write_text("keep: 0.8\nlayer_keep: {'0-1': 0.2}\n")
    command = ("compress", tiny_llama, "--out", tmp_path / "out", "--config", run)
    limit = 200 * 1024
    result = run_lestd(
        *command,
        "--executor",
        "serial",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    refused(result, "no space left", "out.run", code=1)
    groups = tmp_path / "out.run" / "manifest" / "groups"
    done = {path: path.stat().st_ino for path in groups.iterdir()}
    assert len(done) == 2
    assert lestd(*command, "--executor", "serial").code == 0
    assert {path: path.stat().st_ino for path in done} == done
    assert len(list(groups.iterdir())) == 4


@pytest.mark.ray
@pytest.mark.parametrize(
    ("place", "number"),
    [
        (("--workers", 1), signal.SIGINT),
        pytest.param(("--workers", 1), signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(("--executor", "serial"), signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(("--executor", "serial"), signal.SIGTERM, marks=pytest.mark.slow),
    ],
    ids=["ray-int", "ray-term", "serial-int", "serial-term"],
)
def test_ctrl_c_keeps_what_is_done(
    many_layers: Path, tmp_path: Path, number: signal.Signals, place: tuple[str, object]
) -> None:
    out = tmp_path / "out"
    command = ("compress", many_layers, "--out", out, "--keep", 0.5, *place)
    process = start_lestd(
        *command,
        start_new_session=True,
        # A shell starts what it runs in the background deaf to SIGINT; this run is not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    events = tmp_path / "out.run" / "manifest" / "events"
    while process.poll() is None and not list(events.glob("*.parquet")):
        time.sleep(0.002)
    # To the whole group, as a terminal does: Ray's processes get it too.
    os.killpg(process.pid, number)
    out_text, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert "run the same command again" in err
    assert "Traceback" not in err
    assert out_text == ""
    assert not out.exists()
    assert lestd("compress", many_layers, "--out", out, *SERIAL).code == 0


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_worker_is_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start_lestd(
        "compress", tiny_llama, "--out", out, "--keep", 0.5, "--workers", 1, "--json"
    )
    killed = kill_a_worker(process)
    out_text, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert json.loads(out_text)["complete"]
    assert killed
    serial = tmp_path / "serial"
    assert lestd("compress", tiny_llama, "--out", serial, *SERIAL).code == 0
    assert digest_tree(out) == digest_tree(serial)


def kill_a_worker(process: subprocess.Popen[str]) -> bool:
    """SIGKILL the first worker of a driver's local Ray as soon as there is one."""
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                if child.name().startswith("ray::Decompose"):
                    child.kill()
                    return True
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.005)
    return False


def test_a_reader_that_leaves_early_hears_no_complaint(tiny_llama: Path) -> None:
    process = start_lestd("plan", tiny_llama, "--keep", 0.4, "--json")
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 1)
