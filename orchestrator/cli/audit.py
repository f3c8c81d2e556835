"""The command that looks at a model before it is compressed: audit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lestd_kernels.errors import LestdError
from orchestrator.cli.application import app, require_folder
from orchestrator.cli.options import Given, Json, LogFormatOption, options, output_option
from orchestrator.config.options import HOSTS, ArchitectureFile, Checkpoint, Weights
from orchestrator.console import logs, output
from orchestrator.console.logs import LogFormat
from workers.storage.files import as_path, atomic_write


@app.command(rich_help_panel="Compress a model")
@options(Checkpoint, ArchitectureFile, Weights, *HOSTS)
def audit(
    model: Annotated[
        str,
        typer.Argument(help="Directory of a dense checkpoint, Hub id, or URL (s3://, gs://)."),
    ],
    given: Given,
    keep: Annotated[
        str, typer.Option(help="Keeps at which to predict errors, separated by commas.")
    ] = "0.8,0.6,0.4,0.2",
    html: Annotated[
        Path | None,
        typer.Option(help="Also write a page with figures; needs lestd[report].", parser=as_path),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Also write the tables as Markdown.", parser=as_path)
    ] = None,
    run_dir: Annotated[
        Path | None,
        output_option(
            help="Where finished blocks are kept.",
            show_default="MODEL.audit, beside a local MODEL",
            parser=as_path,
        ),
    ] = None,
    log_format: LogFormatOption = LogFormat.text,
    json: Json = False,
) -> None:
    """Inspect a model before compressing it: is a subspace shared, and what would each method do?

    Explained energies of heads on each other and across layers, spectra, outliers, and predicted
    errors of every method at the same bytes, with a verdict for each layer. The model is read block
    by block; run the same command again to continue.
    """
    from orchestrator.audit.audit import audit as audit_blocks
    from orchestrator.audit.audit import check_keeps, default_audit_dir
    from orchestrator.audit.tables import describe, print_audit
    from orchestrator.audit.tables import markdown as audit_markdown
    from orchestrator.config.cluster import cluster_options
    from orchestrator.config.layers import parse_keeps
    from orchestrator.config.run import run_options
    from orchestrator.evaluation.progress import PieceProgress
    from orchestrator.execution.open import open_executor
    from orchestrator.execution.ray.jobs import jobs_address, run_as_job
    from orchestrator.source.checkpoint import resolve_source

    logs.use(log_format)
    for option, file in (("--html", html), ("--markdown", markdown)):
        if file is not None:
            require_folder(option, file)
    if html is not None:
        from orchestrator.report.page import require_plotly

        require_plotly()
    keeps = check_keeps(parse_keeps(keep))
    chosen, config = run_options(given | {"keep": keeps[0]})
    cluster_config = cluster_options(given)
    if jobs := jobs_address(cluster_config):
        raise typer.Exit(run_as_job(jobs, "audit", given, cluster_config))
    kept_in = run_dir or default_audit_dir(model)
    source = resolve_source(*chosen)
    try:
        with (
            open_executor(cluster_config) as runner,
            PieceProgress(f"audit {source.directory.name}", "blocks") as shown,
        ):
            done = audit_blocks(
                source,
                config,
                keeps,
                runner,
                kept_in,
                progress=shown.update,
                on_event=shown.on_event,
            )
    except KeyboardInterrupt:
        logs.log(
            "message",
            f"interrupted; finished work is kept in {kept_in}: run the same command again to "
            "continue",
        )
        raise typer.Exit(130) from None
    found = describe(done)
    if markdown is not None:
        text = audit_markdown(found).encode()
        atomic_write(markdown, lambda file: file.write(text))
    if html is not None:
        from orchestrator.audit.page import render

        page = render(found).encode()
        atomic_write(html, lambda file: file.write(page))
    if json:
        output.print_json(found)
    else:
        print_audit(found)
    for failure in done.failures:
        logs.error(LestdError(failure.message))
    if not done.complete:
        raise typer.Exit(1)
