"""Truncated, foreign and empty files among the manifest's: named by the commands, and no more."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.cli import lestd
from support.families import save_tiny

from orchestrator.manifest.manifest import Manifest
from orchestrator.manifest.schemas import TABLES

TASKS = ("--keep", "0.4", "--allocation", "global", "--executor", "serial")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, ``out`` and its run, which has curves too."""
    root = tmp_path_factory.mktemp("finished")
    model = save_tiny("opt", root / "model")
    (root / "run.yaml").write_text("rank_step: 4\n")
    done = lestd("compress", model, "--out", root / "out", *TASKS, "--config", root / "run.yaml")
    assert done.code == 0, done.err
    return root


def made_up(table: str) -> pa.Table:
    """One row of a table, with what is required of it."""
    spec = TABLES[table]
    row = {column.name: 7 for column in spec.columns if column.required}
    text = {name: str(value) for name, value in row.items()}
    types = {column.name: pa.types.is_string(column.type) for column in spec.columns}
    filled = {name: (text if types[name] else row)[name] for name in row}
    return pa.Table.from_pylist([filled], schema=spec.schema)


def put_damage(folder: Path, table: str) -> set[Path]:
    """Files that nobody should take for parts of the table, in its folder."""
    folder.mkdir(exist_ok=True)
    truncated = folder / "truncated.parquet"
    pq.write_table(made_up(table), truncated)
    truncated.write_bytes(truncated.read_bytes()[:-1])
    (folder / "empty.parquet").write_bytes(b"")
    (folder / "text.parquet").write_text("PAR1 this is not Parquet PAR1")
    pq.write_table(pa.table({"task_id": ["a"], "layer": [0]}), folder / "anybodys.parquet")
    bad = ["truncated", "empty", "text", "anybodys"]
    for other in TABLES.keys() - {table}:
        own = sorted((folder.parent / other).glob("*.parquet"))
        part = pq.read_table(own[0], partitioning=None) if own else made_up(other)
        pq.write_table(part, folder / f"of-{other}.parquet")
        bad.append(f"of-{other}")
    return {folder / f"{name}.parquet" for name in bad}


@pytest.mark.parametrize("table", TABLES)
def test_damaged_and_foreign_files_are_named_and_change_no_row(
    table: str, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    out, run = tmp_path / "copy" / "out", tmp_path / "copy" / "out.run"
    rows = {name: Manifest(run).table(name) for name in TABLES}
    stood = lestd("status", out, "--json").out
    assert json.loads(stood)["state"] == "complete"
    assert lestd("verify", out).code == 0

    bad = put_damage(run / "manifest" / table, table)
    assert {one.path for one in Manifest(run).damaged()} == bad
    assert all(Manifest(run).table(name).equals(rows[name]) for name in TABLES)
    stands = json.loads(lestd("status", out, "--json").out)
    assert {Path(one["path"]) for one in stands["damaged"]} == bad
    assert stands | {"damaged": []} == json.loads(stood)
    verified = lestd("verify", out, "--json")
    problems = json.loads(verified.out)["problems"]
    assert verified.code == 1
    assert {Path(problem.split(" is damaged: ")[0]) for problem in problems} == bad
    assert len(problems) == len(bad)

    options = (*TASKS, "--config", finished / "run.yaml", "--json")
    again = lestd("compress", finished / "model", "--out", out, *options)
    assert json.loads(again.out)["finished_before"] == 3


@pytest.mark.parametrize("table", ["groups", "slices"])
def test_a_task_whose_rows_are_damaged_is_named_and_done_again(
    table: str, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    out, run = tmp_path / "copy" / "out", tmp_path / "copy" / "out.run"
    whole = Manifest(run).groups().to_pylist()
    lost = whole[1]["task_id"]
    part = run / "manifest" / table / f"{lost}.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    verified = lestd("verify", out)
    assert verified.code == 1
    assert str(part) in verified.out
    kept = [row for row in whole if table == "slices" or row["task_id"] != lost]
    assert Manifest(run).groups().to_pylist() == kept
    states = [one["state"] for one in json.loads(lestd("status", out, "--json").out)["layers"]]
    assert states.count("done") == len(kept)

    options = (*TASKS, "--config", finished / "run.yaml", "--json")
    again = lestd("compress", finished / "model", "--out", out, *options)
    assert json.loads(again.out)["finished_before"] == 2
    assert lestd("verify", out).code == 0
    assert [row["sha256"] for row in Manifest(run).groups().to_pylist()] == [
        row["sha256"] for row in whole
    ]


@pytest.mark.parametrize(
    "rows", [slice(1), pytest.param(slice(None), marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_what_may_be_null_stops_no_command(rows: slice, finished: Path, tmp_path: Path) -> None:
    """All columns but those that are never null, in the first file of a table or in all.

    Groups that lack what a run goes on with are compressed again.
    """
    shutil.copytree(finished, tmp_path / "copy")
    out, run = tmp_path / "copy" / "out", tmp_path / "copy" / "out.run"
    for name, spec in TABLES.items():
        for part in sorted((run / "manifest" / name).glob("*.parquet"))[rows]:
            kept = [column.name for column in spec.columns if column.required]
            whole = pq.read_table(part, partitioning=None).select(kept).to_pylist()
            pq.write_table(pa.Table.from_pylist(whole, schema=spec.schema), part)
    shutil.rmtree(out)
    options = (*TASKS, "--config", finished / "run.yaml", "--json")
    again = lestd("compress", finished / "model", "--out", out, *options)
    left = 2 if rows == slice(1) else 0
    assert json.loads(again.out)["finished_before"] == left
    for where in (out, run):
        page = ("--format", "md", "--out", tmp_path / "report.md")
        for command in (("report", where, *page), ("diff", where, finished / "out", "--all")):
            done = lestd(*command)
            assert done.code == 0, done.err
    for command in (("status", out), ("verify", out)):
        done = lestd(*command)
        assert done.code == 0, done.err


@pytest.mark.parametrize("table", ["groups", "slices", "curves"])
def test_a_damaged_table_of_a_model_is_named(table: str, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "out", tmp_path / "out")
    path = tmp_path / "out" / "manifest" / f"{table}.parquet"
    others = {name: Manifest(tmp_path / "out").table(name) for name in TABLES.keys() - {table}}
    path.write_bytes(path.read_bytes()[:100])
    assert [one.path for one in Manifest(tmp_path / "out").damaged()] == [path]
    assert all(Manifest(tmp_path / "out").table(name).equals(others[name]) for name in others)
    verified = lestd("verify", tmp_path / "out")
    assert verified.code == 1
    assert f"{path} is damaged" in verified.out
