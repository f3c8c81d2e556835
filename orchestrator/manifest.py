"""The manifest: what is known of every finished task, one small Parquet file per row.

    manifest/groups/<task_id>.parquet   one row: the group is done     (written last)
    manifest/slices/<task_id>.parquet   one row per slice of the group (written before it)
    manifest/curves/<task_id>.parquet   one row per byte budget of a group's curve, if asked for
    manifest/events/<time>.parquet      one row: started, retried, failed

The group row is the commit. It is written after the payload is on disk, or in an object store,
under a name that carries its sha256, so a crash at any moment leaves either a finished task or no
trace of it. A curve has no payload: its file is its commit. Every file is readable on its own by
anything that reads Parquet; a damaged one costs its own task only.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lestd_kernels.errors import LestdError
from orchestrator.executor import Event
from orchestrator.schemas import CURVES, EVENTS, GROUPS, KEYS, SLICES, STAGES
from workers.contracts import CurveResult, CurveTask, Failure, Result
from workers.files import (
    AnyPath,
    atomic_write,
    file_sha256,
    file_size,
    in_parallel,
    is_file,
    list_files,
    make_directory,
    read_file,
    read_files,
)


def _microseconds(seconds: float) -> int:
    return round(seconds * 1_000_000)


def _common_fields(result: Result | CurveResult, schema: pa.Schema) -> dict[str, Any]:
    fields = asdict(result)
    row = {name: fields[name] for name in schema.names if name in fields}
    row |= {f"seconds_{stage}": result.seconds.get(stage, 0.0) for stage in STAGES}
    row["started_at"] = _microseconds(result.started_at)
    row["versions"] = json.dumps(result.versions, sort_keys=True)
    return row


def group_row(result: Result) -> dict[str, Any]:
    """The row of `groups` for a result."""
    row = _common_fields(result, GROUPS)
    row |= {rank: result.ranks.get(rank) for rank in ("R1", "R2", "R3")}
    row["format"] = json.dumps(result.format, sort_keys=True)
    return row


def curve_rows(result: CurveResult) -> list[dict[str, Any]]:
    """The rows of `curves` for a result."""
    common = _common_fields(result, CURVES)
    return [
        common
        | point.ranks._asdict()
        | {"byte_budget": point.byte_budget, "predicted_squared_error": point.squared_error}
        for point in result.points
    ]


def slice_rows(result: Result) -> list[dict[str, Any]]:
    """The rows of `slices` for a result."""
    key = {"task_id": result.task_id, "layer": result.layer, "group": result.group}
    return [key | asdict(one) for one in result.slices]


def write_rows(path: AnyPath, rows: Sequence[dict[str, Any]], schema: pa.Schema) -> None:
    """Write rows to one Parquet file, atomically and on disk when this returns.

    Raises:
        OutOfSpaceError: no space left.
    """
    table = pa.Table.from_pylist(list(rows), schema=schema)
    atomic_write(path, lambda file: pq.write_table(table, file, compression="zstd"))


@dataclass(frozen=True)
class Damaged:
    """A file of the manifest that cannot be read, and why."""

    path: AnyPath
    reason: str


class Manifest:
    """The manifest in a directory; made on the first write.

    Readers may look while a run goes on: files appear whole or not at all.
    """

    def __init__(self, directory: AnyPath) -> None:
        self.directory = directory

    # -- writing: the driver only ------------------------------------------------------------

    def commit(self, result: Result | CurveResult) -> None:
        """Record a finished task: slice rows first, then the group row, which means done."""
        name = f"{result.task_id}.parquet"
        if isinstance(result, CurveResult):
            write_rows(self._part("curves", name), curve_rows(result), CURVES)
            return
        write_rows(self._part("slices", name), slice_rows(result), SLICES)
        write_rows(self._part("groups", name), [group_row(result)], GROUPS)

    def record_event(self, event: Event) -> None:
        """Record that a task was started or retried."""
        self._write_event(asdict(event))

    def record_failure(self, failure: Failure) -> None:
        """Record that a task failed for good."""
        row = {name: getattr(failure, name) for name in EVENTS.names if hasattr(failure, name)}
        self._write_event(row | {"kind": "failed"})

    def _write_event(self, row: dict[str, Any]) -> None:
        at = time.time_ns()
        name = f"{at:020d}-{row['task_id'][:16]}.parquet"
        write_rows(self._part("events", name), [row | {"at": at // 1000}], EVENTS)

    def _part(self, table: str, name: str) -> AnyPath:
        folder = self.directory / table
        make_directory(folder)
        return folder / name

    # -- reading -----------------------------------------------------------------------------

    def groups(self) -> pa.Table:
        """All group rows, by layer."""
        return self._read("groups", GROUPS).sort_by(
            [("layer", "ascending"), ("group", "ascending")]
        )

    def slices(self) -> pa.Table:
        """All slice rows; those of one group lie together, in the order of its slices."""
        return self._read("slices", SLICES)

    def curves(self) -> pa.Table:
        """All rows of curves, by layer and budget."""
        return self._read("curves", CURVES).sort_by(
            [("layer", "ascending"), ("group", "ascending"), ("byte_budget", "ascending")]
        )

    def events(self) -> pa.Table:
        """All events, oldest first."""
        return self._read("events", EVENTS).sort_by("at")

    def damaged(self) -> list[Damaged]:
        """Files that cannot be read as rows of their table."""
        found = []
        tables = {"groups": GROUPS, "slices": SLICES, "curves": CURVES, "events": EVENTS}
        for table, schema in tables.items():
            found += [part for part in self._parts(table, schema) if isinstance(part, Damaged)]
        return found

    def _parts(self, table: str, schema: pa.Schema) -> list[pa.Table | Damaged]:
        # A compressed model has one file per table; a run directory one per row, in a folder.
        single, folder = self.directory / f"{table}.parquet", self.directory / table
        paths = [single]
        if not is_file(single):
            paths = [folder / name for name in list_files(folder) if name.endswith(".parquet")]
        contents = read_files(paths)
        return [_read_part(*each, schema) for each in zip(paths, contents, strict=True)]

    def _read(self, table: str, schema: pa.Schema) -> pa.Table:
        parts = self._parts(table, schema)
        whole = [part for part in parts if not isinstance(part, Damaged)]
        return pa.concat_tables(whole) if whole else schema.empty_table()

    def completed(self, task_ids: Iterable[str], payload_dir: AnyPath) -> dict[str, dict[str, Any]]:
        """Group rows of those tasks that are done, by task id.

        A row is trusted only if its payload is there with the size and sha256 that it states, and
        so are the rows of its slices. The payload is read to know its sha256, from an object store
        too: what a store says of an object is what its writer said, and a resumed run reads less
        than it would compute again.
        """
        wanted = set(task_ids)
        slices = self.slice_counts()
        rows = [
            row
            for row in self.groups().to_pylist()
            if row["task_id"] in wanted and slices[row["task_id"]] == slice_count(row)
        ]
        problems = in_parallel(lambda row: payload_problem(row, payload_dir), rows)
        return {row["task_id"]: row for row, bad in zip(rows, problems, strict=True) if bad is None}

    def completed_curves(self, tasks: Iterable[CurveTask]) -> dict[str, list[dict[str, Any]]]:
        """Rows of those curves that are whole, by budget, by task id."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for row in self.curves().to_pylist():
            rows.setdefault(row["task_id"], []).append(row)
        return {
            task.task_id: rows[task.task_id]
            for task in tasks
            if tuple(row["byte_budget"] for row in rows.get(task.task_id, ())) == task.curve_budgets
        }

    def finished_tasks(self) -> int:
        """Number of tasks that have rows, encoded groups and curves."""
        return len(self.groups()) + len(set(self.curves()["task_id"].to_pylist()))

    def slice_counts(self) -> Counter[str]:
        """Number of rows in `slices` of each task."""
        return Counter(self.slices()["task_id"].to_pylist())

    def export(
        self, target: AnyPath, task_ids: Iterable[str], curve_ids: Iterable[str] = ()
    ) -> None:
        """Write the rows of these tasks, ``groups.parquet`` and the others, for a model."""
        wanted = {*task_ids, *curve_ids}
        make_directory(target)
        groups = self.groups()
        order = {task_id: i for i, task_id in enumerate(groups["task_id"].to_pylist())}
        tables = {"groups": groups, "slices": self.slices(), "curves": self.curves()}
        for name, table in tables.items():
            rows = [row for row in table.to_pylist() if row["task_id"] in wanted]
            rows.sort(key=lambda row: order.get(row["task_id"], 0))
            if rows:
                write_rows(target / f"{name}.parquet", rows, table.schema)


