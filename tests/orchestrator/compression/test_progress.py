"""What a command says on standard error: in a terminal, in a log, to a program."""

import itertools
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file
from support.cli import PATIENCE, lestd

from orchestrator.compression.progress import CompressionProgress
from orchestrator.console import logs, progress_bar
from orchestrator.console.progress_bar import Meter, Pace
from orchestrator.execution.executor import Event
from workers.contracts import Failure

SERIAL = ("--executor", "serial")
ESCAPE = "\x1b"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that moves when it is told to."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: Clock.now)
    return Clock


def test_the_rate_leaves_out_what_was_done_before_and_time_left_counts_down(clock: Any) -> None:
    pace = Pace()
    pace.update(50, 100)
    assert (pace.rate(), pace.seconds_left()) == (None, None)
    clock.now += 1000
    pace.begin()
    clock.now += 5
    pace.update(60, 100)
    assert pace.rate() == 2
    assert pace.seconds_left() == 20
    clock.now += 3
    assert pace.seconds_left() == 17
    clock.now += 1000  # The step takes longer than the last one: nobody knows by how much.
    assert pace.seconds_left() == 15
    pace.update(100, 100)
    assert pace.seconds_left() is None


def test_bare_progress_is_never_a_flood(clock: Any, capfd: pytest.CaptureFixture[str]) -> None:
    shown = Meter("count", "items")  # Not entered: without the thread that breaks silence.
    for done in range(1001):
        shown.update(done, 1000)
        clock.now += 0.1
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "count: 0 %"
    assert lines[-1] == "count: 100 %"
    assert 10 <= len(lines) <= 12
    for line in lines[2:-1]:
        assert re.fullmatch(r"count: \d+ %, 10\.\d\d items/s, \d+ s left", line), line


def test_silence_is_broken_while_a_task_runs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_bar, "SILENCE_SECONDS", 0.3)
    seen = ""
    with Meter("compress", "bytes") as shown:
        shown.update(0, 100)
        shown.begin("0123456789abcdef", "layers.7.attn", 2)
        deadline = time.monotonic() + PATIENCE
        while seen.count("at work") < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
            seen += capfd.readouterr().err
        shown.end("0123456789abcdef")
    lines = [line for line in seen.splitlines() if "at work" in line]
    assert len(lines) >= 3
    expected = r"compress: 0 % \| 1 at work: layers\.7\.attn \(01234567, attempt 2\) \d+ s"
    for line in lines:
        assert re.fullmatch(expected, line)


