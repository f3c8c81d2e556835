"""A query reads the tables it is given, and nothing can make it do anything else: by attempt."""

import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.cli import lestd
from support.manifests import run_of

from orchestrator.query import sql as query


def state(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to work in, with a model, and files that no query may see."""
    run_of(tmp_path / "out")
    (tmp_path / "secret.csv").write_text("word\nswordfish\n")
    pq.write_table(pa.table({"word": ["swordfish"]}), tmp_path / "secret.parquet")
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SECRET", "swordfish")
    return tmp_path


@pytest.mark.parametrize(
    "sql",
    [
        # Files: to read, to find, to write.
        "from 'secret.csv'",
        "from '{place}/secret.parquet'",
        "from read_csv('secret.csv')",
        "from read_parquet('{place}/secret.parquet')",
        "from read_text('secret.csv')",
        "from read_blob('secret.csv')",
        "from read_json('secret.csv')",
        "from parquet_metadata('secret.parquet')",
        "from sniff_csv('secret.csv')",
        "from glob('{place}/*')",
        "from query('from read_text(''secret.csv'')')",
        "select (select content from read_text('secret.csv')) from groups",
        "with groups as (from 'secret.csv') from groups",
        "describe 'secret.csv'",
        "summarize 'secret.csv'",
        "copy groups to 'new.csv'",
        "copy (select 1) to '{place}/new.parquet' (format parquet)",
        "copy groups from 'secret.csv'",
        "from query('copy groups to ''new.csv''')",
        "export database 'new'",
        "import database '{place}'",
        "attach 'new.duckdb'",
        "attach 'secret.parquet' as x",
        "from enable_logging(storage = 'file', storage_path = 'new')",
        "explain analyze copy groups to 'new.csv'",
        # The network, and code from elsewhere.
        "from read_csv('{url}/x.csv')",
        "from '{url}/x.parquet'",
        "from read_parquet('s3://bucket/x.parquet')",
        "install httpfs",
        "force install httpfs from '{url}'",
        "load httpfs",
        "load '{place}/secret.csv'",
        # Settings and state.
        "set memory_limit = '100GB'",
        "set enable_external_access = true",
        "set lock_configuration = false",
        "set temp_directory = '{place}/new'",
        "set variable x = 1",
        "reset memory_limit",
        "pragma enable_profiling",
        "pragma database_list",
        "use memory",
        "create table x as select 1",
        "create temp view x as from groups",
        "create or replace macro x() as 1",
        "create secret (type s3)",
        "insert into groups (run) values ('x')",
        "update groups set layer = 0",
        "delete from groups",
        "with x as (select 1) delete from groups",
        "drop view groups",
        "alter view groups rename to x",
        "truncate groups",
        "begin",
        "checkpoint",
        "vacuum",
        "call duckdb_tables()",
        "prepare x as select 1",
        "select 1; copy groups to 'new.csv'",
        # This process.
        "select getenv('SECRET')",
        "from variable_of_the_test",
        "from query_table('variable_of_the_test')",
        "from python_map_function()",
        "from arrow_scan(0, 0, 0)",
        "from pandas_scan(0)",
    ],
)
def test_it_is_refused_and_leaves_nothing(sql: str, place: Path) -> None:
    variable_of_the_test = pa.table({"word": ["swordfish"]})
    assert len(variable_of_the_test) == 1
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        before = state(place)
        result = lestd("query", "out", sql.format(place=place, url=url))
        assert result.code == 2, result.out
        assert result.err.startswith("error: ")
        assert result.err.count("\n") == 1
        assert "swordfish" not in result.out + result.err
        assert state(place) == before
        with pytest.raises(BlockingIOError):  # Nobody called.
            server.accept()


def test_what_is_too_large_for_memory_is_not_spilled(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(query._LOCKED, "memory_limit", "200MB")
    before = state(place)
    sql = "select count(*) from (select distinct range, hash(range) from range(1_000_000_000))"
    result = lestd("query", "out", sql)
    assert result.code == 2
    assert "more than 200MB of memory" in result.err
    assert result.err.count("\n") == 1
    assert state(place) == before


@pytest.mark.parametrize(
    "sql",
    [
        "copy groups to 'new.csv'",
        "copy (select 1) to '{place}/new.parquet' (format parquet)",
        "export database 'new'",
        "attach 'new.duckdb'",
        "install httpfs",
        "load '{place}/secret.csv'",
        "set enable_external_access = true",
        "set lock_configuration = false",
        "set temp_directory = '{place}/new'",
        "set python_enable_replacements = true",
        "insert into groups (run) values ('x')",
    ],
)
def test_duckdb_refuses_too_what_is_no_select(
    sql: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the first fence there is a second."""
    monkeypatch.setattr(query, "_one_select", lambda duck, sql: duck.extract_statements(sql)[0])
    before = state(place)
    result = lestd("query", "out", sql.format(place=place))
    assert result.code == 2, result.out
    assert result.err.count("\n") == 1
    assert state(place) == before
