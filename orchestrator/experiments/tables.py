"""The models of an experiment as a table for the terminal, as JSON, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.console import output
from orchestrator.console.markdown import cell
from orchestrator.experiments.compare import Measured, Missing
from orchestrator.experiments.quality import Point, Quality
from workers.storage.files import atomic_write

_NOTES = (
    "bytes are data bytes; keep is stored / dense bytes of the weights in scope, in parentheses by "
    "how much the budget is undershot, which with --size memory counts bytes in memory",
    "relative error `||W - W_hat||_F / ||W||_F` over all weights in scope; operator error the "
    "largest `||W - W_hat||_2 / ||W||_2` of a weight; activation error "
    "`||X (W - W_hat)||_F / ||X W||_F` on the calibration text",
    "behind quality the difference to the dense model, with its paired standard error",
    "seconds: work of all workers together; decode: tokens per second / those of the dense model, "
    "measured in turn",
)


def print_sweep(points: Sequence[Point], asked: dict[str, Any], json: bool) -> None:
    """Print a sweep as a table, or as one JSON object.

    Args:
        points: the dense model first.
        asked: what JSON says besides; ``plot`` is named below the table.
        json: which of the two.
    """
    dense = points[0]
    if json:
        entries = [asdict(point) for point in points]
        output.print_json(asked | {"dense": entries[0], "points": entries[1:]})
        return
    columns = ["keep", "weights in scope", "files on disk", "relative error"]
    # In two lines, so that the columns of several tasks find place beside each other.
    columns += [quality.title.replace(" ", "\n", 1) for quality in dense.quality if quality.main]
    rows = []
    for point in points:
        row = ["dense" if point.keep is None else f"{point.keep:g}"]
        row += [output.size(point.stored_bytes), output.size(point.model_bytes_on_disk)]
        row.append(f"{point.relative_error:.4f}")
        for quality in point.quality:
            if quality.main:
                told = "" if point.keep is None else f"\n({quality.difference:+.4f})"
                row.append(f"{quality.value:.4f}{told}")
        rows.append(row)
    output.print_table(dense.model, columns, rows)
    if dense.quality:
        output.out.print("In parentheses the difference to the dense model")
    if asked["plot"] is not None:
        output.out.print(f"plot {asked['plot']}", soft_wrap=True)


def print_rows(
    rows: Sequence[Measured], missing: Sequence[Missing], asked: dict[str, Any], json: bool
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


def save_markdown(
    rows: Sequence[Measured], missing: Sequence[Missing], title: str, path: Path
) -> None:
    """Write the table as Markdown."""
    columns, body = _cells(rows, " ")
    lines = [f"# {cell(title)}", "", " | ".join(("", *columns, "")).strip()]
    lines.append("| --- |" + " ---: |" * (len(columns) - 1))
    lines += [" | ".join(("", *map(cell, row), "")).strip() for row in body]
    notes = [*_NOTES, *map(cell, _notes(rows, missing))]
    lines += ["", *(f"- {note}" for note in notes), ""]
    content = "\n".join(lines).encode()
    atomic_write(path, lambda file: file.write(content))


def undershoot(row: Measured) -> float:
    """By how much of its budget a model stays below it."""
    return 1 - row.counted_bytes / row.byte_budget if row.byte_budget else 0.0


def _cells(rows: Sequence[Measured], newline: str) -> tuple[list[str], list[list[str]]]:
    """Columns, and the cells of every row; columns that say nothing are left out."""
    dense = rows[0]
    calibrated = any(row.activation_error is not None for row in rows)
    timed = any(row.decode_ratio is not None for row in rows)
    shown = [place for place, quality in enumerate(dense.point.quality) if quality.main]
    unpacked = any(row.memory_bytes != row.point.stored_bytes for row in rows)
    columns = ["method", "keep", "scope bytes", *(["in memory"] if unpacked else [])]
    columns += ["model bytes", "relative error", "operator error"]
    columns += ["activation error"] if calibrated else []
    columns += [dense.point.quality[place].title for place in shown]
    columns += ["seconds"] + (["decode ratio"] if timed else [])
    body = []
    for row in rows:
        point, is_dense = row.point, row.point.keep is None
        keep = f"{point.stored_bytes / dense.point.stored_bytes:.4f}"
        if not is_dense:
            keep += f"{newline}(-{100 * undershoot(row):.2f} %)"
        cells = [row.label, keep, f"{point.stored_bytes:,}"]
        cells += [f"{row.memory_bytes:,}"] if unpacked else []
        cells.append(f"{row.model_bytes:,}")
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


def _notes(rows: Sequence[Measured], missing: Sequence[Missing]) -> list[str]:
    notes = []
    worst = max(rows, key=lambda row: row.operator_error)
    if worst.operator_module:
        notes.append(f"the largest operator error is that of {worst.operator_module}")
    return notes + [f"left out: {one.label} at keep {one.keep:g}: {one.reason}" for one in missing]
