"""Results of workers as rows of the manifest's tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from lestd_kernels.options import MEMORY
from orchestrator.manifest.schemas import CURVES, GROUPS, STAGES, TableSpec
from workers.contracts import CurveResult, Result


def _microseconds(seconds: float) -> int:
    return round(seconds * 1_000_000)


def _common_fields(result: Result | CurveResult, spec: TableSpec) -> dict[str, Any]:
    fields = vars(result)  # Not `asdict`, which copies spectra and slices value by value.
    row = {name: fields[name] for name in spec.schema.names if name in fields}
    row |= {f"seconds_{stage}": result.seconds.get(stage, 0.0) for stage in STAGES}
    row["started_at"] = _microseconds(result.started_at)
    row["versions"] = json.dumps(result.versions, sort_keys=True)
    return row


def is_far(group: Mapping[str, Any]) -> bool:
    """Whether a group's error, of a result or of a row, is far from what was to be expected."""
    error, most = group["metric_squared_error"], group["most_expected_squared_error"]
    return error is not None and most is not None and error > most


def counted_bytes(row: Mapping[str, Any]) -> int:
    """The bytes of a group row that its budget is for."""
    found: int = row["memory_bytes"] if row.get("size") == MEMORY else row["stored_bytes"]
    return found


def total_memory_bytes(rows: Iterable[Mapping[str, Any]]) -> int:
    """What the groups take once they are loaded; rows of earlier versions: what they store."""
    return sum(row["memory_bytes"] or row["stored_bytes"] for row in rows)


def total_expected_loss(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Sum of the groups' expected losses, nats per token; None where one has none."""
    losses = [row["expected_loss"] for row in rows]
    known = losses and all(loss is not None for loss in losses)
    return math.fsum(losses) if known else None


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
    key = {"task_id": result.task_id, "layer": result.layer, "block": result.block}
    return [key | vars(one) for one in result.slices]
