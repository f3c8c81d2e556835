"""The commands that read manifests: report, diff."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lestd_kernels.errors import LestdError
from orchestrator import tables
from orchestrator.app import app
from orchestrator.options import Json
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
    from orchestrator import report_markdown
    from orchestrator.report_data import gather

    target = out or as_path(f"report.{format}")
    if isinstance(target, Path) and not target.parent.is_dir():
        raise LestdError(f"--out {target}: there is no directory {target.parent}; make it first")
    if format is ReportFormat.html:
        report_html.require_plotly()
        page = report_html.render(gather(run))
    else:
        page = report_markdown.render(gather(run))
    content = page.encode()
    atomic_write(target, lambda file: file.write(content))
    tables.out.print(f"{target}: {tables.size(len(content))}", soft_wrap=True)


@app.command()
def diff(
    before: Annotated[str, typer.Argument(help="A model, a run directory, or a URL of one.")],
    after: Annotated[str, typer.Argument(help="What it is compared with.")],
    every_layer: Annotated[
        bool, typer.Option("--all", help="Every layer, not only those that differ most.")
    ] = False,
    json: Json = False,
) -> None:
    """Show what changed between two runs, finished or not: configuration, bytes, error, time,
    quality, layers. Exits with 0 whether or not anything did."""
    from orchestrator.diff import compare
    from orchestrator.diff_text import print_diff

    found = compare(before, after)
    if json:
        tables.print_json(found)
    else:
        print_diff(found, every_layer)
