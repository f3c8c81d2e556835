"""Looking at a run or a compressed model from outside: status and verification.

Both read files only, need no source and no lock, and work while a run goes on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lestd_kernels.errors import LestdError
from orchestrator.manifest.checks import payload_problem, slice_count
from orchestrator.manifest.manifest import Manifest
from orchestrator.manifest.result_rows import counted_bytes
from orchestrator.model.adapter import adapter_stored_bytes
from orchestrator.model.assemble import payload_shard_name
from orchestrator.model.directory import about_model, is_complete
from orchestrator.run.directory import RunDirectory
from workers.checkpoint.tensors import INDEX_FILE, read_header, read_weight_map
from workers.storage.files import AnyPath, in_parallel, is_directory, is_file, list_names
from workers.storage.json_files import read_json
from workers.storage.names import MANIFEST_DIR

_PLANNED = {"task_id": str, "layer": int, "block": str, "byte_budget": int}
_CALIBRATION = "calibration"
_CALIBRATED = {
    "activation": re.compile(r"layer-.*\.safetensors"),
    "loss": re.compile(r"layer-.*\.outputs\.safetensors"),
}
"""In a run directory, by metric the last files of each block; see
`orchestrator.compression.calibration`."""
_FIGURES = (
    *("R1", "R2", "R3", "nnz", "density", "codec", "dense_bytes", "stored_bytes"),
    *("relative_error", "metric_squared_error", "most_expected_squared_error"),
    "expected_loss",
    *("attempt", "worker"),
)


def run_status(run_dir: AnyPath, out: AnyPath) -> dict[str, Any]:
    """State of a run, as plain values.

    Returns:
        ``state`` (``complete | running | stopped``), counts, and one entry per task with its
        ``scope`` (``attention | ffn | experts``), its state
        (``done | running | failed | remaining``) and, when done, its figures. ``calibrating``:
        number of blocks whose activations the run directory has, while no task has begun because
        those of a calibration text come first; else null. With global
        allocation also ``curves``, the counts of pass one, and in each entry ``curve``, the state
        of its task there; until that pass is done ``budgets_decided`` is false. ``damaged`` has
        ``path`` and ``reason`` of files of the manifest. ``cleaned``: the run directory is gone,
        and the model's own manifest answers.

    Raises:
        LestdError: no run was begun at `run_dir` and no model is at `out`, or its plan is damaged.
    """
    run = RunDirectory(run_dir)
    where = {"run_dir": str(run_dir), "out": str(out)}
    if not run.exists:
        if not is_complete(out):
            raise LestdError(f"{run_dir} holds no run; start one with lestd compress")
        return where | _cleaned_status(Manifest(out / MANIFEST_DIR))
    planned_layers, decided = _read_plan(run_dir / "plan.json")
    locked = run.is_locked()
    groups = run.manifest.groups().select(["task_id", *_FIGURES])
    done = {row["task_id"]: row for row in groups.to_pylist()}
    curves = set(run.manifest.curves()["task_id"].to_pylist())
    events = run.manifest.events().select(["task_id", "kind", "message", "attempt"])
    last_event = {row["task_id"]: row for row in events.to_pylist()}

    def unfinished(task_id: str) -> dict[str, Any]:
        event = last_event.get(task_id, {})
        if event.get("kind") == "failed":
            return {"state": "failed", "message": event["message"]}
        if event and locked:
            return {"state": "running", "attempt": event["attempt"]}
        return {"state": "remaining"}

    layers = []
    for planned in planned_layers:
        task_id = planned["task_id"]
        row = done.get(task_id) if decided else None
        entry = {key: planned[key] for key in _PLANNED} | {"scope": _scope(planned)}
        if row is not None:
            entry |= {"state": "done"} | {key: row[key] for key in _FIGURES}
        else:
            entry |= unfinished(task_id) if decided else {"state": "remaining"}
        if curve_id := planned.get("curve_task_id"):
            curve = {"state": "done"} if curve_id in curves else unfinished(curve_id)
            entry |= {"curve": curve["state"]}
            entry |= {"message": curve["message"]} if "message" in curve else {}
        layers.append(entry)

    counts = _counts(entry["state"] for entry in layers)
    complete = counts["done"] == len(layers) and is_complete(out)
    state = "running" if locked else "complete" if complete else "stopped"
    passes: dict[str, Any] = {}
    if pass_one := [entry["curve"] for entry in layers if "curve" in entry]:
        passes = {"budgets_decided": decided, "curves": _counts(pass_one)}
    about = {"state": state, "cleaned": False, "damaged": _damaged(run.manifest)}
    waiting = locked and not done and not curves and not last_event
    finished = _CALIBRATED.get(str(next((one.get("metric") for one in planned_layers), None)))
    if waiting and finished is not None:
        names = list_names(run_dir / _CALIBRATION)
        passes["calibrating"] = sum(finished.fullmatch(name) is not None for name in names)
    return where | about | counts | passes | {"layers": layers}


def _cleaned_status(manifest: Manifest) -> dict[str, Any]:
    """The state of a model without its run."""
    keys = (*_PLANNED, *_FIGURES)
    layers = [
        {"state": "done", "scope": _scope(row)} | {key: row[key] for key in keys}
        for row in manifest.groups().select([*keys, "scope"]).to_pylist()
    ]
    about = {"state": "complete", "cleaned": True, "damaged": _damaged(manifest)}
    return about | _counts(layer["state"] for layer in layers) | {"layers": layers}


def _scope(of: dict[str, Any]) -> str:
    """Kind of a block; runs that do not say were of attention."""
    return str(of.get("scope") or "attention")


def _damaged(manifest: Manifest) -> list[dict[str, str]]:
    return [{"path": str(bad.path), "reason": bad.reason} for bad in manifest.damaged()]


def _counts(states: Iterable[str]) -> dict[str, int]:
    counted = Counter(states)
    return {state: counted[state] for state in ("done", "running", "failed", "remaining")}


def _read_plan(path: AnyPath) -> tuple[list[dict[str, Any]], bool]:
    """The layers of a run's plan, each with the keys of `_PLANNED`; whether budgets are decided."""
    plan = read_json(path)
    layers = plan.get("layers")
    if not isinstance(layers, list) or not all(map(_is_planned, layers)):
        raise LestdError(
            f"{path} is damaged: expected layers with {', '.join(_PLANNED)}; run the same lestd "
            "compress again, which writes it anew"
        )
    return layers, bool(plan.get("budgets_decided", True))


