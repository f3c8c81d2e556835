"""Kill anything, run the same command again, get the same bytes."""

import json
import random
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import LAYERS
from support.cli import PATIENCE, digest_tree, lestd, run_lestd, start_lestd
from support.kills import KEEP, committed, starts, wait_for_progress

from orchestrator.cli.summary import print_outcome
from orchestrator.compression.pipeline import compress_model
from orchestrator.config.run import RunConfig
from orchestrator.execution.executor import Listener, WorkerSpec
from orchestrator.execution.serial import SerialExecutor
from orchestrator.manifest.manifest import Manifest
from orchestrator.source.checkpoint import resolve_source
from workers.contracts import Failure


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if child.name().startswith("ray::Decompose"):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def kill_and_resume(model: Path, out: Path, kills: int, seed: int) -> dict[str, int]:
    """Run to the end through `kills` SIGKILLs, of the driver and of workers in turn.

    Every third driver dies at any moment of its life, while it starts or assembles too; the
    others, and the workers, while tasks run.
    """
    rng = random.Random(seed)
    run_dir = out.with_name(out.name + ".run")
    done = {"driver": 0, "worker": 0}
    command = ("compress", model, "--out", out, *KEEP, "--workers", 2)
    process = start_lestd(*command)
    while sum(done.values()) < kills:
        target = "driver" if done["driver"] <= done["worker"] else "worker"
        if len(committed(run_dir)) == LAYERS or (target == "driver" and done["driver"] % 3 == 2):
            target = "driver"
            time.sleep(rng.uniform(0, 10))
        else:
            wait_for_progress(process, run_dir, more=1)
            time.sleep(rng.uniform(0, 0.2))
        if process.poll() is not None:
            # The run was faster than its killer. Without its result it has to assemble again.
            assert process.returncode == 0, process.communicate()
            shutil.rmtree(out)
            process = start_lestd(*command)
            continue
        finished, begun = committed(run_dir), starts(run_dir)
        if target == "driver":
            process.kill()
            process.communicate()
            process = start_lestd(*command)
        elif victims := workers(process):
            rng.choice(victims).kill()
        else:
            continue
        done[target] += 1
        # What was finished is neither lost nor done again.
        assert finished.items() <= committed(run_dir).items()
    out_text, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, (out_text, err)
    assert finished.items() <= committed(run_dir).items()
    # A task that was finished at the last kill, however early it was, was never begun again.
    assert all(starts(run_dir)[task] == begun[task] for task in finished)
    return done


# A few kills on a cluster, of nodes as well, are in test_cluster.py.
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, 20])
def test_kills_change_no_byte_and_repeat_no_finished_task(
    many_layers: Path, undisturbed: dict[str, str], tmp_path: Path, kills: int
) -> None:
    done = kill_and_resume(many_layers, tmp_path / "out", kills, seed=kills)
    assert sum(done.values()) == kills
    assert min(done.values()) >= 1
    assert digest_tree(tmp_path / "out") == undisturbed
    assert lestd("verify", tmp_path / "out").code == 0
    rows = Manifest(tmp_path / "out" / "manifest").groups().to_pylist()
    assert [row["layer"] for row in rows] == list(range(LAYERS))


def test_a_finished_run_is_left_as_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("compress", tiny_llama, "--out", out, *KEEP, "--executor", "serial")
    assert lestd(*command).code == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    bytes_before = digest_tree(out)
    again = lestd(*command)
    assert again.code == 0
    assert "already complete" in again.out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert digest_tree(out) == bytes_before


def test_a_damaged_payload_is_made_again_and_nothing_else(tiny_llama: Path, tmp_path: Path) -> None:
    out, run_dir = tmp_path / "out", tmp_path / "out.run"
    command = ("compress", tiny_llama, "--out", out, *KEEP, "--executor", "serial")
    assert lestd(*command).code == 0
    undamaged = digest_tree(out)
    rows = Manifest(run_dir / "manifest").groups().to_pylist()
    payload = run_dir / "payloads" / rows[3]["payload"]
    content = bytearray(payload.read_bytes())
    content[-5] ^= 255
    payload.write_bytes(content)
    assert lestd("verify", out).code == 1
    assert lestd(*command).code == 0
    assert {t for t, n in starts(run_dir).items() if n == 2} == {rows[3]["task_id"]}
    assert digest_tree(out) == undamaged
    assert lestd("verify", out).code == 0


@pytest.mark.slow
def test_a_run_begun_serially_is_finished_on_ray(
    many_layers: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start_lestd("compress", many_layers, "--out", out, *KEEP, "--executor", "serial")
    wait_for_progress(process, tmp_path / "out.run", more=5)
    process.kill()
    process.communicate()
    finished = committed(tmp_path / "out.run")
    assert 5 <= len(finished) < LAYERS
    result = run_lestd("compress", many_layers, "--out", out, *KEEP)
    assert result.code == 0, result.err
    assert f"{len(finished)} of {LAYERS} tasks were already finished" in result.err
    assert finished.items() <= committed(tmp_path / "out.run").items()
    assert digest_tree(out) == undisturbed


class BesideADeadWorker(SerialExecutor):
    """Its last item is one that killed its worker."""

    def map(
        self, spec: WorkerSpec, items: Sequence[Any], on_event: Listener | None = None
    ) -> Iterator[Any]:
        yield from super().map(spec, items[:-1], on_event)
        task_id = items[-1].task_id
        yield Failure(
            task_id, "infrastructure", "WorkerDied", "set aside", "trace", 2, "its last words"
        )


def test_what_a_dead_worker_leaves_behind_is_kept_and_told(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, run_dir = tmp_path / "out", tmp_path / "out.run"
    source = resolve_source(str(tiny_llama))
    outcome = compress_model(source, RunConfig(keep=0.5), BesideADeadWorker(), out, run_dir)
    assert (len(outcome.rows), len(outcome.failures)) == (3, 1)
    print_outcome(outcome, out, run_dir, json=False)
    assert "its last words" in capsys.readouterr().err
    print_outcome(outcome, out, run_dir, json=True)
    assert json.loads(capsys.readouterr().out)["failed"][0]["evidence"] == "its last words"
    (event,) = (e for e in Manifest(run_dir / "manifest").events().to_pylist() if e["traceback"])
    assert (event["kind"], event["error_type"]) == ("failed", "WorkerDied")
    assert event["traceback"] == "its last words\ntrace"
    status = json.loads(lestd("status", out, "--json").out)
    assert [e["message"] for e in status["layers"] if e["state"] == "failed"] == ["set aside"]

    # The command is run again, and tells that it was.
    result = lestd("compress", tiny_llama, "--out", out, *KEEP, "--executor", "serial")
    assert result.code == 0, result.err
    assert "retried attempts: 1" in result.out
    assert "WorkerDied" in result.out
