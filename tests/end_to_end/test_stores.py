"""Object stores that fail, refuse or are shared by several drivers: against a real server."""

import contextlib
import errno
import fcntl
import io
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiobotocore.client import AioBaseClient
from botocore.exceptions import ClientError, EndpointConnectionError
from support.cli import lestd
from support.families import save_tiny
from support.object_runs import SERIAL, digest_objects, objects, refused
from support.s3 import s3_server
from upath import UPath

from lestd_kernels.errors import LestdError
from orchestrator.compression import pipeline
from orchestrator.manifest.checks import payload_problem
from orchestrator.model import assemble, directory
from orchestrator.run import lease
from orchestrator.run.directory import RunDirectory
from orchestrator.run.lease import leased
from workers.checkpoint.tensors import read_header, read_weight_map
from workers.host.failures import failure_of
from workers.storage import objects as stores
from workers.storage import ranges, retries
from workers.storage.building import building_directory
from workers.storage.files import (
    as_path,
    atomic_write,
    copy_file,
    file_sha256,
    is_directory,
    is_file,
    list_files,
    list_names,
    read_file,
    read_files,
    remove_file,
    remove_tree,
)
from workers.storage.json_files import read_json, write_json
from workers.storage.retries import TransientError

READS = {"HeadObject", "GetObject", "ListObjectsV2"}
PARTS = {"CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as (url, _):
        yield url


@pytest.fixture
def bucket(server: str, tmp_path: Path) -> UPath:
    """A directory of the test's own in the bucket."""
    return as_path(f"{server}/{tmp_path.name}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("source") / "model")


# Decides what becomes of a request, by its name: it raises, or answers, or lets it pass with None.
Decide = Callable[[str], Any]


@pytest.fixture
def intercept(monkeypatch: pytest.MonkeyPatch) -> Callable[[Decide], None]:
    """Stand between s3fs and the server."""
    monkeypatch.setattr(retries, "_FIRST_PAUSE_SECONDS", 0.001)
    real = AioBaseClient._make_api_call

    def use(decide: Decide) -> None:
        async def call(self: Any, request: str, parameters: Any) -> Any:
            answer = decide(request)
            return await real(self, request, parameters) if answer is None else answer

        monkeypatch.setattr(AioBaseClient, "_make_api_call", call)

    return use


Intercept = Callable[[Decide], None]


def outage(requests: set[str], times: int = 10**9) -> tuple[Decide, Counter[str]]:
    """Each of these requests fails so often; and how often each did."""
    failed: Counter[str] = Counter()

    def decide(request: str) -> None:
        if request in requests and failed[request] < times:
            failed[request] += 1
            raise EndpointConnectionError(endpoint_url="http://store")

    return decide, failed


def denied(request: str) -> ClientError:
    return ClientError({"Error": {"Code": "AccessDenied", "Message": "Access Denied"}}, request)


# -- what is too large -----------------------------------------------------------------------


def test_objects_are_no_larger_than_they_may_be(
    bucket: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (stores, ranges):
        monkeypatch.setattr(module, "MAX_SMALL_BYTES", 10)
    paths = [bucket / str(size) for size in (10, 0, 11)]
    for path in paths:
        atomic_write(path, lambda file, size=int(path.name): file.write(bytes(size)))
    small, empty, large, absent = read_files([*paths, bucket / "absent"])
    assert (small, empty) == (bytes(10), b"")
    assert isinstance(large, OSError)
    assert large.strerror == "more than 10 bytes"
    assert isinstance(absent, FileNotFoundError)
    with pytest.raises(LestdError, match="has 11 bytes, expected at most 10"):
        read_file(paths[2])


# -- an outage -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("megabytes", "requests", "times"), [(1, {"PutObject"}, 5), (12, PARTS, 2)]
)
def test_a_write_outlasts_an_outage(
    bucket: UPath,
    intercept: Intercept,
    monkeypatch: pytest.MonkeyPatch,
    megabytes: int,
    requests: set[str],
    times: int,
) -> None:
    monkeypatch.setattr(bucket.fs, "default_block_size", 5 * 2**20)
    content = random.Random(megabytes).randbytes(megabytes * 2**20)
    decide, failed = outage(requests, times)
    intercept(decide)
    path = bucket / "object"
    atomic_write(path, lambda file: [file.write(content[:1000]), file.write(content[1000:])])
    assert failed == dict.fromkeys(requests, times)
    assert path.read_bytes() == content


def test_what_copies_into_a_store_begins_anew(
    bucket: UPath, intercept: Intercept, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)))
    decide, failed = outage({"PutObject"}, 1)
    intercept(decide)
    copy_file(tmp_path / "file", bucket / "file")
    assert failed
    assert (bucket / "file").read_bytes() == bytes(range(256))


