"""The columns of the manifest's tables."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

MANIFEST_FORMAT = 1
STAGES = ("read", "stage1", "rank_search", "stage2", "error", "write")
"""Stages whose seconds have a column of their own in `groups`."""
COMPUTING_STAGES = STAGES[1:-1]
"""Those inside the decomposition."""


def _schema(fields: Sequence[tuple[str, pa.DataType]]) -> pa.Schema:
    return pa.schema(fields, metadata={"lestd_manifest_format": str(MANIFEST_FORMAT)})


GROUPS = _schema(
    [
        ("task_id", pa.string()),
        ("layer", pa.int32()),
        ("group", pa.string()),
        ("tensors", pa.list_(pa.string())),
        ("method", pa.string()),
        ("pattern", pa.string()),
        ("R1", pa.int32()),
        ("R2", pa.int32()),
        ("R3", pa.int32()),
        ("nnz", pa.int64()),
        ("density", pa.float64()),
        ("codec", pa.string()),
        ("dense_bytes", pa.int64()),
        ("byte_budget", pa.int64()),
        ("stored_bytes", pa.int64()),
        ("relative_error", pa.float64()),
        ("squared_norm", pa.float64()),
        ("squared_error", pa.float64()),
        ("squared_energy_stage1", pa.float64()),
        ("squared_energy_stage2", pa.float64()),
        ("threshold", pa.float64()),
        ("hooi_iterations", pa.int32()),
        *((f"seconds_{stage}", pa.float64()) for stage in STAGES),
        ("started_at", pa.timestamp("us", tz="UTC")),
        ("peak_memory_bytes", pa.int64()),
        ("device", pa.string()),
        ("worker", pa.string()),
        ("node", pa.string()),
        ("attempt", pa.int32()),
        ("payload", pa.string()),
        ("payload_bytes", pa.int64()),
        ("sha256", pa.string()),
        ("source_sha256", pa.string()),
        ("format", pa.string()),
        ("versions", pa.string()),
    ]
)

SLICES = _schema(
    [
        ("task_id", pa.string()),
        ("layer", pa.int32()),
        ("group", pa.string()),
        ("projection", pa.string()),
        ("head", pa.int32()),
        ("nnz", pa.int64()),
        ("density", pa.float64()),
        ("core_bytes", pa.float64()),
        ("relative_error", pa.float64()),
        ("squared_norm", pa.float64()),
        ("squared_energy", pa.float64()),
    ]
)

CURVES = _schema(
    [
        ("task_id", pa.string()),
        ("layer", pa.int32()),
        ("group", pa.string()),
        ("tensors", pa.list_(pa.string())),
        ("method", pa.string()),
        ("pattern", pa.string()),
        ("byte_budget", pa.int64()),
        ("R1", pa.int32()),
        ("R2", pa.int32()),
        ("R3", pa.int32()),
        ("predicted_squared_error", pa.float64()),
        ("squared_norm", pa.float64()),
        ("dense_bytes", pa.int64()),
        ("uniform_byte_budget", pa.int64()),
        ("uniform_squared_error", pa.float64()),
        *((f"seconds_{stage}", pa.float64()) for stage in STAGES),
        ("started_at", pa.timestamp("us", tz="UTC")),
        ("peak_memory_bytes", pa.int64()),
        ("device", pa.string()),
        ("worker", pa.string()),
        ("node", pa.string()),
        ("attempt", pa.int32()),
        ("source_sha256", pa.string()),
        ("versions", pa.string()),
    ]
)

EVENTS = _schema(
    [
        ("at", pa.timestamp("us", tz="UTC")),
        ("task_id", pa.string()),
        ("kind", pa.string()),
        ("attempt", pa.int32()),
        ("error_type", pa.string()),
        ("message", pa.string()),
        ("traceback", pa.string()),
    ]
)


KEYS = {
    *("task_id", "layer", "group", "payload", "payload_bytes", "sha256", "format"),
    *("dense_bytes", "stored_bytes", "byte_budget", "kind"),
    *("predicted_squared_error", "uniform_byte_budget", "uniform_squared_error"),
}
"""Columns that no row can do without; others may be null, where a version did not know them."""
