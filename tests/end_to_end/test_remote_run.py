"""A run directory and a model in an object store: through the command line, against a real server.

moto is as strict as S3 where it matters here: a conditional put is refused with 412.
"""

import json
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import LAYERS
from support.cli import digest_tree, lestd, run_lestd, start_lestd
from support.families import save_tiny
from support.object_runs import SERIAL, digest_objects, objects, refused
from support.s3 import s3_server
from upath import UPath

from lestd_kernels.errors import LestdError
from orchestrator.compression import pipeline
from orchestrator.config.cluster import ClusterConfig
from orchestrator.execution.open import open_executor
from orchestrator.execution.ray import executor as ray_executor
from orchestrator.execution.serial import SerialExecutor
from orchestrator.manifest.manifest import Manifest
from orchestrator.run import lease
from orchestrator.run.lease import leased
from orchestrator.source.checkpoint import resolve_source
from workers.decompose import DecomposeWorker
from workers.storage.files import as_path, atomic_write, list_files, unseen


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as (url, _):
        yield url


@pytest.fixture
def bucket(server: str, tmp_path: Path) -> str:
    """A directory of the test's own in the bucket."""
    return f"{server}/{tmp_path.name}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def local(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The bytes of a local run."""
    out = tmp_path_factory.mktemp("local") / "out"
    assert lestd("compress", model, "--out", out, *SERIAL).code == 0
    return digest_tree(out)


def test_a_run_in_a_store_makes_the_same_bytes_and_every_command_reads_it(
    model: Path, local: dict[str, str], bucket: str
) -> None:
    out = f"{bucket}/out"
    first = lestd("compress", model, "--out", out, *SERIAL)
    assert first.code == 0, first.err
    assert f"aws s3 sync {out} DIRECTORY" in first.out
    assert digest_objects(out) == local
    assert "lock" not in objects(f"{out}.run")

    assert json.loads(lestd("status", out, "--json").out)["state"] == "complete"
    assert json.loads(lestd("verify", out, "--json").out) == {"checked": 4, "problems": []}
    assert "already complete" in lestd("compress", model, "--out", out, *SERIAL).out
    assert lestd("clean", out).code == 0
    assert objects(f"{out}.run") == {}
    assert "already complete" in lestd("compress", model, "--out", out, *SERIAL).out
    assert digest_objects(out) == local


@pytest.mark.slow
def test_another_run_at_the_same_place_deletes_what_is_ours_and_only_that(
    model: Path, local: dict[str, str], bucket: str
) -> None:
    out = f"{bucket}/out"
    assert lestd("compress", model, "--out", out, *SERIAL).code == 0
    refused(lestd("compress", model, "--out", out, "--keep", 0.4, *SERIAL[2:]), "config.keep")
    again = lestd("compress", model, "--out", out, "--keep", 0.4, *SERIAL[2:], "--fresh")
    assert again.code == 0, again.err
    assert digest_objects(out).keys() == local.keys()
    assert digest_objects(out) != local
    assert lestd("verify", out).code == 0
    (UPath(out) / "thesis.txt").write_text("years of work")
    refused(lestd("compress", model, "--out", out, *SERIAL, "--fresh"), "thesis.txt", "not made by")
    assert objects(out)["thesis.txt"] == b"years of work"


@pytest.mark.parametrize("remote", ["--out", "--run-dir"])
def test_model_and_run_may_lie_in_different_places(
    model: Path, local: dict[str, str], bucket: str, tmp_path: Path, remote: str
) -> None:
    places = {"--out": str(tmp_path / "out"), "--run-dir": f"file://{tmp_path}/run"}
    places[remote] = f"{bucket}/there"
    result = lestd("compress", model, *SERIAL, *(part for pair in places.items() for part in pair))
    assert result.code == 0, result.err
    digests = digest_objects if remote == "--out" else lambda out: digest_tree(Path(out))
    assert digests(places["--out"]) == local
    assert (tmp_path / "run" / "run.json").is_file() == (remote == "--out")
    verified = lestd("verify", places["--out"], "--run-dir", places["--run-dir"])
    assert verified.code == 0, verified.out


