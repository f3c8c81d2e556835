"""What a query answers with values that a terminal, a file or Python does not take as they are."""

import csv
import io
import json
import os
import resource
import signal
import sys
import threading
import time
import tracemalloc
from contextlib import redirect_stdout
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.cli import lestd
from support.manifests import run_of

from lestd_kernels.errors import LestdError
from orchestrator.query import sql as query
from orchestrator.query import writers

ESCAPES = "'x\\[/b]' as a, 'x\\[red]hello' as b, 'c' || chr(27) || '[31m:boom:' as \"[/c]\""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return run_of(tmp_path / "out")


@pytest.mark.parametrize("more", ["", ", repeat('w', 200) as w, 'long' as " + "n" * 120])
def test_cells_are_shown_as_they_are_and_do_not_steer_the_terminal(out: Path, more: str) -> None:
    shown = lestd("query", out, f"select {ESCAPES}{more}")
    assert shown.code == 0
    for text in (r"x\[/b]", r"x\[red]hello", r"c\x1b[31m:boom:", "[/c]"):
        assert text in shown.out
    assert "\x1b" not in shown.out
    assert ("│" in shown.out) == (not more)


def test_files_keep_control_characters(out: Path) -> None:
    expected = {"a": r"x\[/b]", "b": r"x\[red]hello", "[/c]": "c\x1b[31m:boom:"}
    assert json.loads(lestd("query", out, f"select {ESCAPES}", "--json").out) == {
        "rows": [expected]
    }
    printed = io.StringIO(lestd("query", out, f"select {ESCAPES}", "--csv").out)
    assert list(csv.DictReader(printed)) == [expected]


def test_a_refusal_does_not_steer_the_terminal(out: Path) -> None:
    result = lestd("query", out, "select ('[/b]' || chr(27) || '[31m')::int")
    assert result.code == 2
    assert r"'[/b]\x1b[31m'" in result.err
    assert "\x1b" not in result.err


@pytest.mark.parametrize(
    "value",
    [
        "interval '14 months 3 days 00:00:01.5'",
        "max(timestamp '2026-01-02 03:04:05') - timestamp '2026-01-01'",
        "[interval 1 day, null]",
        "array[interval 1 day]::interval[1]",
        "{'a': {'b': interval 1 day}}",
        "map {'a': interval 1 day}",
        "union_value(a := 1)",
        "'101'::bit",
        "(2::bignum)",
        "null::interval",
    ],
)
def test_types_that_files_lack_are_the_text_of_duckdb(out: Path, value: str) -> None:
    expected = duckdb.sql(f"select ({value})::varchar").fetchall()[0][0]
    sql = f"select 1 as b, {value} as a, 2 as a"
    rows = json.loads(lestd("query", out, sql, "--json").out)["rows"]
    assert rows == [{"b": 1, "a": expected, "a_2": 2}]
    assert lestd("query", out, sql, "--parquet", out / "a.parquet").code == 0
    assert pq.read_table(out / "a.parquet").to_pylist() == rows
    shown = lestd("query", out, sql).out
    assert expected is None or f"│ {expected} │" in shown


@pytest.mark.parametrize(
    "value", ["'infinity'::timestamptz", "'290309-12-22'::date", "['-infinity'::timestamp]"]
)
def test_times_that_python_lacks_are_named(out: Path, value: str) -> None:
    sql = f"select {value} as t"
    for form in ((), ("--csv",), ("--json",)):
        result = lestd("query", out, sql, *form)
        assert result.code == 2
        assert result.err.startswith("error: column t has a date or time that is infinite")
        assert result.err.count("\n") == 1
    assert lestd("query", out, sql, "--parquet", out / "a.parquet").code == 0
    text = duckdb.sql(f"select ({value})::varchar").fetchall()[0][0]
    assert duckdb.sql(f"select t::varchar from '{out}/a.parquet'").fetchall()[0][0] == text
    assert lestd("query", out, f"select ({value})::varchar as t", "--csv").out == f"t\n{text}\n"


def test_what_parquet_does_not_take_is_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    span = pa.table({"a": pa.array([(1, 2, 3)], pa.month_day_nano_interval())})
    with pytest.raises(LestdError, match=r"a\.parquet cannot be written .*; cast the column"):
        writers.write_parquet(span, tmp_path / "a.parquet")
    assert list(tmp_path.iterdir()) == []


def test_json_is_written_row_by_row() -> None:
    rows = 50_000
    answer = pa.table({"a": range(rows), "b": ["text"] * rows})
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        tracemalloc.start()
        try:
            writers.print_json(answer)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 100 * rows  # A dict alone has more.


def test_json_of_no_rows(out: Path) -> None:
    assert lestd("query", out, "select 1 as a limit 0", "--json").out == '{"rows": []}\n'


@pytest.mark.skipif(sys.platform != "linux", reason="only there the limit is kept")
@pytest.mark.parametrize(
    "sql",
    ["select len(range(150_000_000))", "from (select unnest(range(150_000_000)) as a) limit 1"],
)
def test_lists_that_duckdb_does_not_count_are_refused(
    out: Path, sql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query, "MEMORY_BYTES", 2**30)
    result = lestd("query", out, sql)
    assert result.code == 2
    assert "of memory" in result.err
    assert result.err.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only there the limit is kept")
def test_the_bound_of_memory_holds_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    monkeypatch.setattr(query, "MEMORY_BYTES", 2**30)
    with query.bounded_memory():
        assert len(bytearray(2**29)) == 2**29
    with pytest.raises(LestdError, match="more than 1 GiB of memory"), query.bounded_memory():
        bytearray(2**30 + 2**29)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_ctrl_c_does_not_wait_for_what_cannot_be_stopped(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, ended = threading.Event(), threading.Event()

    def unstoppable(*_: object) -> None:
        time.sleep(1)  # Until the main thread waits, and is not still starting this one.
        os.kill(os.getpid(), signal.SIGINT)
        released.wait(20)
        ended.set()

    monkeypatch.setattr(query, "_collect", unstoppable)
    try:
        with pytest.raises(KeyboardInterrupt):
            query.run_query([out], "select 1", print)
        assert not ended.is_set()
    finally:
        released.set()


@pytest.mark.parametrize(
    "sql",
    [
        "with recursive t as (select 1 as n union all select n + 1 from t) select count(*) from t",
        # One row, for ever.
        "with recursive t(a, n) using key (a) as (select 1, 1 union select a, n + 1 from t) from t",
        "select count(*) from range(100_000_000) a, range(100_000_000) b where a.range = -b.range",
    ],
)
def test_what_never_ends_is_ended(out: Path, sql: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "MAX_SECONDS", 0.3)
    result = lestd("query", out, sql)
    assert result.code == 2
    assert "the query took longer than 0.3 s" in result.err
    assert result.err.count("\n") == 1


def test_pivot_without_its_values_says_what_helps(out: Path) -> None:
    result = lestd("query", out, "pivot slices on projection using avg(density)")
    assert result.code == 2
    assert result.err.count("\n") == 1
    advice = result.err.partition("name them: ")[2]
    assert lestd("query", out, advice).code == 0
