"""Tables of a manifest as files: part files, one compacted file, and how both are read as one.

    <table>/<name>.parquet    a part: some rows, written once, atomically
    <table>.parquet           compacted: rows of many parts, see `compact_table`

Where both have rows of the same key, the part's are newer. A driver that goes on with a run
compacts what it finds, so that parts differ in their keys; where a damaged compacted file keeps it
from that, a part of a task's own counts as newer than one of many tasks, which has its time in its
name. A damaged file costs its own rows only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lestd_kernels.errors import first_line
from orchestrator.manifest.schemas import TableSpec
from workers.storage.building import make_own_directory
from workers.storage.files import (
    AnyPath,
    atomic_write,
    in_parallel,
    list_names,
    read_files,
    remove_file,
)
from workers.storage.names import TEMPORARY

PARQUET = ".parquet"
_LAST_TIME = 221_845_392_000_000_000
"""The beginning of the year 9000 in microseconds; Python knows no time after 9999."""
_LONGEST = 1e9
"""Seconds, 30 years: what a time can be apart from another."""
_LARGEST = 2**63 - 1
_FOREIGN = "lestd makes no such file; move it away"


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


def write_part(path: AnyPath, rows: Sequence[dict[str, Any]], spec: TableSpec) -> None:
    """Write some rows to one Parquet file, atomically and on disk when this returns.

    Raises:
        OutOfSpaceError: no space left.
        LestdError: the object store does not take it.
    """
    # Of few rows: to set up a decompressor for every column takes longer than all else.
    _write(path, pa.Table.from_pylist(list(rows), schema=spec.schema), "none")


def write_table(path: AnyPath, table: pa.Table) -> None:
    """Write a whole table to one Parquet file; see `write_part`."""
    _write(path, table, "zstd")


def _write(path: AnyPath, table: pa.Table, compression: str) -> None:
    def write(file: BinaryIO) -> None:
        pq.write_table(table, file, compression=compression, write_page_checksum=True)

    atomic_write(path, write)


def part_path(directory: AnyPath, spec: TableSpec, name: str) -> AnyPath:
    """Where a part of a table goes; makes its folder."""
    folder = directory / spec.name
    make_own_directory(folder)
    return folder / name


def compacted_path(directory: AnyPath, spec: TableSpec) -> AnyPath:
    """Where a table's compacted file is."""
    return directory / (spec.name + PARQUET)


def read_table(directory: AnyPath, spec: TableSpec) -> TableRead:
    """All rows of a table; of rows with the same key those of the part file.

    The parts are read before the compacted file: one that is compacted and deleted meanwhile is
    found there. Readers need no lock.

    Raises:
        LestdError: the object store does not answer.
    """
    folder = directory / spec.name
    names = [name for name in list_names(folder) if not name.startswith(TEMPORARY)]
    # Those of many tasks, with their times, before those of one.
    names.sort(key=lambda name: ("-" not in name, name))
    paths = [folder / name for name in names if name.endswith(PARQUET)]
    foreign = [Damaged(folder / name, _FOREIGN) for name in names if not name.endswith(PARQUET)]
    parts, damaged, read = _read_all(paths, spec)
    newer = _newest([spec.schema.empty_table(), *parts], spec.key)
    compacted, more, _ = _read_all([compacted_path(directory, spec)], spec)
    older = pa.concat_tables([spec.schema.empty_table(), *compacted])
    rows = pa.concat_tables([_without(older, newer, spec.key), newer])
    # By the key too: what is compacted and what is not makes no difference to the order.
    order = dict.fromkeys((*spec.order, *spec.key), "ascending")
    return TableRead(rows.sort_by([*order.items()]), (*foreign, *damaged, *more), tuple(read))


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
    found = zip(paths, read_files(paths), strict=True)
    parts = in_parallel(lambda one: (one[0], _parsed(*one, spec)), found)
    whole = [part for _, part in parts if isinstance(part, pa.Table)]
    # All at once, which is fast; one by one only where there is something to find.
    suspect = bool(whole) and _problem(pa.concat_tables(whole), spec) is not None
    for path, part in parts:
        if suspect and isinstance(part, pa.Table) and (problem := _problem(part, spec)):
            part = Damaged(path, problem)
        if isinstance(part, Damaged):
            damaged.append(part)
        elif part is not None:
            tables.append(part)
            read.append(path)
    return tables, damaged, read


