"""What a run leaves in its manifest and in its model's: calls, events, spectra, evaluations."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.cli import digest_tree, lestd
from support.groups import gqa, mha, unfolding
from support.s3 import s3_server
from upath import UPath

from lestd_kernels.errors import LestdError
from lestd_kernels.methods import METHODS, MethodArgs
from orchestrator.cli.summary import outcome_figures
from orchestrator.compression.pipeline import compress_model
from orchestrator.config.run import RunConfig
from orchestrator.execution.executor import Listener, WorkerSpec, all_started, retried
from orchestrator.execution.retries import Again, Attempt
from orchestrator.execution.serial import SerialExecutor
from orchestrator.manifest import manifest
from orchestrator.manifest.manifest import Manifest
from orchestrator.model import push
from orchestrator.planning.plan import make_plan
from orchestrator.run.directory import RunDirectory
from orchestrator.source.checkpoint import resolve_source
from workers.contracts import Failure

SERIAL = ("--executor", "serial", "--keep", 0.5)


def calls(place: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = Manifest(place).runs().to_pylist()
    return rows


class Troubled(SerialExecutor):
    """Its first item is tried twice; `end` is what follows the second."""

    def __init__(self, end: BaseException | Failure | None = None) -> None:
        self._end = end

    def map(
        self, spec: WorkerSpec, items: Sequence[Any], on_event: Listener | None = None
    ) -> Iterator[Any]:
        assert on_event is not None
        first = Attempt(items[0], worker="elsewhere:7")
        all_started([first], on_event)
        on_event(retried(Again(Attempt(items[0], 2, worker="elsewhere:7"), "NodeLost", "m", "e")))
        done = super().map(spec, items, on_event)
        yield next(done)
        yield next(done)
        if isinstance(self._end, BaseException):
            raise self._end
        if self._end is not None:
            yield self._end
            return
        yield from done


def test_a_call_is_recorded_and_the_model_has_it_too(tiny_llama: Path, tmp_path: Path) -> None:
    out, run_dir = tmp_path / "out", tmp_path / "out.run"
    began = time.time()
    source = resolve_source(str(tiny_llama))
    config = RunConfig(keep=0.5)
    outcome = compress_model(
        source, config, Troubled(), out, run_dir, predicted={"a": 1.0, "b": 1.5}
    )
    ended = time.time()
    (row,) = calls(run_dir)
    dense = sum(g["dense_bytes"] for g in outcome.rows)
    stored = sum(t.nbytes for p in out.glob("lestd-*") for t in load_file(p).values())
    whole = sum(t.nbytes for p in tiny_llama.glob("*.safetensors") for t in load_file(p).values())
    assert row["state"] == "complete"
    assert began <= row["started_at"].timestamp() <= row["ended_at"].timestamp() <= ended
    wall = row["ended_at"].timestamp() - row["started_at"].timestamp()
    assert 0 < row["seconds_assemble"] < row["seconds"] <= outcome.seconds
    assert row["seconds"] == pytest.approx(wall, abs=0.1)
    assert (row["model"], row["revision"], row["family"]) == (str(tiny_llama), None, "llama")
    assert (row["method"], row["pattern"], row["scope"]) == ("lestd", "unstructured", "attention")
    assert (row["allocation"], row["device"], row["executor"]) == ("uniform", "cpu", "serial")
    assert row["keep"] == pytest.approx(0.5, abs=1e-4)
    counts = ("tasks", "finished_before", "finished", "failed", "retried")
    assert [row[name] for name in counts] == [4, 0, 4, 0, 1]
    assert (row["dense_bytes"], row["stored_bytes"], row["model_bytes"]) == (dense, stored, whole)
    assert row["untouched_bytes"] == whole - dense
    assert stored <= row["byte_budget"] <= dense / 2
    assert row["planned_worker_memory_bytes"] == outcome.plan.worker_memory_bytes
    assert row["planned_disk_bytes"] == outcome.plan.run_disk_bytes
    assert row["planned_seconds"] == 2.5
    recorded = json.loads((run_dir / "run.json").read_text())["fingerprint"]
    assert json.loads(row["config"]) == recorded["config"]
    versions = json.loads(row["versions"])
    assert set(versions) == {"lestd", "torch", "transformers", "python"}
    assert versions["transformers"] == version("transformers")

    (kept,) = calls(out)
    later = {"ended_at", "seconds", "seconds_assemble"}
    assert {k: v for k, v in kept.items() if k not in later} == {
        k: v for k, v in row.items() if k not in later
    }
    assert all(kept[name] <= row[name] for name in later)
    events = Manifest(run_dir).events()
    assert Manifest(out).events() == events
    (task,) = (g for g in outcome.rows if g["layer"] == 0)
    kinds = [e["kind"] for e in events.to_pylist() if e["task_id"] == task["task_id"]]
    assert kinds == ["started", "retried", "started"]
    for event in events.to_pylist():
        group = next(g for g in outcome.rows if g["task_id"] == event["task_id"])
        assert (event["layer"], event["block"]) == (group["layer"], group["block"])
        here = (group["worker"], group["node"])
        assert (event["worker"], event["node"]) in (here, ("elsewhere:7", "elsewhere"))
    # The model answers alone.
    assert lestd("clean", out).code == 0
    assert Manifest(out).events() == events
    assert lestd("verify", out).code == 0


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (LestdError("the store does not answer"), "interrupted"),
        (Failure("", "application", "ValueError", "no", worker="elsewhere:7"), "failed"),
    ],
    ids=["ctrl-c", "error", "failure"],
)
def test_calls_that_end_otherwise_are_recorded_and_continued(
    tiny_llama: Path, tmp_path: Path, end: BaseException | Failure, state: str
) -> None:
    out, run_dir = tmp_path / "out", tmp_path / "out.run"
    source = resolve_source(str(tiny_llama))
    if isinstance(end, Failure):
        compress_model(source, RunConfig(keep=0.5), _Failing(end), out, run_dir)
    else:
        with pytest.raises(type(end)):
            compress_model(source, RunConfig(keep=0.5), Troubled(end), out, run_dir)
    (row,) = calls(run_dir)
    assert row["state"] == state
    assert (row["finished"], row["retried"], row["stored_bytes"]) == (2, 1, None)
    assert row["failed"] == (state == "failed")
    assert row["ended_at"] is not None
    failures = [e for e in Manifest(run_dir).events().to_pylist() if e["kind"] == "failed"]
    assert [(e["worker"], e["node"]) for e in failures] == (
        [("elsewhere:7", "elsewhere")] if state == "failed" else []
    )
    assert lestd("compress", tiny_llama, "--out", out, *SERIAL).code == 0
    first, second = calls(out)
    assert (first, second["run_id"]) == (row, row["run_id"])
    assert (second["state"], second["finished_before"], second["finished"]) == ("complete", 2, 4)
    assert second["stored_bytes"] is not None


class _Failing(Troubled):
    """The failure is of the third item."""

    def map(
        self, spec: WorkerSpec, items: Sequence[Any], on_event: Listener | None = None
    ) -> Iterator[Any]:
        assert isinstance(self._end, Failure)
        self._end = replace(self._end, task_id=items[2].task_id)
        return super().map(spec, items, on_event)


def test_a_call_that_is_killed_stays_running(tiny_llama: Path, tmp_path: Path) -> None:
    """As it is while it works."""
    out, run_dir = tmp_path / "out", tmp_path / "out.run"
    seen = []

    def look(*_: Any) -> None:
        seen.extend(calls(run_dir))

    source = resolve_source(str(tiny_llama))
    compress_model(source, RunConfig(keep=0.5), SerialExecutor(), out, run_dir, on_progress=look)
    assert len(seen) == 4
    assert {row["state"] for row in seen} == {"running"}
    unknown = ("ended_at", "seconds", "finished", "finished_before", "stored_bytes")
    assert {row[name] for row in seen for name in unknown} == {None}
    assert all(row["tasks"] == 4 for row in seen)


def test_a_driver_compacts_what_is_many(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, run_dir = tmp_path / "out", tmp_path / "out.run"
    assert lestd("compress", tiny_llama, "--out", tmp_path / "whole", *SERIAL).code == 0
    monkeypatch.setattr(manifest, "MANY_PARTS", 0)
    assert lestd("compress", tiny_llama, "--out", out, *SERIAL).code == 0
    # The row of the call itself is written after that.
    (left,) = (run_dir / "manifest").glob("*/*.parquet")
    assert left.parent.name == "runs"
    assert digest_tree(out) == digest_tree(tmp_path / "whole")
    # Nothing is done again, what is damaged is, and its rows replace the compacted ones.
    monkeypatch.undo()
    again = lestd("compress", tiny_llama, "--out", out, *SERIAL)
    assert "already complete" in again.out
    payload = sorted((run_dir / "payloads").iterdir())[0]
    payload.write_bytes(b"damaged")
    assert lestd("compress", tiny_llama, "--out", out, *SERIAL).code == 0
    assert len([*(run_dir / "manifest" / "groups").iterdir()]) == 1
    assert len(Manifest(run_dir).groups()) == 4
    assert [row["finished_before"] for row in calls(run_dir)] == [0, 4, 3]
    assert lestd("verify", out).code == 0
    assert digest_tree(out) == digest_tree(tmp_path / "whole")


def evaluation(name: str) -> dict[str, Any]:
    fields = {"task": "wikitext", "metric": "ppl", "value": 9.5, "time": time.time_ns() // 1000}
    return {"evaluation_id": hashlib.sha256(name.encode()).hexdigest()[:32]} | fields


def test_evaluations_belong_to_the_model(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert lestd("compress", tiny_llama, "--out", out, *SERIAL).code == 0
    kept = Manifest(out)
    kept.record_evaluation([evaluation("a"), evaluation("a") | {"metric": "bits"}])
    kept.record_evaluation([evaluation("b")])
    (out / "manifest" / "evaluations" / ".tmp-1-abc").write_bytes(b"half")
    assert kept.evaluations().num_rows == 3
    assert lestd("verify", out).code == 0
    parts = [f"manifest/evaluations/{evaluation(name)['evaluation_id']}.parquet" for name in "ab"]
    pushed = push._finished_files(out)
    assert [name for name in pushed if "evaluations" in name] == sorted(parts)
    assert not [name for name in pushed if not (out / name).is_file()]

    for name in ("evaluations/thesis.txt", "thesis.txt"):
        (out / "manifest" / name).write_text("years of work")
        with pytest.raises(LestdError, match=r"thesis\.txt"):
            push._finished_files(out)
        refused = lestd("compress", tiny_llama, "--out", out, *SERIAL, "--fresh")
        assert refused.code == 2
        assert "thesis.txt was not made by lestd" in refused.err
        (out / "manifest" / name).unlink()
    (out / parts[0]).write_bytes(b"truncated")
    assert parts[0] in lestd("verify", out).out
    assert kept.evaluations().num_rows == 1
    # A new model was not evaluated.
    assert lestd("compress", tiny_llama, "--out", out, *SERIAL, "--fresh").code == 0
    assert Manifest(out).evaluations().num_rows == 0


@pytest.mark.slow
def test_evaluations_in_a_store_go_with_the_model(tiny_llama: Path, tmp_path: Path) -> None:
    with s3_server() as (url, _):
        out = UPath(f"{url}/out", use_listings_cache=False)
        run = ("--run-dir", tmp_path / "run")
        assert lestd("compress", tiny_llama, "--out", out, *SERIAL, *run).code == 0
        Manifest(out).record_evaluation([evaluation("a")])
        assert Manifest(out).evaluations().num_rows == 1
        assert lestd("verify", out, *run).code == 0
        (out / "manifest" / "evaluations" / "thesis.txt").write_text("years of work")
        refused = lestd("compress", tiny_llama, "--out", out, *SERIAL, *run, "--fresh")
        assert "thesis.txt was not made by lestd" in refused.err
        (out / "manifest" / "evaluations" / "thesis.txt").unlink()
        assert lestd("compress", tiny_llama, "--out", out, *SERIAL, *run, "--fresh").code == 0
        assert Manifest(out).evaluations().num_rows == 0
        assert len(Manifest(out).runs()) == 1


SCALES = [1.0, 3e-20, 1e15]


@pytest.mark.parametrize("method", ["lestd", "tucker"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("type_mode", ["identity", "learned"])
def test_spectra_are_the_singular_values_of_the_unfoldings(
    method: str, type_mode: str, scale: float
) -> None:
    layout = gqa(48, 8, 4, 2) if type_mode == "identity" else mha(48, 8, 4)
    W = unfolding(layout).mul_(scale)
    dense = 4 * W.numel()
    given = W.numpy().astype(np.float64)
    args = MethodArgs(type_mode=type_mode, rank_step=4)
    found = METHODS[method].decompose(W, layout, dense // 2, torch.float32, args)
    # (d, S p) is the mode-1 unfolding; for mode 2 the head dimension comes first.
    unfoldings = (given, np.moveaxis(given.reshape(48, -1, 8), 2, 0).reshape(8, -1))
    for spectrum, matrix in zip(found.singular_values, unfoldings, strict=True):
        expected = np.linalg.svd(matrix, compute_uv=False)
        assert len(spectrum) == len(matrix)
        assert [*spectrum] == sorted(spectrum, reverse=True)
        np.testing.assert_allclose(spectrum, expected, rtol=1e-4, atol=1e-3 * expected[0])
        half = len(expected) // 2
        np.testing.assert_allclose(spectrum[:half], expected[:half], rtol=1e-5)


def test_a_rank_deficient_group_has_zeros_and_never_nan() -> None:
    layout = mha(32, 8, 2)
    W = torch.outer(torch.arange(32.0), torch.ones(64))
    found = METHODS["lestd"].decompose(W.clone(), layout, 4096, torch.float32, MethodArgs())
    for spectrum, count in zip(found.singular_values, (32, 8), strict=True):
        assert len(spectrum) == count
        assert spectrum[0] == pytest.approx(float(W.norm()), rel=1e-5)
        assert all(0 <= value < 2e-3 * spectrum[0] for value in spectrum[1:])


def test_the_spectra_of_a_run_are_those_of_the_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("compress", tiny_llama, "--metric", "weight", *SERIAL)
    assert lestd(*command, "--out", out).code == 0
    weights = load_file(next(tiny_llama.glob("*.safetensors")))
    for row in Manifest(out).groups().to_pylist():
        q, k, v, o = (weights[name].float().numpy() for name in row["tensors"])
        rows = [m.reshape(-1, 32, 256) for m in (q, k, v)] + [o.T.reshape(-1, 32, 256)]
        slices = np.concatenate(rows)  # (S, p, d)
        for mode, axis in (("singular_values_1", 2), ("singular_values_2", 1)):
            matrix = np.moveaxis(slices, axis, 0).reshape(slices.shape[axis], -1)
            expected = np.linalg.svd(matrix, compute_uv=False)
            np.testing.assert_allclose(row[mode], expected, rtol=1e-3, atol=1e-5 * expected[0])


def test_a_run_that_another_driver_took_over_is_left_alone(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row goes into what it has begun."""
    run_dir = tmp_path / "out.run"
    run_dir.mkdir()
    taken = []

    @contextmanager
    def locked(self: RunDirectory) -> Iterator[Any]:
        def check() -> None:
            if taken:
                raise LestdError("another driver has taken over")

        yield check

    monkeypatch.setattr(RunDirectory, "locked", locked)
    source = resolve_source(str(tiny_llama))
    with pytest.raises(LestdError, match="taken over"):
        compress_model(
            source,
            RunConfig(keep=0.5),
            SerialExecutor(),
            tmp_path / "out",
            run_dir,
            on_progress=lambda *_: taken.append(shutil.rmtree(run_dir / "manifest")),
        )
    assert taken
    assert not (run_dir / "manifest" / "runs").exists()