def test_an_outage_of_what_is_copied_is_not_taken_for_one_of_the_store(bucket: UPath) -> None:
    calls = []

    def write(file: io.RawIOBase) -> None:
        calls.append(file.write(b"a"))
        raise TransientError("the source does not answer")

    with pytest.raises(TransientError, match="source"):
        atomic_write(bucket / "object", write)
    assert len(calls) == 1
    assert not list_files(bucket)


def test_who_is_to_blame() -> None:
    assert failure_of("id", "group", TransientError("the store")).kind == "infrastructure"
    assert failure_of("id", "group", LestdError("the input")).kind == "application"


READERS = {
    "list_files": list_files,
    "list_names": list_names,
    "is_directory": is_directory,
    "is_file": lambda place: is_file(place / "absent"),
    "read_files": lambda place: read_files([place / "a.json"]),
    "read_json": lambda place: read_json(place / "a.json"),
    "read_header": lambda place: read_header(place / "a.json"),
    "read_weight_map": lambda place: read_weight_map(place / "index.json"),
    "file_sha256": lambda place: file_sha256(place / "a.json"),
    "payload": lambda place: payload_problem({"payload": "absent"}, place),
    "run": lambda place: RunDirectory(place).fingerprint(),
    "usable": lambda place: RunDirectory(place / "run").check_usable(),
    "model": directory.about_model,
    "complete": directory.is_complete,
    "lock": lambda place: lease.is_held(place / "lock"),
}


def answer_of(read: Callable[[UPath], Any], place: UPath) -> Any:
    try:
        return read(place)
    except LestdError as error:
        return str(error)


@pytest.mark.parametrize("reader", READERS)
def test_a_store_that_does_not_answer_is_asked_again_and_never_taken_for_empty(
    bucket: UPath, intercept: Intercept, reader: str
) -> None:
    (bucket / "a.json").write_text('{"a": 1}')
    (bucket / "index.json").write_text('{"weight_map": {}}')
    expected = answer_of(READERS[reader], bucket)
    decide, failed = outage(READS, 1)
    intercept(decide)
    assert answer_of(READERS[reader], bucket) == expected
    assert failed
    intercept(outage(READS)[0])
    with pytest.raises(TransientError, match=r"^s3://\S+ cannot be read .*EndpointConnection") as e:
        READERS[reader](bucket)
    assert "\n" not in str(e.value)


def test_a_refusal_is_final(bucket: UPath, intercept: Intercept) -> None:
    asked = []

    def refuse(request: str) -> None:
        asked.append(request)
        raise denied(request)

    intercept(refuse)
    with pytest.raises(LestdError, match="Access Denied"):
        is_file(bucket / "object")
    with pytest.raises(LestdError, match="Access Denied"):
        atomic_write(bucket / "object", lambda file: file.write(b"a"))
    assert len(asked) == 2


# -- what cannot be deleted ------------------------------------------------------------------


def silently(request: str) -> Any:
    """A bulk delete succeeds, and has an error for each key."""
    return {"Deleted": []} if request.startswith("DeleteObject") else None


