"""The commands that read manifests."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lestd_kernels.errors import LestdError
from orchestrator import tables
from orchestrator.app import app
from workers.files import as_path, atomic_write


class ReportFormat(StrEnum):
    """What a report is written as."""

    html = "html"
    md = "md"


@app.command()
def report(
    run: Annotated[
        str, typer.Argument(help="A compressed model or a run: path or URL, finished or not.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write.", parser=as_path, show_default="report.html, report.md"),
    ] = None,
    format: Annotated[
        ReportFormat, typer.Option(help="html: one page with figures; md: text and tables.")
    ] = ReportFormat.html,
) -> None:
    """Show a run as one page: bytes, error, heads, layers, spectra, time, quality."""
    from orchestrator import report as report_html
    from orchestrator.report_data import gather

    target = out or as_path(f"report.{format}")
    if isinstance(target, Path) and not target.parent.is_dir():
        raise LestdError(f"--out {target}: there is no directory {target.parent}; make it first")
    if format is ReportFormat.html:
        report_html.require_plotly()
        page = report_html.render(gather(run))
    else:
        from orchestrator import report_markdown

        page = report_markdown.render(gather(run))
    content = page.encode()
    atomic_write(target, lambda file: file.write(content))
    tables.out.print(f"{target}: {tables.size(len(content))}", soft_wrap=True)
