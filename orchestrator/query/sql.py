"""SQL over the manifests of runs, by duckdb, which sees their tables and nothing else.

Rows come through `Manifest`, which reads while a run goes on, on a disk or in an object store,
names damaged files and keeps the rest; duckdb itself opens no file. Every table has a first column
``run``, so that one query can span several runs.
"""

from __future__ import annotations

import re
import resource
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import duckdb
import pyarrow as pa
from duckdb.sqltypes import DuckDBPyType

from lestd_kernels.errors import LestdError
from orchestrator.config.named_files import NamedFile, named_files, one_of
from orchestrator.console import output
from orchestrator.manifest.manifest import Manifest
from orchestrator.manifest.part_files import Damaged
from orchestrator.manifest.schemas import TABLES
from orchestrator.query.views import VIEWS
from workers.storage.files import AnyPath
from workers.storage.names import MANIFEST_DIR

MAX_RESULT_BYTES = 2**30
"""A larger result is refused: a forgotten join condition must not take the machine's memory."""
MEMORY_BYTES = 6 * 2**30
"""Limit of `bounded_memory`: duckdb counts neither the lists that it makes nor the result."""
MAX_SECONDS = 600.0
"""A longer query is ended: one that never ends must not hold whoever asks unattended."""
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
# Types that Parquet, Python or JSON lack; duckdb writes them best.
_AS_TEXT = {"bignum", "bit", "interval", "union", "variant"}
_NESTED = {"array", "list", "map", "struct"}
# Functions whose argument names a table, in ways that are not seen from outside.
_NAME_ANY = {"query", "query_table"}
# What duckdb says beside the reason: where in the text, and the signatures of a function.
_BESIDE = re.compile(r"LINE \d+:|[\^ ]*$|.*:$|\w+\(.*\)( -> .*)?$")


def named_queries() -> dict[str, NamedFile]:
    """All built-in queries, by name."""
    return named_files("orchestrator.query", "sql")


def named_query(name: str) -> NamedFile:
    """The built-in query of that name; LestdError if there is none."""
    return one_of(named_queries(), name, "query", "lestd query --list")


def run_query(
    places: Sequence[AnyPath], sql: str, on_damaged: Callable[[Damaged], None]
) -> pa.Table:
    """The answer to one SELECT statement over the manifests of some runs.

    Only the tables that the text names are read. Nothing can be written, and no file, variable,
    setting or address reached: duckdb is in memory, locked, and has the rows handed to it. Columns
    of intervals, unions and other types that files lack are text, also where such a type is nested.

    Args:
        places: compressed models, run directories, or models in the making; see `Manifest`.
        sql: the statement; its tables have a first column ``run``, the directory's name, or its
            whole path where another's name is the same.
        on_damaged: called with each file that could not be read, and whose rows are missing.

    Raises:
        LestdError: there is no manifest; or the query is no single SELECT statement, cannot be
            understood, reaches out, takes longer than `MAX_SECONDS`, or has a result over
            `MAX_RESULT_BYTES`.
        KeyboardInterrupt: it was stopped by Ctrl-C.
    """
    manifests = [Manifest(place) for place in places]
    names = run_names(places)
    # Not closed here: after Ctrl-C a thread may still work with it, and is not waited for.
    connection = duckdb.connect(":memory:", config=_LOCKED)
    connection.execute("set TimeZone = 'UTC'")
    connection.execute("set lock_configuration = true")
    statement = _one_select(connection, sql)
    for table, spec in TABLES.items():
        connection.register(table, _with_run(spec.schema.empty_table(), ""))
    for view, definition in VIEWS.items():
        connection.execute(f"create temp view {view} as {definition}")
    # Refuse before anything is read.
    _explained(lambda: _interruptible(connection, lambda: connection.sql(statement)))
    for table in _tables_named(sql):
        parts = []
        for manifest, name in zip(manifests, names, strict=True):
            read = manifest.read(table)
            parts.append(_with_run(read.rows, name))
            for bad in read.damaged:
                on_damaged(bad)
        connection.register(table, pa.concat_tables(parts))
    return _explained(lambda: _interruptible(connection, lambda: _collect(connection, statement)))


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Let this process take `MEMORY_BYTES` more than it has, on Linux, while a query is answered.

    For a command, which has the process to itself: the limit holds for all its threads.

    Raises:
        LestdError: it was not enough.
    """
    if sys.platform != "linux":  # Elsewhere such a limit is not known or not kept.
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    allowed = pages * resource.getpagesize() + MEMORY_BYTES
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft != resource.RLIM_INFINITY:
        allowed = min(allowed, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))
    try:
        yield
    except MemoryError as error:
        raise LestdError(
            f"the answer needs more than {MEMORY_BYTES / 2**30:.0f} GiB of memory; name the "
            "columns that are needed, aggregate, or add LIMIT"
        ) from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def run_names(places: Sequence[AnyPath]) -> list[str]:
    """Value of the column ``run`` for each place."""
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
    if statements[0].type == duckdb.StatementType.MULTI:
        raise LestdError(
            "expected a SELECT statement, found one that needs another before it, as PIVOT does "
            "without its values; name them: pivot slices on projection in ('q', 'k') using "
            "avg(density)"
        )
    if statements[0].type != duckdb.StatementType.SELECT:
        raise LestdError(
            f"expected a SELECT statement, found {statements[0].type.name}: queries only read; "
            "begin with SELECT, FROM, WITH, DESCRIBE or SUMMARIZE"
        )
    return statements[0]


def _tables_named(sql: str) -> list[str]:
    """Tables that a statement may read: those whose names are words of its text, or of a view's."""
    words = {word.lower() for word in _WORD.findall(sql)}
    for view, definition in reversed(VIEWS.items()):
        if view in words:
            words.update(_WORD.findall(definition))
    return [table for table in TABLES if table in words or words & _NAME_ANY]


