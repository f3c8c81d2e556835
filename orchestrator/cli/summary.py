"""Summaries that commands print when they are done."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lestd_kernels.options import MEMORY
from orchestrator.config.layers import list_of_layers
from orchestrator.console import logs, output
from orchestrator.execution.retries import retries
from orchestrator.manifest.result_rows import is_far, total_expected_loss, total_memory_bytes
from orchestrator.manifest.schemas import COMPUTING_STAGES
from orchestrator.run.directory import RunDirectory
from workers.contracts import OUTSIDE
from workers.storage.files import AnyPath, is_directory

if TYPE_CHECKING:  # Status, which is asked often, shall not wait for what compresses.
    from orchestrator.compression.pipeline import Outcome
    from orchestrator.model.export import Export
    from orchestrator.planning.plan import Plan

_COPY_COMMANDS = {
    "s3": "aws s3 sync {} DIRECTORY",
    "gs": "gcloud storage rsync --recursive {} DIRECTORY",
}


def outcome_figures(outcome: Outcome, out: AnyPath, run_dir: AnyPath) -> dict[str, Any]:
    """Figures of a compression, as plain values."""
    seconds = outcome.predicted
    plan, rows = outcome.plan, outcome.rows
    stored = sum(row["stored_bytes"] for row in rows)
    dense = sum(row["dense_bytes"] for row in rows)
    norm = sum(row["squared_norm"] for row in rows)
    error = sum(row["squared_error"] for row in rows)
    return {
        "out": str(out),
        "run_dir": str(run_dir),
        "complete": outcome.complete,
        "allocation": plan.allocation,
        "curves": len(outcome.curves),
        "tasks": len(plan.tasks),
        "finished": len(rows),
        "finished_before": outcome.skipped,
        "failed": [
            {
                "task_id": f.task_id,
                "kind": f.kind,
                "message": f.message,
                "attempt": f.attempt,
                "evidence": f.evidence,
            }
            for f in outcome.failures
        ],
        "retries": told_retries(plan, run_dir),
        "dense_bytes": dense,
        "byte_budget": sum(row["byte_budget"] for row in rows),
        "stored_bytes": stored,
        "memory_bytes": total_memory_bytes(rows),
        "size": plan.size,
        "keep": stored / dense if dense else None,
        "model_bytes": plan.model_bytes,
        "model_stored_bytes": plan.untouched_bytes + stored,
        "relative_error": (error / norm) ** 0.5 if norm else 0.0,
        "expected_loss": total_expected_loss(rows),
        "far_from_expected": [row["block"] for row in rows if is_far(row)],
        "seconds": outcome.seconds,
        "predicted": {
            "worker_memory_bytes": outcome.planned.worker_memory_bytes,
            "run_disk_bytes": outcome.planned.run_disk_bytes,
            "decomposition_seconds": seconds and sum(seconds[row["block"]] for row in rows),
        },
        "actual": {
            "worker_memory_bytes": max(
                (row["peak_memory_bytes"] for row in (*rows, *outcome.curves)), default=0
            ),
            "run_disk_bytes": sum(row["payload_bytes"] for row in rows),
            "decomposition_seconds": sum(
                row[f"seconds_{stage}"]
                for row in (*rows, *outcome.curves)
                for stage in COMPUTING_STAGES
            ),
        },
    }


def told_retries(plan: Plan, run_dir: AnyPath) -> list[dict[str, Any]]:
    """Every retried attempt of a run, in order, by the names of the groups.

    None once the run is cleaned up.
    """
    groups = {planned.task.task_id: planned.task.block for planned in plan.tasks}
    groups |= {task.task_id: task.block for task in plan.curve_tasks}
    events = RunDirectory(run_dir).manifest.events().to_pylist()
    return [
        {"block": groups.get(retry.task_id, retry.task_id)} | asdict(retry)
        for retry in retries(events)
    ]


def print_outcome(
    outcome: Outcome,
    out: AnyPath,
    run_dir: AnyPath,
    json: bool,
) -> None:
    """Print how a compression ended, beside what was predicted."""
    figures = outcome_figures(outcome, out, run_dir)
    if json:
        output.print_json(figures)
        return
    if figures["retries"]:
        told = [
            (retry["block"], str(retry["attempt"]), retry["cause"], retry["message"])
            for retry in figures["retries"]
        ]
        output.print_table(
            f"retried attempts: {len(told)}",
            ("block", "attempt", "cause", "what happened"),
            told,
        )
    if not outcome.complete:
        said: set[str] = set()
        for failure in outcome.failures:
            if failure.message in said and not logs.in_json():
                continue  # No worker could be made, for any of them.
            said.add(failure.message)
            logs.error(failure.message, task_id=failure.task_id, evidence=failure.evidence or None)
            if failure.evidence and not logs.in_json():
                logs.log("message", failure.evidence)
        plan = outcome.plan
        tasks, finished = len(plan.tasks), len(outcome.rows)
        if not plan.decided:
            tasks, finished = len(plan.curve_tasks), len(outcome.curves)
        logs.log(
            "message",
            f"{len(outcome.failures)} of {tasks} tasks failed; the other "
            f"{finished} are kept in {run_dir}: fix the cause, then run the same "
            "command again",
        )
        return
    model_keep = figures["model_stored_bytes"] / figures["model_bytes"]
    rows = [
        (
            "weights in scope",
            output.size(figures["dense_bytes"]),
            output.size(figures["stored_bytes"]),
            f"{figures['keep']:.4f}",
        ),
        (
            "whole model",
            output.size(figures["model_bytes"]),
            output.size(figures["model_stored_bytes"]),
            f"{model_keep:.4f}",
        ),
    ]
    done = "already complete" if figures["finished_before"] == figures["tasks"] else "complete"
    output.print_table(f"{done}: {out}", ("", "dense", "stored", "keep"), rows)
    if (memory := figures["memory_bytes"]) != figures["stored_bytes"]:
        output.out.print(
            f"loaded, the weights in scope take {output.size(memory)} of memory: numbers that are "
            f"coded by their entropy are unpacked there{_counted(figures)}",
            soft_wrap=True,
        )
    predicted, actual = figures["predicted"], figures["actual"]
    kept = [
        (title, output.size(predicted[key]), output.size(actual[key]))
        for title, key in (
            ("memory of a worker, at most", "worker_memory_bytes"),
            ("disk of the run, at most", "run_disk_bytes"),
        )
    ]
    if outcome.predicted is not None:
        before, after = (each["decomposition_seconds"] for each in (predicted, actual))
        kept.append(("decomposing, all workers", f"{before:.1f} s", f"{after:.1f} s"))
    output.print_table("the plan", ("", "predicted", "actual"), kept)
    if (loss := figures["expected_loss"]) is not None:
        output.out.print(f"expected loss {expected_loss(loss)}", soft_wrap=True)
        if (target := outcome.plan.target_loss) is not None and loss > target:
            logs.log(
                "message",
                f"the target of {target:g} nats per token was missed by {loss / target - 1:.1%}; "
                "the curves promised more than came of them: ask for less loss",
                logging.WARNING,
            )
    output.out.print(
        f"relative error {figures['relative_error']:.4f} over {figures['tasks']} blocks, "
        f"{figures['finished_before']} of them already finished; {figures['seconds']:.1f} s\n"
        f"model {out}",
        soft_wrap=True,
    )
    if far := figures["far_from_expected"]:
        logs.log(
            "message",
            f"{len(far)} of {figures['tasks']} blocks have an error far beyond what their ranks "
            f"and bits explain: {', '.join(far)}; check the model with lestd evaluate before it is "
            "used",
            logging.WARNING,
        )
    if not isinstance(out, Path):
        output.out.print(
            "from_pretrained loads from a disk: copy the directory there first, for example with "
            f"`{_COPY_COMMANDS[out.protocol].format(out)}`",
            soft_wrap=True,
        )
    if is_directory(run_dir):
        output.out.print(
            f"run   {run_dir} (payloads and manifest; lestd clean deletes it)", soft_wrap=True
        )


def _counted(figures: dict[str, Any]) -> str:
    """What to add where keep is about bytes in memory."""
    if figures["size"] != MEMORY:
        return ""
    return f", and that is what keep counts: {figures['memory_bytes'] / figures['dense_bytes']:.4f}"


def fold_layers(rows: Iterable[tuple[int, Sequence[str]]]) -> list[list[str]]:
    """Rows of a table, the layers of equal ones in one: most of a plan says the same 30 times.

    Args:
        rows: layer, and the cells beside it.
    """
    layers: dict[tuple[str, ...], list[int]] = {}
    for layer, cells in rows:
        layers.setdefault(tuple(cells), []).append(layer)
    return [
        [list_of_layers(layer for layer in of if layer != OUTSIDE), *cells]
        for cells, of in layers.items()
    ]


def print_status(state: dict[str, Any], json: bool) -> None:
    """Print how a run stands: what `run_status` found."""
    for bad in state["damaged"]:
        logs.damaged(bad["path"], bad["reason"])
    if json:
        output.print_json(state)
        return
    decided = state.get("budgets_decided", True)
    rows = []
    for layer in state["layers"]:
        done = layer["state"] == "done"
        cells = (
            layer["block"] if layer["layer"] == OUTSIDE else layer["scope"],
            layer["state"],
            output.size(layer["byte_budget"]) if decided or "curve" not in layer else "",
            output.size(layer["stored_bytes"]) if done else "",
            output.ranks(layer),
            f"{layer['density']:.4f}" if done else "",
            layer.get("codec", ""),
            _error(layer) if done else layer.get("message", ""),
        )
        rows.append((layer["layer"], cells))
    columns = ["layer", "block", "state", "target", "stored", "ranks", "density", "codec"]
    columns.append("relative error")
    where = state["out" if state["cleaned"] else "run_dir"]
    output.print_table(where, columns, fold_layers(rows))

    def counts(of: dict[str, Any]) -> str:
        return ", ".join(f"{of[k]} {k}" for k in ("done", "running", "failed", "remaining"))

    if "calibrating" in state:
        output.out.print(
            "the activations of the calibration text come first; the run directory has those of "
            f"{state['calibrating']} of {len(state['layers'])} blocks"
        )
    if "curves" in state:
        output.out.print(f"pass one, the layers' curves: {counts(state['curves'])}")
        if not decided:
            output.out.print("targets are decided when it is done")
    output.out.print(f"{state['state']}: {counts(state)}")
    if state["cleaned"]:
        output.out.print("its run directory was cleaned; this is what its own manifest says")
    if state["damaged"]:
        count = len(state["damaged"])
        remedy = logs.REPAIR
        if state["cleaned"]:
            remedy = "restore what is damaged, or start over with lestd compress --fresh"
        output.out.print(
            f"{count} {'file' if count == 1 else 'files'} of the manifest cannot be read: {remedy}",
            soft_wrap=True,
        )


def expected_loss(nats: float) -> str:
    """An expected loss, and what perplexity makes of it: the quadratic form is good when small."""
    return f"{nats:.4f} nats per token, perplexity about {math.expm1(nats):+.1%}"


def _error(layer: dict[str, Any]) -> str:
    """A relative error; unknown for values that were trained."""
    value = layer["relative_error"]
    far = " (far more than expected)" if is_far(layer) else ""
    return "" if value is None else f"{value:.4f}{far}"


def print_export(export: Export, json: bool) -> None:
    """Print what an export wrote."""
    if json:
        output.print_json(asdict(export))
        return
    output.out.print(
        f"{export.out}: {export.tensors} tensors in {export.shards} shards, "
        f"{output.size(export.untouched_bytes + export.exported_bytes)}; {export.groups} groups "
        f"{output.size(export.stored_bytes)} -> {output.size(export.exported_bytes)} in "
        f"{' and '.join(export.dtypes)}; {export.seconds:.1f} s",
        soft_wrap=True,
    )
