"""Contents of a report as plain values, gathered from a manifest; its looks are decided elsewhere.

Names of the manifest's columns are kept, with their units (`orchestrator.manifest.schemas`). Times
are aware datetimes in UTC. A figure that the manifest does not have is None, never a guess.

Where a run encoded a group twice, as global allocation may when its prediction fails, the later
encoding is the group's; the time that the other one took stays in the timeline.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

from lestd_kernels.options import DISK
from orchestrator.manifest.manifest import Manifest
from orchestrator.manifest.result_rows import (
    counted_bytes,
    total_expected_loss,
    total_memory_bytes,
)
from orchestrator.manifest.schemas import COMPUTING_STAGES, DIVERGENCE_TASK, STAGES, Row
from orchestrator.report.losses import divergences, hulls
from orchestrator.report.quality import before_and_after
from orchestrator.report.state import ended_calls, planned_layers, run_state, task_span, wall_time
from orchestrator.report.timeline import lost_attempts, stage_seconds, timeline
from orchestrator.run.directory import RunDirectory
from workers.storage.names import MANIFEST_DIR


def model_name(summary: Row) -> str | None:
    """The model's name for a headline: of a path its last two parts, the rest is private."""
    name = summary["model"]
    if name is None:
        return None
    parts = [part for part in PurePosixPath(name).parts if part != "/"]
    return "/".join(parts[-2:])


def calls_in_words(summary: Row) -> str:
    """How many calls the wall time is of, and how many have none."""
    ended, without = summary["ended_calls"], summary["calls"] - summary["ended_calls"]
    said = f"{ended} call{'s' if ended != 1 else ''}"
    if without:
        said += f" that ended; {without} {'have' if without != 1 else 'has'} no end"
    return said


PROJECTIONS = ("q", "k", "v", "o")
"""The order in which projections are shown; others follow by name."""

_RUN = ".run"
_NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class ReportData:
    """The content of a report.

    Attributes:
        summary: one value per key, see `_summary`.
        planned: what the plan said beside what came; keys ``what``, ``unit``, ``planned``,
            ``actual``; either may be None.
        projections: one row per projection, over all finished layers: ``projection``, ``slices``,
            ``nnz``, ``density``, ``core_bytes``, ``relative_error``, ``energy_share``.
        layers: one row per finished group, by layer.
        missing: ``layer``, ``block`` of each planned group that is not finished; the name is
            empty where the manifest does not know it.
        heads: one row per slice, by layer, projection and head.
        spectra: one row per group and mode whose singular values are known: ``layer``, ``block``,
            ``mode``, ``rank``, ``singular_values`` (descending, all of them).
        wall: what the wall time went to; see `wall_time`.
        stages: ``stage``, ``seconds``: worker time over all tasks, curves included.
        timeline: one row per finished task of a worker, by start; see `timeline`.
        lost: one row per attempt that was lost, by its end; see `lost_attempts`.
        calls: rows of `runs`, oldest first; the state of one that was killed is ``killed``.
        evaluations: one row per metric and model, before beside after; see `before_and_after`.
        hulls: expected loss against bytes, see `orchestrator.report.losses.hulls`.
        divergences: expected loss beside what was measured, see `divergences` there.
        correlation: the row of `evaluations` that has theirs; None where none has.
        damaged: ``path``, ``name`` (its end, from the run's own directory on) and ``reason`` of
            each file of the manifest that cannot be read.
    """

    summary: Row
    planned: list[Row]
    projections: list[Row]
    layers: list[Row]
    missing: list[Row]
    heads: list[Row]
    spectra: list[Row]
    wall: list[Row]
    stages: list[Row]
    timeline: list[Row]
    lost: list[Row]
    calls: list[Row]
    evaluations: list[Row]
    hulls: list[Row]
    divergences: list[Row]
    correlation: Row | None
    damaged: list[Row]


