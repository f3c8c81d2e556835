"""Differences of two runs as plain values: configuration, bytes, error, time, quality.

Groups are matched by name. Where one side has groups that the other lacks, since it is not
finished or other layers were chosen, figures are those of the groups that both have.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.manifest.manifest import Manifest
from orchestrator.manifest.schemas import COMPUTING_STAGES, STAGES, Row
from orchestrator.model.directory import about_model
from orchestrator.report.data import ReportData, gather, root_ratio
from orchestrator.report.quality import SAME_QUESTION
from orchestrator.report.timeline import stage_seconds
from workers.checkpoint.tensors import INDEX_FILE
from workers.storage.files import AnyPath, is_file
from workers.storage.json_files import read_json

WALL_TIME = "wall time"
"""Of all calls that ended; None where it was not taken in the same way on both sides."""
WORKERS = "worker processes"
"""Those that finished a task, over all calls: one that died and was replaced counts too."""
_OF_A_CALL = ("model", "revision", "family", "executor")
_OF_A_LAYER = ("dense_bytes", "stored_bytes", "relative_error", "R1", "R2", "R3", "density")


class _Side:
    """One of the two: its report's content, and what that leaves out."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.data: ReportData = gather(path)
        manifest = Manifest(path)
        # The rows that the report's layers are of: where a group was encoded twice, the later ones.
        rows = manifest.groups().sort_by("started_at").to_pylist()
        self.groups = {row["block"]: row for row in rows}
        # What belongs to a task of pass one stands in each of its rows.
        self.curves = {row["task_id"]: row for row in manifest.curves().to_pylist()}.values()
        self.directory: AnyPath = manifest.directory.parent
        self.configuration = _configuration(self.directory, self.data)

    def chosen(self, groups: Iterable[str]) -> list[Row]:
        return [self.groups[group] for group in groups]

    def work(self, groups: Iterable[str]) -> list[Row]:
        """A row of each task of both passes."""
        wanted = set(groups)
        return [*self.chosen(wanted), *(row for row in self.curves if row["block"] in wanted)]


def compare(before: str, after: str) -> Row:
    """Compare two manifests.

    Args:
        before: path or URL of a compressed model, a run directory, or an output whose run is not
            finished.
        after: another.

    Returns:
        ``before`` and ``after`` (``path``, ``state``, ``finished``, ``tasks``, ``calls``,
        ``calls_without_time``: those of them that have not ended, ``damaged``);
        ``identical``, whether every payload of either has the same sha256 as the other's;
        ``common``, the number of groups that both have, and ``only_before``, ``only_after``, the
        names of those that one has; ``configuration``, its entries that differ (``what``,
        ``before``, ``after``); ``bytes``, ``error`` and ``time``, lists of figures (``what``,
        ``unit``, ``before``, ``after``, ``change``, and ``ratio``, after / before); ``quality``,
        see `_quality`; ``layers``, one entry per common group, by layer.

    Raises:
        LestdError: one has no manifest, or the object store does not answer.
    """
    old, new = _Side(before), _Side(after)
    common = [group for group in old.groups if group in new.groups]
    common.sort(key=lambda group: (old.groups[group]["layer"], group))
    both = {group: (old.groups[group], new.groups[group]) for group in common}
    same = [one["sha256"] == other["sha256"] for one, other in both.values()]
    calls = [{call["invocation"] for call in side.data.calls} for side in (old, new)]
    # A model and its run share calls, and the model's copy of them ends before they do.
    clocked = bool(calls[0]) == bool(calls[1]) and not calls[0] & calls[1]
    only = [sorted(a.groups.keys() - b.groups.keys()) for a, b in ((old, new), (new, old))]
    clocked = clocked and not any(only)
    return {
        **{name: _about(side) for name, side in (("before", old), ("after", new))},
        "identical": bool(same) and all(same) and not any(only),
        "common": len(common),
        "only_before": only[0],
        "only_after": only[1],
        "configuration": _changed(old.configuration, new.configuration) + _sources(both),
        "bytes": _figures(lambda side: _bytes(side, common), old, new),
        "error": _figures(lambda side: _errors(side, common), old, new),
        "time": _figures(lambda side: _seconds(side, common, clocked), old, new),
        "quality": _quality(old.data.evaluations, new.data.evaluations),
        "layers": [_layer(one, other) for one, other in both.values()],
    }


def _about(side: _Side) -> Row:
    summary = side.data.summary
    about = {key: summary[key] for key in ("state", "finished", "tasks", "calls")}
    about["calls_without_time"] = sum(call["seconds"] is None for call in side.data.calls)
    return {"path": side.path} | about | {"damaged": side.data.damaged}


