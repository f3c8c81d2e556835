"""The highlights of a run: a question and its answer in a sentence each."""

from __future__ import annotations

from orchestrator.manifest.schemas import Row
from orchestrator.report.data import ReportData
from workers.contracts import OUTSIDE

STAGE_NAMES = {
    "read": "reading",
    "stage1": "Stage I",
    "rank_search": "the rank search",
    "stage2": "Stage II",
    "error": "measuring the error",
    "write": "writing",
}


def answers(data: ReportData) -> list[tuple[str, str]]:
    """Where the bytes went, which heads are sparse, which layers hurt, what took the time.

    Returns:
        Question and answer; none that the manifest has no figures for.
    """
    found = [
        ("Where did the bytes go?", _bytes(data)),
        ("Which heads are sparse?", _heads(data.heads)),
        ("Which layers hurt?", _layers(data.layers)),
        ("What took the time?", _time(data)),
    ]
    return [(question, answer) for question, answer in found if answer]


def _bytes(data: ReportData) -> str:
    stored = data.summary["stored_bytes"]
    if not stored or not data.projections:
        return ""
    cores = sum(row["core_bytes"] for row in data.projections)
    each = ", ".join(
        f"{row['projection'].upper()} {row['core_bytes'] / stored:.1%}" for row in data.projections
    )
    return (
        f"Cores {cores / stored:.1%} ({each}), the bases that heads share {1 - cores / stored:.1%}."
    )


def _heads(heads: list[Row]) -> str:
    known = [row for row in heads if row["density"] is not None]
    if not known:
        return ""
    sparsest = min(known, key=lambda row: row["density"])
    densest = max(known, key=lambda row: row["density"])

    def name(row: Row) -> str:
        return f"{row['projection'].upper()} head {row['head']} of {_named(row)}"

    return (
        f"Sparsest is {name(sparsest)} with density {sparsest['density']:.4f}, densest "
        f"{name(densest)} with {densest['density']:.4f}."
    )


def _layers(layers: list[Row]) -> str:
    known = [row for row in layers if row["relative_error"] is not None]
    if not known:
        return ""
    if len(known) == 1:
        [only] = known
        return (
            f"{_first(_named(only))}, the only one whose error is known yet, has a relative error "
            f"of {only['relative_error']:.4f}."
        )
    worst = max(known, key=lambda row: row["relative_error"])
    best = min(known, key=lambda row: row["relative_error"])
    return (
        f"{_first(_named(worst))} has the largest relative error, {worst['relative_error']:.4f}; "
        f"{_named(best)} the smallest, {best['relative_error']:.4f}."
    )


def _named(row: Row) -> str:
    """The layer of a group; of one outside of the layers its path."""
    return str(row["block"]) if row["layer"] == OUTSIDE else f"layer {row['layer']}"


def _first(name: str) -> str:
    """A name at the start of a sentence."""
    return name.replace("layer ", "Layer ")


def _time(data: ReportData) -> str:
    said = []
    wall = {row["part"]: row for row in data.wall}
    if wall:
        total = sum(row["seconds"] for row in data.wall)
        each = [f"{wall['tasks']['seconds']:,.1f} s from the first task to the last"]
        each.append(f"{wall['assemble']['seconds']:,.1f} s assembling the model")
        each.append(f"{wall['rest']['seconds']:,.1f} s {wall['rest']['what']}")
        said.append(f"Of {total:,.1f} s wall time: {'; '.join(each)}.")
    total = sum(row["seconds"] for row in data.stages)
    if total:
        first, second, *_ = sorted(data.stages, key=lambda row: row["seconds"], reverse=True)
        leading = STAGE_NAMES[first["stage"]]
        said.append(
            f"{leading[0].upper()}{leading[1:]}, {first['seconds'] / total:.0%} of "
            f"{total:,.1f} s of worker time, then {STAGE_NAMES[second['stage']]}, "
            f"{second['seconds'] / total:.0%}."
        )
    return " ".join(said)
