"""What is held against a manifest: payloads, numbers of slices, files that are not lestd's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from orchestrator.manifest.part_files import PARQUET
from orchestrator.manifest.schemas import EVALUATIONS, TABLES, format_slices
from workers.storage.files import (
    AnyPath,
    file_sha256,
    file_size,
    is_lfs_pointer,
    lfs_pointer,
    list_names,
    open_binary,
)
from workers.storage.names import TEMPORARY, is_inside, leads_out

ABOUT_FILE = "model.json"
"""In the manifest of a model: see `orchestrator.model.assemble`."""


def foreign_files(directory: AnyPath) -> list[AnyPath]:
    """Names in a model's manifest directory that lestd did not make."""
    ours = {ABOUT_FILE, EVALUATIONS.name, *(name + PARQUET for name in TABLES)}
    parts = directory / EVALUATIONS.name
    evaluations = [name for name in list_names(parts) if not name.startswith(TEMPORARY)]
    return [
        *(directory / name for name in list_names(directory) if name not in ours),
        *(parts / name for name in evaluations if not name.endswith(PARQUET)),
    ]


def slice_count(row: dict[str, Any]) -> int:
    """Number of slices of a group, by its row's format, which was checked as it was read."""
    return format_slices(row["format"]) or 0


def payload_problem(row: dict[str, Any], payload_dir: AnyPath) -> str | None:
    """Why a group row's payload cannot be trusted; None if it can."""
    if not is_inside(row["payload"]):
        return f"the manifest names the file {row['payload']!r}, which is not inside {payload_dir}"
    path = payload_dir / row["payload"]
    if isinstance(path, Path) and leads_out(path, cast(Path, payload_dir)):
        return f"{path} is a link out of {payload_dir}"
    found = file_size(path)
    if found is None:
        return f"{path} is missing"
    if found != row["payload_bytes"]:
        with open_binary(path) as file:
            if is_lfs_pointer(file.read(64)):
                return lfs_pointer(str(path))
        return f"{path} has {found} bytes, the manifest says {row['payload_bytes']}"
    if file_sha256(path) != row["sha256"]:
        return f"{path} does not have the sha256 that the manifest states"
    return None
