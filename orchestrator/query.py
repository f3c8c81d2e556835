"""SQL over the manifests of runs, by duckdb, which sees their tables and nothing else.

Rows come through `Manifest`, which reads while a run goes on, on a disk or in an object store,
names damaged files and keeps the rest; duckdb itself opens no file. Every table has a first column
``run``, so that one query can span several runs.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from typing import TypeVar

import duckdb
import pyarrow as pa

from lestd_kernels.errors import LestdError
from orchestrator.manifest import MANIFEST_DIR, Manifest
from orchestrator.rows import Damaged
from orchestrator.schemas import TABLES
from workers.files import AnyPath

MAX_RESULT_BYTES = 2 * 2**30
"""A larger result is refused: a forgotten join condition must not take the machine's memory."""
_LOCKED: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",  # No files, no network, no extensions.
    "python_enable_replacements": "false",  # No variables of this process.
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "temp_directory": "",  # What does not fit into memory is not spilled to a disk.
    "memory_limit": "2GB",
}
_Answer = TypeVar("_Answer")
_ERROR = re.compile(r"^[A-Z][\w ]*Error: ")
_WORD = re.compile(r"\w+")
# Functions whose argument names a table, in ways that are not seen from outside.
_NAME_ANY = {"query", "query_table"}
# What duckdb says beside the reason: where in the text, and the signatures of a function.
_BESIDE = re.compile(r"LINE \d+:|[\^ ]*$|.*:$|\w+\(.*\)( -> .*)?$")


@dataclass(frozen=True)
class NamedQuery:
    """A query that comes with lestd.

    Attributes:
        name: how it is asked for.
        summary: one line that says what it answers.
        sql: its text.
    """

    name: str
    summary: str
    sql: str


def named_queries() -> dict[str, NamedQuery]:
    """All queries that come with lestd, by name."""
    found = {}
    for file in files("orchestrator").joinpath("queries").iterdir():
        name, _, ending = file.name.rpartition(".")
        if ending == "sql":
            sql = file.read_text(encoding="utf-8")
            found[name] = NamedQuery(name, sql.splitlines()[0].removeprefix("-- "), sql)
    return dict(sorted(found.items()))


def named_query(name: str) -> NamedQuery:
    """The query of that name.

    Raises:
        LestdError: there is none.
    """
    known = named_queries()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise LestdError(f"there is no query named {name!r}; {hint}lestd query --list shows all")
    return known[name]


def run_query(
    places: Sequence[AnyPath], sql: str, on_damaged: Callable[[Damaged], None]
) -> pa.Table:
    """The answer to one SELECT statement over the manifests of some runs.

    Only the tables that the text names are read. Nothing can be written, and no file, variable,
    setting or address reached: duckdb is in memory, locked, and has the rows handed to it.

    Args:
        places: compressed models, run directories, or models in the making; see `Manifest`.
        sql: the statement; its tables have a first column ``run``, the directory's name, or its
            whole path where another's name is the same.
        on_damaged: called with each file that could not be read, and whose rows are missing.

    Raises:
        LestdError: there is no manifest; or the query is no single SELECT statement, cannot be
            understood, reaches out, or has a result over `MAX_RESULT_BYTES`.
        KeyboardInterrupt: it was stopped by Ctrl-C.
    """
    manifests = [Manifest(place) for place in places]
    names = run_names(places)
    connection = duckdb.connect(":memory:", config=_LOCKED)
    try:
        connection.execute("set TimeZone = 'UTC'")
        connection.execute("set lock_configuration = true")
        statement = _one_select(connection, sql)
        for table, spec in TABLES.items():
            connection.register(table, _with_run(spec.schema.empty_table(), ""))
        _explained(lambda: connection.sql(statement))  # Refuse before anything is read.
        for table in _tables_named(sql):
            parts = []
            for manifest, name in zip(manifests, names, strict=True):
                read = manifest.read(table)
                parts.append(_with_run(read.rows, name))
                for bad in read.damaged:
                    on_damaged(bad)
            connection.register(table, pa.concat_tables(parts))
        return _explained(lambda: _interruptible(connection, statement))
    finally:
        connection.close()


def run_names(places: Sequence[AnyPath]) -> list[str]:
    """What the column ``run`` says of each place."""
    short = [
        place.parent.name if place.name == MANIFEST_DIR else place.name or str(place)
        for place in places
    ]
    count = Counter(short)
    return [
        name if count[name] == 1 else str(place) for name, place in zip(short, places, strict=True)
    ]


def _one_select(connection: duckdb.DuckDBPyConnection, sql: str) -> duckdb.Statement:
    statements = _explained(lambda: connection.extract_statements(sql))
    if len(statements) != 1:
        raise LestdError(
            f"expected one SELECT statement, found {len(statements) or 'none'}; give one at a time"
        )
    if statements[0].type != duckdb.StatementType.SELECT:
        raise LestdError(
            f"expected a SELECT statement, found {statements[0].type.name}: queries only read; "
            "begin with SELECT, FROM, WITH, DESCRIBE or SUMMARIZE"
        )
    return statements[0]


def _tables_named(sql: str) -> list[str]:
    """Tables that a statement may read: those whose names are words of its text."""
    words = {word.lower() for word in _WORD.findall(sql)}
    return [table for table in TABLES if table in words or words & _NAME_ANY]


def _with_run(rows: pa.Table, name: str) -> pa.Table:
    return rows.add_column(0, "run", pa.repeat(pa.scalar(name), len(rows)))


def _interruptible(connection: duckdb.DuckDBPyConnection, statement: duckdb.Statement) -> pa.Table:
    """Run a statement in a thread, so that Ctrl-C is heard at once here and passed on to it."""
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(_collect, connection, statement)
        try:
            return result.result()
        except KeyboardInterrupt:
            connection.interrupt()
            raise


def _collect(connection: duckdb.DuckDBPyConnection, statement: duckdb.Statement) -> pa.Table:
    reader = pa.RecordBatchReader.from_stream(connection.sql(statement))
    batches, size = [], 0
    for batch in reader:
        batches.append(batch)
        size += batch.nbytes
        if size > MAX_RESULT_BYTES:
            raise LestdError(
                f"the result has more than {MAX_RESULT_BYTES / 2**30:.0f} GiB; name the columns "
                "that are needed, join tables on run and task_id, or add LIMIT"
            )
    return pa.Table.from_batches(batches, schema=reader.schema)


def _explained(ask: Callable[[], _Answer]) -> _Answer:
    """What duckdb says, as one sentence."""
    try:
        return ask()
    except duckdb.PermissionException as error:
        raise LestdError(
            f"the query reaches out of its tables ({_sentence(error)}); it can read "
            f"{', '.join(TABLES)} only"
        ) from error
    except (duckdb.OutOfMemoryException, MemoryError) as error:
        raise LestdError(
            f"the query needs more than {_LOCKED['memory_limit']} of memory; aggregate or filter "
            "before joining and sorting, or join tables on run and task_id"
        ) from error
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        raise LestdError(
            f"the query cannot be answered: {_sentence(error)}; lestd query --help has examples, "
            "DESCRIBE slices shows the columns of a table"
        ) from error


def _sentence(error: Exception) -> str:
    """The first two lines that say something, without the name of the exception before them."""
    lines = [line.strip() for line in _ERROR.sub("", str(error), count=1).splitlines()]
    said = [line.rstrip(".!") for line in lines if not _BESIDE.match(line)]
    return "; ".join(said[:2])
