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
    Address,
    AllocationOption,
    BatchSize,
    CalibrateOn,
    CalibrationDir,
    ClusterFile,
    ComputeDtype,
    ConfigFile,
    Data,
    DeviceOption,
    Exclude,
    ExecutorOption,
    FactorBits,
    Fewshot,
    Include,
    IncludePath,
    Json,
    KeepOutliers,
    Limit,
    LogFormatOption,
    MaxFlops,
    MaxWindows,
    MethodOption,
    MetricOption,
    Model,
    PatternOption,
    Revision,
    Samples,
    SampleTokens,
    ScopeOption,
    Tasks,
    TdMoeModeOption,
    Text,
    Threads,
    TypeModeOption,
    ValueBits,
    WhiteningOption,
    Window,
    Workers,
    absolute,
    refuse_unused,
)
from orchestrator.console import logs
from orchestrator.console.logs import LogFormat


@app.command(rich_help_panel="Judge and compare")
def sweep(
    keep: Annotated[str, typer.Option(help="Several keeps, like 0.8,0.6,0.4,0.2.")],
    out: Annotated[
        Path,
        typer.Option(
            help="Directory for the models DIR/keep-0.80 and so on, their runs and the plot.",
            callback=absolute,
        ),
    ],
    model: Model = None,
    text: Text = None,
    tasks: Tasks = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw size against quality to this .png or .svg; needs matplotlib.",
            show_default="DIR/sweep.png",
        ),
    ] = None,
    revision: Revision = None,
    scope: ScopeOption = None,
    include: Include = None,
    exclude: Exclude = None,
    allocation: AllocationOption = None,
    method: MethodOption = None,
    type_mode: TypeModeOption = None,
    pattern: PatternOption = None,
    max_flops: MaxFlops = None,
    metric: MetricOption = None,
    calibrate_on: CalibrateOn = None,
    samples: Samples = None,
    sample_tokens: SampleTokens = None,
    calibration: CalibrationDir = None,
    value_bits: ValueBits = None,
    factor_bits: FactorBits = None,
    keep_outliers: KeepOutliers = None,
    td_moe_mode: TdMoeModeOption = None,
    whitening: WhiteningOption = None,
    config: ConfigFile = None,
    window: Window = None,
    max_windows: MaxWindows = None,
    data: Data = None,
    include_path: IncludePath = None,
    limit: Limit = None,
    fewshot: Fewshot = None,
    batch_size: BatchSize = None,
    dtype: ComputeDtype = "auto",
    device: DeviceOption = None,
    threads: Threads = None,
    executor: ExecutorOption = None,
    workers: Workers = None,
    address: Address = None,
    cluster: ClusterFile = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Compress anew what an earlier sweep left in DIR.")
    ] = False,
    log_format: LogFormatOption = LogFormat.text,
    json: Json = False,
) -> None:
    """Compress a model to several sizes and judge each. The same command again continues.

    Size against quality, with the dense model as the line to beat. The weights are read, and Stage
    I is done, once for all sizes. Without --text and --tasks nothing is judged or drawn.
    """
    given = dict(locals())
    judged = text is not None or tasks is not None
    if plot is not None and not judged:
        raise LestdError(
            "--plot draws size against quality; give --text or --tasks, or leave --plot out"
        )
    refuse_unused(given)
    from orchestrator.cli.summary import print_outcome
    from orchestrator.config.cluster import cluster_options
    from orchestrator.config.layers import parse_keeps
    from orchestrator.config.run import RunFile, run_options
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
    options = {k: v for k, v in given.items() if k in RunFile.model_fields and k != "model"}
    configs = {}
    for one in parse_keeps(keep):
        name, revision, configs[one] = run_options(model, config, options | {"keep": one})
    cluster_config = cluster_options(cluster, executor=executor, workers=workers, address=address)
    if jobs := jobs_address(cluster_config):
        raise typer.Exit(run_as_job(jobs, "sweep", given | {"model": name}, cluster_config))

    source = resolve_source(name, revision)
    first = next(iter(configs.values()))
    common = {"dtype": dtype, "device": first.device, "threads": first.threads}
    examination = None if tasks is None else examine(given, common)
    if judged:
        check_judgeable(source, text, window)
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
                    text=text,
                    window=window,
                    settings={**common, "max_windows": max_windows},
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
    asked = {"text": text and str(text), "tasks": tasks, "plot": plot and str(plot)}
    print_sweep(points, asked, json)
