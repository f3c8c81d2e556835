"""The report of a run as Markdown: text for a model card, an issue or a log of experiments."""

from __future__ import annotations

from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from orchestrator.markdown import figure, mib, template
from orchestrator.report_data import ReportData


def render(data: ReportData) -> str:
    """The report's Markdown, with the tables that model cards have too.

    Names of machines and paths to models are left out: it is made to be published.
    """
    summary = data.summary
    text = template("report.md.jinja").render(
        data=data,
        summary=summary,
        name=_name(summary["model"], summary["revision"]),
        facts=_facts(summary),
        quantity=_quantity,
        measured=_measured,
        time=_time,
        base=lambda model: _name(model, None),
    )
    return text.rstrip() + "\n"


def _name(model: str | None, revision: str | None) -> str | None:
    """A Hub id as it is; of a path the last part, the rest is nobody else's business."""
    return model if model is None or revision else PurePosixPath(model).name


def _facts(summary: dict[str, Any]) -> list[tuple[str, Any]]:
    """What the summary states of a run, as far as it is known."""
    layers = summary["finished"]
    if summary["tasks"] is not None:
        layers = f"{layers} of {summary['tasks']}"
    failed = f", {summary['failed']} failures" if summary["failed"] else ""
    nodes = f" on {len(summary['nodes'])} nodes" if len(summary["nodes"]) > 1 else ""
    facts = [
        ("source", summary["model"] and _name(summary["model"], summary["revision"])),
        ("revision", summary["revision"]),
        ("state", summary["state"]),
        ("layers", layers),
        ("method", summary["method"]),
        ("pattern", summary["pattern"]),
        ("allocation", summary["allocation"]),
        ("relative error", figure(summary["relative_error"])),
        ("wall time", _quantity(summary["seconds"], "seconds")),
        ("time of all workers", _quantity(summary["worker_seconds"], "seconds")),
        ("workers", f"{summary['workers']}{nodes}"),
        ("hardware", ", ".join(summary["devices"])),
        ("retries", f"{summary['retried']}{failed}"),
        ("finished at", _time(summary["ended_at"])),
    ]
    return [(what, value) for what, value in facts if value not in (None, "")]


def _quantity(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return mib(value) if unit == "bytes" else f"{value:,.1f} s"


def _measured(value: float | None, stderr: float | None) -> str:
    return figure(value) + ("" if stderr is None else f" ± {figure(stderr)}")


def _time(value: datetime | None) -> str:
    return "" if value is None else f"{value:%Y-%m-%d %H:%M} UTC"
