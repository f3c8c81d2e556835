"""A manifest of made-up rows, of any size: what a report is drawn from."""

import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.manifest.schemas import TABLES

BEGAN = datetime(2026, 3, 1, 12, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return BEGAN + timedelta(seconds=seconds)


def group_name(layer: int) -> str:
    return f"model.layers.{layer}.self_attn"


def group(layer: int, width: int, head_width: int, workers: int, **more: Any) -> dict[str, Any]:
    turn, worker = divmod(layer, workers)
    norm = 40.0 + layer
    error = 0.2 + 0.1 * math.sin(layer / 3)
    row = {
        "task_id": f"{layer:032x}",
        "layer": layer,
        "block": group_name(layer),
        "scope": "attention",
        "tensors": [f"{group_name(layer)}.q_proj.weight"],
        "method": "lestd",
        "pattern": "unstructured",
        "R1": width // 2 + layer % 7,
        "R2": head_width - layer % 3,
        "nnz": 1000 + layer,
        "density": 0.4,
        "codec": "bitmask",
        "dense_bytes": 8 * width * width,
        "byte_budget": 4 * width * width,
        "stored_bytes": 4 * width * width - layer,
        "payload_bytes": 4 * width * width + 500,
        "relative_error": error,
        "squared_norm": norm,
        "squared_error": error**2 * norm,
        "metric": "weight",
        "metric_squared_norm": norm,
        "metric_squared_error": error**2 * norm,
        "squared_energy_stage1": 0.99 * norm,
        "squared_energy_stage2": (1 - error**2) * norm,
        "hooi_iterations": 2,
        "seconds_read": 2.0,
        "seconds_stage1": 9.0,
        "seconds_rank_search": 12.0 + layer % 5,
        "seconds_stage2": 7.0,
        "seconds_error": 1.0,
        "seconds_write": 3.0,
        "started_at": at(40.0 * turn + 3 * worker),
        "peak_memory_bytes": 3 * 2**30,
        "device": "NVIDIA H100",
        "worker": f"node-{worker % 2}:{4000 + worker}",
        "node": f"node-{worker % 2}",
        "attempt": 1,
        "payload": f"{layer}.safetensors",
        "sha256": "0" * 64,
        "format": json.dumps({"modules": {}}),
        "singular_values_1": [6.0 * math.exp(-5 * i / width) + 0.01 * layer for i in range(width)],
        "singular_values_2": [9.0 / (1 + i + layer) for i in range(head_width)],
    }
    return row | more


def slices(layer: int, heads: int, shared: int) -> list[dict[str, Any]]:
    """One row per head of Q and O, and per shared head of K and V."""
    rows = []
    for projection, count in (("q", heads), ("k", shared), ("v", shared), ("o", heads)):
        for head in range(count):
            density = 0.25 + 0.2 * math.cos(layer / 5 + head / 7 + ord(projection))
            row = {"task_id": f"{layer:032x}", "layer": layer, "block": group_name(layer)}
            row |= {"projection": projection, "head": head, "nnz": round(4000 * density)}
            row |= {"density": density, "core_bytes": 9000 * density}
            row |= {"relative_error": 0.5 - density, "squared_norm": 2.0}
            rows.append(row | {"squared_energy": 2.0 - density / 3})
    return rows


def call(number: int, state: str, tasks: int, **more: Any) -> dict[str, Any]:
    row = {
        "invocation": f"call-{number}",
        "run_id": "r",
        "state": state,
        "started_at": at(400.0 * number),
        "ended_at": at(400.0 * number + 300) if state != "running" else None,
        "model": "someone/a-model-7b",
        "family": "llama",
        "method": "lestd",
        "pattern": "unstructured",
        "scope": "attention",
        "allocation": "uniform",
        "keep": 0.5,
        "executor": "ray",
        "tasks": tasks,
        "model_bytes": 64 * 2**20,
        "untouched_bytes": 48 * 2**20,
        "planned_worker_memory_bytes": 4 * 2**30,
        "planned_disk_bytes": 30 * 2**20,
        "planned_seconds": 900.0,
        "seconds": 300.0 if state != "running" else None,
    }
    return row | more


def event(seconds: float, kind: str, layer: int, **more: Any) -> dict[str, Any]:
    row = {"time": at(seconds), "task_id": f"{layer:032x}", "kind": kind, "attempt": 1}
    return row | {"layer": layer, "block": group_name(layer)} | more


def evaluation(compressed: bool, metric: str, value: float, **more: Any) -> dict[str, Any]:
    row = {
        "evaluation_id": f"{metric}-{compressed}",
        "time": at(2000),
        "model": "small" if compressed else "someone/a-model-7b",
        "model_id": "c" if compressed else "d",
        "compressed": compressed,
        "task": "text",
        "metric": metric,
        "answer_filter": "none",
        "value": value,
        "higher_is_better": False,
        "settings": "{}",
        "dtype": "auto",
    }
    return row | more


def write(directory: Path, **tables: list[dict[str, Any]]) -> Path:
    """Write tables by name into ``directory/manifest``; returns `directory`."""
    (directory / "manifest").mkdir(parents=True)
    for name, rows in tables.items():
        table = pa.Table.from_pylist(rows, schema=TABLES[name].schema)
        pq.write_table(table, directory / "manifest" / f"{name}.parquet")
    return directory


def run_of(directory: Path, layers: int = 6, done: int = 6, **tables: Any) -> Path:
    """A run of which `done` layers of `layers` are finished, by two workers."""
    given = {
        "groups": [group(layer, 32, 8, 2) for layer in range(done)],
        "slices": [row for layer in range(done) for row in slices(layer, 4, 2)],
        "runs": [call(0, "complete" if done == layers else "interrupted", layers)],
    }
    return write(directory, **(given | tables))