def _with_run(rows: pa.Table, name: str) -> pa.Table:
    return rows.add_column(0, "run", pa.repeat(pa.scalar(name), len(rows)))


def _interruptible(connection: duckdb.DuckDBPyConnection, ask: Callable[[], _Answer]) -> _Answer:
    """Ask in a thread, so that Ctrl-C and the end of the time are heard at once, and passed on.

    The thread is not waited for: duckdb does not look up from within a function of a long list.
    """
    answer: Future[_Answer] = Future()

    def work() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    try:
        threading.Thread(target=work, daemon=True).start()
        return answer.result(MAX_SECONDS)
    except KeyboardInterrupt:
        connection.interrupt()
        raise
    except TimeoutError as error:
        connection.interrupt()
        raise LestdError(
            f"the query took longer than {MAX_SECONDS:g} s; aggregate or filter before joining, "
            "join tables on run and task_id, and bound what is recursive by WHERE"
        ) from error


def _collect(connection: duckdb.DuckDBPyConnection, statement: duckdb.Statement) -> pa.Table:
    relation = connection.sql(statement)
    columns, types = relation.columns, relation.types
    if any(map(_as_text, types)):
        # By number: names may be there twice.
        numbered = [f"#{number}" for number in range(1, len(types) + 1)]
        relation = relation.project(
            ", ".join(
                f"{column}::varchar" if _as_text(kind) else column
                for column, kind in zip(numbered, types, strict=True)
            )
        )
    reader = pa.RecordBatchReader.from_stream(relation)
    batches, size = [], 0
    for batch in reader:
        batches.append(batch)
        size += batch.nbytes
        if size > MAX_RESULT_BYTES:
            raise LestdError(
                f"the result has more than {MAX_RESULT_BYTES / 2**30:.0f} GiB; name the columns "
                "that are needed, join tables on run and task_id, or add LIMIT"
            )
    return pa.Table.from_batches(batches, schema=reader.schema).rename_columns(columns)


def _as_text(kind: DuckDBPyType) -> bool:
    if kind.id in _NESTED:
        # An array has its size among them.
        return any(isinstance(of, DuckDBPyType) and _as_text(of) for _, of in kind.children)
    return kind.id in _AS_TEXT


def _explained(ask: Callable[[], _Answer]) -> _Answer:
    """Message of duckdb as one sentence."""
    try:
        return ask()
    except duckdb.PermissionException as error:
        raise LestdError(
            f"the query reads outside its tables ({_sentence(error)}); it can read "
            f"{', '.join([*TABLES, *VIEWS])} only"
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
    return output.visible("; ".join(said[:2]))