def _parsed(path: AnyPath, content: bytes | OSError, spec: TableSpec) -> pa.Table | Damaged | None:
    """The rows of a file, why it has none, or None where there is no file."""
    if isinstance(content, FileNotFoundError) and not _is_link(path):
        return None  # Compacted since it was listed.
    if isinstance(content, OSError):
        return Damaged(path, content.strerror or str(content))
    try:
        # Not pq.read_table, whose dataset costs ten times as much for a file of one row.
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        if file.metadata.num_rows > len(content):
            return Damaged(path, f"{len(content)} bytes claim {file.metadata.num_rows} rows")
        return _as_stated(path, file.read(use_threads=False), spec)
    except (pa.ArrowException, OSError, ValueError) as error:
        return Damaged(path, first_line(error))


def _is_link(path: AnyPath) -> bool:
    return isinstance(path, Path) and path.is_symlink()


def _as_stated(path: AnyPath, table: pa.Table, spec: TableSpec) -> pa.Table | Damaged:
    """A file's rows with the columns of this version: others are dropped, absent ones null."""
    columns = []
    for field, column in zip(spec.schema, spec.columns, strict=True):
        index = table.schema.get_field_index(field.name)
        values = table.column(index) if index >= 0 else pa.nulls(len(table), field.type)
        if values.type != field.type:
            expected = f"{field.name} is {values.type}, expected {field.type}"
            return Damaged(path, f"its column {expected}")
        if column.required and values.null_count:
            return Damaged(path, f"it has rows without {field.name}")
        columns.append(values)
    return pa.Table.from_arrays(columns, schema=spec.schema)


def _problem(table: pa.Table, spec: TableSpec) -> str | None:
    """Name the first value that no row of lestd has; None where all are sound.

    Readers divide by the figures, parse the texts and make file names of them.
    """
    try:
        table.validate(full=True)  # Texts that are not UTF-8.
    except pa.ArrowInvalid as error:
        return first_line(error)
    for column in spec.columns:
        values, kind = table[column.name], column.type
        if column.check is not None:
            for text in values.unique().to_pylist():
                if text is not None and not column.check(text):
                    return f"its column {column.name} has {_short(text)}"
        elif pa.types.is_integer(kind) or pa.types.is_timestamp(kind):
            least, most = (value.as_py() for value in pc.min_max(values.cast(pa.int64())).values())
            highest = _LAST_TIME if pa.types.is_timestamp(kind) else _LARGEST
            if least is not None and not column.least <= least <= most <= highest:
                return f"its column {column.name} has values from {least} to {most}"
        elif column.unit == "seconds":
            # Nor NaN, which is less than nothing.
            short = pc.all(pc.less(pc.abs(values), _LONGEST), min_count=0)
            if not short.as_py():
                return f"its column {column.name} has {_LONGEST:.0f} seconds or more"
    return None


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _newest(parts: Sequence[pa.Table], key: Sequence[str]) -> pa.Table:
    """Rows of all parts; of rows with the same key those of the last part that has them.

    A longer key than one column names a single row, which no two parts have.
    """
    together = pa.concat_tables(parts)
    if len(key) > 1 or _distinct(together, key) == sum(_distinct(part, key) for part in parts):
        return together
    kept: list[pa.Table] = []
    taken: set[tuple[Any, ...]] = set()
    for part in reversed(parts):
        found = _keys(part, key)
        kept.append(part.filter(pa.array([one not in taken for one in found], pa.bool_())))
        taken.update(found)
    return pa.concat_tables(kept[::-1])


def _distinct(table: pa.Table, key: Sequence[str]) -> int:
    return len(table) if len(table) < 2 else int(pc.count_distinct(table[key[0]]).as_py())


def _without(older: pa.Table, newer: pa.Table, key: Sequence[str]) -> pa.Table:
    """Rows of `older` whose key no row of `newer` has."""
    if not len(older) or not len(newer):
        return older
    replaced = set(_keys(newer, key))
    return older.filter(pa.array([one not in replaced for one in _keys(older, key)]))


def _keys(table: pa.Table, key: Sequence[str]) -> list[tuple[Any, ...]]:
    return list(zip(*(table[name].to_pylist() for name in key), strict=True))