def gather(path: str) -> ReportData:
    """Read a manifest once, as it is now.

    Args:
        path: of a compressed model, a run directory, or an output whose run is not finished; a
            path or a URL.

    Raises:
        LestdError: there is no manifest, or the object store does not answer.
    """
    manifest = Manifest(path)
    found = {
        name: manifest.read(name)
        for name in ("runs", "groups", "slices", "curves", "events", "evaluations")
    }
    if not len(found["evaluations"].rows) and (model := _model_of(manifest)):
        found["evaluations"] = model.read("evaluations")
    encoded = found["groups"].rows.to_pylist()
    groups = _latest(encoded)
    points: dict[str, list[Row]] = {}
    for row in found["curves"].rows.to_pylist():
        points.setdefault(row["block"], []).append(row)
    curves = list({row["task_id"]: row for of in points.values() for row in of}.values())
    evaluations = found["evaluations"].rows.to_pylist()
    measured, correlation = divergences(evaluations, groups)
    events = found["events"].rows.to_pylist()
    locked = RunDirectory(manifest.directory.parent).is_locked()
    calls = ended_calls(found["runs"].rows.to_pylist(), locked)
    heads = _heads(found["slices"].rows, {row["task_id"] for row in groups})
    lost = lost_attempts(events)
    tasks = calls[-1]["tasks"] if calls else None
    planned = planned_layers(manifest.directory.parent, [*groups, *curves, *events], tasks)
    finished = {row["block"] for row in groups}, {row["layer"] for row in groups}
    summary = _summary(path, groups, [*encoded, *curves], calls, events)
    summary["state"], summary["state_reason"] = run_state(
        calls,
        groups,
        Counter(found["slices"].rows["task_id"].to_pylist()),
        [*found["groups"].damaged, *found["slices"].damaged],
    )
    beside = str(manifest.directory.parent.parent)
    return ReportData(
        summary=summary,
        planned=_planned(groups, [*encoded, *curves], calls),
        projections=_projections(heads),
        layers=[_layer(row) for row in groups],
        missing=[
            row
            for row in planned
            if row["block"] not in finished[0] and (row["block"] or row["layer"] not in finished[1])
        ],
        heads=heads,
        spectra=_spectra(groups),
        wall=wall_time(calls, [*encoded, *curves]),
        stages=stage_seconds([*encoded, *curves]),
        timeline=timeline(encoded, curves),
        lost=lost,
        calls=calls,
        evaluations=before_and_after(
            [row for row in evaluations if row["task"] != DIVERGENCE_TASK]
        ),
        hulls=hulls(groups, points),
        divergences=measured,
        correlation=correlation,
        damaged=[
            {
                "path": str(bad.path),
                "name": str(bad.path).removeprefix(beside).lstrip("/"),
                "reason": bad.reason,
            }
            for table in found.values()
            for bad in table.damaged
        ],
    )


def _model_of(manifest: Manifest) -> Manifest | None:
    """The manifest of the model that a run made, where evaluations are kept; None if none is."""
    run = manifest.directory.parent
    if not run.name.endswith(_RUN):
        return None
    return Manifest(run.with_name(run.name.removesuffix(_RUN)) / MANIFEST_DIR)


def _latest(rows: Sequence[Row]) -> list[Row]:
    """The row of each group that was started last, in order."""
    latest: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row["started_at"] or _NEVER):
        latest[row["block"]] = row
    return sorted(latest.values(), key=lambda row: (row["layer"], row["block"]))