def loudly(request: str) -> Any:
    if request.startswith("DeleteObject"):
        raise denied(request)


@pytest.mark.parametrize("refusal", [silently, loudly])
def test_what_cannot_be_deleted_is_named(
    bucket: UPath, intercept: Intercept, refusal: Callable[[str], Any]
) -> None:
    path = bucket / "run" / "payloads" / "object"
    path.write_bytes(b"a")
    remove_file(bucket / "absent")
    remove_tree(bucket / "absent")
    intercept(refusal)
    for remove in (
        lambda: remove_file(path),
        lambda: remove_tree(path.parent),
        RunDirectory(bucket / "run").remove_contents,
    ):
        with pytest.raises(LestdError, match=r"payloads\S* cannot be deleted; .*s3:DeleteObject"):
            remove()
    assert path.read_bytes() == b"a"


OTHER = '{"holder": "process 1 on elsewhere", "token": "0"}'


@pytest.mark.parametrize("refusal", [silently, loudly])
def test_a_lease_that_cannot_be_taken_over_is_named(
    bucket: UPath,
    intercept: Intercept,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Callable[[str], Any],
) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", -1.0)
    lock = bucket / "run" / "lock"
    lock.write_text(OTHER)
    intercept(refusal)
    with (
        pytest.raises(LestdError, match=r"clock-\w+ cannot be deleted; .*s3:DeleteObject"),
        leased(lock, lock.parent),
    ):
        raise AssertionError("two drivers")
    assert lock.read_text() == OTHER


