"""A report as one HTML page that needs no network: styles, scripts and all numbers are inside.

The page says what `orchestrator.report.data` gathered. Its numbers are embedded once, as JSON; the
figures, the tables behind them and the CSV files are made of those by report.js, in the browser.
Names and messages of the manifest are not trusted: they are escaped here, handled as text there,
and the page's Content-Security-Policy allows no script but its own, by hash, and no request.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jinja2 import Environment, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from orchestrator.console.output import finite, ranks, size
from orchestrator.manifest.schemas import STAGES, Row
from orchestrator.report.data import ReportData, calls_in_words, model_name
from orchestrator.report.highlights import answers
from orchestrator.report.page import column_table, csp_hash, inline_script, package_file, plotly_js
from orchestrator.report.quality import headline

_POINTS_OF_A_SPECTRUM = 64
_FIRST_POINTS = 16
_HEADS = (
    *("layer", "block", "projection", "head", "nnz", "density", "core_bytes"),
    *("relative_error", "energy_share"),
)
_PROJECTIONS = (
    *("projection", "slices", "nnz", "density", "core_bytes"),
    *("relative_error", "energy_share"),
)
_TIMELINE = (
    *("kind", "worker", "node", "layer", "block", "task_id", "attempt"),
    *("read_at", "computed_at", "written_at", "ended_at"),
    *(f"seconds_{stage}" for stage in STAGES),
)
_LOST = (
    *("kind", "time", "started_at", "layer", "block", "attempt", "worker", "node"),
    *("error_type", "message"),
)
_EVALUATIONS = (
    *("task", "metric", "answer_filter", "measured_on", "before", "after", "change"),
    *("before_stderr", "after_stderr", "fewshot", "samples", "tokens", "dtype", "settings"),
    *("before_model", "after_model", "time"),
)


def render(data: ReportData) -> str:
    """The page. Same data and same plotly, same page.

    Raises:
        LestdError: plotly is not installed.
    """
    names = ("report/report_figures.js", "report/report.js")
    scripts = [inline_script(text) for text in (plotly_js(), *map(package_file, names))]
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True
    )
    environment.filters |= {"size": size, "duration": duration, "moment": moment}
    environment.filters |= {"figure": figure, "change": change}
    template = environment.from_string(package_file("report/report.html.jinja"))
    content = {
        "tables": _tables(data),
        "relative_error": data.summary["relative_error"],
        "missing": [[row["layer"], row["block"]] for row in data.missing],
    }
    return template.render(
        data=data,
        summary=data.summary,
        title=model_name(data.summary) or _last_parts(data.summary["path"]),
        calls_in_words=calls_in_words(data.summary),
        unique=_is_unique(data.layers),
        last_call=_last_busy_call(data),
        answers=answers(data),
        embedded=htmlsafe_json_dumps(finite(content), separators=(",", ":"), allow_nan=False),
        scripts=[Markup(script) for script in scripts],
        hashes=" ".join(map(csp_hash, scripts)),
        style=Markup(package_file("report/report.css")),
        evaluated=headline(data.evaluations),
        ranks=ranks,
    )


def _last_parts(path: str) -> str:
    return "/".join(path.rstrip("/").split("/")[-2:])


def _is_unique(layers: Sequence[Row]) -> bool:
    """Whether every layer has one block, so that its number names it."""
    return len({row["layer"] for row in layers}) == len(layers)


def _last_busy_call(data: ReportData) -> int | None:
    """The last call in which a task began; None if there is none."""
    latest = max((task["read_at"] for task in data.timeline), default=None)
    began = [
        number
        for number, call in enumerate(data.calls)
        if latest is not None and call["started_at"] and call["started_at"] <= latest
    ]
    return began[-1] if began else None


def _tables(data: ReportData) -> dict[str, Any]:
    layers = list(data.layers[0]) if data.layers else ["layer", "block"]
    unique = _is_unique(data.layers)
    return {
        "planned": column_table(data.planned, ("what", "unit", "planned", "actual")),
        "projections": column_table(
            data.projections,
            _PROJECTIONS,
        ),
        # A quarter of a million rows need not repeat a name that the layer's number tells.
        "heads": column_table(
            data.heads, [name for name in _HEADS if name != "block" or not unique]
        ),
        "layers": column_table(data.layers, layers),
        "spectra": column_table(
            _drawn_spectra(data),
            ("row", "layer", *(() if unique else ("block",)), "mode", "index", "singular_value"),
        ),
        "wall": column_table(data.wall, ("what", "seconds")),
        "stages": column_table(data.stages, ("stage", "seconds")),
        "timeline": column_table(data.timeline, _TIMELINE),
        "lost": column_table(data.lost, _LOST),
        "calls": column_table(data.calls, ("invocation", "started_at", "ended_at", "state")),
        "evaluations": column_table(data.evaluations, _EVALUATIONS),
    }


def _drawn_spectra(data: ReportData) -> list[Row]:
    """The points of each spectrum that are drawn: its steep begin, its rank, the rest evenly."""
    rows = {(row["layer"], row["block"]): index for index, row in enumerate(data.layers)}
    drawn = []
    for spectrum in data.spectra:
        values = spectrum["singular_values"]
        step = (len(values) - 1) / (_POINTS_OF_A_SPECTRUM - 1)
        places = {round(point * step) for point in range(_POINTS_OF_A_SPECTRUM)}
        places |= set(range(min(len(values), _FIRST_POINTS)))
        places |= {spectrum["rank"] - 1} & set(range(len(values))) if spectrum["rank"] else set()
        drawn += [
            {
                "row": rows[spectrum["layer"], spectrum["block"]],
                "layer": spectrum["layer"],
                "block": spectrum["block"],
                "mode": spectrum["mode"],
                "index": place + 1,
                "singular_value": values[place],
            }
            for place in sorted(places)
        ]
    return drawn


def duration(seconds: float) -> str:
    """Seconds as text."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {left:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def moment(at: datetime) -> str:
    """A time as text."""
    return at.strftime("%Y-%m-%d %H:%M UTC")


def figure(value: float | None, digits: int = 4) -> str:
    """A figure with so many decimals; a dash for one that there is not."""
    return "–" if value is None else f"{value:,.{digits}f}"


def change(value: float | None) -> str:
    """A relative change in percent, with its sign."""
    return "–" if value is None else f"{value:+.2%}".replace("-", "−")
