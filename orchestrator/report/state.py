"""State of a run, derived from its calls and its rows."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from lestd_kernels.errors import LestdError
from orchestrator.manifest.checks import slice_count
from orchestrator.manifest.schemas import STAGES, Row
from workers.storage.files import AnyPath
from workers.storage.json_files import read_json

AGAIN = "run the same lestd compress again"


def ended_calls(calls: Sequence[Row], locked: bool) -> list[Row]:
    """Rows of `runs` whose state is what became of the call.

    A call that was killed could not say so, and its row says ``running`` for ever. It is
    ``killed`` here where a later call exists, or where nobody works on the run.

    Args:
        calls: rows of `runs`, oldest first.
        locked: whether a driver works on the run now.
    """
    last = len(calls) - 1

    def state(number: int, call: Row) -> Any:
        killed = call["state"] == "running" and (number < last or not locked)
        return "killed" if killed else call["state"]

    return [call | {"state": state(number, call)} for number, call in enumerate(calls)]


def run_state(
    calls: Sequence[Row], groups: Sequence[Row], slices: Mapping[str, int], damaged: Collection[Any]
) -> tuple[str | None, str]:
    """The state of a run, and in a few words why, where there is more to say.

    Args:
        calls: as `ended_calls` gives them.
        groups: the row of each finished group.
        slices: number of rows in `slices` by task id.
        damaged: files of `groups` and `slices` that cannot be read.

    Returns:
        ``running``, ``complete``, ``failed``, ``interrupted``, ``stopped`` (the last call was
        killed), ``incomplete`` (the last call put the model together, and rows of some layers are
        gone since), or None where no call was recorded; and the reason, which may be empty.
    """
    if not calls:
        return None, ""
    state: str = calls[-1]["state"]
    tasks = calls[-1]["tasks"]
    if state == "killed":
        return "stopped", f"the last call was killed; {AGAIN} to continue"
    if state in ("failed", "interrupted"):
        return state, f"{AGAIN} to continue"
    if state == "complete":
        bare = sum(slices.get(row["task_id"], 0) < slice_count(row) for row in groups)
        lost = max((tasks or 0) - len(groups), 0) + bare
        if lost:
            one = lost == 1
            whose = "1 layer's row is" if one else f"rows of {lost} layers are"
            return "incomplete", f"{whose} {'damaged' if damaged else 'missing'}; {AGAIN}"
    return state, ""


def planned_layers(run: AnyPath, known: Sequence[Row], tasks: int | None) -> list[Row]:
    """``layer`` and ``block`` of each planned block, in order.

    Args:
        run: the run directory, whose plan.json says it; a model has none.
        known: rows with ``layer`` and ``block``, which count where there is no plan.
        tasks: number of planned groups.
    """
    found = {(row["layer"], row["block"]) for row in known if row["layer"] is not None}
    try:
        layers = read_json(run / "plan.json")["layers"]
        found |= {(int(one["layer"]), str(one["block"])) for one in layers}
    except (LestdError, KeyError, TypeError, ValueError):
        numbers = {layer for layer, _ in found}
        # Where every layer has one block, those that nobody has named are numbers in between.
        if len(numbers) == len(found):
            numbers |= set(range(tasks or 0)) if len(numbers) < (tasks or 0) else set()
            names = dict(found)
            found = {(layer, names.get(layer, "")) for layer in numbers}
    return [{"layer": layer, "block": group} for layer, group in sorted(found)]


def task_span(work: Sequence[Row]) -> tuple[datetime | None, datetime | None]:
    """When the first task began and the last one had ended; (None, None) if none has."""
    begun = [row for row in work if row["started_at"] is not None]
    ends = [
        row["started_at"]
        + timedelta(seconds=math.fsum(row[f"seconds_{stage}"] or 0.0 for stage in STAGES))
        for row in begun
    ]
    return min((row["started_at"] for row in begun), default=None), max(ends, default=None)


def wall_time(calls: Sequence[Row], work: Sequence[Row]) -> list[Row]:
    """Parts of the wall time of the calls that ended; keys ``part``, ``what``, ``seconds``.

    Args:
        calls: as `ended_calls` gives them.
        work: rows of `groups`, and one of `curves` per task.
    """
    ended = [call for call in calls if call["seconds"] is not None and call["ended_at"]]
    if not ended:
        return []
    tasks = 0.0
    for call in ended:
        first, last = task_span(
            [
                row
                for row in work
                if row["started_at"] and call["started_at"] <= row["started_at"] <= call["ended_at"]
            ]
        )
        if first and last:
            tasks += (last - first).total_seconds()
    assemble = math.fsum(call["seconds_assemble"] or 0.0 for call in ended)
    rest = math.fsum(call["seconds"] for call in ended) - tasks - assemble
    starting = "starting Ray and its workers, " if ended[-1]["executor"] == "ray" else ""
    return [
        {"part": part, "what": what, "seconds": seconds}
        for part, what, seconds in (
            ("tasks", "from the first task to the last, of each call", tasks),
            ("assemble", "assembling the model", assemble),
            ("rest", f"{starting}planning and checking", max(rest, 0.0)),
        )
    ]
