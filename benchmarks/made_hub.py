"""A model Hub whose weights exist nowhere: it makes each tensor when a byte of it is asked for.

    python benchmarks/made_hub.py --shape opt-30b --port 8765
    HF_ENDPOINT=http://127.0.0.1:8765 lestd plan made/opt-30b --keep 0.4

Serves a model of the shape as the Hub serves one: its description, config.json, an index, shards
with ETags, byte ranges. The bytes are those that benchmarks/make_checkpoint.py writes with the same
options, so a restarted server is the same server. The tensors made last stay in memory; small
answers are kept in a directory: whoever begins to read a model looks at the start of every tensor.

    --drop-every 50      every 50th answer of a file ends in the middle, the connection with it
    GET /sent            bytes sent so far: small answers, and larger ones by kind (JSON)
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections import Counter, OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
from make_checkpoint import (
    add_model_options,
    checkpoint_shards,
    config_files,
    make_tensor,
    weights_index,
)
from shapes import make_config

from workers.checkpoint.headers import TensorSpec, build_header
from workers.checkpoint.tensors import INDEX_FILE
from workers.storage.files import atomic_write

OWNER = "made"
CACHE_BYTES = 2 * 2**30
SMALL_BYTES = 2**19


class MadeTensors:
    """The tensors of a checkpoint, made when they are wanted, the last few kept.

    Args:
        dtype: of all of them.
        seed: of the checkpoint.
        threads: that make one tensor.
    """

    def __init__(self, dtype: str, seed: int, threads: int) -> None:
        torch.set_num_threads(1)  # The last bit of a product depends on it.
        self._kind: torch.dtype = getattr(torch, dtype)
        self._seed = seed
        self._pool = ThreadPoolExecutor(threads)
        self._lock = threading.Lock()
        self._made: OrderedDict[str, Future[memoryview]] = OrderedDict()
        self._bytes: dict[str, int] = {}

    def content(self, spec: TensorSpec) -> memoryview:
        """Bytes of a tensor; whoever asks while it is being made waits for it."""
        with self._lock:
            made = self._made.get(spec.name)
            mine = made is None
            if made is None:
                made = self._made[spec.name] = Future()
                self._bytes[spec.name] = spec.stored_bytes
                while sum(self._bytes.values()) > CACHE_BYTES and len(self._made) > 1:
                    name, _ = self._made.popitem(last=False)
                    del self._bytes[name]
            self._made.move_to_end(spec.name)
        if mine:
            tensor = make_tensor(spec.name, spec.shape, self._kind, self._seed, self._pool)
            made.set_result(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return made.result()


class MadeModel:
    """Files of a made model, by byte range.

    Args:
        shape, layers, dtype, seed: as of benchmarks/make_checkpoint.py.
        threads: that make a tensor.
        memory: directory of small answers.

    Attributes:
        name: as on the Hub.
        commit: stands for all of its content.
        sent: bytes sent of each kind of content.
    """

    def __init__(
        self,
        shape: str,
        layers: int | None,
        dtype: str,
        seed: int,
        threads: int,
        memory: Path,
    ) -> None:
        config = make_config(shape, layers)
        self.name = f"{OWNER}/{shape}"
        self.commit = hashlib.sha1(repr((shape, layers, dtype, seed)).encode()).hexdigest()
        self.sent: Counter[str] = Counter()
        self._tensors = MadeTensors(dtype, seed, threads)
        self._shards = checkpoint_shards(config, dtype)
        self._memory = memory / self.commit
        self._memory.mkdir(parents=True, exist_ok=True)
        self._headers = {name: build_header(specs) for name, specs in self._shards.items()}
        small = config_files(config, dtype) | {INDEX_FILE: weights_index(self._shards)}
        self._small = {name: json.dumps(content).encode() for name, content in small.items()}

    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        shards = {
            name: len(self._headers[name]) + sum(spec.stored_bytes for spec in specs)
            for name, specs in self._shards.items()
        }
        return shards | {name: len(content) for name, content in self._small.items()}

    def small_piece(self, file: str, start: int, stop: int) -> bytes:
        """At most `SMALL_BYTES` of a file, from disk where they were asked for before."""
        known = self._memory / f"{file}-{start}-{stop}"
        if not known.is_file():
            content = b"".join(bytes(piece) for _, piece in self.pieces(file, start, stop))
            atomic_write(known, lambda out: out.write(content))
        return known.read_bytes()

    def pieces(self, file: str, start: int, stop: int) -> Iterator[tuple[str, memoryview]]:
        """The bytes of a file from `start` up to `stop`, each piece with its kind."""
        if file in self._small:
            yield "files", memoryview(self._small[file])[start:stop]
            return
        header = memoryview(self._headers[file])
        yield "headers", header[start:stop]
        at = len(header)
        for spec in self._shards[file]:
            first, last = max(start - at, 0), min(stop - at, spec.stored_bytes)
            if first < last:
                kind = "attention" if "self_attn" in spec.name else "other"
                yield kind, self._tensors.content(spec)[first:last]
            at += spec.stored_bytes


def handler(model: MadeModel, drop_every: int) -> type[BaseHTTPRequestHandler]:
    """A class that answers as the Hub does, for this model only."""
    answers = itertools.count(1)
    counting = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            """Nothing: a line for each range would be too many."""

        def handle(self) -> None:
            with suppress(ConnectionError):  # Whoever asked has gone.
                super().handle()

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            parts = path.split("/")
            if path == "sent":
                self.answer_json(200, dict(model.sent))
            elif path.startswith(f"api/models/{model.name}"):
                self.describe(parts[4:])
            elif path.startswith(f"{model.name}/resolve/") and len(parts) == 5:
                self.send_file(parts[4])
            else:
                self.answer_json(404, {}, X_Error_Code="RepoNotFound")

        def start_answer(self, status: int, length: int, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()

        def answer_json(self, status: int, content: Any, **headers: str) -> None:
            body = json.dumps(content).encode()
            self.start_answer(status, len(body), **headers)
            if self.command != "HEAD":
                self.wfile.write(body)

        def describe(self, rest: list[str]) -> None:
            sizes = model.sizes()
            if rest[:1] == ["tree"]:
                files = [
                    {"type": "file", "path": name, "size": size, "oid": name}
                    for name, size in sizes.items()
                ]
                self.answer_json(200, files)
                return
            siblings = [{"rfilename": name} for name in sizes]
            about = {"id": model.name, "sha": model.commit, "siblings": siblings}
            self.answer_json(200, about)

        def send_file(self, name: str) -> None:
            size = model.sizes().get(name)
            if size is None:
                self.answer_json(404, {}, X_Error_Code="EntryNotFound")
                return
            headers = {
                "ETag": f'"{hashlib.sha1((model.commit + name).encode()).hexdigest()}"',
                "X_Repo_Commit": model.commit,
                "Accept_Ranges": "bytes",
            }
            start, stop, status = 0, size, 200
            if asked := self.headers.get("Range"):
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, stop, status = int(first), min(int(last) + 1 if last else size, size), 206
                headers["Content_Range"] = f"bytes {start}-{stop - 1}/{size}"
            self.start_answer(status, stop - start, **headers)
            if self.command == "HEAD":
                return
            with counting:
                dropped = drop_every and next(answers) % drop_every == 0
            left = (stop - start) // 2 if dropped else stop - start
            pieces = model.pieces(name, start, stop)
            if stop - start <= SMALL_BYTES:
                pieces = iter([("small", memoryview(model.small_piece(name, start, stop)))])
            for kind, piece in pieces:
                piece = piece[:left]
                self.wfile.write(piece)
                left -= len(piece)
                with counting:
                    model.sent[kind] += len(piece)
            self.close_connection = bool(dropped)

    return Handler


@dataclass
class HubProcess:
    """This server as a process, which may be stopped and started at the same port.

    Args:
        options: of the command above, without its port.
    """

    options: list[str]
    port: int = 0
    process: subprocess.Popen[str] | None = None
    before: dict[str, int] = field(default_factory=dict)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, __file__, *self.options]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline().split()[0].rsplit(":", 1)[1])

    def stop(self) -> None:
        """Kill it; what it has sent is remembered."""
        self.before = self.sent()
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def sent(self) -> dict[str, int]:
        """Bytes sent of each kind, by all servers so far."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/sent") as answer:
            now: dict[str, int] = json.load(answer)
        kinds = self.before.keys() | now.keys()
        return {kind: self.before.get(kind, 0) + now.get(kind, 0) for kind in kinds}


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--threads", type=int, default=2, help="that make a tensor (default: 2)")
    parser.add_argument("--port", type=int, default=0, help="(default: any that is free)")
    memory = Path(tempfile.gettempdir(), "lestd-made-hub")
    parser.add_argument("--memory", type=Path, default=memory, help="(default: %(default)s)")
    parser.add_argument("--drop-every", type=int, default=0, help="(default: drop nothing)")
    options = parser.parse_args()
    model = MadeModel(
        options.shape, options.layers, options.dtype, options.seed, options.threads, options.memory
    )
    server = ThreadingHTTPServer(("127.0.0.1", options.port), handler(model, options.drop_every))
    server.daemon_threads = True
    print(f"http://127.0.0.1:{server.server_address[1]} serves {model.name}", flush=True)
    with suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