def _is_planned(layer: Any) -> bool:
    return (
        isinstance(layer, dict)
        and all(isinstance(layer.get(key), kind) for key, kind in _PLANNED.items())
        and isinstance(layer.get("curve_task_id"), str | None)
    )


@dataclass(frozen=True)
class Verification:
    """Outcome of `verify`: what it looked at, and the problems."""

    checked: int
    problems: tuple[str, ...]


def verify(out: AnyPath, run_dir: AnyPath) -> Verification:
    """Check every payload, and every file of the model, against the manifest.

    Looks at the run directory, at the compressed model, or at both: sizes, sha256, the tensors
    and their stored bytes, that every group has the rows of its slices, and that the model's
    index names the tensors that are there.

    Raises:
        LestdError: neither is there.
    """
    problems: list[str] = []
    checked = 0
    run = RunDirectory(run_dir)
    if run.exists:
        rows, found = _check_manifest(run.manifest)
        problems += found
        checked += len(rows)
        problems += _check_payloads(rows, run.payloads)
    if is_directory(out / MANIFEST_DIR):
        rows, found = _check_manifest(Manifest(out / MANIFEST_DIR))
        problems += found
        checked += len(rows)
        try:
            shards = [row | {"payload": payload_shard_name(row)} for row in rows]
        except LestdError as error:
            shards = []
            problems.append(str(error))
        problems += _check_payloads(shards, out)
        problems += _check_files(out, {row["payload"] for row in shards})
        problems += _check_index(out)
    elif run.exists and is_file(out / "config.json"):
        problems.append(f"{out} has no {MANIFEST_DIR} to check it against")
    if not checked and not problems:
        raise LestdError(f"neither {out} nor {run_dir} holds anything that lestd made")
    return Verification(checked, tuple(problems))


def _check_manifest(manifest: Manifest) -> tuple[list[dict[str, Any]], list[str]]:
    """The group rows, and what is wrong with the manifest itself."""
    problems = [f"{d.path} is damaged: {d.reason}" for d in manifest.damaged()]
    slices = manifest.slice_counts()
    rows = manifest.groups().to_pylist()
    for row in rows:
        found, expected = slices[row["task_id"]], slice_count(row)
        if found != expected:
            problems.append(
                f"{manifest.directory} has {found} rows in slices for task {row['task_id']} "
                f"({row['block']}), which has {expected} slices"
            )
    return rows, problems


def _check_payloads(rows: Sequence[dict[str, Any]], directory: AnyPath) -> list[str]:
    found = in_parallel(lambda row: _check_payload(row, directory), rows)
    return [problem for problems in found for problem in problems]


def _check_payload(row: dict[str, Any], directory: AnyPath) -> list[str]:
    if problem := payload_problem(row, directory):
        return [problem]
    path = directory / row["payload"]
    stored = sum(ref.stored_bytes for ref in read_header(path).values())
    if stored != row["stored_bytes"]:
        return [f"{path} holds {stored} bytes of tensors, manifest says {row['stored_bytes']}"]
    if (counted := max(stored, counted_bytes(row))) > row["byte_budget"]:
        return [f"{path} holds {counted} bytes of tensors, over its budget {row['byte_budget']}"]
    return []


def _check_files(out: AnyPath, checked: set[str]) -> list[str]:
    """Compare the files that are not checked yet with what the model says of itself."""
    try:
        about = about_model(out)
    except LestdError as error:
        return [str(error)]
    files = {} if about is None else about.get("files")
    if not isinstance(files, dict) or not all(map(_is_described, files.values())) or not files:
        return [
            f"{out / MANIFEST_DIR} does not say what files the model has; where lestd compress was "
            "interrupted, run it again"
        ]
    rows = [
        {"payload": name, "payload_bytes": stated["bytes"], "sha256": stated["sha256"]}
        for name, stated in sorted(files.items())
        if name not in checked
    ]
    problems = in_parallel(lambda row: payload_problem(row, out), rows)
    return [problem for problem in problems if problem is not None]


def _is_described(stated: Any) -> bool:
    return isinstance(stated, dict) and {"bytes", "sha256"} <= stated.keys()


def _check_index(out: AnyPath) -> list[str]:
    index = out / INDEX_FILE
    try:
        weight_map = read_weight_map(index)
    except LestdError as error:
        return [str(error)]
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

    Stored bytes are counted from the headers of the files on disk, not taken from the manifest;
    an adapter beside the model counts.
    """
    rows = Manifest(directory / MANIFEST_DIR).groups().to_pylist()
    if not rows:
        return None
    stored = adapter_stored_bytes(directory)
    for row in rows:
        shard = read_header(directory / payload_shard_name(row))
        stored += sum(ref.stored_bytes for ref in shard.values())
    return {"dense_bytes": sum(row["dense_bytes"] for row in rows), "stored_bytes": stored}
