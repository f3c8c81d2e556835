"""What the named queries of `lestd query` answer, recomputed in plain Python from the rows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

Row = dict[str, Any]
Tables = dict[str, list[Row]]
STAGES = ("read", "stage1", "rank_search", "stage2", "error", "write")


def by(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    found = defaultdict(list)
    for row in rows:
        found[tuple(row[key] for key in keys)].append(row)
    return found


def pick(row: Row, *keys: str) -> Row:
    return {key: row[key] for key in keys}


def total(rows: Iterable[Row], key: str) -> Any:
    values = [row[key] for row in rows if row[key] is not None]
    return sum(values) if values else None


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def current(tables: Tables) -> list[Row]:
    """The groups that a model is made of: of one that was encoded twice the later encoding."""
    latest = {}
    for row in sorted(tables["groups"], key=lambda row: (row["started_at"], row["task_id"])):
        latest[row["run"], row["block"]] = row
    return sorted(latest.values(), key=lambda row: (row["run"], row["layer"], row["block"]))


def committed(tables: Tables) -> list[Row]:
    done = {(row["run"], row["task_id"]) for row in current(tables)}
    return [row for row in tables["slices"] if (row["run"], row["task_id"]) in done]


def bytes_by_projection(tables: Tables) -> list[Row]:
    rows = []
    for (run,), groups in by(current(tables), "run").items():
        stored, parts = total(groups, "stored_bytes"), []
        slices = [row for row in committed(tables) if row["run"] == run]
        for (part,), ours in by(slices, "projection").items():
            counts = {"slices": len(ours), "nnz": total(ours, "nnz")}
            parts.append({"part": part, **counts, "bytes": total(ours, "core_bytes")})
        factors = stored - total(parts, "bytes")
        parts.append({"part": "factors", "slices": None, "nnz": None, "bytes": factors})
        rows += [{"run": run, **part, "share": part["bytes"] / stored} for part in parts]
    return sorted(rows, key=lambda row: (row["run"], -row["bytes"], row["part"]))


def bytes_by_layer(tables: Tables) -> list[Row]:
    rows = []
    for (run, layer), groups in sorted(by(current(tables), "run", "layer").items()):
        whole = total((row for row in current(tables) if row["run"] == run), "stored_bytes")
        sums = {key: total(groups, key) for key in ("dense_bytes", "byte_budget", "stored_bytes")}
        keep = sums["stored_bytes"] / sums["dense_bytes"]
        rows.append(
            {
                "run": run,
                "layer": layer,
                **sums,
                "keep": keep,
                "share": sums["stored_bytes"] / whole,
            }
        )
    return rows


def heads(key: str, sign: int) -> Callable[[Tables], list[Row]]:
    shown = ("run", "layer", "block", "projection", "head", "density", "nnz", "core_bytes")

    def answer(tables: Tables) -> list[Row]:
        rows = []
        for _, slices in sorted(by(committed(tables), "run").items()):
            slices.sort(
                key=lambda r: (sign * r[key], r["layer"], r["block"], r["projection"], r["head"])
            )
            rows += [pick(row, *shown, "relative_error") for row in slices[:20]]
        return rows

    return answer


def worst_layers(tables: Tables) -> list[Row]:
    rows = []
    for _, groups in sorted(by(current(tables), "run").items()):
        error = total(groups, "squared_error")
        for row in sorted(groups, key=lambda r: (-r["relative_error"], r["layer"]))[:20]:
            figures = {"share_of_error": ratio(row["squared_error"], error)}
            figures["keep"] = row["stored_bytes"] / row["dense_bytes"]
            shown = pick(
                row, "run", "layer", "block", "relative_error", "R1", "R2", "R3", "density"
            )
            rows.append(shown | figures)
    return rows


def tasks(tables: Tables) -> list[Row]:
    """One row per task: curves have a row per point, each with the seconds of the whole."""
    curves = [points[0] for points in by(tables["curves"], "run", "task_id").values()]
    found = [row | {"pass": "group"} for row in tables["groups"]]
    found += [row | {"pass": "curve"} for row in curves]
    for row in found:
        row |= {stage: row[f"seconds_{stage}"] for stage in STAGES}
        row["seconds"] = sum(row[stage] or 0 for stage in STAGES)
    return found


def slowest_tasks(tables: Tables) -> list[Row]:
    rows = []
    for _, ours in sorted(by(tasks(tables), "run").items()):
        ours.sort(key=lambda r: (-r["seconds"], r["pass"], r["layer"], r["block"]))
        shown = ("run", "pass", "layer", "block", "seconds", *STAGES, "worker", "attempt")
        rows += [pick(row, *shown) for row in ours[:20]]
    return rows


def time_by_stage(tables: Tables) -> list[Row]:
    rows = []
    whole = {run: total(ours, "seconds") for (run,), ours in by(tasks(tables), "run").items()}
    for (run, which), ours in by(tasks(tables), "run", "pass").items():
        for stage in STAGES:
            seconds = [row[stage] for row in ours if row[stage] is not None]
            if seconds:
                row = {"run": run, "pass": which, "stage": stage, "tasks": len(seconds)}
                row |= {"seconds": sum(seconds), "longest": max(seconds)}
                rows.append(row | {"share": sum(seconds) / whole[run]})
    return sorted(rows, key=lambda r: (r["run"], -r["seconds"], r["pass"], r["stage"]))


def workers(tables: Tables) -> list[Row]:
    rows = []
    whole = {run: total(ours, "seconds") for (run,), ours in by(tasks(tables), "run").items()}
    for (run, _), ours in by(tasks(tables), "run", "worker").items():
        busy = total(ours, "seconds")
        starts = [row["started_at"] for row in ours]
        row = pick(ours[0], "run", "worker", "node", "device")
        row |= {"tasks": len(ours), "busy_seconds": busy, "share": busy / whole[run]}
        rows.append(row | {"first_started_at": min(starts), "last_started_at": max(starts)})
    return sorted(rows, key=lambda r: (r["run"], -r["busy_seconds"], r["worker"]))


def events(tables: Tables, kind: str) -> list[Row]:
    shown = ("run", "time", "layer", "block", "task_id", "attempt", "error_type", "message")
    rows = [row for row in tables["events"] if row["kind"] == kind]
    rows.sort(key=lambda r: (r["run"], r["time"], r["task_id"]))
    return [pick(row, *shown, "worker", "node") for row in rows]


def retries(tables: Tables) -> list[Row]:
    """Attempts by what followed them: none ends well that another attempt follows."""
    rows = events(tables, "retried")
    for _, ours in by(tables["events"], "run", "task_id").items():
        for event, following in pairwise(sorted(ours, key=lambda row: row["time"])):
            if following["kind"] == "started" and event["kind"] != "retried":
                row = pick(event, *(key for key in rows[0])) if rows else dict(event)
                if event["kind"] == "started":
                    row["error_type"] = "Interrupted"
                    row["message"] = (
                        "an earlier call ended before it was finished, "
                        "or its result was damaged since"
                    )
                rows.append(row)
    return sorted(rows, key=lambda r: (r["run"], r["time"], r["task_id"]))


def failures(tables: Tables) -> list[Row]:
    done = {(r["run"], r["task_id"]) for name in ("groups", "curves") for r in tables[name]}
    return [
        row | {"finished_since": (row["run"], row["task_id"]) in done}
        for row in events(tables, "failed")
    ]


def predicted(group: Row, curves: list[Row]) -> float | None:
    ours = [r for r in curves if all(r[k] == group[k] for k in ("run", "layer", "block"))]
    points = sorted((r["byte_budget"], r["predicted_squared_error"]) for r in ours)
    budget = group["byte_budget"]
    for (low, low_error), (high, high_error) in pairwise(points):
        if low <= budget < high:
            return low_error + (high_error - low_error) * (budget - low) / (high - low)
    return points[-1][1] if points and points[-1][0] <= budget else None


def plan_vs_actual(tables: Tables) -> list[Row]:
    rows = []
    for run in sorted(
        {row["run"] for name in ("groups", "runs", "curves") for row in tables[name]}
    ):
        groups = [row for row in current(tables) if row["run"] == run]
        work = [row for row in tasks(tables) if row["run"] == run]
        calls = [row for row in tables["runs"] if row["run"] == run]
        call = defaultdict(lambda: None, max(calls, key=lambda r: r["started_at"], default={}))
        seconds = [
            sum(row[f"seconds_{stage}"] for stage in ("stage1", "rank_search", "stage2", "error"))
            for row in work
        ]
        calibrated = [row for row in calls if row["planned_seconds"] is not None]
        before = max(calibrated, key=lambda r: r["started_at"], default={"planned_seconds": None})
        disk = total(groups, "payload_bytes")
        errors = [predicted(row, tables["curves"]) for row in groups]
        memory = max((row["peak_memory_bytes"] for row in work), default=None)
        quantities = {
            "groups": (call["tasks"], len(groups)),
            "bytes of the finished groups": (
                total(groups, "byte_budget"),
                total(groups, "stored_bytes"),
            ),
            "bytes of all groups": (call["byte_budget"], call["stored_bytes"]),
            "peak memory of a worker, bytes": (call["planned_worker_memory_bytes"], memory),
            "disk of the run, bytes": (call["planned_disk_bytes"], disk),
            "decomposing, seconds": (
                before["planned_seconds"],
                sum(seconds) if seconds else None,
            ),
            "squared error in the run's metric": (
                sum(errors) if errors and None not in errors else None,
                total(groups, "metric_squared_error"),
            ),
        }
        for quantity, (planned, actual) in quantities.items():
            row = {"run": run, "quantity": quantity, "planned": planned, "actual": actual}
            rows.append(row | {"ratio": ratio(actual, planned)})
    return rows


def energy(tables: Tables) -> list[Row]:
    rows = []
    for (run, layer), groups in sorted(by(current(tables), "run", "layer").items()):
        norm, one, two, error = (
            total(groups, key)
            for key in (
                "squared_norm",
                "squared_energy_stage1",
                "squared_energy_stage2",
                "squared_error",
            )
        )
        kept = {"kept_stage1": ratio(one, norm), "kept_stage2": ratio(two, norm)}
        kept |= {"kept_by_pruning": ratio(two, one), "relative_error": math.sqrt(error / norm)}
        rows.append({"run": run, "layer": layer, "squared_norm": norm, **kept})
    return rows


def ranks(tables: Tables) -> list[Row]:
    shown = ("run", "layer", "block", "R1", "R2", "R3", "nnz", "density", "codec")
    return [pick(row, *shown, "hooi_iterations", "threshold") for row in current(tables)]


def codecs(tables: Tables) -> list[Row]:
    rows = []
    for (run, codec), groups in by(current(tables), "run", "codec").items():
        row = {"run": run, "codec": codec, "groups": len(groups), "nnz": total(groups, "nnz")}
        row["stored_bytes"] = total(groups, "stored_bytes")
        rows.append(row | {"mean_density": total(groups, "density") / len(groups)})
    return sorted(rows, key=lambda r: (r["run"], -r["stored_bytes"], r["codec"]))


def spectra(tables: Tables) -> list[Row]:
    rows = []
    for group in current(tables):
        energies = [value**2 for value in group.get("singular_values_1") or ()]
        if not sum(energies):
            continue

        def leading(count: int, energies: list[float] = energies) -> float:
            return sum(energies[:count]) / sum(energies)

        width = len(energies)
        shares = [energy / sum(energies) for energy in energies]
        entropy = -sum(share * math.log(share) for share in shares if share > 0)
        row = pick(group, "run", "layer", "block", "R1") | {"width": width}
        row |= {"energy_of_R1": leading(group["R1"]), "energy_of_1": leading(1)}
        row |= {"energy_of_sixteenth": leading(math.ceil(width / 16))}
        row |= {"energy_of_quarter": leading(math.ceil(width / 4))}
        rows.append(row | {"effective_rank": math.exp(entropy)})
    return rows


def evaluations(tables: Tables) -> list[Row]:
    keys = (
        "run",
        "task",
        "task_version",
        "metric",
        "answer_filter",
        "fewshot",
        "dtype",
        "settings",
    )
    rows = []
    for key, ours in by(sorted(tables["evaluations"], key=lambda r: r["time"]), *keys).items():
        latest = {row["compressed"]: row for row in ours}
        dense, small = latest.get(False, {}), latest.get(True, {})
        row = dict(zip(keys, key, strict=True))
        row |= {"before": dense.get("value"), "after": small.get("value")}
        change = small["value"] - dense["value"] if dense and small else None
        row |= {"change": change, "stderr_after": small.get("stderr")}
        rows.append(row | {"higher_is_better": any(r["higher_is_better"] for r in ours)})
    return sorted(rows, key=lambda r: [(r[key] is None, r[key]) for key in keys])


def runs(tables: Tables) -> list[Row]:
    shown = ("run", "invocation", "state", "started_at", "seconds", "model", "method")
    shown += ("allocation", "keep", "device", "executor", "tasks", "finished_before", "finished")
    shown += ("failed", "retried", "dense_bytes", "stored_bytes")
    rows = sorted(tables["runs"], key=lambda r: (r["run"], r["started_at"], r["invocation"]))
    return [pick(row, *shown) for row in rows]


ORACLES: dict[str, Callable[[Tables], list[Row]]] = {
    "bytes-by-layer": bytes_by_layer,
    "bytes-by-projection": bytes_by_projection,
    "codecs": codecs,
    "densest-heads": heads("density", -1),
    "energy": energy,
    "evaluations": evaluations,
    "failures": failures,
    "plan-vs-actual": plan_vs_actual,
    "ranks": ranks,
    "retries": retries,
    "runs": runs,
    "slowest-tasks": slowest_tasks,
    "sparsest-heads": heads("density", 1),
    "spectra": spectra,
    "time-by-stage": time_by_stage,
    "workers": workers,
    "worst-heads": heads("relative_error", -1),
    "worst-layers": worst_layers,
}