@pytest.mark.slow
def test_a_damaged_payload_is_made_again_and_nothing_else(
    model: Path, local: dict[str, str], bucket: str
) -> None:
    """Of the same size, so that only reading it tells."""
    out = f"{bucket}/out"
    assert lestd("compress", model, "--out", out, *SERIAL).code == 0
    payload = next((UPath(f"{out}.run") / "payloads").iterdir())
    content = payload.read_bytes()
    payload.write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
    assert "sha256" in lestd("verify", out).out
    assert lestd("compress", model, "--out", out, *SERIAL).code == 0
    assert payload.read_bytes() == content
    assert sorted(starts(f"{out}.run").values()) == [1, 2]
    assert digest_objects(out) == local


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", ["config.json", "dense-00002-of-00005.safetensors"])
def test_an_interrupted_assembly_neither_loads_nor_looks_complete(
    model: Path,
    local: dict[str, str],
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: str,
) -> None:
    from orchestrator.model import assemble

    def stop(path: UPath, write: object) -> None:
        if path.name == stop_at:
            raise RuntimeError("killed")
        atomic_write(path, write)

    out = f"{bucket}/out"
    with monkeypatch.context() as patch:
        patch.setattr(assemble, "atomic_write", stop)
        with pytest.raises(RuntimeError, match="killed"):
            lestd("compress", model, "--out", out, *SERIAL)
    left = objects(out)
    assert "manifest/model.json" in left
    assert "config.json" not in left
    assert json.loads(lestd("status", out, "--json").out)["state"] == "stopped"
    # Another run knows what it may delete.
    (UPath(out) / "thesis.txt").write_text("years of work")
    refused(lestd("compress", model, "--out", out, *SERIAL), "thesis.txt")
    (UPath(out) / "thesis.txt").unlink()
    result = lestd("compress", model, "--out", out, *SERIAL)
    assert result.code == 0, result.err
    assert digest_objects(out) == local
    assert set(starts(f"{out}.run").values()) == {1}


def test_a_write_that_fails_leaves_no_object(server: str) -> None:
    path = as_path(f"{server}/aborted")

    def fail(file: object) -> None:
        file.write(bytes(60 * 2**20))  # More than one part of a multipart upload.
        raise RuntimeError("out of ideas")

    with pytest.raises(RuntimeError):
        atomic_write(path, fail)
    assert not path.exists()
    content = random.Random(0).randbytes(60 * 2**20)
    atomic_write(path, lambda file: file.write(content))
    assert path.read_bytes() == content


# -- the lease -------------------------------------------------------------------------------


def test_one_driver_at_a_time(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_HEARTBEAT_SECONDS", 0.2)
    lock = as_path(f"{bucket}/run/lock")
    words = r"another driver \(process \d+ on .*\) works on s3://"
    with leased(lock, lock.parent) as check:
        with pytest.raises(LestdError, match=words), leased(lock, lock.parent):
            raise AssertionError("two drivers")
        check()
    assert not lock.exists()


def test_the_lease_of_a_dead_driver_is_taken_over(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.0)
    lock = as_path(f"{bucket}/run/lock")
    lock.write_text('{"holder": "process 1 on elsewhere", "token": "0"}')  # And never again.
    with leased(lock, lock.parent):
        monkeypatch.setattr(lease, "LEASE_SECONDS", 600.0)  # However late this test looks.
        assert lease.is_held(lock)
        assert "elsewhere" not in lock.read_text()
    assert not lock.exists()
    assert objects(str(lock.parent)) == {}


def test_a_driver_whose_lease_was_taken_stops(
    model: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its own thread has seen it: the whole process slept."""
    monkeypatch.setattr(lease, "_HEARTBEAT_SECONDS", 60)
    lock = as_path(f"{bucket}/out.run/lock")

    class Slept(DecomposeWorker):
        def run(self, task: object) -> object:
            result = super().run(task)
            lock.write_text('{"holder": "another", "token": "1"}')
            return result

    monkeypatch.setattr(pipeline, "DecomposeWorker", Slept)
    refused(lestd("compress", model, "--out", f"{bucket}/out", *SERIAL), "taken over")
    # It is the other's, and stays.
    assert json.loads(lock.read_text())["holder"] == "another"


# -- kills -----------------------------------------------------------------------------------


def starts(run_dir: str) -> Counter[str]:
    events = Manifest(as_path(f"{run_dir}/manifest")).events().to_pylist()
    return Counter(e["task_id"] for e in events if e["kind"] == "started")


def committed(run_dir: str) -> set[str]:
    return {*Manifest(as_path(f"{run_dir}/manifest")).groups()["task_id"].to_pylist()}


def kill(process: subprocess.Popen[str], run_dir: str) -> None:
    process.kill()
    process.communicate()
    # As if it had died long ago: who resumes at once waits for the end of its lease.
    (as_path(run_dir) / "lock").unlink(missing_ok=True)


def payload_without_row(run_dir: str) -> bool:
    payloads = list_files(as_path(f"{run_dir}/payloads"))
    return bool({name.partition("-")[0] for name in payloads} - committed(run_dir))


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["serial", pytest.param("ray", marks=pytest.mark.ray)])
def test_kills_change_no_byte_and_repeat_no_finished_task(
    many_layers: Path, bucket: str, tmp_path: Path, executor: str
) -> None:
    undisturbed = tmp_path / "undisturbed"
    assert lestd("compress", many_layers, "--out", undisturbed, *SERIAL).code == 0
    out, run_dir, rng = f"{bucket}/out", f"{bucket}/out.run", random.Random(executor)
    command = ("compress", many_layers, "--out", out, "--keep", 0.5, "--executor", executor)
    command += ("--workers", 2) if executor == "ray" else ()
    caught = False
    for number in range(3):
        finished = committed(run_dir)
        process = start_lestd(*command)
        while process.poll() is None and len(committed(run_dir)) < len(finished) + 2:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.2))
        while number == 0 and process.poll() is None and not caught:  # Between put and row.
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.1)  # For what is on its way to the server.
            if not (caught := payload_without_row(run_dir)):
                process.send_signal(signal.SIGCONT)
                time.sleep(0.005)
        assert process.poll() is None, process.communicate()
        kill(process, run_dir)
    finished, begun = committed(run_dir), starts(run_dir)
    assert caught
    assert 0 < len(finished) < LAYERS
    result = run_lestd(*command)
    assert result.code == 0, result.err
    assert f"{len(finished)} of {LAYERS} tasks were already finished" in result.err
    assert all(starts(run_dir)[task] == begun[task] for task in finished)
    assert digest_objects(out) == digest_tree(undisturbed)
    assert lestd("verify", out).code == 0


@pytest.mark.slow
def test_a_driver_killed_between_put_and_row_is_resumed(
    model: Path, local: dict[str, str], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it leaves is a payload without a row; without the payload, a row is nothing."""
    out = f"{bucket}/out"
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "commit", lambda self, result: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lestd("compress", model, "--out", out, *SERIAL)
    assert payload_without_row(f"{out}.run")
    assert json.loads(lestd("status", out, "--json").out)["done"] == 0
    assert lestd("compress", model, "--out", out, *SERIAL).code == 0
    assert digest_objects(out) == local
    next((as_path(f"{out}.run") / "payloads").iterdir()).unlink()
    assert "is missing" in lestd("verify", out).out
    assert lestd("compress", model, "--out", out, *SERIAL).code == 0
    assert lestd("verify", out).code == 0


@pytest.mark.ray
@pytest.mark.slow
def test_workers_of_ray_write_there(model: Path, local: dict[str, str], bucket: str) -> None:
    result = run_lestd("compress", model, "--out", f"{bucket}/out", "--keep", 0.5, "--workers", 2)
    assert result.code == 0, result.err
    assert digest_objects(f"{bucket}/out") == local


# -- what cannot be used ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/out", ("ftp://host/out", "s3:// or gs://")),
        ("memory://out", ("memory://out", "expected a local path")),
        ("file://host/out", ("file://host/out", "file:///")),
        ("s3://bucket", ("s3://bucket", "directory in a bucket")),
        ("s3://bucket/..", ("directory in a bucket",)),
        ("s3://bucket/a*", ("s3://bucket/a*", "another name")),
        ("s3://no-such-bucket/out", ("s3://no-such-bucket/out", "bucket does not exist")),
    ],
)
def test_what_cannot_be_written_to(server: str, model: Path, url: str, words: tuple[str]) -> None:
    refused(lestd("compress", model, "--out", url, *SERIAL), *words)


