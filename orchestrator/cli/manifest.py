"""The commands that work on manifests: query, report, diff, compact."""

from __future__ import annotations

import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lestd_kernels.errors import LestdError
from orchestrator.cli.application import app, require_folder
from orchestrator.cli.options import Json, Out, RunDir
from orchestrator.console import logs, output
from workers.storage.files import AnyPath, as_path, atomic_write


class ReportFormat(StrEnum):
    """Format of a report."""

    html = "html"
    md = "md"


# What is SQL, or stands for it, and not the name of a run.
_STATEMENT = re.compile(
    r"\s*(-\s*$|(select|from|with|describe|summarize|show|pivot|unpivot)\s.*)",
    re.IGNORECASE | re.DOTALL,
)
_QUERY_HELP = """Query the manifests of runs in SQL, during a run or after it.

Each RUN is a directory or URL: a compressed model, its run directory, or an unfinished
OUT. The last argument is one SELECT statement (`-`: read it from standard input); `--name`
chooses a built-in query instead.

Tables: **groups** (a row per finished block), **slices** (per head of a projection), **curves**
(points of global allocation), **events** (starts, retries, failures), **runs** (calls of compress),
**evaluations** (metrics). The first column of each is **run**; `DESCRIBE slices` shows the others.
Views: **current** and **current_slices** (of the groups that the model is made of),
**finished_tasks** (both passes of global allocation, with their seconds).

    lestd query --list

    lestd query OUT --name densest-heads

    lestd query OUT "select projection, avg(density), sum(core_bytes) from slices group by all"

    lestd query OUT1 OUT2 "select run, layer, relative_error from groups order by all" --csv

    lestd query s3://BUCKET/OUT "from slices" --parquet slices.parquet

A query reads these tables only; it cannot write, or reach files or the network. Damaged files are
named on standard error; their rows are missing. Dialect: duckdb's."""


@app.command(help=_QUERY_HELP, rich_help_panel="Inspect a run")
def query(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="RUN... [SQL]", help="Runs, then the statement.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="A built-in query, instead of SQL.")] = None,
    show_list: Annotated[
        bool, typer.Option("--list", help="List the built-in queries; needs no RUN.")
    ] = False,
    csv: Annotated[bool, typer.Option("--csv", help="All rows as CSV.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help='All rows as JSON: {"rows": [{...}, ...]}.')
    ] = False,
    parquet: Annotated[
        Path | None, typer.Option(help="All rows into this Parquet file.", parser=as_path)
    ] = None,
) -> None:
    """Ask the manifests of runs in SQL."""
    from orchestrator.manifest.part_files import Damaged
    from orchestrator.query import writers
    from orchestrator.query.sql import bounded_memory, named_queries, run_query

    if csv + json + (parquet is not None) > 1:
        raise LestdError("--csv, --json and --parquet were given together; choose one")
    if parquet is not None:
        require_folder("--parquet", parquet)
    if show_list:
        if name is not None:
            raise LestdError("--list and --name were given together; choose one")
        known = named_queries()
        width = max(map(len, known))
        for one in known.values():
            output.out.print(f"{one.name:{width}}  {one.summary}", soft_wrap=True)
        return
    places, sql = _asked(arguments or [], name)

    def on_damaged(bad: Damaged) -> None:
        logs.damaged(bad.path, bad.reason)

    with bounded_memory():
        answer = writers.unique_names(run_query(places, sql, on_damaged))
        if csv:
            writers.print_csv(answer)
        elif json:
            writers.print_json(answer)
        elif parquet is not None:
            writers.write_parquet(answer, parquet)
            output.out.print(f"{parquet}: {len(answer)} rows", soft_wrap=True)
        else:
            writers.print_answer(answer)


def _asked(arguments: list[str], name: str | None) -> tuple[list[AnyPath], str]:
    """The runs and the statement of a call of `query`.

    Raises:
        LestdError: one of them is missing, or there are two statements.
    """
    from orchestrator.query.sql import named_query

    if name is not None and arguments and _STATEMENT.fullmatch(arguments[-1]):
        raise LestdError(f"--name {name} was given together with a statement; choose one")
    if name is not None:
        sql, runs = named_query(name).text, arguments
    elif arguments:
        *runs, sql = arguments
    else:
        runs, sql = [], ""
    if not runs:
        raise LestdError(
            'expected RUN and a statement: lestd query RUN "select ...", or lestd query RUN '
            "--name NAME; lestd query --list shows the names"
        )
    if sql == "-":
        sql = sys.stdin.read()
    return [as_path(run) for run in dict.fromkeys(runs)], sql


@app.command(rich_help_panel="Inspect a run")
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
    from orchestrator.report import html, markdown
    from orchestrator.report.data import gather
    from orchestrator.report.page import require_plotly

    target = out or as_path(f"report.{format}")
    require_folder("--out", target)
    if format is ReportFormat.html:
        require_plotly()
    data = gather(run)
    for bad in data.damaged:
        logs.damaged(bad["path"], bad["reason"])
    render = html.render if format is ReportFormat.html else markdown.render
    content = render(data).encode()
    atomic_write(target, lambda file: file.write(content))
    output.out.print(f"{target}: {output.size(len(content))}", soft_wrap=True)


@app.command(rich_help_panel="Inspect a run")
def diff(
    before: Annotated[str, typer.Argument(help="A model, a run directory, or a URL of one.")],
    after: Annotated[str, typer.Argument(help="The run to compare with the first.")],
    every_layer: Annotated[
        bool, typer.Option("--all", help="Show every layer, not only those that differ most.")
    ] = False,
    json: Json = False,
) -> None:
    """Show what changed between two runs, finished or not: configuration, bytes, error, time,
    quality, layers. Exits with 0 whether or not anything did."""
    from orchestrator.report.diff import compare
    from orchestrator.report.diff_table import print_diff

    found = compare(before, after)
    if json:
        output.print_json(found)
    else:
        print_diff(found, every_layer)


@app.command(rich_help_panel="Inspect a run")
def compact(out: Out, run_dir: RunDir = None) -> None:
    """Merge a run's manifest into one file per table: faster to read. Safe at any moment."""
    from orchestrator.run.directory import compact as compact_manifest

    place = run_dir or out
    gone, damaged = compact_manifest(place)
    for bad in damaged:
        logs.damaged(bad.path, bad.reason)
    said = f"{gone} files were merged" if gone else "there was nothing to merge"
    output.out.print(f"{place}: {said}", soft_wrap=True)
    if damaged:
        stay = "file stays where it is" if len(damaged) == 1 else "files stay where they are"
        output.out.print(f"{len(damaged)} damaged {stay}: {logs.REPAIR}", soft_wrap=True)
