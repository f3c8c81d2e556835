"""The command that holds methods against each other: compare."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from lestd_kernels.errors import LestdError
from orchestrator.cli.application import app
from orchestrator.cli.evaluate import examine
from orchestrator.cli.options import (
    Fresh,
    Given,
    Json,
    LogFormatOption,
    absolute,
    options,
    refuse_unused,
)
from orchestrator.config.options import HOSTS, RUN, Evaluation, chosen
from orchestrator.console import logs
from orchestrator.console.logs import LogFormat

_SPEED_TOKENS = (64, 33)


@app.command(rich_help_panel="Judge and compare")
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
    speed: Annotated[
        bool,
        typer.Option(
            help="Time decoding of every model beside the dense one.", rich_help_panel="Evaluation"
        ),
    ] = True,
    fresh: Fresh = False,
    log_format: LogFormatOption = LogFormat.text,
    json: Json = False,
) -> None:
    """Compress a model by several methods to the same bytes, and measure and judge each.

    Errors of the weights, perplexity, tasks, time and decode speed, in one table and plot. The same
    command again continues; sizes that a method does not reach are left out, with the reason.
    """
    asked = chosen(Evaluation, given)
    judged = asked.text is not None or asked.tasks is not None
    refuse_unused(given)
    from orchestrator.cli.summary import print_outcome
    from orchestrator.config.cluster import cluster_options
    from orchestrator.config.layers import parse_keeps
    from orchestrator.config.run import run_options
    from orchestrator.console.plots import check_plot
    from orchestrator.execution.open import open_executor
    from orchestrator.execution.ray.jobs import jobs_address, run_as_job
    from orchestrator.experiments.compare import (
        comparison_rows,
        compress_contenders,
        feasible,
        models_of,
        without_repeated,
    )
    from orchestrator.experiments.compare_table import print_rows, save_comparison, save_markdown
    from orchestrator.experiments.sweep import check_judgeable, judge_keeps, model_dir
    from orchestrator.experiments.variants import parse_contenders
    from orchestrator.manifest.manifest import default_run_dir
    from orchestrator.source.checkpoint import resolve_source
    from workers.bench import BenchSettings

    logs.use(log_format)
    contenders = parse_contenders(methods)
    configs: dict[Any, dict[float, Any]] = {}
    for contender in contenders:
        own = {"method": contender.method, **contender.options}
        configs[contender] = {}
        for one in parse_keeps(keep):
            name, revision, configs[contender][one] = run_options(given | {"keep": one}, own)
    cluster_config = cluster_options(given)
    if jobs := jobs_address(cluster_config):
        there = {key: value for key, value in given.items() if key != "speed"}
        there |= {"model": name, "no_speed": not speed}
        raise typer.Exit(run_as_job(jobs, "compare", there, cluster_config))

    source = resolve_source(name, revision)
    first = next(iter(configs[contenders[0]].values()))
    common = {"dtype": asked.dtype, "device": first.device, "threads": first.threads}
    examination = None if asked.tasks is None else examine(asked, common)
    if judged or speed:
        check_judgeable(source, asked.text, asked.window)
    missing: list[Any] = []
    for contender in contenders:
        configs[contender], left_out = feasible(source, contender, configs[contender])
        missing += left_out
    if not any(configs.values()):
        raise LestdError(missing[0].reason)
    out.mkdir(parents=True, exist_ok=True)
    plot = out / "compare.png" if importlib.util.find_spec("matplotlib") is not None else None
    if plot is not None:
        check_plot(plot)
    timing = None
    if speed:
        timing = BenchSettings(*_SPEED_TOKENS, 1, asked.dtype, first.device, None)
    try:
        with open_executor(cluster_config) as runner:
            chosen_ones = {c: by_keep for c, by_keep in configs.items() if by_keep}
            outcomes, calibration = compress_contenders(
                source, chosen_ones, runner, out, fresh=fresh
            )
            failed = [
                (outcome, model_dir(out / contender.directory, one))
                for contender, by_keep in outcomes.items()
                for one, outcome in by_keep.items()
                if not outcome.complete
            ]
            for outcome, directory in failed:
                print_outcome(outcome, directory, default_run_dir(directory), json=False)
            if failed:
                raise typer.Exit(1)
            outcomes, repeated = without_repeated(outcomes)
            missing += repeated
            models = models_of(outcomes, out)
            qualities: list[Any] = [() for _ in (None, *models)]
            if judged:
                qualities = judge_keeps(
                    source.directory,
                    models,
                    out,
                    runner,
                    text=asked.text,
                    window=asked.window,
                    settings={**common, "max_windows": asked.max_windows},
                    examination=examination,
                )
        rows = comparison_rows(source, outcomes, out, qualities, calibration, timing)
    except KeyboardInterrupt:
        logs.log(
            "message",
            f"interrupted; what is done is kept in {out}: run the same command again to continue",
        )
        raise typer.Exit(130) from None
    title = f"{name}: methods at the same bytes"
    table = out / "compare.md"
    save_markdown(rows, missing, title, table)
    if plot is not None:
        save_comparison(rows, title, plot)
    shown = {"text": asked.text and str(asked.text), "tasks": asked.tasks, "table": str(table)}
    print_rows(rows, missing, shown | {"plot": plot and str(plot)}, json)
