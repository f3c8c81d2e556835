"""The report of a run as Markdown: text for a model card, an issue or a log of experiments."""

from __future__ import annotations

from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from orchestrator.console.markdown import figure, mib, template
from orchestrator.report.data import ReportData, calls_in_words, model_name


def render(data: ReportData) -> str:
    """The report's Markdown, with the tables that model cards have too.

    Names of machines and paths to models are left out: it is made to be published.
    """
    summary = data.summary
    text = template("report/report.md.jinja").render(
        data=data,
        summary=summary,
        name=model_name(summary),
        facts=_facts(summary),
        quantity=_quantity,
        measured=_measured,
        time=_time,
        base=lambda model: PurePosixPath(model).name,
    )
    return text.rstrip() + "\n"


def _facts(summary: dict[str, Any]) -> list[tuple[str, Any]]:
    """Facts of a run for the summary, as far as they are known."""
    layers = summary["finished"]
    if summary["tasks"] is not None:
        layers = f"{layers} of {summary['tasks']}"
    failed = f", {summary['failed']} failures" if summary["failed"] else ""
    nodes = f" on {len(summary['nodes'])} nodes" if len(summary["nodes"]) > 1 else ""
    over = summary["state"] == "complete"
    at = summary["ended_at"] if over else summary["last_result_at"]
    facts = [
        ("source", model_name(summary)),
        ("revision", summary["revision"]),
        ("family", summary["family"]),
        ("state", ": ".join(filter(None, (summary["state"], summary["state_reason"])))),
        ("layers", layers),
        ("method", summary["method"]),
        ("metric", summary["metric"]),
        ("pattern", summary["pattern"]),
        ("keep, as planned", figure(summary["keep"])),
        ("allocation", summary["allocation"]),
        ("relative error", figure(summary["relative_error"])),
        ("expected loss, nats per token", figure(summary["expected_loss"])),
        ("wall time", _wall_time(summary)),
        ("from first to last task", _quantity(summary["span_seconds"], "seconds")),
        ("time of all workers", _quantity(summary["worker_seconds"], "seconds")),
        ("executor", summary["executor"]),
        ("worker processes", f"{summary['workers']}{nodes}"),
        ("hardware", ", ".join(summary["devices"])),
        ("retries", f"{summary['retried']}{failed}"),
        ("calls that were killed", summary["killed_calls"] or None),
        ("finished at" if over else "last result at", _time(at)),
    ]
    return [(what, value) for what, value in facts if value not in (None, "")]


def _wall_time(summary: dict[str, Any]) -> str:
    if not summary["calls"] or summary["seconds"] is None:
        return ""
    return f"{_quantity(summary['seconds'], 'seconds')} in {calls_in_words(summary)}"


def _quantity(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return mib(value) if unit == "bytes" else f"{value:,.1f} s"


def _measured(value: float | None, stderr: float | None) -> str:
    return figure(value) + ("" if stderr is None else f" ± {figure(stderr)}")


def _time(value: datetime | None) -> str:
    return "" if value is None else f"{value:%Y-%m-%d %H:%M} UTC"