def _read_part(path: AnyPath, content: bytes | OSError, schema: pa.Schema) -> pa.Table | Damaged:
    if isinstance(content, OSError):
        return Damaged(path, str(content))
    try:
        table = pq.read_table(pa.BufferReader(content), partitioning=None)
        for key in sorted(KEYS & set(schema.names)):
            if key not in table.column_names or table[key].null_count:
                return Damaged(path, f"it has rows without {key}")
        # Columns that a newer version added are dropped, those of a later one are null.
        return pa.Table.from_pydict(
            {
                field.name: table[field.name].cast(field.type)
                if field.name in table.column_names
                else pa.nulls(len(table), field.type)
                for field in schema
            },
            schema=schema,
        )
    except (pa.ArrowException, OSError, ValueError) as error:
        return Damaged(path, str(error).splitlines()[0])


def slice_count(row: dict[str, Any]) -> int:
    """Number of slices of a group, by its row's format."""
    return sum(module["slices"] for module in json.loads(row["format"])["modules"].values())


def payload_problem(row: dict[str, Any], payload_dir: AnyPath) -> str | None:
    """Why a group row's payload cannot be trusted; None if it can."""
    path = payload_dir / row["payload"]
    found = file_size(path)
    if found is None:
        return f"{path} is missing"
    if found != row["payload_bytes"]:
        return f"{path} has {found} bytes, the manifest says {row['payload_bytes']}"
    if file_sha256(path) != row["sha256"]:
        return f"{path} does not have the sha256 that the manifest states"
    return None


def read_json(path: AnyPath) -> dict[str, Any]:
    """Read a JSON object that LeSTD wrote.

    Raises:
        LestdError: the file is missing or damaged, or the object store does not answer.
    """
    try:
        data = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError) as error:
        raise LestdError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise LestdError(f"{path} must hold a JSON object")
    return data


def write_json(path: AnyPath, data: dict[str, Any]) -> None:
    """Write a JSON object, atomically, with sorted keys."""
    content = json_bytes(data)
    atomic_write(path, lambda file: file.write(content))


def json_bytes(data: dict[str, Any]) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()
