"""Every named query of `lestd query`, against a recomputation from the rows of a real run."""

import functools
import json
import math
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from support.cli import lestd
from support.oracles import ORACLES, committed, current
from support.paths import ROOT

from orchestrator.manifest.part_files import part_path, write_part
from orchestrator.manifest.schemas import TABLES
from orchestrator.query.sql import named_queries

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def add(manifest: Path, table: str, name: str, *rows: dict[str, Any]) -> None:
    write_part(part_path(manifest, TABLES[table], f"{name}.parquet"), rows, TABLES[table])


def add_spectra(manifest: Path) -> None:
    """Give every group singular values; some are exact zeros, as of a matrix of low rank."""
    for number, path in enumerate(sorted((manifest / "groups").iterdir())):
        table = pq.read_table(path, partitioning=None)
        place = table.column_names.index("singular_values_1")
        values = np.sort(np.random.default_rng(number).pareto(2.0, 250))[::-1].astype(np.float32)
        column = pa.array([[*values.tolist(), 0.0, 0.0]], pa.list_(pa.float32()))
        pq.write_table(table.set_column(place, table.schema.field(place), column), path)


def add_superseded(manifest: Path) -> None:
    """An earlier encoding of two groups, as global allocation leaves when its prediction fails."""
    for path in sorted((manifest / "groups").iterdir())[:2]:
        for table in ("groups", "slices"):
            rows = pq.read_table(manifest / table / path.name, partitioning=None).to_pylist()
            for row in rows:
                row["task_id"] = f"f{row['task_id'][1:]}x"
                if table == "groups":
                    row["started_at"] -= timedelta(hours=1)
                    row |= {"stored_bytes": 7, "squared_error": 1e9, "relative_error": 9.0}
                    row |= {"peak_memory_bytes": 2**40, "codec": "superseded"}
                else:
                    row |= {"density": 1.0, "relative_error": 9.0, "core_bytes": 1e9}
            add(manifest, table, f"superseded-{path.stem}", *rows)


def add_interruption(manifest: Path) -> None:
    """A start that nothing followed but another one, of the next call."""
    task = sorted((manifest / "groups").iterdir())[2].stem
    event = {"time": NOON, "task_id": task, "kind": "started", "attempt": 1, "layer": 2}
    add(manifest, "events", "made-interrupted", event)


def add_history(manifest: Path) -> None:
    """What a quiet run lacks: retries, failures, an earlier and a later call, evaluations."""
    first, second = (path.stem for path in sorted((manifest / "groups").iterdir())[:2])
    for number, (kind, task) in enumerate(
        [("retried", first), ("retried", second), ("failed", second), ("failed", "gone")]
    ):
        event = {"time": NOON + timedelta(seconds=number), "task_id": task, "kind": kind}
        event |= {"attempt": number, "error_type": "WorkerDied", "message": "it died, twice"}
        add(manifest, "events", f"made-{number}", event)
    later = datetime.now(UTC) + timedelta(days=1)
    for number, at in enumerate((NOON, later)):
        call = {"invocation": f"made-{number}", "state": "failed", "started_at": at, "tasks": 4}
        call |= {"byte_budget": 1000 + number, "stored_bytes": 900, "planned_disk_bytes": 2**20}
        call |= {"planned_seconds": None if number else 2.5}  # The later one did not calibrate.
        add(manifest, "runs", f"made-{number}", call | {"planned_worker_memory_bytes": 2**30})
    for number, (compressed, value) in enumerate([(False, 9.0), (True, 12.0), (True, 11.5)]):
        metric = {"evaluation_id": f"made-{number}", "time": NOON + timedelta(days=number)}
        metric |= {"task": "wikitext", "metric": "perplexity", "compressed": compressed}
        metric |= {"value": value, "stderr": value / 100, "higher_is_better": False}
        alone = metric | {"metric": "acc", "answer_filter": "none", "higher_is_better": True}
        add(manifest, "evaluations", f"made-{number}", metric, *([alone] if number == 1 else []))


