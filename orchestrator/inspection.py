"""Looking at a run or a compressed model from outside: status and verification.

Both read files only, need no source and no lock, and work while a run goes on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lestd_kernels.errors import LestdError
from orchestrator.assemble import INDEX_NAME, MANIFEST_DIR, payload_shard_name
from orchestrator.manifest import Manifest, payload_problem, read_json
from orchestrator.rundir import RunDirectory
from workers.checkpoint import read_header


def run_status(run_dir: Path, out: Path) -> dict[str, Any]:
    """State of a run, as plain values.

    Returns:
        ``state`` (``complete | running | stopped``), counts, and one entry per task with its
        state (``done | running | failed | remaining``) and, when done, its figures.

    Raises:
        LestdError: no run was begun at `run_dir`.
    """
    run = RunDirectory(run_dir)
    if not run.exists:
        raise LestdError(f"{run_dir} holds no run; start one with lestd compress")
    plan = read_json(run_dir / "plan.json")
    locked = run.is_locked()
    done = {row["task_id"]: row for row in run.manifest.groups().to_pylist()}
    last_event = {row["task_id"]: row for row in run.manifest.events().to_pylist()}

    layers = []
    for planned in plan["layers"]:
        task_id = planned["task_id"]
        event = last_event.get(task_id, {})
        row = done.get(task_id)
        entry = {key: planned[key] for key in ("task_id", "layer", "group", "byte_budget")}
        if row is not None:
            figures = ("R1", "R2", "R3", "nnz", "density", "codec", "dense_bytes", "stored_bytes")
            entry |= {"state": "done"} | {key: row[key] for key in figures}
            entry |= {key: row[key] for key in ("relative_error", "attempt", "worker")}
        elif event.get("kind") == "failed":
            entry |= {"state": "failed", "message": event["message"]}
        elif event and locked:
            entry |= {"state": "running", "attempt": event["attempt"]}
        else:
            entry |= {"state": "remaining"}
        layers.append(entry)

    counts = {
        state: sum(entry["state"] == state for entry in layers)
        for state in ("done", "running", "failed", "remaining")
    }
    complete = counts["done"] == len(layers) and (out / INDEX_NAME).is_file()
    state = "running" if locked else "complete" if complete else "stopped"
    return {"run_dir": str(run_dir), "out": str(out), "state": state} | counts | {"layers": layers}


@dataclass(frozen=True)
class Verification:
    """What `verify` looked at, and what is wrong with it."""

    checked: int
    problems: tuple[str, ...]


def verify(out: Path, run_dir: Path) -> Verification:
    """Check every payload, and every shard made of one, against the manifest.

    Looks at the run directory, at the compressed model, or at both: sizes, sha256, the tensors
    and their stored bytes, and that the model's index names only tensors that are there.

    Raises:
        LestdError: neither is there.
    """
    problems: list[str] = []
    checked = 0
    run = RunDirectory(run_dir)
    if run.exists:
        problems += [f"{d.path} is damaged: {d.reason}" for d in run.manifest.damaged()]
        for row in run.manifest.groups().to_pylist():
            checked += 1
            problems += _check_payload(row, run.payloads)
    if (out / "config.json").is_file():
        manifest = Manifest(out / MANIFEST_DIR)
        problems += [f"{d.path} is damaged: {d.reason}" for d in manifest.damaged()]
        for row in manifest.groups().to_pylist():
            checked += 1
            problems += _check_payload(row | {"payload": payload_shard_name(row)}, out)
        problems += _check_index(out)
    if not checked and not problems:
        raise LestdError(f"neither {out} nor {run_dir} holds anything that lestd made")
    return Verification(checked, tuple(problems))


def _check_payload(row: dict[str, Any], directory: Path) -> list[str]:
    if problem := payload_problem(row, directory):
        return [problem]
    path = directory / row["payload"]
    stored = sum(ref.stored_bytes for ref in read_header(path).values())
    if stored != row["stored_bytes"]:
        return [f"{path} holds {stored} bytes of tensors, manifest says {row['stored_bytes']}"]
    if stored > row["byte_budget"]:
        return [f"{path} holds {stored} bytes of tensors, over its budget {row['byte_budget']}"]
    return []


def _check_index(out: Path) -> list[str]:
    index = out / INDEX_NAME
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        return [f"{index} cannot be read ({error})"]
    problems = []
    for shard in sorted(set(weight_map.values())):
        named = {name for name, where in weight_map.items() if where == shard}
        try:
            present = set(read_header(out / shard))
        except LestdError as error:
            problems.append(str(error))
            continue
        problems += [f"{out / shard} lacks {name}" for name in sorted(named - present)]
        problems += [f"{index} does not name {name} of {shard}" for name in sorted(present - named)]
    return problems


def stored_scope_bytes(directory: Path) -> dict[str, int] | None:
    """Dense and stored bytes of the weights in scope of a compressed model; None for a dense one.

    Stored bytes are counted from the headers of the files on disk, not taken from the manifest.
    """
    rows = Manifest(directory / MANIFEST_DIR).groups().to_pylist()
    if not rows:
        return None
    stored = 0
    for row in rows:
        shard = read_header(directory / payload_shard_name(row))
        stored += sum(ref.stored_bytes for ref in shard.values())
    return {"dense_bytes": sum(row["dense_bytes"] for row in rows), "stored_bytes": stored}
