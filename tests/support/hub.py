"""A model Hub on this machine: the few endpoints that huggingface_hub asks, over real HTTP.

huggingface_hub reads ``HF_ENDPOINT`` when it is imported, so whatever talks to this server runs
in a process of its own: `call_with_hub`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

FAULTS = ("503", "dropped", "429", "dropped")


@dataclass
class Hub:
    """Repositories by id, and what was sent of them.

    A file named ``.gated`` in a repository makes its files answer 403; ``.broken`` makes its
    description answer 500; ``.no-range`` makes the server ignore Range headers; ``.drop-once``
    drops the connection of the first request for its description; ``.endless`` makes the content
    of its config.json go on for ever, whatever is said of its size.

    Attributes:
        sent_bytes: bytes sent of each file.
        asked: file and byte range of every request that was answered in full.
        flaky: while true, half of the requests for files end in one of `FAULTS`, in turn.
        hold: a file and range; the request for it sets `held` and is not answered.
    """

    root: Path
    url: str = ""
    sent_bytes: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    flaky: bool = False
    faults: int = 0
    hold: tuple[str, int, int] | None = None
    held: threading.Event = field(default_factory=threading.Event)
    requests: Iterator[int] = field(default_factory=itertools.count)

    def commit(self, model: str) -> str:
        return hashlib.sha1(model.encode()).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self.describe("/".join(parts[2:4]), parts[4:])
            elif len(parts) < 5:
                self.answer(404, b"{}")
            else:
                self.send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            if "Content_Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def exists(self, model: str, revision: str) -> bool:
            if not (hub.root / model).is_dir():
                self.answer(401, b"{}", X_Error_Code="RepoNotFound")
                return False
            if revision not in ("main", "v1", hub.commit(model)):
                self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
                return False
            return True

        def describe(self, model: str, rest: list[str]) -> None:
            if not self.exists(model, rest[1] if rest else "main"):
                return
            directory = hub.root / model
            if (directory / ".drop-once").exists():
                (directory / ".drop-once").unlink()
                self.close_connection = True
                return
            if (directory / ".broken").exists():
                self.answer(500, b"{}")
                return
            files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name[0] != ".")
            names = [str(path.relative_to(directory)) for path in files]
            if rest[:1] == ["tree"]:
                body: Any = [
                    {"type": "file", "path": n, "size": p.stat().st_size, "oid": n}
                    for n, p in zip(names, files, strict=True)
                ]
            else:
                siblings = [{"rfilename": name} for name in names]
                body = {"id": model, "sha": hub.commit(model), "siblings": siblings}
            self.answer(200, json.dumps(body).encode())

        def send_file(self, model: str, revision: str, name: str) -> None:
            if not self.exists(model, revision):
                return
            path = hub.root / model / name
            if (hub.root / model / ".gated").exists():
                self.answer(403, b"{}", X_Error_Code="GatedRepo")
            elif not path.is_file():
                self.answer(404, b"{}", X_Error_Code="EntryNotFound")
            else:
                self.send_range(model, path, f"{model}/{name}")

        def send_range(self, model: str, path: Path, key: str) -> None:
            content = path.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            headers["X_Repo_Commit"] = hub.commit(model)
            status, body, start = 200, content, 0
            asked = self.headers.get("Range")
            if asked and not (hub.root / model / ".no-range").exists():
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start = int(first)
                body = content[start : int(last) + 1 if last else None]
                headers["Content_Range"] = f"bytes {start}-{start + len(body) - 1}/{len(content)}"
                status = 206
            if self.command == "HEAD":
                self.answer(status, body, **headers, Content_Length=str(len(body)))
                return
            if path.name == "config.json" and (hub.root / model / ".endless").exists():
                self.send_without_end(headers)
                return
            request = (key, start, start + len(body))
            if request == hub.hold:
                hub.held.set()
                self.close_connection = True
                return
            fault = FAULTS[hub.faults % len(FAULTS)] if next(hub.requests) % 2 else None
            if hub.flaky and fault:
                hub.faults += 1
                if fault != "dropped":
                    self.answer(int(fault), b"{}")
                    return
                headers["Content_Length"] = str(len(body))
                body = body[: len(body) // 2]
                self.close_connection = True
            else:
                hub.asked.append(request)
            hub.sent_bytes[key] = hub.sent_bytes.get(key, 0) + len(body)
            self.answer(status, body, **headers)

        def send_without_end(self, headers: dict[str, str]) -> None:
            self.send_response(200)
            for name, value in (headers | {"Transfer-Encoding": "chunked"}).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.close_connection = True
            piece = b"%x\r\n%b\r\n" % (2**16, bytes(2**16))
            with suppress(OSError):  # Until the reader has had enough.
                while True:
                    self.wfile.write(piece)

    return Handler


@contextmanager
def serve_hub(root: Path) -> Iterator[Hub]:
    """Serve the directories ``root/<owner>/<name>`` as models."""
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


_PROGRAM = """
import json, sys
from pathlib import Path
from huggingface_hub import snapshot_download
from lestd_kernels.errors import LestdError
from orchestrator.source.convert import convert
from orchestrator.source.checkpoint import resolve_source
from workers.storage import retries
retries._FIRST_PAUSE_SECONDS = 0.01
answers = []
for name, *arguments in json.loads(sys.argv[1]):
    try:
        if name == "convert":
            index = convert(arguments[0], Path(arguments[1]))
            answers.append({"tensors": list(index.tensors)})
            continue
        if name == "snapshot":
            snapshot_download(arguments[0], revision=arguments[1])
            answers.append({})
            continue
        source = resolve_source(*arguments)
        if name == "side_files":
            answers.append({"files": sorted(p.name for p in source.fetch_side_files().iterdir())})
            continue
        tensors = source.index.tensors.items()
        refs = {n: [r.shard, r.shape, r.dtype, r.byte_range] for n, r in tensors}
        answers.append({
            "revision": source.revision, "directory": str(source.directory),
            "model_type": source.config.model_type, "tensors": refs,
        })
    except LestdError as error:
        answers.append({"error": str(error)})
print(json.dumps(answers))
"""


def hub_environment(url: str, home: Path) -> dict[str, str]:
    """Environment of a process that uses the Hub at `url`, with its cache in `home`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return environment | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def call_with_hub(url: str, home: Path, calls: list[list[str | None]]) -> list[dict[str, Any]]:
    """Make the calls, ``[function, arguments...]``, in one process that uses the Hub at `url`."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(calls)],
        env=hub_environment(url, home),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers
