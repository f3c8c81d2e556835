"""Size against quality: the models of a sweep as a table, as JSON, and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.console import output
from orchestrator.console.plots import write_figure
from orchestrator.evaluation.perplexity import PERPLEXITIES, TEXT_TASK, Evaluation
from orchestrator.evaluation.perplexity_table import describe_evaluations

_PANELS_IN_A_ROW = 3


@dataclass(frozen=True)
class Quality:
    """One figure of a model.

    Attributes:
        task: ``"text"``, or a task of lm-eval.
        metric: its metric.
        answer_filter: lm-eval's filter of the answers; ``"none"`` where there is none.
        value: the figure.
        stderr: its standard error; None where it has none.
        difference: to the dense model, whose own is 0.
        difference_stderr: paired standard error of the difference; None where it has none.
        higher_is_better: None where nobody says.
        main: whether it is shown in the table; JSON has all.
    """

    task: str
    metric: str
    answer_filter: str
    value: float
    stderr: float | None
    difference: float
    difference_stderr: float | None
    higher_is_better: bool | None
    main: bool

    @property
    def title(self) -> str:
        """What it is called for people."""
        if self.task == TEXT_TASK:
            return self.metric.replace("_perplexity", " ppl")
        return f"{self.task} {self.metric}".replace("_perplexity", " ppl")


@dataclass(frozen=True)
class Point:
    """A model of the sweep.

    Attributes:
        keep: what was asked for; None for the dense model.
        model: its directory, or how the dense one was named.
        stored_bytes: bytes of its weights in scope.
        model_bytes_on_disk: bytes of its safetensors files, headers included.
        relative_error: ``||W - W_hat|| / ||W||`` over the weights in scope.
        quality: its figures, of each model the same ones; empty where it was not judged.
    """

    keep: float | None
    model: str
    stored_bytes: int
    model_bytes_on_disk: int
    relative_error: float
    quality: tuple[Quality, ...]


def text_qualities(evaluations: Sequence[Evaluation]) -> list[tuple[Quality, ...]]:
    """The perplexities of models on a text; the first model is the dense one."""
    qualities = []
    for evaluation in evaluations:
        described = describe_evaluations([evaluations[0], evaluation])
        entry, difference = described["models"][1], described["difference"]
        qualities.append(
            tuple(
                Quality(
                    TEXT_TASK,
                    metric,
                    "none",
                    entry[metric],
                    entry.get(f"{metric}_stderr"),
                    difference[metric],
                    difference.get(f"{metric}_stderr"),
                    higher_is_better=False,
                    main=True,
                )
                for metric in PERPLEXITIES
            )
        )
    return qualities


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


def save_curve(points: Sequence[Point], title: str, path: Path) -> None:
    """Draw size on disk against each main figure; the dense model is the line to beat.

    Of a text only the token perplexity is drawn: the word perplexity is a power of it. Bars are
    one paired standard error of the difference to the dense model, where it has one.

    Args:
        points: the dense model first; judged.
        title: what stands above.
        path: the file; `bench.check_plot` has accepted it.
    """
    # An extra of the package, and slow to import: only who asks for a plot needs it.
    from matplotlib.figure import Figure

    dense = points[0]
    shown = [
        place
        for place, quality in enumerate(dense.quality)
        if quality.main and (quality.task, quality.metric) != (TEXT_TASK, "word_perplexity")
    ]
    rows = -(-len(shown) // _PANELS_IN_A_ROW)
    columns = -(-len(shown) // rows)
    wide = 6.4 if columns == 1 else 4.2 * columns
    figure = Figure(figsize=(wide, 4.2 if rows == 1 else 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, place in zip(panels, shown, strict=False):
        _draw(axes, points, place)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    figure.supxlabel("safetensors files on disk, MiB", fontsize="medium")
    figure.suptitle(title, fontsize="medium")
    write_figure(figure, path)


def _draw(axes: Any, points: Sequence[Point], place: int) -> None:
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
    axes.set_ylabel(quality.title + {True: " ↑", False: " ↓", None: ""}[quality.higher_is_better])