def test_of_two_that_take_a_lease_over_one_gets_it(
    bucket: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, real = bucket / "run" / "lock", lease._store_time

    def overtaken(path: UPath) -> Any:
        """Another takes it over when this one has found that it may."""
        lock.write_text(OTHER)
        return real(path)

    monkeypatch.setattr(lease, "LEASE_SECONDS", -1.0)
    monkeypatch.setattr(lease, "_store_time", overtaken)
    lock.write_text('{"holder": "process 2, which was killed", "token": "1"}')
    with (
        pytest.raises(LestdError, match=r"another driver \(process 1 on elsewhere\) works on"),
        leased(lock, lock.parent),
    ):
        raise AssertionError("two drivers")
    assert lock.read_text() == OTHER


def test_who_wakes_up_late_does_not_write_over_its_successor(
    bucket: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, real = bucket / "run" / "lock", lease._look
    monkeypatch.setattr(lease, "_HEARTBEAT_SECONDS", 0.01)
    looked = threading.Event()

    def slept(path: UPath) -> Any:
        seen = real(path)
        if threading.current_thread() is not threading.main_thread() and not looked.is_set():
            lock.write_text(OTHER)
            looked.set()
        return seen

    def hold() -> None:
        with leased(lock, lock.parent) as check:
            monkeypatch.setattr(lease, "_look", slept)
            assert looked.wait(60)
            check()

    with pytest.raises(LestdError, match="taken over"):
        hold()
    assert lock.read_text() == OTHER


# -- several drivers of one model ------------------------------------------------------------


def test_drivers_of_two_runs_do_not_write_one_model(
    model: Path, bucket: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, lock = bucket / "out", bucket / ".out.assembling"
    command = ("compress", model, "--out", out, "--run-dir", tmp_path / "run", *SERIAL)
    monkeypatch.setattr(lease, "_HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "_PAUSE_SECONDS", 0.3)
    with leased(lock, out):
        refused(lestd(*command), "another driver", f"works on {out};")
        refused(lestd(*command, "--fresh"), "another driver", f"works on {out};")
    assert objects(str(bucket)) == {}
    # It sleeps while it writes, and another takes over.
    monkeypatch.setattr(lease, "_HEARTBEAT_SECONDS", 60)

    def slept(path: UPath, write: object) -> None:
        atomic_write(path, write)
        if path.name == "README.md":
            lock.write_text('{"holder": "another", "token": "1"}')

    with monkeypatch.context() as patch:
        patch.setattr(assemble, "atomic_write", slept)
        refused(lestd(*command), "taken over", str(out))
    assert "config.json" not in objects(str(out))
    assert json.loads(lock.read_text())["holder"] == "another"


@pytest.mark.slow
def test_a_model_that_another_run_has_finished_meanwhile_stays(
    model: Path, bucket: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = bucket / "out"
    assert lestd("compress", model, "--out", out, "--run-dir", tmp_path / "a", *SERIAL).code == 0
    before = {name: out.fs.modified((out / name).path) for name in list_files(out)}
    monkeypatch.setattr(pipeline, "check_output", lambda out: None)  # It was not there yet.
    again = lestd("compress", model, "--out", out, "--run-dir", tmp_path / "b", *SERIAL)
    assert again.code == 0, again.err
    other = ("--out", out, "--run-dir", tmp_path / "c", "--keep", 0.4, *SERIAL[2:])
    refused(lestd("compress", model, *other), str(out), "config.keep")
    assert {name: out.fs.modified((out / name).path) for name in list_files(out)} == before


def test_who_waited_for_another_driver_sees_what_it_has_finished(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real, waited = tmp_path / "out", RunDirectory.locked, []

    @contextlib.contextmanager
    def locked(self: RunDirectory) -> Iterator[Callable[[], None]]:
        if not waited:
            waited.append(True)
            assert lestd("compress", model, "--out", out, *SERIAL).code == 0
            waited.append(out.stat().st_ino)
        with real(self) as check:
            yield check

    monkeypatch.setattr(RunDirectory, "locked", locked)
    assert "already complete" in lestd("compress", model, "--out", out, *SERIAL).out
    assert out.stat().st_ino == waited[1]


def test_a_mixture_is_not_complete_and_is_repaired(
    model: Path, bucket: UPath, tmp_path: Path
) -> None:
    """A driver that slept puts its config.json beside what another is about to write."""
    out = bucket / "out"
    command = ("compress", model, "--out", out, "--run-dir", tmp_path / "run", *SERIAL)
    status = ("status", out, "--run-dir", tmp_path / "run", "--json")
    assert lestd(*command).code == 0
    whole = digest_objects(str(out))
    assert json.loads(lestd(*status).out)["state"] == "complete"
    about = read_json(out / "manifest" / "model.json")
    shard = next(name for name in about["files"] if name.startswith("lestd-"))
    (out / shard).unlink()
    assert json.loads(lestd(*status).out)["state"] == "stopped"
    write_json(out / "manifest" / "model.json", about | {"files": {n: {} for n in about["files"]}})
    assert json.loads(lestd(*status).out)["state"] == "stopped"
    assert lestd(*command).code == 0
    assert digest_objects(str(out)) == whole
    (out / "README.md").write_text("edited")
    assert "already complete" in lestd(*command).out


def test_what_others_put_there_meanwhile_is_not_taken_for_ours(
    model: Path, bucket: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = bucket / "out"
    command = ("compress", model, "--out", out, "--run-dir", tmp_path / "run", *SERIAL)

    def crowded(path: UPath, write: object) -> None:
        atomic_write(path, write)
        (out / "thesis.txt").write_text("years of work")

    with monkeypatch.context() as patch:
        patch.setattr(assemble, "atomic_write", crowded)
        refused(lestd(*command), "thesis.txt", "somebody else")
    refused(lestd(*command, "--fresh"), "thesis.txt", "not made by")
    assert objects(str(out))["thesis.txt"] == b"years of work"


# -- file systems without locks --------------------------------------------------------------


def test_a_file_system_without_locks_is_not_another_driver(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    words = (str(tmp_path), "without locks (No locks available)", "--run-dir")
    refused(lestd("compress", model, "--out", tmp_path / "out", *SERIAL), *words)
    with (
        pytest.raises(LestdError, match="without locks"),
        building_directory(tmp_path / "out", "building", "busy"),
    ):
        raise AssertionError("no lock")