def _summary(
    path: str,
    groups: Sequence[Row],
    work: Sequence[Row],
    calls: Sequence[Row],
    events: Sequence[Row],
) -> Row:
    """Facts of a whole run, but for its ``state`` and ``state_reason``; see `run_state`.

    The keys: ``path``; ``model``, ``revision``, ``family``, ``method``, ``metric``, ``pattern``,
    ``scope``, ``allocation``, ``keep``, ``device``, ``executor``; ``finished``, ``tasks``;
    ``started_at``; ``ended_at`` of the last call, None while it has no end; ``last_result_at``;
    ``seconds``, the wall time of the calls that ended (None if none has), or, where no call was
    recorded, ``span_seconds``, from the first task's start to the last one's end;
    ``worker_seconds``; ``calls``, ``ended_calls`` (those with a wall time) and ``killed_calls``;
    ``workers`` (processes), ``nodes`` (names), ``devices``, ``retried``, ``failed``;
    ``dense_bytes``, ``byte_budget``, ``stored_bytes`` and ``memory_bytes`` of the finished groups,
    and which of both the budget counts, ``size``;
    ``scope_dense_bytes`` and ``scope_byte_budget`` of all;
    ``model_bytes``, ``untouched_bytes``, and ``model_stored_bytes``, None until complete;
    ``relative_error`` and ``expected_loss`` over the finished groups; ``curves``, finished ones of
    pass one.
    """
    last = calls[-1] if calls else {}
    tasks = last.get("tasks")
    stored = sum(row["stored_bytes"] for row in groups)
    whole = tasks == len(groups)
    untouched = last.get("untouched_bytes")
    first, end = task_span(work)
    started = min((c["started_at"] for c in calls if c["started_at"]), default=first)
    seconds = [call["seconds"] for call in calls if call["seconds"] is not None]
    span = (end - first).total_seconds() if first and end else None
    kinds = [event["kind"] for event in events]
    one = groups[0] if groups else {}
    return {
        "path": path,
        **{key: last.get(key) for key in ("model", "revision", "family", "scope", "allocation")},
        "method": last.get("method") or one.get("method"),
        "metric": " or ".join(sorted({row.get("metric") or "" for row in groups})) or None,
        "pattern": last.get("pattern") or one.get("pattern"),
        **{key: last.get(key) for key in ("keep", "device", "executor")},
        "finished": len(groups),
        "tasks": tasks,
        "curves": len(work) - sum("payload" in row for row in work),
        "started_at": started,
        "ended_at": last.get("ended_at"),
        "last_result_at": end,
        "seconds": sum(seconds) if seconds else None if calls else span,
        "span_seconds": span,
        "worker_seconds": math.fsum(row["seconds"] for row in stage_seconds(work)),
        "calls": len(calls),
        "ended_calls": len(seconds),
        "killed_calls": sum(call["state"] == "killed" for call in calls),
        "workers": len({row["worker"] for row in work if row["worker"]}),
        "nodes": sorted({row["node"] for row in work if row["node"]}),
        "devices": sorted({row["device"] for row in work if row["device"]}),
        "retried": kinds.count("retried"),
        "failed": kinds.count("failed"),
        "dense_bytes": sum(row["dense_bytes"] for row in groups),
        "byte_budget": sum(row["byte_budget"] for row in groups),
        "stored_bytes": stored,
        "memory_bytes": total_memory_bytes(groups),
        "size": one.get("size") or DISK,
        "scope_dense_bytes": last.get("dense_bytes"),
        "scope_byte_budget": last.get("byte_budget"),
        "model_bytes": last.get("model_bytes"),
        "untouched_bytes": untouched,
        "model_stored_bytes": untouched + stored if whole and untouched is not None else None,
        "relative_error": root_ratio((row["squared_error"], row["squared_norm"]) for row in groups),
        "expected_loss": total_expected_loss(groups),
    }


def _seconds(row: Row, stages: Iterable[str]) -> float:
    return math.fsum(row[f"seconds_{stage}"] or 0.0 for stage in stages)


def root_ratio(pairs: Iterable[tuple[float | None, float | None]]) -> float | None:
    """sqrt(sum of the first / sum of the second); None where a value or any weight is missing."""
    above, below = 0.0, 0.0
    for one, other in pairs:
        if one is None or other is None:
            return None
        above, below = above + one, below + other
    return math.sqrt(above / below) if above >= 0 and below > 0 else None


