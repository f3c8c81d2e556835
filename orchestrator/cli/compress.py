"""The commands of a run: plan, compress, status, verify, clean."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lestd_kernels.errors import LestdError
from orchestrator.cli.application import app
from orchestrator.cli.options import (
    CalibrationDir,
    Fresh,
    Given,
    Json,
    LogFormatOption,
    Out,
    RunDir,
    Time,
    given_of,
    options,
    output_option,
)
from orchestrator.config.options import HOSTS, METHOD, RUN, Target, Tracking
from orchestrator.console import logs, output
from orchestrator.console.logs import LogFormat
from workers.storage.files import as_path


@app.command(rich_help_panel="Compress a model")
@options(Target, *RUN, *METHOD)
def plan(
    given: Given,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory of a model with the same options, finished or in the making: what its "
            "first pass has found of the layers decides their targets.",
            parser=as_path,
        ),
    ] = None,
    run_dir: RunDir = None,
    time: Time = False,
    show_architecture: Annotated[
        bool,
        output_option(
            "--show-architecture",
            help="Print where the model keeps its weights, for --architecture, and stop.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Show what a compression would do: reads headers only, writes nothing."""
    from orchestrator.cli.plans import describe_plan, print_plan
    from orchestrator.config.run import run_options
    from orchestrator.manifest.manifest import Manifest
    from orchestrator.planning.decide import decide
    from orchestrator.planning.plan import make_plan
    from orchestrator.run.directory import run_dir_of
    from orchestrator.source.checkpoint import resolve_source

    if show_architecture:  # For which it does not matter how small the model shall be.
        given = given | {"keep": 0.5, "keep_model": None, "target_loss": None}
    chosen, run_config = run_options(given)
    source = resolve_source(*chosen)
    if show_architecture:
        output.out.print(source.architecture.model_dump_json(indent=2), markup=False)
        return
    planned, curves = make_plan(source, run_config), {}
    if out is not None and not planned.decided:
        curves = Manifest(run_dir or run_dir_of(out)).completed_curves(planned.curve_tasks)
        if len(curves) == len(planned.curve_tasks):
            planned = decide(planned, curves) or planned
    print_plan(chosen.model, describe_plan(planned, source, run_config, time, curves), json)


@app.command(rich_help_panel="Compress a model")
@options(Target, *RUN, *METHOD, *HOSTS, Tracking)
def compress(
    out: Annotated[
        Path, typer.Option(help="Directory of the compressed model, or URL.", parser=as_path)
    ],
    given: Given,
    calibration: CalibrationDir = None,
    run_dir: RunDir = None,
    fresh: Fresh = False,
    dry_run: Annotated[
        bool, output_option("--dry-run", help="Show the plan and stop before any work.")
    ] = False,
    time: Time = False,
    log_format: LogFormatOption = LogFormat.text,
    json: Json = False,
) -> None:
    """Compress a checkpoint. Run the same command again to continue after a crash."""
    from orchestrator import api
    from orchestrator.cli.plans import describe_plan, print_plan
    from orchestrator.cli.summary import print_outcome
    from orchestrator.config.cluster import cluster_options
    from orchestrator.config.run import run_options
    from orchestrator.execution.ray.jobs import jobs_address, run_as_job
    from orchestrator.manifest.manifest import default_run_dir
    from orchestrator.planning.plan import make_plan
    from orchestrator.run.directory import RunDirectory
    from orchestrator.source.checkpoint import resolve_source

    logs.use(log_format)
    chosen, run_config = run_options(given)
    cluster_config = cluster_options(given)
    if jobs := jobs_address(cluster_config):
        raise typer.Exit(
            run_as_job(jobs, "compress", given | {"model": chosen.model}, cluster_config)
        )
    if dry_run:
        source = resolve_source(*chosen)
        planned = make_plan(source, run_config)
        print_plan(chosen.model, describe_plan(planned, source, run_config, time), json)
        return

    run_dir = run_dir or default_run_dir(out)
    try:
        outcome = api.compress(
            out=out,
            run_dir=run_dir,
            calibration=calibration,
            fresh=fresh,
            time=time,
            **given_of(given, Target, *RUN, *METHOD, *HOSTS, Tracking) | {"model": chosen.model},
        )
    except KeyboardInterrupt:
        run = RunDirectory(run_dir)
        kept = f"{run.manifest.finished_tasks()} tasks are done and kept in {run_dir}"
        logs.log(
            "message",
            f"interrupted; {kept if run.exists else 'no task was done yet'}: "
            "run the same command again to continue",
        )
        raise typer.Exit(130) from None
    print_outcome(outcome, out, run_dir, json)
    if not outcome.complete:
        raise typer.Exit(1)


@app.command(rich_help_panel="Compress a model")
def status(out: Out, run_dir: RunDir = None, json: Json = False) -> None:
    """Show what is done, running, failed and remaining; works during a run and after it."""
    from orchestrator.cli.summary import print_status
    from orchestrator.model.verify import run_status
    from orchestrator.run.directory import run_dir_of

    state = run_status(run_dir or run_dir_of(out), out)
    print_status(state, json)


@app.command(rich_help_panel="Compress a model")
def verify(out: Out, run_dir: RunDir = None, json: Json = False) -> None:
    """Check every payload and shard against the manifest: sizes, sha256, tensors, budget."""
    from orchestrator.model.verify import verify as verify_files
    from orchestrator.run.directory import run_dir_of

    result = verify_files(out, run_dir or run_dir_of(out))
    if json:
        output.print_json(asdict(result))
    else:
        for problem in result.problems:
            output.out.print(problem, style="red", soft_wrap=True)
        output.out.print(
            f"{result.checked} payloads and shards checked; problems: {len(result.problems)}"
        )
    if result.problems:
        raise typer.Exit(1)


@app.command(rich_help_panel="Compress a model")
def clean(
    out: Out,
    run_dir: RunDir = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Delete an incomplete model too: work is lost."),
    ] = False,
) -> None:
    """Delete the run directory of a finished compression; the model stays."""
    from orchestrator.model.verify import run_status
    from orchestrator.run.directory import RunDirectory, run_dir_of

    run_dir = run_dir or run_dir_of(out)
    if not force:
        state = run_status(run_dir, out)
        if state["cleaned"]:
            output.out.print(f"{out} is complete; its run directory was cleaned", soft_wrap=True)
            return
        if state["state"] != "complete":
            raise LestdError(
                f"{out} is not complete ({state['done']} of {len(state['layers'])} tasks done); "
                "finish it with the same lestd compress, or delete the work with --force"
            )
    RunDirectory(run_dir).remove()
    output.out.print(f"removed {run_dir}", soft_wrap=True)
