"""Tables of a manifest as files: part files, one compacted file, and how both are read as one.

    <table>/<name>.parquet    a part: some rows, written once, atomically
    <table>.parquet           compacted: rows of many parts, see `compact_table`

Where both have rows of the same key, the part's are newer. A damaged file costs its own rows only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.schemas import TableSpec
from workers.files import (
    AnyPath,
    atomic_write,
    in_parallel,
    is_file,
    list_files,
    make_directory,
    read_files,
    remove_file,
)


@dataclass(frozen=True)
class Damaged:
    """A file of the manifest that cannot be read, and why."""

    path: AnyPath
    reason: str


@dataclass(frozen=True)
class TableRead:
    """A table as it was found.

    Attributes:
        rows: all rows, in the order that the table has.
        damaged: files whose rows are not among them.
        parts: part files whose rows are.
    """

    rows: pa.Table
    damaged: tuple[Damaged, ...]
    parts: tuple[AnyPath, ...]


def write_rows(path: AnyPath, rows: Sequence[dict[str, Any]], spec: TableSpec) -> None:
    """Write rows to one Parquet file, atomically and on disk when this returns.

    Raises:
        OutOfSpaceError: no space left.
    """
    write_table(path, pa.Table.from_pylist(list(rows), schema=spec.schema))


def write_table(path: AnyPath, table: pa.Table) -> None:
    """Write a table to one Parquet file; see `write_rows`."""
    atomic_write(path, lambda file: pq.write_table(table, file, compression="zstd"))


def part_path(directory: AnyPath, spec: TableSpec, name: str) -> AnyPath:
    """Where a part of a table goes; makes its folder."""
    folder = directory / spec.name
    make_directory(folder)
    return folder / name


def compacted_path(directory: AnyPath, spec: TableSpec) -> AnyPath:
    """Where a table's compacted file is."""
    return directory / f"{spec.name}.parquet"


def read_table(directory: AnyPath, spec: TableSpec) -> TableRead:
    """All rows of a table; of rows with the same key those of the part file.

    The parts are read before the compacted file: one that is compacted and deleted meanwhile is
    found there. Readers need no lock.
    """
    folder = directory / spec.name
    paths = [folder / name for name in list_files(folder) if name.endswith(".parquet")]
    parts, damaged, read = _read_all(paths, spec)
    newer = pa.concat_tables(parts) if parts else spec.schema.empty_table()
    single = compacted_path(directory, spec)
    compacted, more, _ = _read_all([single] if is_file(single) else [], spec)
    older = compacted[0] if compacted else spec.schema.empty_table()
    rows = pa.concat_tables([_without(older, newer, spec.key), newer])
    if spec.order:
        rows = rows.sort_by([(name, "ascending") for name in spec.order])
    return TableRead(rows, (*damaged, *more), tuple(read))


def compact_table(directory: AnyPath, spec: TableSpec, check: Callable[[], None]) -> int:
    """Write a table's rows to one file, then delete the parts that they came from.

    Killed in between, rows are in both, which readers are used to. Damaged files stay as they are,
    to be named. Only the run's one driver may do this: a part that another writes meanwhile, under
    the name of one that was read, would be lost.

    Args:
        directory: of the manifest.
        spec: the table.
        check: called before anything is changed; raises where the run is another driver's.

    Returns:
        Number of parts that are gone.

    Raises:
        OutOfSpaceError: no space left; every row is where it was.
        LestdError: the object store does not answer.
    """
    found = read_table(directory, spec)
    single = compacted_path(directory, spec)
    if not found.parts or any(bad.path == single for bad in found.damaged):
        return 0
    check()
    write_table(single, found.rows)
    in_parallel(remove_file, found.parts)
    return len(found.parts)


def _read_all(
    paths: Sequence[AnyPath], spec: TableSpec
) -> tuple[list[pa.Table], list[Damaged], list[AnyPath]]:
    tables, damaged, read = [], [], []
    for path, content in zip(paths, read_files(paths), strict=True):
        if isinstance(content, FileNotFoundError):
            continue  # Compacted since it was listed.
        part = _parsed(path, content, spec)
        if isinstance(part, Damaged):
            damaged.append(part)
        else:
            tables.append(part)
            read.append(path)
    return tables, damaged, read


def _parsed(path: AnyPath, content: bytes | OSError, spec: TableSpec) -> pa.Table | Damaged:
    if isinstance(content, OSError):
        return Damaged(path, str(content))
    try:
        # Not pq.read_table, whose dataset costs ten times as much for a file of one row.
        table = pq.ParquetFile(pa.BufferReader(content)).read()
        for column in spec.columns:
            if column.required and (
                column.name not in table.column_names or table[column.name].null_count
            ):
                return Damaged(path, f"it has rows without {column.name}")
        # Columns that a newer version added are dropped, those of a later one are null.
        columns = [
            table[field.name].cast(field.type)
            if field.name in table.column_names
            else pa.nulls(len(table), field.type)
            for field in spec.schema
        ]
        return pa.Table.from_arrays(columns, schema=spec.schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        return Damaged(path, str(error).splitlines()[0])


def _without(older: pa.Table, newer: pa.Table, key: Sequence[str]) -> pa.Table:
    """Rows of `older` whose key no row of `newer` has."""
    if not len(older) or not len(newer):
        return older
    replaced = set(_keys(newer, key))
    return older.filter(pa.array([one not in replaced for one in _keys(older, key)]))


def _keys(table: pa.Table, key: Sequence[str]) -> list[tuple[Any, ...]]:
    return list(zip(*(table[name].to_pylist() for name in key), strict=True))