# -- configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Configuration:
    """Configuration that a run was asked for.

    Attributes:
        known: the source and where it ran, as far as it is recorded.
        config: the run's configuration, flat; None if it is not recorded.
        versions: of the software; None likewise.
    """

    known: Row
    config: Row | None
    versions: Row | None


def _configuration(directory: AnyPath, data: ReportData) -> _Configuration:
    known, config, versions = {}, None, None
    if data.calls:
        last = data.calls[-1]
        known = {name: last[name] for name in _OF_A_CALL}
        config, versions = (
            last[name] and json.loads(last[name]) for name in ("config", "versions")
        )
    if config is None:
        recorded, known = _recorded(directory)
        config, versions = (recorded.get(name) for name in ("config", "versions"))
    summary = data.summary
    if summary["devices"]:
        known["hardware"] = ", ".join(summary["devices"])
    return _Configuration(known, *(value and _flat(_object(value)) for value in (config, versions)))


def _object(value: Any) -> Row:
    """A part of a file that a run wrote; nothing where it is damaged."""
    return value if isinstance(value, dict) else {}


def _recorded(directory: AnyPath) -> tuple[Row, Row]:
    """The fingerprint beside a manifest without rows of calls, and what is known of the source."""
    path = directory / "run.json"
    if not is_file(path):
        return (about_model(directory) or {}).get("fingerprint", {}), {}
    run = read_json(path)
    source = _object(run.get("source"))
    return _object(run.get("fingerprint")), {
        key: source[key] for key in _OF_A_CALL if key in source
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> Row:
    found: Row = {}
    for key, value in sorted(values.items()):
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _changed(old: _Configuration, new: _Configuration) -> list[Row]:
    """The entries that differ; what one side has no record of is not compared."""
    both = [key for key in old.known if key in new.known]
    found = [(key, old.known[key], new.known[key]) for key in both]
    if old.config is not None and new.config is not None:
        keys = dict.fromkeys([*old.config, *new.config])
        found += [(key, old.config.get(key), new.config.get(key)) for key in keys]
    if old.versions is not None and new.versions is not None:
        found += [
            (f"version of {key}", value, new.versions[key])
            for key, value in old.versions.items()
            if key in new.versions
        ]
    return [
        {"what": what, "before": before, "after": after}
        for what, before, after in found
        if before != after
    ]


def _sources(both: Mapping[str, tuple[Row, Row]]) -> list[Row]:
    """An entry that tells of weights that were not the same."""
    digests = [[row["source_sha256"] for row in rows] for rows in both.values()]
    differ = sum(None not in pair and pair[0] != pair[1] for pair in digests)
    if not differ:
        return []
    return [{"what": "source weights", "before": None, "after": f"other in {differ} layers"}]


# -- figures -------------------------------------------------------------------------------------


def _figures(
    of: Callable[[_Side], list[tuple[str, str, Any]]], old: _Side, new: _Side
) -> list[Row]:
    """The figures that either side has, ``(what, unit, value)``, side by side."""
    sides = [{(what, unit): value for what, unit, value in of(side)} for side in (old, new)]
    keys = [*sides[0], *(key for key in sides[1] if key not in sides[0])]
    figures = []
    for what, unit in keys:
        before, after = (side.get((what, unit)) for side in sides)
        if before is not None or after is not None:
            figures.append({"what": what, "unit": unit} | _pair(before, after))
    return figures


def _pair(before: float | None, after: float | None) -> Row:
    known = before is not None and after is not None
    return {
        "before": before,
        "after": after,
        "change": after - before if known else None,  # type: ignore[operator]
        "ratio": after / before if known and before else None,  # type: ignore[operator]
    }


def _bytes(side: _Side, common: Sequence[str]) -> list[tuple[str, str, Any]]:
    rows = side.chosen(common)
    if not rows:
        return []
    stored, dense = (sum(row[key] for row in rows) for key in ("stored_bytes", "dense_bytes"))
    whole = _model_stored_bytes(side) if len(rows) == len(side.groups) else None
    nonzeros = [row["nnz"] for row in rows]
    return [
        ("weights in scope, dense", "bytes", dense),
        ("weights in scope, stored", "bytes", stored),
        ("stored / dense", "", stored / dense if dense else None),
        ("core elements kept", "count", None if None in nonzeros else sum(nonzeros)),
        ("whole model, stored", "bytes", whole),
    ]


def _model_stored_bytes(side: _Side) -> int | None:
    """Stored bytes of all weights; None while they are not known."""
    found: int | None = side.data.summary["model_stored_bytes"]
    if found is None and is_file(side.directory / INDEX_FILE):
        found = _size(read_json(side.directory / INDEX_FILE).get("metadata"), "total_size")
    elif found is None and is_file(side.directory / "plan.json"):
        plan = read_json(side.directory / "plan.json")
        untouched, layers = _size(plan.get("total"), "untouched_bytes"), plan.get("layers")
        if isinstance(layers, list) and len(layers) == len(side.groups) and untouched is not None:
            found = untouched + sum(row["stored_bytes"] for row in side.groups.values())
    return found


def _size(value: Any, key: str) -> int | None:
    found = _object(value).get(key)
    return found if type(found) is int else None


def _errors(side: _Side, common: Sequence[str]) -> list[tuple[str, str, Any]]:
    rows = side.chosen(common)
    figures = [
        ("all projections", "", root_ratio([(r["squared_error"], r["squared_norm"]) for r in rows]))
    ]
    shared = set(common)
    heads = [row for row in side.data.heads if row["block"] in shared]
    for projection in dict.fromkeys(row["projection"] for row in heads):
        own = [row for row in heads if row["projection"] == projection]
        pairs = [
            (error and norm and error**2 * norm, norm)
            for error, norm in ((row["relative_error"], row["squared_norm"]) for row in own)
        ]
        figures.append((projection, "", root_ratio(pairs)))
    return figures


def _seconds(side: _Side, common: Sequence[str], clocked: bool) -> list[tuple[str, str, Any]]:
    """Times; that of the wall only where it was taken in the same way on both sides.

    Where no calls are recorded it runs from the first task's start to the last one's end.
    """
    work = side.work(common)
    stages = {row["stage"]: row["seconds"] for row in stage_seconds(work)} if work else {}
    peaks = [row["peak_memory_bytes"] for row in work if row["peak_memory_bytes"] is not None]
    return [
        (WALL_TIME, "seconds", side.data.summary["seconds"] if clocked else None),
        ("working time of all workers", "seconds", _sum_of(stages, STAGES)),
        ("decomposing", "seconds", _sum_of(stages, COMPUTING_STAGES)),
        *((stage, "seconds", seconds) for stage, seconds in stages.items()),
        ("memory of a worker", "bytes", max(peaks, default=None)),
        (WORKERS, "count", side.data.summary["workers"] or None),
    ]


def _sum_of(seconds: Mapping[str, float], stages: Iterable[str]) -> float | None:
    return math.fsum(seconds[stage] for stage in stages) if seconds else None


# -- quality and layers --------------------------------------------------------------------------


def _quality(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """The metrics that both compressed models were measured in, in the same way.

    Each has what tells it from others (``task``, ``metric``, ``answer_filter``, ...), the figures
    of `_pair`, ``higher_is_better``, and ``stderr``: the standard error of the change for
    independent samples, ``sqrt(a^2 + b^2)``; null where one of the two is unknown.
    """
    sides: list[dict[tuple[Any, ...], Row]] = []
    for rows in (old, new):
        measured = [row for row in rows if row["after"] is not None]
        # Of several models that one run was evaluated as, or the same one again, the latest.
        measured.sort(key=lambda row: str(row["time"] or ""))
        sides.append({tuple(row[key] for key in SAME_QUESTION): row for row in measured})
    found = []
    for key, before in sides[0].items():
        if (after := sides[1].get(key)) is not None:
            errors = [before["after_stderr"], after["after_stderr"]]
            found.append(
                dict(zip(SAME_QUESTION, key, strict=True))
                | _pair(before["after"], after["after"])
                | {
                    "stderr": None if None in errors else math.hypot(*errors),
                    "higher_is_better": after["higher_is_better"],
                }
            )
    return found


def _layer(before: Row, after: Row) -> Row:
    sides = {
        name: {key: row[key] for key in _OF_A_LAYER}
        for name, row in (("before", before), ("after", after))
    }
    return {
        "layer": after["layer"],
        "block": after["block"],
        "identical": before["sha256"] == after["sha256"],
        **sides,
        "stored_bytes": _pair(before["stored_bytes"], after["stored_bytes"]),
        "relative_error": _pair(before["relative_error"], after["relative_error"]),
    }


def by_difference(layers: Sequence[Row]) -> list[Row]:
    """The layers of `compare` that are not identical, those that differ most first.

    What counts is the larger of two changes: of the relative error, and of the stored bytes as a
    share of the dense ones.
    """

    def size(layer: Row) -> float:
        stored: float = layer["stored_bytes"]["change"] / max(layer["after"]["dense_bytes"], 1)
        error: float = layer["relative_error"]["change"] or 0.0
        return max(abs(stored), abs(error))

    differing = [layer for layer in layers if not layer["identical"]]
    return sorted(differing, key=size, reverse=True)