def _planned(groups: Sequence[Row], work: Sequence[Row], calls: Sequence[Row]) -> list[Row]:
    last = calls[-1] if calls else {}
    peaks = [row["peak_memory_bytes"] for row in work if row["peak_memory_bytes"] is not None]
    budget = sum(row["byte_budget"] for row in groups)
    computing = math.fsum(_seconds(row, COMPUTING_STAGES) for row in work)
    whole = last.get("tasks") in (None, len(groups))
    weights = "weights in scope" if whole else "weights of the finished layers"
    return [
        {"what": what, "unit": unit, "planned": planned, "actual": actual if groups else None}
        for what, unit, planned, actual in (
            (f"{weights}, at most", "bytes", budget, sum(map(counted_bytes, groups))),
            (
                "memory of a worker, at most",
                "bytes",
                last.get("planned_worker_memory_bytes"),
                max(peaks, default=None),
            ),
            (
                "disk of the run, at most",
                "bytes",
                last.get("planned_disk_bytes"),
                sum(row["payload_bytes"] for row in groups),
            ),
            ("decomposing, all workers", "seconds", last.get("planned_seconds"), computing),
        )
    ]


_OF_A_LAYER = (
    *("layer", "block", "scope", "R1", "R2", "R3", "nnz", "density", "codec"),
    *("dense_bytes", "byte_budget", "stored_bytes", "payload_bytes", "memory_bytes"),
    *("relative_error", "bits_per_weight", "coding", "size"),
    *(
        "expected_loss",
        "squared_norm",
        "squared_error",
        "squared_energy_stage1",
        "squared_energy_stage2",
    ),
    *("hooi_iterations", "peak_memory_bytes", "worker", "node", "device", "attempt"),
)


def _layer(row: Row) -> Row:
    layer = {name: row[name] for name in _OF_A_LAYER}
    layer |= {f"seconds_{stage}": row[f"seconds_{stage}"] for stage in STAGES}
    return layer | {"seconds": _seconds(row, STAGES)}


def _heads(slices: Any, task_ids: set[str]) -> list[Row]:
    """Rows of `slices` of these tasks, with ``energy_share``, squared_energy / squared_norm."""
    names = ["task_id", "layer", "block", "projection", "head", "nnz", "density", "core_bytes"]
    names += ["relative_error", "squared_norm", "squared_energy"]
    rows = [row for row in slices.select(names).to_pylist() if row.pop("task_id") in task_ids]
    for row in rows:
        energy, norm = row["squared_energy"], row["squared_norm"]
        row["energy_share"] = energy / norm if norm and energy is not None else None
    rows.sort(key=lambda row: (row["layer"], row["block"], _place(row), row["head"] or 0))
    return rows


def _place(row: Mapping[str, Any]) -> tuple[int, str]:
    name = row["projection"] or ""
    return PROJECTIONS.index(name) if name in PROJECTIONS else len(PROJECTIONS), name


def _projections(heads: Sequence[Row]) -> list[Row]:
    of: dict[str, list[Row]] = {}
    for row in heads:
        of.setdefault(row["projection"], []).append(row)
    found = []
    for name, rows in sorted(of.items(), key=lambda item: _place({"projection": item[0]})):
        # nnz / density is the number of elements of a slice of the core.
        elements = math.fsum(r["nnz"] / r["density"] for r in rows if r["density"])
        norm = math.fsum(row["squared_norm"] or 0.0 for row in rows)
        energy = math.fsum(row["squared_energy"] or 0.0 for row in rows)
        errors = (
            (row["relative_error"] or 0.0) ** 2 * (row["squared_norm"] or 0.0) for row in rows
        )
        found.append(
            {
                "projection": name,
                "slices": len(rows),
                "nnz": sum(row["nnz"] or 0 for row in rows),
                "density": sum(r["nnz"] for r in rows if r["density"]) / elements
                if elements
                else None,
                "core_bytes": math.fsum(row["core_bytes"] or 0.0 for row in rows),
                "relative_error": root_ratio([(math.fsum(errors), norm)]),
                "energy_share": energy / norm if norm else None,
            }
        )
    return found


def _spectra(groups: Sequence[Row]) -> list[Row]:
    return [
        {
            "layer": row["layer"],
            "block": row["block"],
            "mode": mode,
            "rank": row[f"R{mode}"],
            "singular_values": row[f"singular_values_{mode}"],
        }
        for row in groups
        for mode in (1, 2)
        if row[f"singular_values_{mode}"]
    ]
