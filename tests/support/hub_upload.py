"""The other half of a Hub on this machine: the endpoints that an upload asks, over real HTTP.

Files of safetensors and Parquet go by git LFS, all others in the commit itself, as on the Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"


@dataclass
class UploadHub:
    """Repositories, the objects of git LFS, and what was sent.

    Attributes:
        files: content of every file, by ``repository@branch`` and path.
        private: whether a repository is.
        objects: LFS objects that have arrived, by sha256.
        sent: sha256 of every object whose content arrived, in order.
        commits: per commit, the paths added and those deleted.
        faults: what happens to the next uploads of objects, one each: ``503``, ``drop`` (the
            connection), ``hang`` (until the server ends); then all is well.
    """

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    sent: list[str] = field(default_factory=list)
    commits: list[tuple[list[str], list[str]]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    hanging: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".parquet"))


def _handler(hub: UploadHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def answer(self, status: int, body: Any) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def parts(self) -> list[str]:
            return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

        def content(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_GET(self) -> None:
            _, _, owner, name, *rest = self.parts()
            branch = rest[1] if rest else "main"
            files = hub.files.get(f"{owner}/{name}@{branch}")
            if files is None:
                self.answer(404, {"error": "Repository not found"})
            elif rest[:1] == ["tree"]:
                self.answer(
                    200,
                    [
                        {"type": "file", "path": path, "size": len(content), "oid": path}
                        for path, content in files.items()
                    ],
                )
            else:
                siblings = [{"rfilename": path} for path in files]
                about = {"id": f"{owner}/{name}", "sha": str(len(hub.commits)).zfill(40)}
                private = hub.private[f"{owner}/{name}"]
                self.answer(200, about | {"private": private, "siblings": siblings})

        def do_POST(self) -> None:
            parts, body = self.parts(), self.content()
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token != WRITER:
                status = 403 if token == READER else 401
                self.answer(status, {"error": "Invalid username or password."})
            elif parts == ["api", "validate-yaml"]:  # The head of the model card.
                self.answer(200, {"errors": [], "warnings": []})
            elif parts == ["api", "repos", "create"]:
                self.create(json.loads(body))
            elif parts[-3:] == ["lfs", "objects", "batch"]:
                self.batch(json.loads(body))
            else:
                repository, action, branch = "/".join(parts[2:4]), parts[4], parts[5]
                key = f"{repository}@{branch}"
                if action == "branch":
                    known = key in hub.files
                    hub.files.setdefault(key, dict(hub.files[f"{repository}@main"]))
                    self.answer(409 if known else 200, {})
                elif action == "preupload":
                    self.preupload(hub.files[key], json.loads(body))
                else:
                    assert action == "commit"
                    self.commit(key, [json.loads(line) for line in body.splitlines()])

        def create(self, asked: dict[str, Any]) -> None:
            repository = f"{asked['organization'] or 'me'}/{asked['name']}"
            if asked["organization"] == "foreign":
                self.answer(403, {"error": "You don't have the rights to create a model there"})
                return
            if asked["organization"] == "broken":
                self.close_connection = True
                return
            known = repository in hub.private
            if not known:
                hub.private[repository] = asked.get("visibility") == "private"
                hub.files[f"{repository}@main"] = {".gitattributes": b"*.safetensors filter=lfs\n"}
            self.answer(409 if known else 200, {"url": f"{hub.url}/{repository}"})

        def preupload(self, files: dict[str, bytes], asked: dict[str, Any]) -> None:
            modes = []
            for file in asked["files"]:
                path = file["path"]
                mode = {"path": path, "uploadMode": "lfs" if _is_lfs(path) else "regular"}
                if path in files:
                    sha256 = hashlib.sha256(files[path]).hexdigest()
                    mode["oid"] = sha256 if _is_lfs(path) else _git_oid(files[path])
                modes.append(mode | {"shouldIgnore": False})
            self.answer(200, {"files": modes})

        def batch(self, asked: dict[str, Any]) -> None:
            objects = []
            for wanted in asked["objects"]:
                if wanted["oid"] not in hub.objects:
                    upload = {"href": f"{hub.url}/objects/{wanted['oid']}"}
                    wanted = wanted | {"actions": {"upload": upload}}
                objects.append(wanted)
            self.answer(200, {"transfer": "basic", "objects": objects})

        def do_PUT(self) -> None:
            with hub.lock:
                fault = hub.faults.pop(0) if hub.faults else None
            if fault == "drop":
                self.rfile.read(1)
                self.close_connection = True
                self.connection.close()
                return
            if fault == "hang":
                hub.hanging.set()
                hub.ended.wait()
                return
            content = self.content()
            if fault is not None:
                self.answer(int(fault), {"error": "come again"})
                return
            oid = self.parts()[1]
            assert hashlib.sha256(content).hexdigest() == oid
            with hub.lock:
                hub.objects[oid] = content
                hub.sent.append(oid)
            self.answer(200, {})

        def commit(self, key: str, lines: list[dict[str, Any]]) -> None:
            files, added, deleted = dict(hub.files[key]), [], []
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    continue
                path = value["path"]
                if line["key"] == "deletedFile":
                    del files[path]
                    deleted.append(path)
                    continue
                lfs = line["key"] == "lfsFile"
                assert lfs == _is_lfs(path)
                files[path] = (
                    hub.objects[value["oid"]] if lfs else base64.b64decode(value["content"])
                )
                added.append(path)
            hub.files[key] = files
            hub.commits.append((sorted(added), sorted(deleted)))
            oid = str(len(hub.commits)).zfill(40)
            page = f"{hub.url}/{key.partition('@')[0]}/commit/{oid}"
            self.answer(200, {"commitUrl": page, "commitOid": oid})

    return Handler


@contextmanager
def serve_upload_hub() -> Iterator[UploadHub]:
    """A Hub without repositories, which lets `WRITER` write."""
    hub = UploadHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
