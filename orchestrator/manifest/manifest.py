"""The manifest: the record of a run, in Parquet files that appear whole or not at all.

    manifest/groups/<task_id>.parquet       one row: the group is done     (written last)
    manifest/slices/<task_id>.parquet       one row per slice of the group (written before it)
    manifest/curves/<task_id>.parquet       one row per byte budget of a group's curve
    manifest/events/<time>.parquet          one row: started, retried, failed
    manifest/runs/<invocation>.parquet      one row: a call of `lestd compress`
    manifest/evaluations/<id>.parquet       one row per metric
    manifest/<table>.parquet                rows of many such files, once compacted

Many tasks that are committed at the same time share files, which have the time in their names.

Their columns are in `orchestrator.manifest.schemas`, for people in docs/manifest.md.

The group row is the commit. It is written after the payload is on disk, or in an object store,
under a name that carries its sha256, so a crash at any moment leaves either a finished task or no
trace of it. A curve has no payload: its file is its commit. Every file is readable on its own by
anything that reads Parquet; a damaged one costs its own task only.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import pyarrow as pa
import pyarrow.compute as pc

from lestd_kernels.errors import LestdError
from orchestrator.manifest.checks import payload_problem, slice_count
from orchestrator.manifest.part_files import (
    PARQUET,
    Damaged,
    TableRead,
    compact_table,
    compacted_path,
    part_path,
    read_table,
    write_part,
    write_table,
)
from orchestrator.manifest.result_rows import curve_rows, group_row, slice_rows
from orchestrator.manifest.schemas import (
    CURVES,
    EVALUATIONS,
    EVENTS,
    GROUPS,
    RUNS,
    SLICES,
    TABLES,
    TableSpec,
)
from workers.contracts import CurveResult, CurveTask, Failure, Result, Task
from workers.storage.files import (
    AnyPath,
    as_path,
    copy_file,
    in_parallel,
    list_files,
    list_names,
    make_directory,
)
from workers.storage.names import MANIFEST_DIR, TEMPORARY

if TYPE_CHECKING:  # It imports torch, which readers of a manifest need not wait for.
    from orchestrator.execution.executor import Event

MANY_PARTS = 1000
"""More part files than that, which take a second to read, are compacted by their driver."""
TableType = Literal["arrow", "pandas", "polars"]
"""Forms of a table; their libraries are imported on demand."""
_GOES_ON_WITH = ("scope", "metric_squared_norm", "metric_squared_error")
"""Columns of `groups` that allocation and assembly read; null in rows of earlier versions."""
_TOGETHER = 8  # From so many results on they are committed together.
_SPECTRA = ("singular_values_1", "singular_values_2")
_RUN = ".run"
_AnyPathT = TypeVar("_AnyPathT", bound=AnyPath)


def default_run_dir(out: _AnyPathT) -> _AnyPathT:
    """``OUT.run``, beside the output.

    Raises:
        LestdError: `out` is the root directory.
    """
    if not out.name:
        raise LestdError(f"{out} cannot be the directory of a model; name one inside it")
    return cast(_AnyPathT, out.with_name(out.name + _RUN))


def default_evaluation_dir(model: _AnyPathT) -> _AnyPathT:
    """``MODEL.eval``, beside the model.

    Raises:
        LestdError: `model` is the root directory.
    """
    directory: AnyPath = model
    if isinstance(model, Path):  # Not `resolve`: a link's target has other neighbors.
        directory = Path(os.path.abspath(model))  # noqa: PTH100
    if not directory.name:
        raise LestdError(f"{model} cannot be the directory of a model; name one inside it")
    return cast(_AnyPathT, directory.with_name(directory.name + ".eval"))


def manifest_directory(path: AnyPath) -> AnyPath:
    """The manifest directory of what a person names.

    Args:
        path: a compressed model, a run directory, a model in the making, a dense model that was
            evaluated, or a manifest directory.

    Raises:
        LestdError: there is none; or the object store does not answer.
    """
    candidates = [path / MANIFEST_DIR]
    if path.name == MANIFEST_DIR:
        candidates.append(path)
    if path.name:
        candidates += [
            beside / MANIFEST_DIR
            for beside in (default_run_dir(path), default_evaluation_dir(path))
        ]
    for directory in candidates:
        if list_names(directory):
            return directory
    absent = isinstance(path, Path) and not path.exists()
    found = "does not exist, and neither does" if absent else "has no manifest, and neither has"
    raise LestdError(
        f"{path} {found} a run or an evaluation beside it; name the directory of a compressed "
        "model or of a run, as given to --out or --run-dir"
    )


class Manifest:
    """The manifest of a run or of a compressed model.

        Manifest("OUT").slices()            # a pyarrow.Table
        Manifest("OUT").groups("pandas")    # a pandas.DataFrame

    Readers may look while a run goes on, and see what was committed when they looked.

    Args:
        path: path or URL of a compressed model, of a run directory, of an output whose run is not
            finished, or of a ``manifest`` directory, which is made on the first write.

    Raises:
        LestdError: there is no manifest at a path that is not itself called ``manifest``.
    """

    def __init__(self, path: str | AnyPath) -> None:
        path = as_path(path) if isinstance(path, str) else path
        if path.name != MANIFEST_DIR or list_names(path / MANIFEST_DIR):
            path = manifest_directory(path)
        self.directory = path
        self._events: list[dict[str, Any]] = []
        self._written = 0

    # -- writing: the driver only ------------------------------------------------------------

    def commit(self, *results: Result | CurveResult) -> None:
        """Record finished tasks: slice rows first, then the group rows, which mean done.

        Each has files of its own, so that damage costs it alone; where workers are faster than
        those are written, all share them.
        """
        self._write_events()
        if len(results) < _TOGETHER:
            for one in results:
                self._commit([one])
        else:
            self._commit(results)

    def _commit(self, results: Sequence[Result | CurveResult]) -> None:
        curves = [one for one in results if isinstance(one, CurveResult)]
        groups = [one for one in results if isinstance(one, Result)]
        for spec, tasks, rows in (
            (CURVES, curves, chain.from_iterable(map(curve_rows, curves))),
            (SLICES, groups, chain.from_iterable(map(slice_rows, groups))),
            (GROUPS, groups, map(group_row, groups)),
        ):
            if tasks:
                first = tasks[0].task_id
                self._write(spec, first if len(tasks) == 1 else _name_by_time(first), [*rows])

    def record_event(self, event: Event, task: Task) -> None:
        """Record that a task was started or retried; where more follows at once, with that."""
        self._add_event(asdict(event), task)
        if not event.more:
            self._write_events()

    def record_failure(self, failure: Failure, task: Task) -> None:
        """Record that a task failed for good."""
        self._add_event(asdict(failure) | {"kind": "failed"}, task)
        self._write_events()

    def _add_event(self, row: dict[str, Any], task: Task) -> None:
        worker = row["worker"] or None
        row |= {"time": time.time_ns() // 1000, "layer": task.layer, "block": task.block}
        row |= {"worker": worker, "node": worker and worker.rpartition(":")[0]}
        self._events.append(row)

    def _write_events(self) -> None:
        if self._events:
            self._write(EVENTS, _name_by_time(self._events[0]["task_id"]), self._events)
            self._events.clear()

    def _write(self, spec: TableSpec, name: str, rows: Sequence[dict[str, Any]]) -> None:
        write_part(part_path(self.directory, spec, name + PARQUET), rows, spec)
        self._written += 1

    def record_run(self, row: dict[str, Any]) -> None:
        """Record a call of compress, as it begins and again as it ends; a row of `runs`."""
        self._write(RUNS, row["invocation"], [row])

    def record_evaluation(self, rows: Sequence[dict[str, Any]]) -> None:
        """Record the metrics of one evaluation: rows of `evaluations` with one evaluation_id."""
        self._write(EVALUATIONS, rows[0]["evaluation_id"], rows)

    def compact(self, check: Callable[[], None]) -> int:
        """Put the part files of every table together; see
        `orchestrator.manifest.part_files.compact_table`.

        Not those of `evaluations`, which several processes may write at a time.

        Args:
            check: raises where the run is another driver's.

        Returns:
            Number of part files that are gone.
        """
        self._written = 0
        return sum(compact_table(self.directory, spec, check) for spec in _OF_A_DRIVER)

    def compact_many(self, check: Callable[[], None]) -> None:
        """`compact`, where more than `MANY_PARTS` part files were written since the last time."""
        if self._written > MANY_PARTS:
            self.compact(check)

    def compact_found(self, check: Callable[[], None]) -> None:
        """`compact`, before a run goes on, where there are more than `MANY_PARTS` part files, or
        one of many tasks: one that is done again is to be in one part only."""
        found = {spec.name: list_names(self.directory / spec.name) for spec in _OF_A_DRIVER}
        together = any("-" in name for spec in _OF_TASKS for name in found[spec.name])
        if together or sum(map(len, found.values())) > MANY_PARTS:
            self.compact(check)

    # -- reading -----------------------------------------------------------------------------

    def groups(self, to: TableType = "arrow") -> Any:
        """All group rows, by layer."""
        return self.table("groups", to)

    def slices(self, to: TableType = "arrow") -> Any:
        """All slice rows, by layer; those of one group in the order of its slices."""
        return self.table("slices", to)

    def curves(self, to: TableType = "arrow") -> Any:
        """All rows of curves, by layer and budget."""
        return self.table("curves", to)

    def events(self, to: TableType = "arrow") -> Any:
        """All events, oldest first."""
        return self.table("events", to)

    def runs(self, to: TableType = "arrow") -> Any:
        """All calls of compress, oldest first."""
        return self.table("runs", to)

    def evaluations(self, to: TableType = "arrow") -> Any:
        """All metrics of all evaluations, oldest first."""
        return self.table("evaluations", to)

    def table(self, name: str, to: TableType = "arrow") -> Any:
        """A table by its name.

        Returns:
            ``pyarrow.Table``, ``pandas.DataFrame`` or ``polars.DataFrame``.

        Raises:
            ImportError: pandas or polars is asked for and not installed.
            LestdError: the object store does not answer.
        """
        rows = self.read(name).rows
        if to == "pandas":
            return rows.to_pandas()
        if to == "polars":
            import polars

            return polars.from_arrow(rows)
        return rows

    def read(self, name: str) -> TableRead:
        """A table by its name, with the files that could not be read.

        What a run lacks of evaluations is with the model beside it: that is read instead.
        """
        found = read_table(self.directory, TABLES[name])
        run = self.directory.parent
        if name != EVALUATIONS.name or not run.name.endswith(_RUN):
            return found
        if found.damaged or len(found.rows):
            return found
        model = run.with_name(run.name.removesuffix(_RUN))
        return read_table(model / MANIFEST_DIR, EVALUATIONS)

    def damaged(self) -> list[Damaged]:
        """Files that cannot be read as rows of their table."""
        return [bad for name in TABLES for bad in self.read(name).damaged]

    def completed(self, task_ids: Iterable[str], payload_dir: AnyPath) -> dict[str, dict[str, Any]]:
        """Group rows of those tasks that are done, by task id.

        A row is trusted only if it has all that a run goes on with, which those of earlier versions
        lack, its payload is there with the size and sha256 that it states, and so are the rows of
        its slices. The payload is read to know its sha256, from an object store
        too: what a store says of an object is what its writer said, and a resumed run reads less
        than it would compute again.

        Returns:
            The rows by task id, without the singular values.
        """
        wanted = set(task_ids)
        slices = self.slice_counts()
        # Spectra are long, and all rows are held.
        rows = [
            row
            for row in self.groups().drop_columns(list(_SPECTRA)).to_pylist()
            if row["task_id"] in wanted
            and slices[row["task_id"]] == slice_count(row)
            and all(row[name] is not None for name in _GOES_ON_WITH)
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

    def export(self, target: AnyPath, task_ids: Iterable[str], run: dict[str, Any]) -> None:
        """Write what a model's own manifest has, ``groups.parquet`` and the others.

        Args:
            target: its directory.
            task_ids: of the groups and curves that the model is made of; their rows go there.
            run: the row of the call that makes it, which is not recorded as ended yet. Those of
                earlier calls go there too, and all events.
        """
        make_directory(target)
        wanted = pa.array([*task_ids], pa.string())
        for spec in _OF_TASKS:
            rows = self.table(spec.name)
            _write_if_any(target, spec, rows.filter(pc.is_in(rows["task_id"], wanted)))
        earlier = [r for r in self.runs().to_pylist() if r["invocation"] != run["invocation"]]
        _write_if_any(target, RUNS, pa.Table.from_pylist([*earlier, run], schema=RUNS.schema))
        _write_if_any(target, EVENTS, self.events())


def _name_by_time(task_id: str) -> str:
    """Name of a new file that is about this task, and perhaps about others."""
    return f"{time.time_ns():020d}-{task_id[:16]}"


# Written by the one driver of a run.
_OF_TASKS = (GROUPS, SLICES, CURVES)
_OF_A_DRIVER = [spec for spec in TABLES.values() if spec is not EVALUATIONS]


def _write_if_any(target: AnyPath, spec: TableSpec, rows: pa.Table) -> None:
    if len(rows):
        write_table(compacted_path(target, spec), rows)


def keep_evaluations(model: AnyPath, again: AnyPath) -> None:
    """Copy the evaluations of a model to where the same model is made again."""
    folders = [directory / MANIFEST_DIR / EVALUATIONS.name for directory in (model, again)]
    for name in list_files(folders[0]):
        if not name.startswith(TEMPORARY):
            make_directory(folders[1])
            copy_file(folders[0] / name, folders[1] / name)
