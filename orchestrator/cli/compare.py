"""The command that holds methods against each other: compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.application import app
from orchestrator.cli.experiment import run_experiment
from orchestrator.cli.options import (
    Address,
    AllocationOption,
    BatchSize,
    CalibrateOn,
    ClusterFile,
    ComputeDtype,
    ConfigFile,
    Data,
    DeviceOption,
    Exclude,
    ExecutorOption,
    Fewshot,
    Include,
    IncludePath,
    Json,
    Limit,
    LogFormatOption,
    MaxWindows,
    Model,
    Revision,
    Samples,
    SampleTokens,
    ScopeOption,
    Tasks,
    Text,
    Threads,
    Window,
    Workers,
    absolute,
    refuse_unused,
)
from orchestrator.console.logs import LogFormat

_SPEED_TOKENS = (64, 33)


@app.command(rich_help_panel="Judge and compare")
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
    model: Model = None,
    text: Text = None,
    tasks: Tasks = None,
    calibrate_on: CalibrateOn = None,
    samples: Samples = None,
    sample_tokens: SampleTokens = None,
    speed: Annotated[
        bool, typer.Option(help="Time decoding of every model beside the dense one.")
    ] = True,
    revision: Revision = None,
    scope: ScopeOption = None,
    include: Include = None,
    exclude: Exclude = None,
    allocation: AllocationOption = None,
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
        bool, typer.Option("--fresh", help="Compress anew what an earlier call left in DIR.")
    ] = False,
    log_format: LogFormatOption = LogFormat.text,
    json: Json = False,
) -> None:
    """Compress a model by several methods to the same bytes, and measure and judge each.

    Errors of the weights, perplexity, tasks, time and decode speed, in one table and plot. The same
    command again continues; sizes that a method does not reach are left out, with the reason.
    """
    given = dict(locals())
    refuse_unused(given)
    from orchestrator.experiments.compare import comparison_rows
    from orchestrator.experiments.curves import save_comparison
    from orchestrator.experiments.tables import print_rows, save_markdown
    from orchestrator.experiments.variants import parse_contenders
    from workers.bench import BenchSettings

    found = run_experiment("compare", given, parse_contenders(methods), measured=True)
    timing = BenchSettings(*_SPEED_TOKENS, 1, dtype, found.first.device, None) if speed else None
    rows = comparison_rows(
        found.source, found.outcomes, out, found.qualities, found.calibration, timing
    )
    title = f"{found.name}: methods at the same bytes"
    table = out / "compare.md"
    save_markdown(rows, found.missing, title, table)
    if found.plot is not None:
        save_comparison(rows, title, found.plot)
    said = {"text": text and str(text), "tasks": tasks, "table": str(table)}
    print_rows(rows, found.missing, said | {"plot": found.plot and str(found.plot)}, json)
