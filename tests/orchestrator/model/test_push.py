"""`lestd push` to a server that speaks the Hub's upload: killed, continued, refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.cli import lestd, start_lestd
from support.hub import hub_environment
from support.hub_upload import READER, WRITER, UploadHub, serve_upload_hub

SHARD = "lestd-00001-self_attn.safetensors"

_PROGRAM = """
import json, os, sys
from huggingface_hub import _commit_api, constants
from typer.testing import CliRunner
from orchestrator.model import push
from orchestrator.cli import app

answers, sent = [], []

def upload(*, additions, **_):
    # In place of hf_xet, whose protocol is its own, and which sends nothing that is there.
    sent.extend(additions)
    if len(sent) == 3:
        raise ConnectionError("cut off")

_commit_api._upload_xet_files = upload
for token, arguments, *xet in json.loads(sys.argv[1]):
    constants.HF_HUB_DISABLE_XET = not xet
    if xet:
        push._BATCH_BYTES = 1
    os.environ.update({"HF_TOKEN": token} if token else {})
    token or os.environ.pop("HF_TOKEN", None)
    done = CliRunner().invoke(app, ["push", *arguments])
    answers.append([done.exit_code, done.stdout, done.stderr])
print(json.dumps(answers))
"""


def environment(hub: UploadHub, home: Path, **more: str) -> dict[str, str]:
    # The protocol of hf-xet is its own; its absence is a case that huggingface_hub supports.
    given = hub_environment(hub.url, home) | {"HF_HUB_DISABLE_XET": "1"} | more
    del given["HF_HUB_DISABLE_PROGRESS_BARS"]  # There is no terminal: lestd draws none.
    return given


def push_each(hub: UploadHub, home: Path, calls: list[Any]) -> list[list[Any]]:
    """Exit code, output and errors of each ``[token, arguments]``, all in one process."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(calls)],
        env=environment(hub, home),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answers: list[list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("push") / "model"
    done = lestd("compress", tiny_llama, "--keep", 0.4, "--out", out, "--executor", "serial")
    assert done.code == 0, done.err
    return out


@dataclass
class Story:
    hub: UploadHub
    sent_before_the_kill: list[str]
    log_of_the_killed: str
    code_of_the_killed: int
    answers: list[list[Any]]


@pytest.fixture(scope="module")
def story(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One push is killed when some files have arrived; the next ones follow in one process."""
    home = tmp_path_factory.mktemp("home")
    damaged, unfinished = home / "damaged", home / "unfinished"
    shutil.copytree(model, damaged)
    with (damaged / SHARD).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    truncated = home / "truncated"
    shutil.copytree(model, truncated)
    os.truncate(truncated / SHARD, 100)
    unfinished.mkdir()
    (model / "notes.txt").write_text("not of lestd")
    with serve_upload_hub() as hub:
        # Five go at once: two of them arrive, so the kill finds the upload in the middle.
        hub.faults = ["hang", "hang", "hang"]
        process = start_lestd(
            "push", model, "me/model", env=environment(hub, home, HF_TOKEN=WRITER)
        )
        while not hub.hanging.wait(0.1) or len(hub.sent) < 2:
            assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGKILL)
        _, log = process.communicate()
        sent = list(hub.sent)
        hub.files["me/other@main"] = {"model.safetensors": b"dense"}
        hub.private["me/other"] = False
        hub.files["me/model@main"]["lestd-00077-self_attn.safetensors"] = b"an earlier push"
        hub.faults = ["503", "drop"]
        calls = [
            [None, [str(model), "me/model"]],
            [READER, [str(model), "me/model"]],
            [WRITER, [str(model), "foreign/model"]],
            [WRITER, [str(model), "a//b"]],
            [WRITER, [str(model), "me/other"]],
            [WRITER, [str(model), "me/other", "--private"]],
            [WRITER, [str(damaged), "me/model"]],
            [WRITER, [str(truncated), "me/model"]],
            [WRITER, [str(unfinished), "me/model"]],
            [WRITER, [str(model), "me/model", "--json"]],
            [WRITER, [str(model), "me/model", "--json"]],
            [WRITER, [str(model), "hidden", "--private", "--revision", "v/2"]],
            [WRITER, [str(model), "broken/model"]],
            [WRITER, [str(model), "me/chunked"], "xet"],
            [WRITER, [str(model), "me/chunked"], "xet"],
        ]
        answers = push_each(hub, home, calls)
    (model / "notes.txt").unlink()
    return Story(hub, sent, log, process.returncode, answers)


def test_a_killed_push_is_continued(story: Story, model: Path) -> None:
    assert story.code_of_the_killed == -signal.SIGKILL
    assert story.sent_before_the_kill
    log = story.log_of_the_killed
    assert log.startswith("checking ")
    assert not any(garbage in log for garbage in ("\r", "\x1b", "Warning"))
    code, out, _ = story.answers[9]
    assert code == 0
    expected = contents(model)
    on_hub = dict(story.hub.files["me/model@main"])
    assert on_hub.pop(".gitattributes")
    assert on_hub == expected
    answer = json.loads(out)
    assert answer["url"] == f"{story.hub.url}/me/model"
    assert (answer["repository"], answer["commit"]) == ("me/model", "1".zfill(40))
    assert answer["files"] == len(expected)
    assert answer["bytes"] == sum(map(len, expected.values()))


def test_no_file_is_sent_twice(story: Story, model: Path) -> None:
    large = {n for n in contents(model) if n.endswith((".safetensors", ".parquet"))}
    oids = {hashlib.sha256((model / name).read_bytes()).hexdigest() for name in large}
    assert set(story.sent_before_the_kill) < oids
    assert sorted(story.hub.sent) == sorted(oids)


def test_shards_of_an_earlier_push_go(story: Story) -> None:
    assert story.hub.commits[0][1] == ["lestd-00077-self_attn.safetensors"]


def test_nothing_changes_beside_the_model(story: Story, model: Path) -> None:
    assert lestd("verify", model).code == 0
    assert not list(model.rglob(".*"))
    assert {path.name for path in model.parent.iterdir()} == {"model", "model.run"}


def test_a_second_push_sends_nothing(story: Story) -> None:
    code, out, _ = story.answers[10]
    assert (code, json.loads(out)["url"]) == (0, f"{story.hub.url}/me/model")


def test_one_commit_publishes_all_of_it_where_xet_is_used(story: Story, model: Path) -> None:
    (broken, _, why), (code, _, log) = story.answers[13:]
    assert (broken, code) == (2, 0)
    assert "the upload to me/chunked broke off (ConnectionError: cut off)" in why
    assert log.count(" uploaded; the model appears when all of it is there") == len(contents(model))
    *_, (added, deleted) = story.hub.commits
    assert (added, deleted) == (sorted(contents(model)), [])
    on_hub = story.hub.files["me/chunked@main"]
    assert {name: on_hub[name] for name in added} == contents(model)


def test_a_private_repository_of_ones_own_and_a_branch(story: Story, model: Path) -> None:
    code, out, _ = story.answers[11]
    assert code == 0
    assert out.startswith(f"{story.hub.url}/me/hidden/tree/v/2: ")
    assert story.hub.private["me/hidden"]
    assert contents(model).items() <= story.hub.files["me/hidden@v/2"].items()
    assert list(story.hub.files["me/hidden@main"]) == [".gitattributes"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (0, "the Hub requires a login to write to me/model (401: Invalid username or password.)"),
        (1, "your token has no write access to me/model (403"),
        (2, "your token has no write access to foreign/model (403: You don't have the rights"),
        (3, "'a//b' cannot be the name of a Hub repository; expected OWNER/NAME"),
        (4, "me/other holds model.safetensors, weights of another model; choose another REPO"),
        (5, "me/other is public; make it private"),
        (6, f"{SHARD} does not have the sha256"),
        (7, f"{SHARD} is absent, or has not the"),
        (8, "is not a finished lestd model (it has no manifest/model.json)"),
        (12, "the upload to broken/model broke off (RemoteProtocolError: "),
    ],
)
def test_refusals(story: Story, call: int, words: str) -> None:
    code, out, err = story.answers[call]
    assert (code, out) == (2, "")
    *_, sentence = err.splitlines()
    assert sentence.startswith("error: ")
    assert words in sentence
