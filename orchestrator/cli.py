"""The command `lestd`: the commands of a run, and the entry point.

Results go to standard output, progress and problems to standard error. Exit codes: 0 done;
1 the run ended with failed tasks, or verification found problems; 2 bad input or refused;
130 interrupted.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from lestd_kernels.errors import LestdError
from orchestrator import (  # noqa: F401 - the others register their commands
    cli_audit,
    cli_compare,
    cli_evaluate,
    cli_manifest,
    cli_models,
    cli_recover,
    cli_sweep,
    logs,
    tables,
)
from orchestrator.app import app
from orchestrator.logs import LogFormat
from orchestrator.options import (
    Address,
    AllocationOption,
    Calibrate,
    CalibrateOn,
    CalibrationDir,
    ClusterFile,
    ConfigFile,
    DeviceOption,
    Exclude,
    ExecutorOption,
    FactorBits,
    Include,
    Json,
    Keep,
    KeepModel,
    LogFormatOption,
    MaxFlops,
    MethodOption,
    MetricOption,
    Model,
    Out,
    PatternOption,
    Revision,
    RunDir,
    Samples,
    SampleTokens,
    ScopeOption,
    SuperWeights,
    TdMoeModeOption,
    Threads,
    TypeModeOption,
    ValueBits,
    WhiteningOption,
    Workers,
)
from workers.files import as_path


@app.command()
def plan(
    model: Model = None,
    keep: Keep = None,
    keep_model: KeepModel = None,
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
    value_bits: ValueBits = None,
    factor_bits: FactorBits = None,
    keep_super_weights: SuperWeights = None,
    td_moe_mode: TdMoeModeOption = None,
    whitening: WhiteningOption = None,
    config: ConfigFile = None,
    calibrate: Calibrate = False,
    json: Json = False,
) -> None:
    """Show what a compression would do: reads headers only, writes nothing."""
    from orchestrator.config import RunFile, run_options
    from orchestrator.plan import make_plan
    from orchestrator.source import resolve_source
    from orchestrator.summary import describe_plan, print_plan

    options = {k: v for k, v in locals().items() if k in RunFile.model_fields and k != "model"}
    name, revision, run_config = run_options(model, config, options)
    planned = make_plan(resolve_source(name, revision), run_config)
    print_plan(name, describe_plan(planned, run_config, calibrate), json)


@app.command()
def compress(
    out: Annotated[
        Path, typer.Option(help="Directory of the compressed model, or URL.", parser=as_path)
    ],
    model: Model = None,
    keep: Keep = None,
    keep_model: KeepModel = None,
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
    keep_super_weights: SuperWeights = None,
    td_moe_mode: TdMoeModeOption = None,
    whitening: WhiteningOption = None,
    device: DeviceOption = None,
    threads: Threads = None,
    config: ConfigFile = None,
    executor: ExecutorOption = None,
    workers: Workers = None,
    address: Address = None,
    cluster: ClusterFile = None,
    run_dir: RunDir = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget what an earlier run left at OUT and start over.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and stop before any work.")
    ] = False,
    calibrate: Calibrate = False,
    log_format: LogFormatOption = LogFormat.text,
    json: Json = False,
) -> None:
    """Compress a checkpoint. Run the same command again to continue after a crash."""
    given = dict(locals())
    from orchestrator.config import RunFile, cluster_options, run_options
    from orchestrator.executor import open_executor
    from orchestrator.manifest import default_run_dir
    from orchestrator.metrics import RunMetrics
    from orchestrator.pipeline import compress_model
    from orchestrator.plan import make_plan
    from orchestrator.progress import CompressionProgress
    from orchestrator.rundir import RunDirectory
    from orchestrator.source import resolve_source
    from orchestrator.submit import jobs_address, run_as_job
    from orchestrator.summary import (
        describe_plan,
        predicted_seconds,
        print_outcome,
        print_plan,
    )

    options = {k: v for k, v in locals().items() if k in RunFile.model_fields and k != "model"}
    logs.use(log_format)
    name, revision, run_config = run_options(model, config, options)
    cluster_config = cluster_options(cluster, executor=executor, workers=workers, address=address)
    if jobs := jobs_address(cluster_config):
        raise typer.Exit(run_as_job(jobs, "compress", given | {"model": name}, cluster_config))
    if dry_run:
        planned = make_plan(resolve_source(name, revision), run_config)
        print_plan(name, describe_plan(planned, run_config, calibrate), json)
        return

    run_dir = run_dir or default_run_dir(out)
    source = resolve_source(name, revision)
    planned = make_plan(source, run_config)  # Refuse what is impossible before Ray is started.
    seconds = predicted_seconds(planned, run_config) if calibrate else None
    metrics = RunMetrics(out.name) if cluster_config.executor == "ray" else None
    try:
        with (
            open_executor(cluster_config) as runner,
            CompressionProgress(out.name, metrics) as shown,
        ):
            outcome = compress_model(
                source,
                run_config,
                runner,
                out,
                run_dir,
                calibration=calibration,
                fresh=fresh,
                on_start=shown.on_start,
                on_event=shown.on_event,
                on_progress=shown.on_progress,
                planned_seconds=None if seconds is None else sum(seconds.values()),
            )
            shown.ended(outcome)
    except KeyboardInterrupt:
        run = RunDirectory(run_dir)
        kept = f"{run.manifest.finished_tasks()} tasks are done and kept in {run_dir}"
        logs.log(
            "message",
            f"interrupted; {kept if run.exists else 'no task was done yet'}: "
            "run the same command again to continue",
        )
        raise typer.Exit(130) from None
    print_outcome(outcome, out, run_dir, json, seconds)
    if not outcome.complete:
        raise typer.Exit(1)


@app.command()
def status(out: Out, run_dir: RunDir = None, json: Json = False) -> None:
    """Show what is done, running, failed and remaining; works during a run and after it."""
    from orchestrator.inspection import run_status
    from orchestrator.rundir import run_dir_of
    from orchestrator.summary import print_status

    state = run_status(run_dir or run_dir_of(out), out)
    print_status(state, json)


@app.command()
def verify(out: Out, run_dir: RunDir = None, json: Json = False) -> None:
    """Check every payload and shard against the manifest: sizes, sha256, tensors, budget."""
    from orchestrator.inspection import verify as verify_files
    from orchestrator.rundir import run_dir_of

    result = verify_files(out, run_dir or run_dir_of(out))
    if json:
        tables.print_json(asdict(result))
    else:
        for problem in result.problems:
            tables.out.print(problem, style="red", soft_wrap=True)
        tables.out.print(
            f"{result.checked} payloads and shards checked; problems: {len(result.problems)}"
        )
    if result.problems:
        raise typer.Exit(1)


@app.command()
def clean(
    out: Out,
    run_dir: RunDir = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also when the model is not complete: work is lost.")
    ] = False,
) -> None:
    """Delete the run directory of a finished compression; the model stays."""
    from orchestrator.inspection import run_status
    from orchestrator.rundir import RunDirectory, run_dir_of

    run_dir = run_dir or run_dir_of(out)
    if not force:
        state = run_status(run_dir, out)
        if state["cleaned"]:
            tables.out.print(f"{out} is complete; its run directory was cleaned", soft_wrap=True)
            return
        if state["state"] != "complete":
            raise LestdError(
                f"{out} is not complete ({state['done']} of {len(state['layers'])} tasks done); "
                "finish it with the same lestd compress, or delete the work with --force"
            )
    RunDirectory(run_dir).remove()
    tables.out.print(f"removed {run_dir}", soft_wrap=True)


def main() -> None:
    """Entry point of the command."""
    # A batch system ends a job with SIGTERM: end as with Ctrl-C, with all finished work kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # For terminals that know only ASCII.
    app(prog_name="lestd")
