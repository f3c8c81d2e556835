"""The manifest of a very large model: how long the named queries of `lestd query` take.

    python benchmarks/manifest_scale.py        prints the table of docs/queries.md, in Markdown

Writes the manifest of a run of 400 layers with 128 heads, 204,800 rows of `slices` in 5,000 part
files, with lestd's own writer (without fsync, which is not what is measured), and asks each query
that comes with lestd before and after compaction. Every time is of a fresh process, the median of
some repetitions, with the files in the page cache: "command" is `lestd query` as a user waits for
it, Python's start included; "query" the part that reads the manifest and answers. Takes some
minutes, and 60 MB of disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from orchestrator.manifest.manifest import Manifest
from orchestrator.manifest.part_files import part_path, write_part
from orchestrator.manifest.schemas import (
    CURVES,
    EVALUATIONS,
    EVENTS,
    GROUPS,
    RUNS,
    SLICES,
    TableSpec,
)
from orchestrator.query.sql import named_queries

START = 1_700_000_000_000_000  # Microseconds.
SECONDS = ("read", "stage1", "rank_search", "stage2", "error", "write")
ALONE = """
import sys, time
from orchestrator.query.sql import named_query, run_query
from workers.storage.files import as_path
start = time.perf_counter()
run_query([as_path(sys.argv[1])], named_query(sys.argv[2]).sql, print)
print(time.perf_counter() - start)
"""


def digest(*words: object) -> str:
    """A sha256 that stands for some content."""
    return hashlib.sha256(repr(words).encode()).hexdigest()


def task_columns(kind: str, layer: int, rng: random.Random) -> dict[str, Any]:
    """What rows of groups and of curves have in common."""
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    group = f"model.layers.{layer}.self_attn"
    return {
        "task_id": digest(kind, layer)[:32],
        "layer": layer,
        "block": group,
        "tensors": [f"{group}.{name}.weight" for name in projections],
        "method": "lestd",
        "pattern": "unstructured",
        "R1": rng.randrange(2000, 4000),
        "R2": 128,
        "dense_bytes": 4 * 2 * 4096 * 16384,
        "squared_norm": rng.uniform(1e4, 1e5),
        "started_at": START + layer * 10_000_000,
        "peak_memory_bytes": rng.randrange(2**33, 2**35),
        "device": "NVIDIA H100",
        "worker": f"node-{layer % 16}:{1000 + layer % 64}",
        "node": f"node-{layer % 16}",
        "attempt": 1,
        "source_sha256": digest("source", layer),
        "versions": json.dumps({"lestd": "0.1.0", "torch": "2.13.0"}),
    } | {f"seconds_{stage}": rng.expovariate(0.1) for stage in SECONDS}


def group_row(layer: int, rng: random.Random, width: int) -> dict[str, Any]:
    """A row of groups, with spectra of the model's width and of the head dimension."""
    row = task_columns("group", layer, rng)
    modules = {
        name: {"basis_side": "input", "slices": 128, "codec": "csr", "nnz": rng.randrange(10**8)}
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    values = np.random.default_rng(layer)
    return row | {
        "nnz": rng.randrange(10**7, 10**8),
        "density": rng.random(),
        "codec": "bitmask",
        "byte_budget": row["dense_bytes"] // 2,
        "stored_bytes": row["dense_bytes"] // 2 - rng.randrange(10**6),
        "relative_error": rng.random(),
        "squared_error": row["squared_norm"] * rng.random(),
        "squared_energy_stage1": row["squared_norm"] * 0.98,
        "squared_energy_stage2": row["squared_norm"] * 0.9,
        "threshold": rng.random(),
        "hooi_iterations": 3,
        "payload": f"{row['task_id']}-{digest('payload', layer)}.safetensors",
        "payload_bytes": row["dense_bytes"] // 2,
        "sha256": digest("payload", layer),
        "format": json.dumps({"path": row["block"], "kind": "shared_tucker", "modules": modules}),
        "singular_values_1": np.sort(values.pareto(2.0, width))[::-1].astype(np.float32),
        "singular_values_2": np.sort(values.pareto(2.0, 128))[::-1].astype(np.float32),
    }


def slice_rows(group: dict[str, Any], heads: int, rng: random.Random) -> list[dict[str, Any]]:
    """The rows of slices of a group."""
    key = {name: group[name] for name in ("task_id", "layer", "block")}
    return [
        key
        | {
            "projection": projection,
            "head": head,
            "nnz": rng.randrange(10**6),
            "density": rng.random(),
            "core_bytes": rng.uniform(1e5, 1e6),
            "relative_error": rng.random(),
            "squared_norm": rng.uniform(10, 100),
            "squared_energy": rng.uniform(5, 10),
        }
        for projection in "qkvo"
        for head in range(heads)
    ]


def curve_rows(layer: int, rng: random.Random) -> list[dict[str, Any]]:
    """The rows of a curve of eight points."""
    row = task_columns("curve", layer, rng)
    row |= {
        "uniform_byte_budget": row["dense_bytes"] // 2,
        "uniform_squared_error": row["squared_norm"] / 10,
    }
    return [
        row
        | {
            "byte_budget": row["dense_bytes"] * point // 10,
            "predicted_squared_error": row["squared_norm"] / (1 + point),
        }
        for point in range(1, 9)
    ]


def write_manifest(directory: Path, layers: int, heads: int, parts: int, width: int) -> None:
    """Write all part files."""
    rng = random.Random(0)
    os.fsync = lambda descriptor: None  # type: ignore[assignment]

    def write(spec: TableSpec, name: str, rows: list[dict[str, Any]]) -> None:
        write_part(part_path(directory, spec, f"{name}.parquet"), rows, spec)

    for layer in range(layers):
        group = group_row(layer, rng, width)
        curve = curve_rows(layer, rng)
        write(SLICES, group["task_id"], slice_rows(group, heads, rng))
        write(GROUPS, group["task_id"], [group])
        write(CURVES, curve[0]["task_id"], curve)
    run = {"invocation": "0", "state": "complete", "started_at": START, "tasks": layers}
    write(RUNS, "0", [run | {"method": "lestd", "keep": 0.5}])
    evaluation = {"evaluation_id": "0", "time": START, "task": "wikitext", "metric": "perplexity"}
    write(EVALUATIONS, "0", [evaluation | {"value": 10.0, "compressed": True}])
    for number in range(parts - 3 * layers - 2):
        layer = number % layers
        at = START + number * 1_000_000
        kind = "retried" if number % 10 == 9 else "started"
        event = {"time": at, "task_id": digest("group", layer)[:32], "kind": kind, "attempt": 1}
        event |= {"layer": layer, "message": "the worker died", "worker": f"node-{layer % 16}:1"}
        write(EVENTS, f"{at:020d}-{event['task_id'][:16]}", [event])


def timed(directory: Path, name: str, repeats: int) -> tuple[float, float]:
    """Median seconds of the whole command, and of the query in it."""
    command = [sys.executable, "-m", "orchestrator", "query", str(directory), "--name", name]
    alone = [sys.executable, "-c", ALONE, str(directory), name]
    whole, inner = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([*command, "--csv"], stdout=subprocess.DEVNULL, check=True)
        whole.append(time.perf_counter() - start)
        run = subprocess.run(alone, stdout=subprocess.PIPE, check=True, text=True)
        inner.append(float(run.stdout))
    return median(whole), median(inner)


def main() -> None:
    """Write the manifest, ask, compact, ask again, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=400, help="(default: %(default)s)")
    parser.add_argument("--heads", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--parts", type=int, default=5000, help="files (default: %(default)s)")
    parser.add_argument("--width", type=int, default=4096, help="of spectra (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lestd-scale-") as work:
        directory = Path(work) / "manifest"
        write_manifest(directory, options.layers, options.heads, options.parts, options.width)
        names = list(named_queries())
        before = [timed(directory, name, options.repeats) for name in names]
        start = time.perf_counter()
        gone = Manifest(directory).compact(lambda: None)
        seconds = time.perf_counter() - start
        after = [timed(directory, name, options.repeats) for name in names]
    print(f"{gone} part files were compacted in {seconds:.1f} s.\n")
    print(
        "| query | command before | query before | command after | query after | after / before |"
    )
    print("|---|---|---|---|---|---|")
    for name, old, new in zip(names, before, after, strict=True):
        cells = [f"{value:.2f} s" for value in (*old, *new)]
        print(f"| {name} | {' | '.join(cells)} | {new[0] / old[0]:.2f} |")


if __name__ == "__main__":
    main()