def test_only_the_first_task_of_a_worker_is_at_work(
    clock: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    shown = Meter("compress", "bytes")
    for task, worker in (("a1", "a"), ("b1", "b"), ("a2", "a"), ("a3", "a")):
        shown.begin(task, f"block.{task}", 1, worker)
    clock.now += 20
    shown.update(0, 100)
    shown.end("a1")
    clock.now += 15
    shown.update(0, 100)
    first, second = capfd.readouterr().err.splitlines()
    assert first.endswith("2 at work: block.a1 (a1) 20 s, block.b1 (b1) 20 s; 2 wait")
    assert second.endswith("2 at work: block.b1 (b1) 35 s, block.a2 (a2) 15 s; 1 wait")


def test_a_log_has_plain_lines(tiny_llama: Path, tmp_path: Path) -> None:
    run = lestd("compress", tiny_llama, "--keep", 0.5, "--out", tmp_path / "out", *SERIAL)
    assert run.code == 0, run.err
    assert ESCAPE not in run.err
    assert "\r" not in run.err
    lines = run.err.splitlines()
    assert lines[0] == "compress: 0 %"
    rows = pq.read_table(tmp_path / "out" / "manifest" / "groups.parquet").to_pylist()
    for number, (line, row) in enumerate(zip(lines[1:5], rows, strict=True), 1):
        assert line.startswith(f"compress: {25 * number} %")
        assert f"[{number}/4] {row['block']} ({row['task_id'][:8]}): ranks" in line
        assert (" s left | " in line) == (number < 4)
    again = lestd("compress", tiny_llama, "--keep", 0.5, "--out", tmp_path / "out", *SERIAL)
    assert again.err.splitlines() == [
        "compress: 100 %",
        "compress: 100 % | 4 of 4 tasks were already finished",
    ]


def test_json_lines_tell_of_every_task(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    options = ("--keep", 0.5, "--allocation", "global", "--out", out, "--log-format", "json")
    run = lestd("compress", tiny_llama, *options, "--json", *SERIAL)
    assert run.code == 0, run.err
    assert json.loads(run.out)["complete"]  # The result is alone on standard output.
    lines = [json.loads(line) for line in run.err.splitlines()]
    times = [datetime.fromisoformat(line["time"]) for line in lines]
    assert all(at.utcoffset() is not None and not at.utcoffset() for at in times)
    assert all(a <= b for a, b in itertools.pairwise(times))
    assert {line["run"] for line in lines} == {"model"}
    assert lines[0]["event"] == "run_started"
    assert lines[-1].items() >= {"event": "run_ended", "state": "complete", "tasks": 4}.items()
    rows = pq.read_table(out / "manifest" / "groups.parquet").to_pylist()
    done = [line for line in lines if line["event"] == "task_done" and line["pass"] == "compress"]
    names = ("task_id", "block", "layer", "attempt", "worker", "dense_bytes", "stored_bytes")
    assert [{n: line[n] for n in names} for line in done] == [
        {n: r[n] for n in names} for r in rows
    ]
    for line, row in zip(done, rows, strict=True):
        stages = sum(value for name, value in row.items() if name.startswith("seconds_"))
        assert line["seconds"] == pytest.approx(stages)
    for name in ("curves", "compress"):
        for event in ("task_started", "task_done"):
            of = [line for line in lines if (line["event"], line.get("pass")) == (event, name)]
            assert len({line["task_id"] for line in of}) == len(of) == 4
    progress = [line for line in lines if line["event"] == "progress"]
    assert {"curves", "compress", "assemble"} == {line["doing"] for line in progress}
    assert all(line["done"] <= line["total"] and line["unit"] == "bytes" for line in progress)


def test_json_lines_tell_of_failures_and_refusals(tiny_llama: Path, tmp_path: Path) -> None:
    refused = lestd("compress", tiny_llama, "--keep", 7, "--out", tmp_path, "--log-format", "json")
    assert refused.code == 2
    assert json.loads(refused.err).items() >= {"level": "error", "event": "error"}.items()
    plain = lestd("compress", tiny_llama, "--keep", 7, "--out", tmp_path)
    assert plain.err.strip() == f"error: {json.loads(refused.err)['message']}"


def test_json_lines_tell_of_a_failed_task(tiny_llama: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    shard = next(source.glob("*.safetensors"))
    tensors = load_file(shard)
    tensors["model.layers.2.self_attn.k_proj.weight"][3, 5] = float("nan")
    save_file(tensors, shard, {"format": "pt"})
    options = ("--keep", 0.5, "--out", tmp_path / "out", "--log-format", "json")
    run = lestd("compress", source, *options, *SERIAL)
    assert run.code == 1
    lines = [json.loads(line) for line in run.err.splitlines()]
    failed = next(line for line in lines if line["event"] == "task_failed")
    assert failed["level"] == "error"
    assert (failed["layer"], failed["attempt"], failed["failure_kind"]) == (2, 1, "application")
    assert "k_proj" in failed["message"]
    ended = next(line for line in lines if line["event"] == "run_ended")
    assert (ended["state"], ended["finished"], ended["failed"]) == ("failed", 3, 1)
    assert failed["task_id"] in {line.get("task_id") for line in lines if line["event"] == "error"}


def test_events_of_any_kind_are_told(capfd: pytest.CaptureFixture[str]) -> None:
    task = type("Made", (), {"task_id": "ab" * 16, "block": "g.3", "layer": 3, "dense_bytes": 10})()
    logs.use(logs.LogFormat.json)
    try:
        with CompressionProgress("run", None) as shown:
            shown.on_start("compress", [task], set())
            shown.on_event(Event("started", task.task_id, 1))
            shown.on_event(Event("retried", task.task_id, 1, "the worker died"))
            shown.on_event(Event("timed_out", task.task_id, 2, "no answer"))
            shown.on_event(Event("worker_lost", "", 1))
            shown.on_progress(Failure(task.task_id, "application", "ValueError", "bad"), 0, 1)
    finally:
        logs.use(logs.LogFormat.text)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    told = [(line["event"], line["level"], line.get("layer")) for line in lines]
    assert told[2:] == [
        ("task_started", "info", 3),
        ("task_retried", "warning", 3),
        ("task_timed_out", "warning", 3),
        ("task_worker_lost", "warning", None),
        ("task_failed", "error", 3),
        ("run_ended", "error", None),
    ]
    assert lines[3]["message"] == "g.3 (abababab): attempt 1 is retried: the worker died"
    assert lines[4]["message"] == "g.3 (abababab): attempt 2 timed out: no answer"


def test_a_terminal_has_a_bar(tmp_path: Path) -> None:
    code = (
        "from orchestrator.console.progress_bar import Meter\n"
        "with Meter('compress', 'bytes') as meter:\n"
        "    meter.update(0, 2**20)\n"
        "    meter.begin('0123456789abcdef', 'layers.7.attn', 1)\n"
        "    meter.say('task_done', 'a line that stays', done=2**19)\n"
        "    meter._bar.refresh()\n"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    run = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:
        pass  # The other end is closed.
    os.close(ours)
    assert run.wait(timeout=PATIENCE) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "\na line that stays" in text.replace("\r", "\n")
    assert re.search(
        r"compress \S+\s+50 % [\d.]+ .iB/s 0:00:0\d \d+ s left 1 at work: layers", text
    )
    assert shown.decode().rstrip().endswith("\x1b[2K")  # The bar is gone at the end.
