"""Models that lie elsewhere, where the disk, the server or the address is not as it should be."""

from __future__ import annotations

import errno
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save
from upath import UPath

from lestd_kernels.errors import LestdError, OutOfSpaceError
from orchestrator.compression import preflight
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.run import RunConfig
from orchestrator.execution.ray.jobs import job_command
from orchestrator.model import untouched
from orchestrator.model.untouched import fetch_shard
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.source.checkpoint import resolve_source
from orchestrator.source.location import store_url
from workers.checkpoint.tensors import read_header
from workers.contracts import TensorRef
from workers.storage import ranges

MODEL_BYTES = 64 * 2**20  # More than the buffers of two sockets hold.

# A shard that is part of a finished model.


@pytest.fixture
def refs(tmp_path: Path) -> list[TensorRef]:
    url = f"memory://{tmp_path.name}/1.safetensors"
    store, path = fsspec.core.url_to_fs(url)
    store.pipe_file(path, save({name: torch.rand(1000) for name in "abc"}))
    return list(read_header(url).values())


def fill_the_disk(ref: TensorRef, file: Any) -> None:
    file.write(b"half of it")
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("what", ["other content", "another length", "less recorded"])
def test_a_shard_that_is_linked_into_a_model_is_not_written_to(
    refs: list[TensorRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path = fetch_shard(refs, tmp_path / "untouched", "dense")
    if what == "another length":
        path.write_bytes(path.read_bytes() + b"more")
    linked, expected = tmp_path / "linked", path.read_bytes()
    linked.hardlink_to(path)
    if what == "other content":
        refs = [replace(ref, version="of another content") for ref in refs]
    if what == "less recorded":
        progress = path.with_name("dense.json")
        record = json.loads(progress.read_text())
        progress.write_text(json.dumps(record | {"bytes": record["bytes"] - 4000}))
    monkeypatch.setattr(untouched, "copy_tensor", fill_the_disk)
    with pytest.raises(
        OutOfSpaceError, match=f"no space left while writing {re.escape(str(path))}"
    ):
        fetch_shard(refs, tmp_path / "untouched", "dense")
    assert linked.read_bytes() == expected


# What the disks must hold.


@pytest.fixture(scope="module")
def plan(tiny_llama: Path) -> Plan:
    """A plan for the example in a store."""
    plan = make_plan(resolve_source(str(tiny_llama)), RunConfig(keep=0.4))
    return replace(plan, untouched=tuple(replace(r, shard="s3://b/1") for r in plan.untouched))


@pytest.mark.parametrize(
    ("out", "kept", "reclaimed", "more"),
    [
        ("memory://faults/out", 0, 0, 0),
        ("memory://faults/out", 1000, 0, -1000),
        ("memory://faults/out", 1000, 1, -1),
        ("out", 0, 0, 2**26),  # Linked: no more than the files beside the weights.
    ],
)
def test_what_is_fetched_counts_on_the_disk_of_the_run(
    plan: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    out: str,
    kept: int,
    reclaimed: int,
    more: int,
) -> None:
    place = UPath(out) if ranges.is_url(out) else tmp_path / out
    (tmp_path / "run" / "untouched").mkdir(parents=True)
    (tmp_path / "run" / "untouched" / "dense").write_bytes(bytes(kept))
    needed = plan.run_disk_bytes + plan.untouched_bytes
    needed += plan.out_disk_bytes - plan.untouched_bytes if more == 2**26 else more

    def check(free: int) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        with monkeypatch.context() as patch:
            patch.setattr(preflight.shutil, "disk_usage", lambda path: usage)
            preflight.require_disk(plan, place, tmp_path / "run", reclaimed)

    check(needed)
    with pytest.raises(LestdError, match="but the run needs"):
        check(needed - 1)


# A web server that ignores Range and does not say so.


class Ignoring(BaseHTTPRequestHandler):
    """Sends a large file, whatever is asked for."""

    sent = 0

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(MODEL_BYTES))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        piece = bytes(2**16)
        try:
            for _ in range(MODEL_BYTES // len(piece)):
                self.wfile.write(piece)
                Ignoring.sent += len(piece)
        except OSError:  # The reader has gone.
            self.close_connection = True


@pytest.fixture
def ignoring() -> Iterator[ThreadingHTTPServer]:
    Ignoring.sent = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Ignoring)
    server.daemon_threads = False  # So server_close waits for what they send.
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_file_is_not_taken_in_for_a_range_of_it(
    ignoring: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    url = f"http://127.0.0.1:{ignoring.server_address[1]}/model.safetensors"
    with pytest.raises(LestdError, match="does not answer range requests; copy the model"):
        read_header(url)
    ignoring.shutdown()
    ignoring.server_close()
    assert Ignoring.sent < MODEL_BYTES // 2


# A web server whose answer to a range goes on without end.


class Endless(Ignoring):
    def do_GET(self) -> None:
        self.send_response(206)
        self.send_header("Content-Range", "bytes 5-14/100")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        piece = b"%x\r\n%b\r\n" % (2**16, b"x" * 2**16)
        with suppress(OSError):  # Until the reader has gone.
            while True:
                self.wfile.write(piece)


def test_no_more_is_read_than_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    with server:  # Waits for what it sends.
        server.daemon_threads = False
        threading.Thread(target=server.serve_forever).start()
        content = bytearray(10)
        url = f"http://127.0.0.1:{server.server_address[1]}/file"
        ranges.read_ranges(url, f"{MODEL_BYTES} bytes", [(5, memoryview(content))])
        server.shutdown()
    assert bytes(content) == b"x" * 10


# A password in an address.


@pytest.mark.parametrize(
    "url",
    [
        "https://user:hush@host/model",
        "https://hush@host/model",
        "sftp://user:hush@host/model",
        "s3://key:hush@bucket/model?versionId=3",
        "zip://model::https://user:hush@host/a.zip",
        "https://host/model?sig=hush",
    ],
)
def test_a_password_in_a_url_is_refused_and_not_repeated(url: str, tmp_path: Path) -> None:
    with pytest.raises(LestdError) as caught:
        resolve_source(url, "v1")
    assert "hush" not in str(caught.value)
    if "@" in url:
        assert "put credentials into the store's own configuration" in str(caught.value)
    with pytest.raises(LestdError):
        job_command("compress", {"model": url}, ClusterConfig(), tmp_path)


def test_a_name_before_an_at_sign_is_no_password() -> None:
    url = "abfs://container@account.dfs.core.windows.net/model"
    assert store_url(url, None) == url
