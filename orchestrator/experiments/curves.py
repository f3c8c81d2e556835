"""Size against quality, drawn: the dense model is the line to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.console.plots import write_figure
from orchestrator.evaluation.perplexity import TEXT_TASK
from orchestrator.experiments.compare import Measured
from orchestrator.experiments.quality import Point, Quality

# Of the ends of a logarithmic axis on which every tick has a name.
_NEAR = 10
_PANELS_IN_A_ROW = 3


def save_curve(points: Sequence[Point], title: str, path: Path) -> None:
    """Draw size on disk against each main figure; the dense model is the line to beat.

    Of a text only the token perplexity is drawn: the word perplexity is a power of it. Bars are
    one paired standard error of the difference to the dense model, where it has one.

    Args:
        points: the dense model first; evaluated.
        title: what stands above.
        path: the file; `check_plot` has accepted it.
    """
    figure, _ = _figure(
        [partial(_draw_sizes, points, place) for place in _drawn(points[0].quality)],
        title,
        lambda rows: 4.2 if rows == 1 else 3.4 * rows,
    )
    figure.supxlabel("safetensors files on disk, MiB", fontsize="medium")
    write_figure(figure, path)


def save_comparison(rows: Sequence[Measured], title: str, path: Path) -> None:
    """Draw bytes against each main figure, a line for each method; dense is the line to beat.

    Of a text only the token perplexity is drawn, with bars of one paired standard error; where
    nothing was evaluated, the errors of the weights are. Perplexities have a logarithmic axis.

    Args:
        rows: the dense model first.
        title: what stands above.
        path: the file; `check_plot` has accepted it.
    """
    draws = [partial(_draw_quality, rows, place) for place in _drawn(rows[0].point.quality)]
    draws.append(partial(_draw_error, rows, "relative error", lambda row: row.point.relative_error))
    draws.append(
        partial(_draw_error, rows, "largest operator error", lambda row: row.operator_error)
    )
    figure, panels = _figure(draws, title, lambda lines: 0.8 + 3.6 * lines)
    for axes in panels:
        axes.set_xlabel("weights in scope, MiB")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    write_figure(figure, path)


def _drawn(qualities: Sequence[Quality]) -> list[int]:
    """Places of the figures that are drawn."""
    return [
        place
        for place, quality in enumerate(qualities)
        if quality.main and (quality.task, quality.metric) != (TEXT_TASK, "word_perplexity")
    ]


def _figure(
    draws: Sequence[Callable[[Any], None]], title: str, height: Callable[[int], float]
) -> tuple[Any, list[Any]]:
    """A figure with a panel for each of `draws`; `height`, in inches, of the number of rows."""
    # An extra of the package, and slow to import: only who asks for a plot needs it.
    from matplotlib.figure import Figure

    rows = -(-len(draws) // _PANELS_IN_A_ROW)
    columns = -(-len(draws) // rows)
    wide = 6.4 if columns == 1 else 4.2 * columns
    figure = Figure(figsize=(wide, height(rows)), layout="constrained")
    panels = [*figure.subplots(rows, columns, squeeze=False).ravel()]
    for axes in panels[len(draws) :]:
        axes.set_axis_off()
    for axes, draw in zip(panels, draws, strict=False):
        draw(axes)
    figure.suptitle(title, fontsize="medium")
    return figure, panels[: len(draws)]


def _draw_sizes(points: Sequence[Point], place: int, axes: Any) -> None:
    """One panel: the figure that stands at this place of every model's."""
    dense, *compressed = points
    compressed = sorted(compressed, key=lambda point: point.model_bytes_on_disk)
    quality = dense.quality[place]
    axes.axhline(quality.value, color="0.4", linestyle="--", linewidth=1)
    sizes = [point.model_bytes_on_disk / 2**20 for point in compressed]
    values = [point.quality[place].value for point in compressed]
    errors = [point.quality[place].difference_stderr or 0.0 for point in compressed]
    axes.errorbar(sizes, values, errors, fmt="o-", color="tab:blue", ecolor="0.7", capsize=3)
    whole = dense.model_bytes_on_disk / 2**20
    axes.plot([whole], [quality.value], "s", color="0.4")
    for x, y, point in zip(sizes, values, compressed, strict=True):
        axes.annotate(f"keep {point.keep:g}", (x, y), (5, 3), textcoords="offset points")
    # Below its line: the names of the others are above their points.
    axes.annotate(
        f"dense, {quality.value:.4g}",
        (whole, quality.value),
        (0, -6),
        textcoords="offset points",
        ha="right",
        va="top",
    )
    axes.margins(x=0.1, y=0.15)
    axes.set_ylabel(_labelled(quality))


def _labelled(quality: Quality) -> str:
    return quality.title + {True: " ↑", False: " ↓", None: ""}[quality.higher_is_better]


def _lines(rows: Sequence[Measured]) -> dict[str, list[Measured]]:
    """The compressed models of each method, by size."""
    lines: dict[str, list[Measured]] = {}
    for row in sorted(rows[1:], key=lambda row: row.point.stored_bytes):
        lines.setdefault(row.label, []).append(row)
    return {label: lines[label] for label in dict.fromkeys(row.label for row in rows[1:])}


def _draw_quality(rows: Sequence[Measured], place: int, axes: Any) -> None:
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
        low, high = axes.get_ylim()
        if high < _NEAR * low:
            axes.yaxis.set_minor_formatter("{x:g}")
        else:  # The names of all its ticks would lie on each other.
            from matplotlib.ticker import LogLocator, NullFormatter

            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(_labelled(dense))


def _draw_error(
    rows: Sequence[Measured], title: str, value: Callable[[Measured], float], axes: Any
) -> None:
    for label, line in _lines(rows).items():
        sizes = [row.point.stored_bytes / 2**20 for row in line]
        axes.plot(sizes, [value(row) for row in line], "o-", label=label)
    axes.set_ylabel(f"{title} ↓")
