"""The command that compresses a model to several sizes and evaluates each: sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lestd_kernels.errors import LestdError
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
    output_option,
    refuse_unused,
)
from orchestrator.config.options import HOSTS, METHOD, RUN, Evaluation, chosen
from orchestrator.console.logs import LogFormat


@app.command(rich_help_panel="Evaluate and compare")
@options(Evaluation, *RUN, *METHOD, *HOSTS)
def sweep(
    keep: Annotated[str, typer.Option(help="Several keeps, like 0.8,0.6,0.4,0.2.")],
    out: Annotated[
        Path,
        typer.Option(
            help="Directory for the models DIR/keep-0.80 and so on, their runs and the plot.",
            callback=absolute,
        ),
    ],
    given: Given,
    calibration: CalibrationDir = None,
    plot: Annotated[
        Path | None,
        output_option(
            help="Draw size against quality to this .png or .svg; needs matplotlib.",
            show_default="DIR/sweep.png",
        ),
    ] = None,
    fresh: Fresh = False,
    log_format: LogFormatOption = LogFormat.text,
    json: Json = False,
) -> None:
    """Compress a model to several sizes and evaluate each. Run it again to continue.

    Size against quality, with the dense model as a line. The weights are read, and Stage
    I is done, once for all sizes. Without --text and --tasks nothing is evaluated or drawn.
    """
    asked = chosen(Evaluation, given)
    evaluated = asked.text is not None or asked.tasks is not None
    if plot is not None and not evaluated:
        raise LestdError(
            "--plot draws size against quality; give --text or --tasks, or leave --plot out"
        )
    refuse_unused(given)
    from orchestrator.experiments.curves import save_curve
    from orchestrator.experiments.engine import points_of
    from orchestrator.experiments.tables import print_sweep
    from orchestrator.experiments.variants import Contender

    found = run_experiment("sweep", given, [Contender("", {})], measured=False)
    points = points_of(found.source, found.outcomes, out, found.qualities)
    if found.plot is not None:
        save_curve(points, f"{found.name}, {found.first.method}", found.plot)
    said = {
        "text": asked.text and str(asked.text),
        "tasks": asked.tasks,
        "plot": found.plot and str(found.plot),
    }
    print_sweep(points, said, json)
