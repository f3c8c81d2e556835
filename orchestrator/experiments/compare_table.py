"""A comparison as a table for the terminal, as JSON, as Markdown, and drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.console import output
from orchestrator.console.markdown import cell
from orchestrator.console.plots import write_figure
from orchestrator.evaluation.perplexity import TEXT_TASK
from orchestrator.experiments.compare import Missing, Row
from orchestrator.experiments.sweep_table import Quality
from workers.storage.files import atomic_write

_PANELS_IN_A_ROW = 3
_NOTES = (
    "bytes are data bytes; keep is stored / dense bytes of the weights in scope, in parentheses by "
    "how much the budget is undershot",
    "relative error `||W - W_hat||_F / ||W||_F` over all weights in scope; operator error the "
    "largest `||W - W_hat||_2 / ||W||_2` of a weight; activation error "
    "`||X (W - W_hat)||_F / ||X W||_F` on the calibration text",
    "behind quality the difference to the dense model, with its paired standard error",
    "seconds: work of all workers together; decode: tokens per second / those of the dense model, "
    "measured in turn",
)


def print_rows(
    rows: Sequence[Row], missing: Sequence[Missing], asked: dict[str, Any], json: bool
) -> None:
    """Print a comparison as a table, or as one JSON object.

    Args:
        rows: the dense model first.
        missing: what is left out.
        asked: what JSON says besides; ``table`` and ``plot`` are named below the table.
        json: which of the two.
    """
    if json:
        dense, *others = ({**asdict(row), "undershoot": undershoot(row)} for row in rows)
        left_out = [asdict(one) for one in missing]
        output.print_json(asked | {"dense": dense, "rows": others, "left_out": left_out})
        return
    columns, body = _cells(rows, "\n")
    output.print_table(rows[0].point.model, [c.replace(" ", "\n", 1) for c in columns], body)
    for line in (*_NOTES, *_notes(rows, missing)):
        output.out.print(line, soft_wrap=True)
    for name in ("table", "plot"):
        if asked.get(name) is not None:
            output.out.print(f"{name} {asked[name]}", soft_wrap=True)


def save_markdown(rows: Sequence[Row], missing: Sequence[Missing], title: str, path: Path) -> None:
    """Write the table as Markdown."""
    columns, body = _cells(rows, " ")
    lines = [f"# {cell(title)}", "", " | ".join(("", *columns, "")).strip()]
    lines.append("| --- |" + " ---: |" * (len(columns) - 1))
    lines += [" | ".join(("", *map(cell, row), "")).strip() for row in body]
    notes = [*_NOTES, *map(cell, _notes(rows, missing))]
    lines += ["", *(f"- {note}" for note in notes), ""]
    content = "\n".join(lines).encode()
    atomic_write(path, lambda file: file.write(content))


def undershoot(row: Row) -> float:
    """By how much of its budget a model stays below it."""
    return 1 - row.point.stored_bytes / row.byte_budget if row.byte_budget else 0.0


def _cells(rows: Sequence[Row], newline: str) -> tuple[list[str], list[list[str]]]:
    """Columns, and the cells of every row; columns that say nothing are left out."""
    dense = rows[0]
    calibrated = any(row.activation_error is not None for row in rows)
    timed = any(row.decode_ratio is not None for row in rows)
    shown = [place for place, quality in enumerate(dense.point.quality) if quality.main]
    columns = ["method", "keep", "scope bytes", "model bytes", "relative error", "operator error"]
    columns += ["activation error"] if calibrated else []
    columns += [dense.point.quality[place].title for place in shown]
    columns += ["seconds"] + (["decode ratio"] if timed else [])
    body = []
    for row in rows:
        point, is_dense = row.point, row.point.keep is None
        keep = f"{point.stored_bytes / dense.point.stored_bytes:.4f}"
        if not is_dense:
            keep += f"{newline}(-{100 * undershoot(row):.2f} %)"
        cells = [row.label, keep, f"{point.stored_bytes:,}", f"{row.model_bytes:,}"]
        cells += [f"{point.relative_error:.4f}", f"{row.operator_error:.4f}"]
        if calibrated:
            cells.append(_figure(row.activation_error))
        cells += [_quality(point.quality[place], is_dense, newline) for place in shown]
        cells.append("" if is_dense else f"{row.seconds:.1f}")
        if timed:
            cells.append("" if is_dense else _figure(row.decode_ratio, ".2f"))
        body.append(cells)
    return columns, body


def _figure(value: float | None, form: str = ".4f") -> str:
    return "" if value is None else f"{value:{form}}"


def _quality(quality: Quality, is_dense: bool, newline: str) -> str:
    if is_dense:
        return f"{quality.value:.4f}"
    told = output.with_error(quality.difference, quality.difference_stderr, "+")
    return f"{quality.value:.4f}{newline}({told})"


def _notes(rows: Sequence[Row], missing: Sequence[Missing]) -> list[str]:
    notes = []
    worst = max(rows, key=lambda row: row.operator_error)
    if worst.operator_module:
        notes.append(f"the largest operator error is that of {worst.operator_module}")
    return notes + [f"left out: {one.label} at keep {one.keep:g}: {one.reason}" for one in missing]


def save_comparison(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw bytes against each main figure, a line for each method; dense is the line to beat.

    Of a text only the token perplexity is drawn, with bars of one paired standard error; where
    nothing was judged, the errors of the weights are. Perplexities have a logarithmic axis.

    Args:
        rows: the dense model first.
        title: what stands above.
        path: the file; `bench.check_plot` has accepted it.
    """
    # An extra of the package, and slow to import: only who asks for a plot needs it.
    from matplotlib.figure import Figure

    quality = rows[0].point.quality
    places = [
        place
        for place, one in enumerate(quality)
        if one.main and (one.task, one.metric) != (TEXT_TASK, "word_perplexity")
    ]
    panels: list[Callable[[Any], None]] = [
        lambda axes, place=place: _draw_quality(axes, rows, place)  # type: ignore[misc]
        for place in places
    ]
    panels.append(lambda axes: _draw_error(axes, rows, "relative error", _relative_error))
    panels.append(lambda axes: _draw_error(axes, rows, "largest operator error", _operator_error))
    count = len(panels)
    lines = -(-count // _PANELS_IN_A_ROW)
    columns = -(-count // lines)
    figure = Figure(figsize=(4.2 * columns, 0.8 + 3.6 * lines), layout="constrained")
    found = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, draw in zip(found, panels, strict=False):
        draw(axes)
        axes.set_xlabel("weights in scope, MiB")
    for axes in found[count:]:
        axes.set_axis_off()
    handles, labels = found[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(title, fontsize="medium")
    write_figure(figure, path)


def _relative_error(row: Row) -> float:
    return row.point.relative_error


def _operator_error(row: Row) -> float:
    return row.operator_error


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The compressed models of each method, by size."""
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows[1:], key=lambda row: row.point.stored_bytes):
        lines.setdefault(row.label, []).append(row)
    return {label: lines[label] for label in dict.fromkeys(row.label for row in rows[1:])}


def _draw_quality(axes: Any, rows: Sequence[Row], place: int) -> None:
    dense = rows[0].point.quality[place]
    axes.axhline(dense.value, color="0.4", linestyle="--", linewidth=1)
    for label, line in _lines(rows).items():
        found = [row.point.quality[place] for row in line]
        sizes = [row.point.stored_bytes / 2**20 for row in line]
        errors = [one.difference_stderr or 0.0 for one in found]
        axes.errorbar(sizes, [q.value for q in found], errors, fmt="o-", capsize=3, label=label)
    if dense.title.endswith("ppl"):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_ylabel(dense.title + {True: " ↑", False: " ↓", None: ""}[dense.higher_is_better])


def _draw_error(axes: Any, rows: Sequence[Row], title: str, value: Callable[[Row], float]) -> None:
    for label, line in _lines(rows).items():
        sizes = [row.point.stored_bytes / 2**20 for row in line]
        axes.plot(sizes, [value(row) for row in line], "o-", label=label)
    axes.set_ylabel(f"{title} ↓")