def test_a_store_whose_package_is_absent_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(LestdError, match=r"gs://bucket/out needs .*pip install 'lestd\[gcs\]'"):
        as_path("gs://bucket/out")


def test_directories_of_a_store_must_not_lie_in_one_another(model: Path, bucket: str) -> None:
    inner = ("--run-dir", f"{bucket}/out/../out/run")
    refused(lestd("compress", model, "--out", f"{bucket}/out", *inner, *SERIAL), "lies in")
    assert objects(bucket) == {}


# -- nodes without a shared disk -------------------------------------------------------------


def test_a_worker_without_the_run_directory_says_so(tmp_path: Path) -> None:
    with pytest.raises(LestdError, match=r"cannot be seen from .*mount .* s3://BUCKET"):
        DecomposeWorker(str(tmp_path / "absent"))


@pytest.mark.ray
@pytest.mark.slow
def test_every_other_node_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, absent = str(tmp_path), str(tmp_path / "absent")
    with open_executor(ClusterConfig()) as executor:
        assert executor.on_nodes(unseen, [here, absent]) == {}
        monkeypatch.setattr(ray_executor.socket, "gethostname", lambda: "elsewhere")
        assert list(executor.on_nodes(unseen, [here, absent]).values()) == [[absent]]


def test_nodes_that_do_not_see_the_disk_are_named(
    model: Path, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One machine has one disk: the answer of the second node is made here."""
    asked = []

    def on_nodes(self: SerialExecutor, function: object, paths: list[str]) -> dict[str, list[str]]:
        assert function(paths) == []  # The driver sees them all.
        asked.append(paths)
        return {"node-1": [], "node-2": paths}

    monkeypatch.setattr(SerialExecutor, "on_nodes", on_nodes)
    out = tmp_path / "out"
    source = resolve_source(str(model), None).directory
    words = (str(tmp_path / "out.run"), str(source), "from node-2: mount", "s3://")
    refused(lestd("compress", model, "--out", out, *SERIAL), *words)
    assert not (tmp_path / "out.run" / "run.json").exists()  # Nothing was begun.
    assert len(asked.pop()) == 2
    # With the run elsewhere, only the source is asked for.
    refused(lestd("compress", model, "--out", f"{bucket}/out", *SERIAL), str(source), "node-2")
    assert len(asked.pop()) == 1
