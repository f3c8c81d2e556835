"""`lestd diff`: its figures recomputed from the files, and what it makes of odd pairs."""

import json
import math
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.cli import lestd
from support.families import save_tiny
from support.s3 import s3_server
from upath import UPath

from orchestrator.manifest.schemas import STAGES, TABLES

FIGURES = ("stored_bytes", "relative_error", "R1", "R2", "R3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``small`` and ``large``, with their runs, of one model; ``part``, of its first layers."""
    root = tmp_path_factory.mktemp("runs")
    model = save_tiny("opt", root / "model")
    (root / "run.yaml").write_text("rank_step: 4\n")
    for name, *options in (
        ("small", "--keep", 0.4),
        ("large", "--keep", 0.6),
        ("part", "--keep", 0.4, "--include", "0-1", "--method", "tucker"),
    ):
        options += ["--executor", "serial", "--config", root / "run.yaml"]
        assert lestd("compress", model, "--out", root / name, *options).code == 0
    return root


def diff(*args: object) -> dict[str, Any]:
    found = lestd("diff", *args, "--json")
    assert found.code == 0, found.err
    result: dict[str, Any] = json.loads(found.out)
    return result


def figures(found: dict[str, Any], section: str) -> dict[str, dict[str, Any]]:
    return {one.pop("what"): one for one in found[section]}


def parquet(out: Path, table: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(out / "manifest" / f"{table}.parquet").to_pylist()
    return rows


def by_hand(old: float, new: float) -> dict[str, Any]:
    near = pytest.approx
    return {
        "before": near(old),
        "after": near(new),
        "change": near(new - old, abs=1e-12),
        "ratio": near(new / old),
    }


def test_figures_of_two_compressions(runs: Path) -> None:
    found = diff(runs / "small", runs / "large.run")
    groups = [parquet(runs / name, "groups") for name in ("small", "large")]
    slices = [parquet(runs / name, "slices") for name in ("small", "large")]
    assert not found["identical"]
    assert found["only_before"] == found["only_after"] == []
    assert found["configuration"] == [{"what": "keep", "before": 0.4, "after": 0.6}]

    stored, dense, nnz = (
        [sum(row[key] for row in rows) for rows in groups]
        for key in ("stored_bytes", "dense_bytes", "nnz")
    )
    whole = [
        json.loads((runs / name / "model.safetensors.index.json").read_text())["metadata"]
        for name in ("small", "large")
    ]
    bytes_ = figures(found, "bytes")
    assert bytes_ == {
        "weights in scope, dense": {"unit": "bytes"} | by_hand(*dense),
        "weights in scope, stored": {"unit": "bytes"} | by_hand(*stored),
        "stored / dense": {"unit": ""} | by_hand(stored[0] / dense[0], stored[1] / dense[1]),
        "core elements kept": {"unit": "count"} | by_hand(*nnz),
        "whole model, stored": {"unit": "bytes"} | by_hand(*(m["total_size"] for m in whole)),
    }

    def error(rows: list[dict[str, Any]]) -> float:
        norm = sum(row["squared_norm"] for row in rows)
        squares = (row["relative_error"] ** 2 * row["squared_norm"] for row in rows)
        return math.sqrt(sum(squares) / norm)

    errors = {"all projections": {"unit": ""} | by_hand(*map(error, groups))}
    for kind in "qkvo":
        own = [[row for row in rows if row["projection"] == kind] for rows in slices]
        errors[kind] = {"unit": ""} | by_hand(*map(error, own))
    assert figures(found, "error") == errors

    stages = ("read", "stage1", "rank_search", "stage2", "error", "write")
    times = figures(found, "time")
    seconds = {s: [sum(r[f"seconds_{s}"] for r in rows) for rows in groups] for s in stages}
    for stage in stages:
        assert times[stage] == {"unit": "seconds"} | by_hand(*seconds[stage])
    computing = [sum(seconds[s][i] for s in stages[1:-1]) for i in (0, 1)]
    workers = [sum(seconds[s][i] for s in stages) for i in (0, 1)]
    assert times["decomposing"] == {"unit": "seconds"} | by_hand(*computing)
    assert times["working time of all workers"] == {"unit": "seconds"} | by_hand(*workers)
    peaks = [max(row["peak_memory_bytes"] for row in rows) for rows in groups]
    assert times["memory of a worker"] == {"unit": "bytes"} | by_hand(*peaks)
    assert times["wall time"]["before"] > 0

    for layer, one, other in zip(found["layers"], *groups, strict=True):
        assert (layer["layer"], layer["block"]) == (one["layer"], one["block"])
        assert {key: layer["before"][key] for key in FIGURES} == {k: one[k] for k in FIGURES}
        assert {key: layer["after"][key] for key in FIGURES} == {k: other[k] for k in FIGURES}
        assert layer["relative_error"] == by_hand(one["relative_error"], other["relative_error"])


def test_the_tables_show_signs_and_percentages(runs: Path) -> None:
    shown = lestd("diff", runs / "small", runs / "large")
    assert shown.code == 0
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in shown.out.splitlines()]
    cells = {row[0]: row[1:] for row in rows if row}
    small, large = (
        sum(r["stored_bytes"] for r in parquet(runs / n, "groups")) for n in ("small", "large")
    )
    kib = [f"{size / 1024:.2f} KiB" for size in (small, large, large - small)]
    assert cells["weights in scope, stored"] == [
        kib[0],
        kib[1],
        f"+{kib[2]}",
        f"+{100 * (large / small - 1):.2f}%",
    ]
    assert cells["keep"] == ["0.4", "0.6"]
    assert cells["all projections"][2].startswith("-0.")
    assert cells["all projections"][3].startswith("-")
    first = parquet(runs / "large", "groups")[0]
    assert cells["0"][3] == f"{first['relative_error']:.4f}"
    assert "layers: 3 of 3 differ" in shown.out


@pytest.mark.parametrize("other", ["small.run", "small"])
def test_equal_runs_say_so_in_one_line(runs: Path, other: str) -> None:
    shown = lestd("diff", runs / "small", runs / other)
    stored = sum(row["stored_bytes"] for row in parquet(runs / "small", "groups"))
    assert shown.code == 0
    assert [
        line for line in shown.out.splitlines() if not line.startswith(("before", "after"))
    ] == [f"the payloads are identical: 3 layers, {stored / 1024:.2f} KiB"]


def test_what_only_one_side_records_is_no_difference(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "small.run", tmp_path / "run")
    fingerprint = json.loads((runs / "small.run" / "run.json").read_text())["fingerprint"]
    recorded = {key: json.dumps(fingerprint[key]) for key in ("config", "versions")}
    recorded["versions"] = json.dumps(fingerprint["versions"] | {"python": "3"})
    shutil.rmtree(tmp_path / "run" / "manifest" / "runs", ignore_errors=True)
    write(tmp_path / "run", "runs", call("a", 0, seconds=99.0, **recorded))
    shutil.copytree(runs / "small", tmp_path / "model")
    (tmp_path / "model" / "manifest" / "runs.parquet").unlink(missing_ok=True)
    shown = lestd("diff", tmp_path / "model", tmp_path / "run")
    assert len(shown.out.splitlines()) == 3
    assert "the payloads are identical" in shown.out


def test_layers_of_one_side_are_named_and_not_counted(runs: Path) -> None:
    found = diff(runs / "small", runs / "part")
    groups = parquet(runs / "small", "groups")
    assert found["only_before"] == [groups[2]["block"]]
    assert found["only_after"] == []
    assert found["common"] == 2
    changed = {one["what"]: (one["before"], one["after"]) for one in found["configuration"]}
    assert changed == {"include": (None, "0-1"), "method": ("lestd", "tucker")}
    stored = figures(found, "bytes")
    assert stored["weights in scope, stored"]["before"] == sum(
        r["stored_bytes"] for r in groups[:2]
    )
    assert stored["whole model, stored"]["before"] is None  # Of three layers, not of these two.
    assert stored["whole model, stored"]["change"] is None
    shown = lestd("diff", runs / "small", runs / "part").out
    assert f"only before: {groups[2]['block']}\n" in shown
    assert "bytes, errors and times are of the 2 layers that both have" in shown


def test_a_damaged_file_is_named_and_the_rest_is_compared(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "manifest" / "groups"
    folder.mkdir(parents=True)
    parts = sorted((runs / "small.run" / "manifest" / "groups").iterdir())
    for part in parts:
        (folder / part.name).write_bytes(part.read_bytes())
    (folder / parts[0].name).write_bytes(parts[0].read_bytes()[:-9])
    lost = pq.read_table(parts[0], partitioning=None).to_pylist()[0]["block"]
    shown = lestd("diff", tmp_path / "run", runs / "small")
    assert shown.code == 0
    assert f"{folder / parts[0].name} is damaged and left out" in shown.err
    assert f"only after: {lost}\n" in shown.out
    assert diff(tmp_path / "run", runs / "small")["common"] == 2


@pytest.mark.parametrize(
    ("before", "said"), [("nothing", "does not exist"), ("foo://a/b", "foo://")]
)
def test_what_is_no_run_is_refused(runs: Path, before: str, said: str) -> None:
    refused = lestd("diff", before, runs / "small")
    assert refused.code == 2
    assert said in refused.err


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as (url, _):
        yield url


def test_runs_in_an_object_store(runs: Path, bucket: str) -> None:
    for part in (runs / "large.run").rglob("*"):
        if part.is_file():
            target = UPath(f"{bucket}/large.run") / str(part.relative_to(runs / "large.run"))
            target.write_bytes(part.read_bytes())
    local, remote = (diff(runs / "small", at) for at in (runs / "large.run", f"{bucket}/large.run"))
    assert remote["after"].pop("path") == f"{bucket}/large.run"
    del local["after"]["path"]
    assert remote == local
    # Of a model that is not there yet the run beside it is meant.
    assert diff(f"{bucket}/large", f"{bucket}/large.run")["identical"]


# -- manifests made by hand ----------------------------------------------------------------------


def write(directory: Path, table: str, *rows: dict[str, Any]) -> Path:
    path = directory / "manifest" / f"{table}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=TABLES[table].schema), path)
    return directory


def metric(name: str, value: float, **more: Any) -> dict[str, Any]:
    row = {"evaluation_id": "e", "time": 1, "model": "m", "model_id": "x", "compressed": True}
    row |= {"task": "wikitext", "metric": name, "answer_filter": "none", "value": value}
    return row | {"stderr": None, "higher_is_better": False, "settings": "{}"} | more


def call(name: str, at: int, **more: Any) -> dict[str, Any]:
    started = datetime(2026, 1, 1, 0, at, tzinfo=UTC)
    row = {"invocation": name, "started_at": started, "ended_at": started, "state": "complete"}
    return row | {"model": "org/m", "executor": "ray", "versions": '{"torch": "2"}'} | more


def test_quality_is_compared_where_it_was_measured_alike(tmp_path: Path) -> None:
    sides = [
        write(
            tmp_path / "before",
            "evaluations",
            metric("word_perplexity", 20.0),
            metric("acc", 0.5, task="piqa", stderr=0.03, higher_is_better=True, fewshot=0),
            metric("acc", 0.4, task="arc", stderr=0.03, fewshot=0),
            metric("acc", 0.9, task="piqa", compressed=False, model_id="d", fewshot=0),
            metric("old", 1.0),
        ),
        write(
            tmp_path / "after",
            "evaluations",
            metric("word_perplexity", 25.0),
            metric("acc", 0.7, task="piqa", stderr=0.04, higher_is_better=True, fewshot=0, time=1),
            metric(
                "acc",
                0.6,
                task="piqa",
                stderr=0.04,
                higher_is_better=True,
                fewshot=0,
                time=2,
                model_id="y",
            ),
            metric("acc", 0.4, task="arc", stderr=0.03, fewshot=5),
            metric("new", 1.0),
        ),
    ]
    found = diff(*sides)
    quality = {(one["task"], one["metric"]): one for one in found["quality"]}
    assert quality.keys() == {("wikitext", "word_perplexity"), ("piqa", "acc")}
    perplexity, accuracy = quality["wikitext", "word_perplexity"], quality["piqa", "acc"]
    assert perplexity["change"] == 5.0
    assert perplexity["ratio"] == 1.25
    assert perplexity["stderr"] is None
    assert (accuracy["before"], accuracy["after"]) == (0.5, 0.6)  # Measured last.
    assert accuracy["stderr"] == pytest.approx(0.05)

    shown = lestd("diff", *sides).out
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in shown.splitlines()]
    assert ["wikitext", "word_perplexity", "", "20.0000", "25.0000", "+5.0000", "+25.00%"] in rows
    assert ["piqa", "acc", "0", "0.5000", "0.6000", "+0.1000 ± 0.0500", "+20.00%"] in rows
    assert "the payloads are identical" not in shown


def test_configuration_is_that_of_the_last_call(tmp_path: Path) -> None:
    config = {"keep": 0.4, "layer_keep": {"0": 0.8}, "threads": 1}
    later = {"keep": 0.5, "layer_keep": {"1": 0.8}, "threads": 1, "alpha": 0.2}
    sides = [
        write(
            tmp_path / "before",
            "runs",
            call("a", 0, config="{}", state="failed", seconds=5.0),
            call("b", 1, config=json.dumps(config), seconds=2.0),
        ),
        write(
            tmp_path / "after",
            "runs",
            call("c", 0, config=json.dumps(later), executor="serial", revision="abc",
                 versions='{"torch": "3 [bold]"}', state="interrupted"),
        ),
    ]  # fmt: skip
    found = diff(*sides)
    assert found["before"]["state"] == "complete"
    assert found["after"]["state"] == "interrupted"
    assert {one["what"]: (one["before"], one["after"]) for one in found["configuration"]} == {
        "revision": (None, "abc"),
        "executor": ("ray", "serial"),
        "keep": (0.4, 0.5),
        "layer_keep.0": (0.8, None),
        "layer_keep.1": (None, 0.8),
        "alpha": (None, 0.2),
        "version of torch": ("2", "3 [bold]"),
    }
    assert figures(found, "time")["wall time"]["before"] == 7.0
    shown = lestd("diff", *sides).out
    assert "lacks" not in shown
    assert "3 [bold]" in shown
    assert f"after   {sides[1]} (interrupted)" in shown


def test_what_a_killed_call_took_is_said_to_be_missing(tmp_path: Path) -> None:
    sides = [
        write(
            tmp_path / "before",
            "runs",
            call("a", 0, state="killed", seconds=None),
            call("b", 1, seconds=2.0),
        ),
        write(tmp_path / "after", "runs", call("c", 0, seconds=3.0)),
    ]
    found = diff(*sides)
    assert figures(found, "time")["wall time"]["before"] == 2.0
    assert [found[side]["calls_without_time"] for side in ("before", "after")] == [1, 0]
    shown = lestd("diff", *sides).out
    assert "wall time of before lacks 1 of its 2 calls" in shown
    assert "of after lacks" not in shown


def test_the_layers_that_differ_most_come_first(tmp_path: Path) -> None:
    def group(layer: int, stored: int, error: float, digest: str) -> dict[str, Any]:
        row = {"task_id": f"t{layer}", "layer": layer, "block": f"layers.{layer}.attn"}
        row |= {"dense_bytes": 1000, "byte_budget": 500, "stored_bytes": stored}
        row |= {"relative_error": error, "squared_norm": 1.0, "squared_error": error**2}
        row |= {"payload": "p", "payload_bytes": 1, "sha256": digest}
        row |= {"format": '{"modules": {}}', "method": "lestd", "density": 0.5}
        row |= {f"seconds_{stage}": 1.0 for stage in STAGES} | {"peak_memory_bytes": 2**30}
        return row | {"source_sha256": digest, "R1": 8, "R2": 4 + layer % 2}

    layers = range(14)
    before = [group(i, 400, 0.3, f"same{i}" if i in (0, 5) else "old") for i in layers]
    after = [
        group(i, 400 - (300 if i == 9 else 0), 0.3 + 0.001 * i, f"same{i}" if i == 5 else "new")
        for i in layers
    ]
    after[0], after[5] = before[0], before[5]
    sides = [write(tmp_path / n, "groups", *rows) for n, rows in (("a", before), ("b", after))]
    shown = lestd("diff", *sides).out

    def listed(text: str) -> list[int]:
        cells = [line.split("│")[1].strip() for line in text.splitlines() if "│" in line]
        return [int(cell) for cell in cells if cell.isdigit()]

    assert "layers: 12 of 14 differ, the 10 that differ most; --all shows every one" in shown
    assert listed(shown) == [9, 13, 12, 11, 10, 8, 7, 6, 4, 3]
    assert "-75.00%" in shown
    assert listed(lestd("diff", *sides, "--all").out) == list(layers)
    assert [layer["layer"] for layer in diff(*sides)["layers"]] == list(layers)
    assert {"what": "source weights", "before": None, "after": "other in 12 layers"} in diff(
        *sides
    )["configuration"]