@pytest.fixture(scope="module")
def real(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """A run with global allocation, with a history, and a part of the same under another name."""
    root = tmp_path_factory.mktemp("real")
    out = root / "out"
    options = ("--keep", 0.4, "--allocation", "global", "--executor", "serial", "--out", out)
    assert lestd("compress", tiny_llama, *options).code == 0
    run, part = root / "out.run", root / "part"
    shutil.copytree(run / "manifest", part / "manifest")
    add_spectra(run / "manifest")
    add_superseded(run / "manifest")
    add_interruption(run / "manifest")
    add_history(run / "manifest")
    for path in (part / "manifest" / "curves").iterdir():  # Budgets that are no points of curves.
        rows = pq.read_table(path, partitioning=None)
        away = pc.not_equal(rows["byte_budget"], rows["uniform_byte_budget"])
        pq.write_table(rows.filter(away), path)
    # Killed between its slices and its row, which is the commit.
    next((part / "manifest" / "groups").iterdir()).unlink()
    return run, part


@pytest.fixture(scope="module")
def nothing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """A run that has begun and finished no task."""
    directory = tmp_path_factory.mktemp("nothing") / "run"
    (directory / "manifest" / "groups").mkdir(parents=True)
    return (directory,)


@functools.cache
def tables(places: tuple[Path, ...]) -> dict[str, list[dict[str, Any]]]:
    """All rows, read file by file; no run here has parts and a compacted file of one table."""
    found = {}
    for name, spec in TABLES.items():
        found[name] = [
            dict.fromkeys(spec.schema.names) | row | {"run": place.name}
            for place in places
            for path in sorted((place / "manifest").glob(f"{name}*/**/*.parquet"))
            + sorted((place / "manifest").glob(f"{name}.parquet"))
            for row in pq.ParquetFile(path).read().to_pylist()
        ]
    return found


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, datetime):
        return datetime.fromisoformat(found) == expected
    if isinstance(expected, float) and isinstance(found, int | float):
        # Sums in another order; an effective rank is the exponential of one.
        return math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-9)
    return bool(found == expected)


@pytest.mark.parametrize("which", ["real", "nothing"])
@pytest.mark.parametrize("name", ORACLES)
def test_it_answers_what_the_rows_say(
    name: str, which: str, request: pytest.FixtureRequest
) -> None:
    places = request.getfixturevalue(which)
    result = lestd("query", *places, "--name", name, "--json")
    assert result.code == 0, result.err
    assert not result.err
    found = json.loads(result.out)["rows"]
    expected = ORACLES[name](tables(places))
    assert len(found) == len(expected)
    assert (which == "nothing") <= (not found)
    assert (which == "real") <= bool(found)
    for row, wanted in zip(found, expected, strict=True):
        assert row.keys() == wanted.keys()
        wrong = {key: (row[key], wanted[key]) for key in row if not same(row[key], wanted[key])}
        assert not wrong


def test_the_views_are_for_anybody(real: tuple[Path, ...]) -> None:
    """Only the tables of a view are read: a damaged file of another is not named."""
    bad = real[0] / "manifest" / "events" / "bad.parquet"
    bad.write_bytes(b"")
    asked = "select (select count(*) from current), (select count(*) from current_slices)"
    result = lestd("query", *real, asked, "--csv")
    bad.unlink()
    rows = tables(real)
    counts = f"{len(current(rows))},{len(committed(rows))}"
    assert (result.out.splitlines()[1], result.err) == (counts, "")


def test_every_query_has_an_oracle_and_a_line_in_the_list() -> None:
    assert set(named_queries()) == set(ORACLES)
    listed = lestd("query", "--list")
    assert listed.code == 0
    lines = listed.out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(ORACLES)
    assert all(len(line.split()) > 4 for line in lines)
    docs = (ROOT / "docs" / "queries.md").read_text(encoding="utf-8")
    for query in named_queries().values():
        assert f"| `{query.name}` | {query.summary} |" in docs
