"""The command that compresses a model to several sizes and judges each: sweep."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from lestd_kernels.errors import LestdError
from orchestrator.cli.application import app
from orchestrator.cli.evaluate import examine
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
from orchestrator.console import logs
from orchestrator.console.logs import LogFormat


@app.command(rich_help_panel="Judge and compare")
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
    """Compress a model to several sizes and judge each. The same command again continues.

    Size against quality, with the dense model as the line to beat. The weights are read, and Stage
    I is done, once for all sizes. Without --text and --tasks nothing is judged or drawn.
    """
    asked = chosen(Evaluation, given)
    judged = asked.text is not None or asked.tasks is not None
    if plot is not None and not judged:
        raise LestdError(
            "--plot draws size against quality; give --text or --tasks, or leave --plot out"
        )
    refuse_unused(given)
    from orchestrator.cli.summary import print_outcome
    from orchestrator.config.cluster import cluster_options
    from orchestrator.config.layers import parse_keeps
    from orchestrator.config.run import run_options
    from orchestrator.console.plots import check_plot
    from orchestrator.execution.open import open_executor
    from orchestrator.execution.ray.jobs import jobs_address, run_as_job
    from orchestrator.experiments.sweep import (
        check_judgeable,
        compress_keeps,
        judge_keeps,
        model_dir,
        sweep_points,
    )
    from orchestrator.experiments.sweep_table import print_sweep, save_curve
    from orchestrator.manifest.manifest import default_run_dir
    from orchestrator.source.checkpoint import resolve_source

    logs.use(log_format)
    configs = {}
    for one in parse_keeps(keep):
        name, revision, configs[one] = run_options(given | {"keep": one})
    cluster_config = cluster_options(given)
    if jobs := jobs_address(cluster_config):
        raise typer.Exit(run_as_job(jobs, "sweep", given | {"model": name}, cluster_config))

    source = resolve_source(name, revision)
    first = next(iter(configs.values()))
    common = {"dtype": asked.dtype, "device": first.device, "threads": first.threads}
    examination = None if asked.tasks is None else examine(asked, common)
    if judged:
        check_judgeable(source, asked.text, asked.window)
        if plot is None and importlib.util.find_spec("matplotlib") is not None:
            plot = out / "sweep.png"
    out.mkdir(parents=True, exist_ok=True)
    if plot is not None:
        check_plot(plot)
    try:
        with open_executor(cluster_config) as runner:
            outcomes = compress_keeps(
                source, configs, runner, out, calibration=calibration, fresh=fresh
            )
            failed = {k: outcome for k, outcome in outcomes.items() if not outcome.complete}
            for one, outcome in failed.items():
                directory = model_dir(out, one)
                print_outcome(outcome, directory, default_run_dir(directory), json=False)
            if failed:
                raise typer.Exit(1)
            qualities: list[Any] = [() for _ in (None, *outcomes)]
            if judged:
                qualities = judge_keeps(
                    source.directory,
                    [model_dir(out, one) for one in outcomes],
                    out,
                    runner,
                    text=asked.text,
                    window=asked.window,
                    settings={**common, "max_windows": asked.max_windows},
                    examination=examination,
                )
    except KeyboardInterrupt:
        logs.log(
            "message",
            f"interrupted; what is done is kept in {out}: run the same command again to continue",
        )
        raise typer.Exit(130) from None
    points = sweep_points(source, outcomes, out, qualities)
    if plot is not None:
        save_curve(points, f"{name}, {first.method}", plot)
    shown = {"text": asked.text and str(asked.text), "tasks": asked.tasks}
    print_sweep(points, shown | {"plot": plot and str(plot)}, json)
