"""The command that compresses a model to several sizes and judges each: sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lestd_kernels.errors import LestdError
from orchestrator.cli.application import app
from orchestrator.cli.experiment import run_experiment
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
    from orchestrator.experiments.curves import save_curve
    from orchestrator.experiments.engine import points_of
    from orchestrator.experiments.tables import print_sweep
    from orchestrator.experiments.variants import Contender

    found = run_experiment("sweep", given, [Contender("", {})], measured=False)
    points = points_of(found.source, found.outcomes, out, found.qualities)
    if found.plot is not None:
        save_curve(points, f"{found.name}, {found.first.method}", found.plot)
    said = {"text": text and str(text), "tasks": tasks, "plot": found.plot and str(found.plot)}
    print_sweep(points, said, json)
