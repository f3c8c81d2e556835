"""`lestd query` and `lestd compact`: what they read, how they answer, while a run goes on too."""

import csv
import io
import json
import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import LAYERS
from support.cli import PATIENCE, Finished, lestd, start_lestd
from support.families import save_tiny
from support.s3 import s3_server
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.manifest.schemas import TABLES
from orchestrator.query import sql as query
from orchestrator.query.views import VIEWS

SERIAL = ("--keep", 0.5, "--executor", "serial")
HEADS = "select layer, projection, head, density from slices order by all"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a compressed model ``out`` and its run ``out.run``."""
    root = tmp_path_factory.mktemp("finished")
    model = save_tiny("llama-gqa", root / "model")
    assert lestd("compress", model, "--out", root / "out", *SERIAL).code == 0
    return root


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    for name in ("out", "out.run"):
        shutil.copytree(finished / name, tmp_path / name)
    return tmp_path / "out"


def ask(*args: object) -> list[dict[str, object]]:
    result = lestd("query", *args, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)["rows"]


def refused(result: Finished, *words: str) -> None:
    assert result.code == 2, (result.out, result.err)
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert result.out == ""
    assert all(word in result.err for word in words), result.err


def slices_of(manifest: Path) -> list[tuple[object, ...]]:
    """Those of the files themselves."""
    files = [*manifest.glob("slices.parquet"), *manifest.glob("slices/*.parquet")]
    rows = [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]
    return sorted((r["layer"], r["projection"], r["head"], r["density"]) for r in rows)


# -- what is read ----------------------------------------------------------------------------


def test_model_run_and_both(out: Path) -> None:
    run = Path(f"{out}.run")
    expected = slices_of(run / "manifest")
    assert len(expected) == 24
    for place in (out, run, run / "manifest"):
        assert [tuple(row.values()) for row in ask(place, HEADS)] == expected
    count = "select run, count(*) as rows from slices group by run order by run"
    both = [{"run": "out", "rows": 24}, {"run": "out.run", "rows": 24}]
    assert ask(out, run, count) == both
    assert lestd("clean", out).code == 0
    assert [tuple(row.values()) for row in ask(out, HEADS)] == expected
    refused(lestd("query", run, HEADS), str(run), "does not exist")


def test_an_output_whose_run_is_not_finished(out: Path) -> None:
    shutil.rmtree(out)
    assert len(ask(out, HEADS)) == 24
    assert ask(out, "select distinct run from slices") == [{"run": "out"}]


def test_runs_of_the_same_name_are_told_apart_and_none_counts_twice(
    out: Path, tmp_path: Path
) -> None:
    other = tmp_path / "elsewhere" / "out"
    shutil.copytree(out, other)
    names = ask(out, other, out, "select run, count(*) as rows from slices group by run order by 1")
    assert names == sorted(
        [{"run": str(out), "rows": 24}, {"run": str(other), "rows": 24}], key=lambda r: r["run"]
    )


def test_a_damaged_file_is_named_and_spoils_no_other(out: Path) -> None:
    run = Path(f"{out}.run")
    bad = sorted((run / "manifest" / "slices").iterdir())[0]
    bad.write_bytes(bad.read_bytes()[:-20])
    (run / "manifest" / "groups" / "notes.parquet").write_text("years of work")
    result = lestd("query", run, HEADS, "--json")
    assert result.code == 0
    assert len(json.loads(result.out)["rows"]) == 12
    # Nothing is said of a table that the query does not name: it is not read.
    assert result.err.count("\n") == 1
    assert str(bad) in result.err


@pytest.mark.parametrize(
    "sql",
    [
        "from query_table('slices')",
        "select * from query('from slices')",
        "FROM main.Slices",
        "with slices as (from temp.slices) from slices",
    ],
)
def test_however_a_table_is_named_its_rows_are_there(out: Path, sql: str) -> None:
    assert len(ask(out, sql)) == 24


def test_columns_are_those_of_the_schema_also_without_rows(out: Path) -> None:
    for name, spec in TABLES.items():
        described = ask(out, f"describe {name}")
        assert [row["column_name"] for row in described] == ["run", *spec.schema.names]
    assert ask(out, "select count(*) as n, max(method) as m from curves") == [{"n": 0, "m": None}]
    assert {row["name"] for row in ask(out, "show tables")} == {*TABLES, *VIEWS}
    assert len(ask(out, "summarize slices")) == 1 + len(TABLES["slices"].columns)


def test_a_url(tmp_path: Path) -> None:
    with s3_server() as (bucket, _):
        url = f"{bucket}/{tmp_path.name}/out"
        model = save_tiny("llama", tmp_path / "model")
        assert lestd("compress", model, "--out", url, *SERIAL).code == 0
        rows = ask(url, HEADS)
        assert len(rows) == 32
        assert ask(f"{url}.run", HEADS) == rows
        before = ask(f"{url}.run", "from events")
        assert before
        compacted = lestd("compact", url)
        assert compacted.code == 0, compacted.err
        assert ask(f"{url}.run", HEADS) == rows
        assert ask(f"{url}.run", "from events") == before
        assert lestd("query", url, HEADS, "--parquet", f"{url}-answer").code == 0
        assert lestd("clean", url).code == 0
        assert ask(url, HEADS) == rows


# -- how it answers --------------------------------------------------------------------------


def test_csv_json_and_parquet_have_the_same_rows(out: Path, tmp_path: Path) -> None:
    sql = "select run, layer, nnz, density, tensors, started_at, sum(nnz) over () as s from groups"
    rows = ask(out, sql)
    assert len(rows) == 2
    printed = list(csv.DictReader(io.StringIO(lestd("query", out, sql, "--csv").out)))
    as_text = [
        {
            key: json.dumps(value) if isinstance(value, list) else str(value)
            for key, value in r.items()
        }
        for r in rows
    ]
    assert printed == as_text
    target = tmp_path / "answer.parquet"
    target.write_text("of yesterday")
    assert lestd("query", out, sql, "--parquet", target).code == 0
    table = pq.read_table(target)
    assert table["tensors"].type == pa.list_(pa.string())
    assert [row["nnz"] for row in table.to_pylist()] == [row["nnz"] for row in rows]
    assert [row["started_at"].isoformat() for row in table.to_pylist()] == [
        row["started_at"] for row in rows
    ]
    nowhere = lestd("query", out, sql, "--parquet", tmp_path / "absent" / "answer.parquet")
    refused(nowhere, "absent")


def test_json_has_finite_numbers_unique_names_and_plain_values(out: Path) -> None:
    sql = """select 'nan'::double as a, 'inf'::double as a, 1::decimal(9, 2) as a, 2.5 as b,
        true as c, [1, null] as d, {'x': 'inf'::double} as e, date '2026-01-02' as f, null as g"""
    expected = {"a": None, "a_2": None, "a_3": 1, "b": 2.5, "c": True, "d": [1, None]}
    assert ask(out, sql) == [expected | {"e": {"x": None}, "f": "2026-01-02", "g": None}]
    assert lestd("query", out, "select true as c, null as g", "--csv").out == "c,g\ntrue,\n"


def test_a_column_of_a_table_has_the_same_decimals_throughout(out: Path) -> None:
    sql = """select * from (values (1234.56789, 0.5, 1e12 + 0.25, 0.99, 7::double, 1e-12),
        (0.25, 0.123456789, 12.75, 100, 8, 1e12)) as t(a, b, c_bytes, d, e, mixed)"""
    shown = lestd("query", out, sql).out
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in shown.splitlines()]
    assert [row for row in cells if row] == [
        ["1234.57", "0.5000", "1000000000000", "0.99", "7", "1e-12"],
        ["0.25", "0.1235", "13", "100.00", "8", "1000000000000"],
    ]
    assert lestd("query", out, "select 0.123456789::double as a", "--csv").out == "a\n0.123456789\n"


def test_a_table_shows_the_first_rows_and_says_how_to_get_all(out: Path) -> None:
    few = lestd("query", out, "select layer, 0.5 as half from groups order by all").out
    assert [line.split("│")[1:3] for line in few.splitlines() if "│" in line] == [
        ["     0 ", "  0.5 "],
        ["     1 ", "  0.5 "],
    ]
    assert few.endswith("2 rows\n")
    many = lestd("query", out, "select a.head, '[x]' as t from slices a, slices b").out
    assert many.count("│ [x] │") == 50
    assert many.endswith("50 of 576 rows; all: --csv, --json or --parquet FILE\n")


def test_rows_too_wide_for_a_table_are_shown_one_column_a_line(out: Path) -> None:
    shown = lestd("query", out, "from groups order by layer").out
    lines = shown.splitlines()
    assert lines[0].split() == ["run", "out"]
    assert ["layer", "1"] in [line.split() for line in lines]
    assert max(map(len, lines)) < 100
    assert lines[-1] == "2 rows"
    many = lestd("query", out, "select s.* from slices s, groups g, slices t").out
    assert many.endswith("of 1152 rows; all: --csv, --json or --parquet FILE\n")


def test_the_statement_may_come_from_standard_input(out: Path) -> None:
    result = CliRunner().invoke(app, ["query", str(out), "-", "--csv"], input="select 7 as a\n;")
    assert result.stdout == "a\n7\n"


def test_no_column_needs_quotes(out: Path) -> None:
    for name, spec in TABLES.items():
        names = spec.schema.names
        asked = f"select {', '.join(names)} from {name} group by all order by {', '.join(names)}"
        assert query.run_query([out], asked, print).column_names == names


def test_help_teaches_the_tables() -> None:
    shown = lestd("query", "--help").out
    assert all(name in shown for name in (*TABLES, *VIEWS))
    assert "--name densest-heads" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("expected RUN", "--list")),
        (("OUT",), ("expected RUN",)),
        (("--name", "ranks"), ("expected RUN",)),
        (("OUT", "--name", "densest-head"), ("did you mean densest-heads?",)),
        (("OUT", "--name", "x"), ("no query named 'x'", "--list")),
        (("OUT", "select 1", "--csv", "--json"), ("choose one",)),
        (("OUT.absent", "select 1"), ("out.absent", "does not exist")),
        (("OUT", "select foo from slices"), ('"foo" not found', "Candidate bindings")),
        (("OUT", "from slicez"), ("slicez does not exist", 'mean "slices"', "lestd query --help")),
        (("OUT", "selec 1"), ('syntax error at or near "selec"',)),
        (("OUT", "select 1", "--name", "ranks"), ("--name ranks", "choose one")),
        (("OUT", "-", "--name", "ranks"), ("--name ranks", "choose one")),
        (("--list", "--name", "ranks"), ("--list and --name", "choose one")),
        (("OUT", "from groups", "--parquet", "OUT/no/x"), ("--parquet", "out/no; make it first")),
        (("OUT", "select ?"), ("parameters",)),
        (("OUT", ""), ("expected one SELECT", "none")),
        (("OUT", "select 1; select 2"), ("expected one SELECT", "found 2")),
        (("OUT", "select 'x'::int"), ("Could not convert string 'x'",)),
    ],
)
def test_mistakes_end_in_a_sentence(out: Path, arguments: tuple[str, ...], words: tuple) -> None:
    refused(lestd("query", *(arg.replace("OUT", str(out)) for arg in arguments)), *words)


def test_a_result_without_bounds_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(query._LOCKED, "memory_limit", "200MB")
    refused(
        lestd("query", out, "select list(range) from range(10_000_000_000)"),
        "more than 200MB of memory",
    )
    monkeypatch.setattr(query, "MAX_RESULT_BYTES", 2**20)
    refused(lestd("query", out, "from range(10_000_000_000)"), "GiB", "LIMIT")


def test_ctrl_c_ends_a_long_query(out: Path) -> None:
    endless = "select count(*) from range(1_000_000) a, range(1_000_000) b where hash(a, b) = 1"
    process = start_lestd("query", out, endless)
    # More than it takes to start: the query runs.
    while sum(psutil.Process(process.pid).cpu_times()[:2]) < 4 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, printed, said) == (130, "", "interrupted\n")


# -- while a run goes on ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_asked_while_it_goes_on_and_compacted_when_it_has_stopped(
    many_layers: Path, tmp_path: Path
) -> None:
    out, run = tmp_path / "out", tmp_path / "out.run"
    count = "select count(*) as n from groups"
    compress = ("compress", many_layers, "--out", out, *SERIAL)
    process = start_lestd(*compress)
    try:
        seen = 0
        while seen < 3:  # While it writes: what is there is read, whatever comes and goes.
            assert process.poll() is None
            if (run / "manifest" / "groups").is_dir():
                now = ask(out, count)[0]["n"]
                assert now >= seen
                seen = now
        process.send_signal(signal.SIGSTOP)
        files = list((run / "manifest" / "groups").glob("*.parquet"))
        found = sum(pq.read_metadata(file).num_rows for file in files)
        assert ask(run, count) == [{"n": found}]
        assert found < LAYERS
        refused(lestd("compact", out), "another driver", str(run))
        assert sorted((run / "manifest" / "groups").glob("*.parquet")) == sorted(files)
    finally:
        process.kill()
        process.communicate()
    rows, tables = ask(run, HEADS), ask(run, "from groups")
    parts = list((run / "manifest").rglob("*.parquet"))
    compacted = lestd("compact", out)
    assert compacted.code == 0, compacted.err
    assert compacted.out == f"{out}: {len(parts)} files were merged\n"
    left = list((run / "manifest").rglob("*.parquet"))
    assert all(path.parent == run / "manifest" for path in left)
    assert (ask(run, HEADS), ask(run, "from groups")) == (rows, tables)
    again = lestd("compact", out, "--run-dir", run)
    assert (again.code, again.out) == (0, f"{run}: there was nothing to merge\n")
    resumed = lestd(*compress)
    assert resumed.code == 0, resumed.err
    assert f"{len(tables)} of {LAYERS} tasks were already finished" in resumed.err
    assert ask(out, count) == [{"n": LAYERS}]
    # What the killed call left is told in the same way everywhere.
    for place in (out, run):
        calls = ask(place, "select state, seconds is null as unknown, retried from runs")
        assert calls == [
            {"state": "killed", "unknown": True, "retried": None},
            {"state": "complete", "unknown": False, "retried": 0},
        ]
    told = [
        (row["block"], row["attempt"], row["error_type"], row["message"])
        for row in json.loads(lestd("query", run, "--name", "retries", "--json").out)["rows"]
    ]
    printed = json.loads(lestd(*compress, "--json").out)["retries"]
    keys = ("block", "attempt", "cause", "message")
    assert sorted(told) == sorted(tuple(row[key] for key in keys) for row in printed)
    assert {row[2] for row in told} == {"Interrupted"}
    unchanged = lestd("diff", run, out)
    assert "wall time" not in unchanged.out  # They share their calls.


def test_damaged_files_are_named_and_left_by_compact(out: Path) -> None:
    bad = sorted(Path(f"{out}.run/manifest/slices").iterdir())[0]
    bad.write_bytes(b"PAR1")
    compacted = lestd("compact", out)
    assert compacted.code == 0
    assert compacted.err.startswith(f"{bad} is damaged and left out: ")
    assert "1 damaged file stays where it is: the same lestd compress" in compacted.out
    assert bad.exists()


def test_what_there_is_to_compact(out: Path, tmp_path: Path) -> None:
    refused(lestd("compact", tmp_path / "absent"), "absent", "does not exist")
    assert lestd("clean", out).code == 0
    assert "nothing to merge" in lestd("compact", out).out
    assert not os.path.exists(f"{out}.run")  # noqa: PTH110
