"""The command that holds methods against each other: compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.application import app
from orchestrator.cli.experiment import run_experiment
from orchestrator.cli.options import (
    CalibrationDir,
    Fresh,
    Given,
    Json,
    LogFormatOption,
    absolute,
    options,
    refuse_unused,
)
from orchestrator.config.options import HOSTS, RUN, Evaluation, chosen
from orchestrator.console.logs import LogFormat

_SPEED_TOKENS = (64, 33)


@app.command(rich_help_panel="Evaluate and compare")
@options(Evaluation, *RUN, *HOSTS)
def compare(
    methods: Annotated[
        str,
        typer.Option(
            help="Methods, with options after a colon: "
            '"lestd, tucker, lestd:metric=norm,value_bits=8".'
        ),
    ],
    keep: Annotated[str, typer.Option(help="Several keeps, like 0.8,0.6,0.4,0.2.")],
    out: Annotated[
        Path,
        typer.Option(
            help="Directory for the models DIR/METHOD/keep-0.80 and so on, table and plot.",
            callback=absolute,
        ),
    ],
    given: Given,
    calibration: CalibrationDir = None,
    speed: Annotated[
        bool,
        typer.Option(
            help="Time decoding of every model against the dense one.", rich_help_panel="Evaluation"
        ),
    ] = True,
    fresh: Fresh = False,
    log_format: LogFormatOption = LogFormat.text,
    json: Json = False,
) -> None:
    """Compress a model by several methods to the same bytes, and measure and evaluate each.

    Errors of the weights, perplexity, tasks, time and decode speed, in one table and plot. Run it
    again to continue. Sizes that a method does not reach are left out, with the reason.
    """
    asked = chosen(Evaluation, given)
    refuse_unused(given)
    from orchestrator.experiments.compare import comparison_rows
    from orchestrator.experiments.curves import save_comparison
    from orchestrator.experiments.tables import print_rows, save_markdown
    from orchestrator.experiments.variants import parse_contenders
    from workers.bench import BenchSettings

    found = run_experiment("compare", given, parse_contenders(methods), measured=True)
    timing = (
        BenchSettings(*_SPEED_TOKENS, 1, asked.dtype, found.first.device, None) if speed else None
    )
    rows = comparison_rows(
        found.source, found.outcomes, out, found.qualities, found.calibration, timing
    )
    title = f"{found.name}: methods at the same bytes"
    table = out / "compare.md"
    save_markdown(rows, found.missing, title, table)
    if found.plot is not None:
        save_comparison(rows, title, found.plot)
    said = {"text": asked.text and str(asked.text), "tasks": asked.tasks, "table": str(table)}
    print_rows(rows, found.missing, said | {"plot": found.plot and str(found.plot)}, json)
