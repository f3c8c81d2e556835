"""The tables of `lestd diff`: one for each kind of difference that exists."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from orchestrator.console import logs, output
from orchestrator.manifest.schemas import Row
from orchestrator.report.diff import WALL_TIME, WORKERS, by_difference
from workers.contracts import OUTSIDE

_SHOWN_LAYERS, _SHOWN_NAMES = 10, 3
_BAR, _BAR_WIDTH = 12, 96
_BETTER, _WORSE = "green", "red"


def print_diff(found: Row, every_layer: bool) -> None:
    """Print what `compare` found; all layers, or those that differ most."""
    for side in ("before", "after"):
        for bad in found[side]["damaged"]:
            logs.damaged(bad["path"], bad["reason"])
    for side in ("before", "after"):
        output.out.print(f"{side:6}  {_about(found[side])}", soft_wrap=True)
    if found["identical"]:
        stored = next(f["after"] for f in found["bytes"] if f["what"] == "weights in scope, stored")
        output.out.print(
            f"the payloads are identical: {found['common']} layers, {output.size(stored)}"
        )
    _print_one_sided(found)
    _print_configuration(found["configuration"])
    if not found["identical"]:
        _print_figures("bytes", found["bytes"])
        _print_figures("relative error", found["error"])
    _print_figures("time, and memory", found["time"])
    _print_unclocked(found)
    _print_quality(found["quality"])
    if not found["identical"]:
        _print_layers(found["layers"], every_layer)


def _about(side: Row) -> str:
    finished = f"{side['finished']} of {side['tasks']} layers" if side["tasks"] else None
    known = ", ".join(filter(None, (side["state"], finished)))
    return f"{side['path']} ({known})" if known else str(side["path"])


def _print_one_sided(found: Row) -> None:
    for side in ("before", "after"):
        if names := found[f"only_{side}"]:
            more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
            output.out.print(
                f"only {side}: {', '.join(names[:_SHOWN_NAMES])}{more}",
                soft_wrap=True,
            )
    if found["only_before"] or found["only_after"]:
        output.out.print(
            f"bytes, errors and times are of the {found['common']} layers that both have"
            if found["common"]
            else "they have no layer in common"
        )


def _print_configuration(entries: Sequence[Row]) -> None:
    rows = [[one["what"], _plain(one["before"]), _plain(one["after"])] for one in entries]
    if rows:
        output.print_table("configuration", ("", "before", "after"), rows)


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _print_figures(title: str, figures: Sequence[Row]) -> None:
    if any(figure["before"] != figure["after"] for figure in figures):
        rows = [
            (
                figure["what"],
                *(_figure(figure[side], figure["unit"]) for side in ("before", "after")),
                *_change(figure, figure["unit"], None if figure["what"] == WORKERS else False),
            )
            for figure in figures
        ]
        output.print_table(title, ("", "before", "after", "change", "%"), rows)


def _print_unclocked(found: Row) -> None:
    """Say which calls are not in the wall time, where one is shown."""
    wall: Row = next((one for one in found["time"] if one["what"] == WALL_TIME), {})
    for side in ("before", "after"):
        if wall.get(side) is not None and (count := found[side]["calls_without_time"]):
            output.out.print(
                f"{WALL_TIME} of {side} lacks {count} of its {found[side]['calls']} calls, killed "
                "or not ended yet: what they took is not known"
            )


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "bytes":
        return output.size(value)
    if unit == "seconds":
        return f"{value:,.2f} s"
    return f"{value:,}" if unit == "count" else f"{value:.4f}"


def _change(pair: Row, unit: str, higher_is_better: bool | None) -> tuple[Text, Text]:
    """The change with its sign, and in percent, in the color of what it means."""
    change, ratio = pair["change"], pair["ratio"]
    if not change:
        return Text("" if change is None else "="), Text()
    text = ("-" if change < 0 else "+") + _figure(abs(change), unit)
    percent = "" if ratio is None else f"{ratio - 1:+.2%}"
    if higher_is_better is None:
        return Text(text), Text(percent)
    color = _BETTER if (change > 0) == higher_is_better else _WORSE
    return Text(text, color), Text(percent, color)


def _print_quality(metrics: Sequence[Row]) -> None:
    rows = []
    for one in metrics:
        change, percent = _change(one, "", one["higher_is_better"])
        if one["stderr"] is not None:
            change += f" ± {one['stderr']:.4f}"
        name = one["metric"] + (
            f", {one['answer_filter']}" if one["answer_filter"] not in (None, "none") else ""
        )
        shots = "" if one["fewshot"] is None else str(one["fewshot"])
        sides = (_figure(one[side], "") for side in ("before", "after"))
        rows.append((one["task"], name, shots, *sides, change, percent))
    if rows and any(one["change"] for one in metrics):
        columns = ("quality", "metric", "shots", "before", "after", "change", "%")
        output.print_table("quality, where both were measured alike", columns, rows)
        if any(one["stderr"] is not None for one in metrics):
            output.out.print("± is the standard error of the change, for independent samples")


def _print_layers(layers: Sequence[Row], every_layer: bool) -> None:
    differing = by_difference(layers)
    shown = list(layers) if every_layer else differing[:_SHOWN_LAYERS]
    largest = max((abs(one["relative_error"]["change"] or 0.0) for one in shown), default=0.0)
    wide = output.out.width >= _BAR_WIDTH
    rows = []
    for one in shown:
        stored, error = one["stored_bytes"], one["relative_error"]
        cells: list[str | Text] = [
            str(one["block"] if one["layer"] == OUTSIDE else one["layer"]),
            _figure(stored["after"], "bytes"),
            _change(stored, "bytes", higher_is_better=False)[1],
            _sides(output.ranks(one["before"]), output.ranks(one["after"])),
            _figure(error["after"], ""),
            _change(error, "", higher_is_better=False)[0],
        ]
        rows.append(cells + ([_bar(error["change"] or 0.0, largest)] if wide else []))
    if not rows:
        return
    title = f"layers: {len(differing)} of {len(layers)} differ"
    if len(shown) < len(differing):
        title += f", the {len(shown)} that differ most; --all shows every one"
    columns = [
        "layer",
        "stored",
        "%",
        "ranks",
        "error",
        "change",
        *(["of largest"] if wide else []),
    ]
    output.print_table(title, columns, rows)


def _sides(before: str, after: str) -> str:
    return after if before == after else f"{before} → {after}"


def _bar(change: float, largest: float) -> Text:
    """As much of a bar is full as the change is of the largest one."""
    length = round(_BAR * abs(change) / largest) if largest else 0
    color = _WORSE if change > 0 else _BETTER
    return Text.assemble(("█" * length, color), ("░" * (_BAR - length), "dim"))