def test_a_group_that_is_encoded_twice_counts_once(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As global allocation does where what it predicts does not come true."""

    def moved(_curves: Any, _norms: Any, uniform: list[int]) -> list[int]:
        return [uniform[0] - 2000, uniform[1] + 2000, *uniform[2:]]

    monkeypatch.setattr("orchestrator.planning.decide.better_than_uniform", moved)
    monkeypatch.setattr("orchestrator.planning.decide.no_worse_than_uniform", lambda *_: False)
    out, run_dir = tmp_path / "out", tmp_path / "out.run"
    source = resolve_source(str(tiny_llama))
    config = RunConfig(keep=0.5, allocation="global")
    outcome = compress_model(source, config, SerialExecutor(), out, run_dir)
    encoded, curves = (Manifest(run_dir).table(name).to_pylist() for name in ("groups", "curves"))
    assert (len(outcome.rows), len(encoded), outcome.skipped) == (4, 6, 0)
    (row,) = calls(run_dir)
    assert [row[name] for name in ("tasks", "finished_before", "finished")] == [4, 0, 4]

    figures = outcome_figures(outcome, out, run_dir)
    planned = make_plan(source, config)
    assert figures["predicted"]["worker_memory_bytes"] == planned.worker_memory_bytes
    assert figures["predicted"]["run_disk_bytes"] == planned.run_disk_bytes
    peaks = [one["peak_memory_bytes"] for one in (*outcome.rows, *curves)]
    assert figures["actual"]["worker_memory_bytes"] == max(peaks)

    def ask(name: str, place: Path) -> list[dict[str, Any]]:
        rows = json.loads(lestd("query", place, "--name", name, "--json").out)["rows"]
        return [{k: v for k, v in row.items() if k != "run"} for row in rows]

    for name in ("bytes-by-layer", "bytes-by-projection", "codecs", "energy", "ranks"):
        assert ask(name, run_dir) == ask(name, out)
    actual = {row["quantity"]: row["actual"] for row in ask("plan-vs-actual", run_dir)}
    assert actual["groups"] == 4
    assert actual["bytes of the finished groups"] == row["stored_bytes"]
    found = json.loads(lestd("diff", out, run_dir, "--json").out)
    assert found["identical"]
    assert {one["change"] for one in found["time"] if one["what"] != "worker processes"} == {0}
