"""Machines that are not as they should be: clock, home, user, memory, Ray; and who looks on."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.cli import PATIENCE, digest_tree, lestd, run_lestd, start_lestd
from support.families import save_tiny
from support.kills import wait_for_progress

from orchestrator import __main__, cli

KEEP = ("--keep", 0.6)
SERIAL = (*KEEP, "--executor", "serial")
SMALL = "mount -t tmpfs -o size=64k{} tmpfs /dev/shm"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected") / "out"
    assert lestd("compress", model, "--out", out, *SERIAL).code == 0
    return digest_tree(out)


def look_at(out: Path) -> None:
    """Whatever tells of a run tells of this one."""
    commands: list[tuple[object, ...]] = [("status", out), ("query", out, "--name", "retries")]
    commands += [("query", out, "--name", name) for name in ("runs", "workers", "time-by-stage")]
    commands.append(("report", out, "--format", "md", "--out", out.with_name("report.md")))
    for command in commands:
        result = lestd(*command)
        assert result.code == 0, result.err


def test_a_clock_that_jumps_changes_no_byte(
    model: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps = itertools.cycle([0.0, 3e9, 1e9, 2e9, 1.0])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: int(next(jumps) * 1e9))
    out = tmp_path / "out"
    assert lestd("compress", model, "--out", out, *SERIAL).code == 0
    look_at(out)
    assert lestd("verify", out).code == 0
    next((out.with_name("out.run") / "payloads").iterdir()).unlink()
    (out / "config.json").unlink()  # So that the model is made again too.
    assert lestd("compress", model, "--out", out, *SERIAL).code == 0
    look_at(out)
    assert digest_tree(out) == expected


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        ValueError("a bug"),  # Is not taken for one.
    ],
)
def test_a_process_that_gets_no_memory_says_so(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        raise error

    monkeypatch.setattr(cli, "main", run)
    with pytest.raises((SystemExit, ValueError)) as ended:
        __main__.main()
    said = capsys.readouterr().err
    if isinstance(ended.value, SystemExit):
        assert ended.value.code == 2
        assert said.startswith("error: the system refuses this process more memory or threads (")
        assert said.count("\n") == 1
    else:
        assert said == ""


@pytest.mark.slow
def test_a_run_is_looked_at_as_long_as_it_goes_on(
    model: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start_lestd("compress", model, "--out", out, *SERIAL)
    while process.poll() is None:
        if (tmp_path / "out.run" / "manifest" / "groups").is_dir():
            look_at(out)
    look_at(out)
    assert process.returncode == 0
    assert digest_tree(out) == expected


@pytest.mark.ray
@pytest.mark.slow
def test_a_home_is_not_needed(model: Path, expected: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = os.environ | {"HOME": "/dev/null", "RAY_ADDRESS": "local"}
    done = run_lestd("compress", model, "--out", out, *KEEP, env=environment)
    assert done.code == 0, done.err
    assert digest_tree(out) == expected


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("mount", [SMALL.format(""), SMALL.format(",ro")])
def test_shared_memory_is_not_needed(
    model: Path, expected: dict[str, str], tmp_path: Path, mount: str
) -> None:
    within = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    try:
        subprocess.run([*within, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("nothing can be mounted here")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "orchestrator", "compress", model, "--out", out, *KEEP]
    environment = os.environ | {"RAY_ADDRESS": "local"}
    subprocess.run([*within, *map(str, command)], check=True, timeout=PATIENCE, env=environment)
    assert digest_tree(out) == expected


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_is_out_of_memory_is_said_once(
    model: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """Ray ends every worker, whose node is never well."""
    out = tmp_path / "out"
    environment = os.environ | {"RAY_ADDRESS": "local", "RAY_memory_monitor_refresh_ms": "100"}
    failing = environment | {"RAY_memory_usage_threshold": "0.001"}
    failed = run_lestd("compress", model, "--out", out, *KEEP, env=failing)
    assert failed.code == 1
    errors = [line for line in failed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    assert "use fewer workers, or larger machines" in errors[0]
    resumed = run_lestd("compress", model, "--out", out, *SERIAL)
    assert resumed.code == 0, resumed.err
    assert digest_tree(out) == expected


@pytest.mark.ray
@pytest.mark.slow
def test_a_local_ray_that_dies_is_not_waited_for(
    many_layers: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """Of a cluster of one machine, which ends with the command, no other node will ever come."""
    out, log = tmp_path / "out", tmp_path / "log.txt"
    command = ["compress", many_layers, "--out", out, "--keep", 0.5, "--workers", 1]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator", *map(str, command)],
            stdout=stream,
            stderr=stream,
            env=os.environ | {"RAY_ADDRESS": "local"},
        )
    wait_for_progress(process, tmp_path / "out.run", more=1)
    # Where others work, too, looking for it may take as long as the run.
    process.send_signal(signal.SIGSTOP)
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.name() == "raylet":
            child.kill()
    process.send_signal(signal.SIGCONT)
    assert process.wait(PATIENCE) == 2
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "the local Ray cluster has ended" in errors[0]
    resumed = lestd(*command, "--executor", "serial", "--json")
    assert resumed.code == 0, resumed.err
    assert digest_tree(out) == undisturbed


@pytest.mark.slow
def test_a_user_whom_nobody_knows(model: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """As in containers: no name for the number, no home, no privilege over files."""
    out = tmp_path / "out"
    within = ["unshare", "--user", "--map-user=12345"]
    try:
        subprocess.run([*within, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no other user can be had here")
    environment = {key: os.environ[key] for key in os.environ.keys() - {"HOME", "USER", "LOGNAME"}}

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        line = [*within, sys.executable, "-m", "orchestrator", *map(str, command)]
        return subprocess.run(
            line, env=environment, capture_output=True, text=True, timeout=PATIENCE
        )

    for command in (("compress", model, "--out", out, *SERIAL), ("verify", out), ("status", out)):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    assert digest_tree(out) == expected
    (tmp_path / "closed").mkdir(mode=0o555)
    refused = run("compress", model, "--out", tmp_path / "closed" / "out", *SERIAL)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert "Permission denied" in refused.stderr
    assert refused.stderr.count("\n") == 1
