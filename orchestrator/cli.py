"""The command `lestd`.

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
from typing import Annotated, Any

import typer

from lestd_kernels.errors import LestdError
from orchestrator import tables
from orchestrator.app import app
from orchestrator.config import ClusterConfig, RunConfig, RunFile, load_yaml, validated
from orchestrator.options import (
    Address,
    AllocationOption,
    Batch,
    BenchThreads,
    Calibrate,
    ClusterFile,
    ComputeDtype,
    ConfigFile,
    DeviceOption,
    Exclude,
    ExecutorOption,
    ExportDtype,
    Include,
    Json,
    Keep,
    KeepModel,
    MaxFlops,
    MaxWindows,
    MethodOption,
    Model,
    NewTokens,
    Out,
    PatternOption,
    Plot,
    PromptTokens,
    Repeats,
    Revision,
    RunDir,
    ScopeOption,
    Threads,
    TypeModeOption,
    Window,
    Workers,
    absolute,
)
from orchestrator.rundir import RunDirectory, default_run_dir


def _run_config(
    model: str | None, config: Path | None, options: dict[str, Any]
) -> tuple[str, str | None, RunConfig]:
    """Model, revision and configuration from a run file and the options; options win."""
    values = {} if config is None else load_yaml(config)
    given = {key: value for key, value in options.items() if value is not None}
    if "keep" in given or "keep_model" in given:
        values = {k: v for k, v in values.items() if k not in ("keep", "keep_model")}
    values |= given | ({} if model is None else {"model": model})
    run_file = validated(RunFile, values, str(config or "options"))
    if run_file.model is None:
        raise LestdError("no model given; name a directory or a Hub id, or set model in --config")
    plain = run_file.model_dump(exclude={"model", "revision"})
    return run_file.model, run_file.revision, RunConfig.model_validate(plain)


def _cluster_config(cluster: Path | None, **options: Any) -> ClusterConfig:
    values = {} if cluster is None else load_yaml(cluster)
    values |= {key: value for key, value in options.items() if value is not None}
    return validated(ClusterConfig, values, str(cluster or "options"))


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
    config: ConfigFile = None,
    calibrate: Calibrate = False,
    json: Json = False,
) -> None:
    """Show what a compression would do: reads headers only, writes nothing."""
    from orchestrator.plan import make_plan
    from orchestrator.source import open_headers
    from orchestrator.summary import describe_plan, print_plan

    options = {k: v for k, v in locals().items() if k in RunFile.model_fields and k != "model"}
    name, revision, run_config = _run_config(model, config, options)
    planned = make_plan(open_headers(name, revision), run_config)
    print_plan(name, describe_plan(planned, run_config, calibrate), json)


@app.command()
def compress(
    out: Annotated[
        Path, typer.Option(help="Directory of the compressed model.", callback=absolute)
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
    json: Json = False,
) -> None:
    """Compress a checkpoint. Run the same command again to continue after a crash."""
    from orchestrator.executor import open_executor
    from orchestrator.pipeline import compress_model
    from orchestrator.plan import make_plan
    from orchestrator.source import open_headers, resolve_source
    from orchestrator.summary import (
        CompressionProgress,
        describe_plan,
        predicted_seconds,
        print_outcome,
        print_plan,
    )

    options = {k: v for k, v in locals().items() if k in RunFile.model_fields and k != "model"}
    name, revision, run_config = _run_config(model, config, options)
    cluster_config = _cluster_config(cluster, executor=executor, workers=workers, address=address)
    if dry_run:
        planned = make_plan(open_headers(name, revision), run_config)
        print_plan(name, describe_plan(planned, run_config, calibrate), json)
        return

    run_dir = run_dir or default_run_dir(out)
    source = resolve_source(name, revision)
    planned = make_plan(source, run_config)  # Refuse what is impossible before Ray is started.
    seconds = predicted_seconds(planned, run_config) if calibrate else None
    try:
        with open_executor(cluster_config) as runner, tables.Meter("compress", "bytes") as meter:
            shown = CompressionProgress(meter)
            outcome = compress_model(
                source,
                run_config,
                runner,
                out,
                run_dir,
                fresh=fresh,
                on_start=shown.on_start,
                on_event=shown.on_event,
                on_progress=shown.on_progress,
            )
    except KeyboardInterrupt:
        run = RunDirectory(run_dir)
        kept = f"{run.manifest.finished_tasks()} tasks are done and kept in {run_dir}"
        tables.err.print(
            f"interrupted; {kept if run.exists else 'no task was done yet'}: "
            "run the same command again to continue",
            soft_wrap=True,
        )
        raise typer.Exit(130) from None
    print_outcome(outcome, out, run_dir, json, seconds)
    if not outcome.complete:
        raise typer.Exit(1)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Directory or Hub id of pickled .bin weights.")],
    out: Annotated[Path, typer.Argument(help="Directory of the safetensors checkpoint to write.")],
    revision: Revision = None,
) -> None:
    """Rewrite pickled .bin weights as safetensors, shard by shard, without running their code."""
    from orchestrator.convert import convert as convert_checkpoint

    with tables.Meter("convert", "shards") as meter:
        index = convert_checkpoint(model, out, revision, meter.update)
    tables.out.print(
        f"{out}: {len(index.tensors)} tensors, {tables.size(index.stored_bytes)} in "
        f"{len(index.shards)} shards",
        soft_wrap=True,
    )


@app.command()
def export(
    model: Annotated[
        Path, typer.Argument(help="The compressed model's directory.", callback=absolute)
    ],
    dense: Annotated[
        Path,
        typer.Option(
            help="Directory of the dense checkpoint to write; must not exist, or be empty.",
            callback=absolute,
        ),
    ],
    dtype: Annotated[
        ExportDtype,
        typer.Option(help="Of the reconstructed weights; auto: as the values are stored."),
    ] = ExportDtype.auto,
    json: Json = False,
) -> None:
    """Write a compressed model as an ordinary dense checkpoint, for tools without the format."""
    import torch

    from orchestrator.export import export_dense
    from orchestrator.summary import print_export

    chosen = torch.float32 if dtype is ExportDtype.float32 else None
    with tables.Meter("export", "bytes") as meter:
        exported = export_dense(model, dense, chosen, meter.update)
    print_export(exported, json)


@app.command()
def status(out: Out, run_dir: RunDir = None, json: Json = False) -> None:
    """Show what is done, running, failed and remaining; works during a run and after it."""
    from orchestrator.inspection import run_status
    from orchestrator.summary import print_status

    state = run_status(run_dir or default_run_dir(out), out)
    print_status(state, json)


@app.command()
def verify(out: Out, run_dir: RunDir = None, json: Json = False) -> None:
    """Check every payload and shard against the manifest: sizes, sha256, tensors, budget."""
    from orchestrator.inspection import verify as verify_files

    result = verify_files(out, run_dir or default_run_dir(out))
    if json:
        tables.print_json(asdict(result))
    else:
        for problem in result.problems:
            tables.out.print(problem, style="red", markup=False, soft_wrap=True)
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

    run_dir = run_dir or default_run_dir(out)
    if not force:
        state = run_status(run_dir, out)
        if state["state"] != "complete":
            raise LestdError(
                f"{out} is not complete ({state['done']} of {len(state['layers'])} tasks done); "
                "finish it with the same lestd compress, or delete the work with --force"
            )
    RunDirectory(run_dir).remove()
    tables.out.print(f"removed {run_dir}", soft_wrap=True)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Directory of a compressed or a dense model.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text to predict.")],
    against: Annotated[
        Path | None, typer.Option(help="A second model, usually the dense one, to compare with.")
    ] = None,
    window: Window = None,
    max_windows: MaxWindows = None,
    dtype: ComputeDtype = "auto",
    device: DeviceOption = None,
    threads: Threads = None,
    executor: ExecutorOption = None,
    workers: Workers = None,
    address: Address = None,
    cluster: ClusterFile = None,
    json: Json = False,
) -> None:
    """Measure token and word perplexity over non-overlapping windows of a text."""
    from orchestrator.executor import open_executor
    from orchestrator.summary import evaluate_models, print_evaluations

    cluster_config = _cluster_config(cluster, executor=executor, workers=workers, address=address)
    models = [model] if against is None else [against, model]
    settings = {"window": window, "max_windows": max_windows, "dtype": dtype}
    settings |= {"device": device or "auto", "threads": 1 if threads is None else threads}
    with open_executor(cluster_config) as runner:
        evaluations = evaluate_models(models, text, runner, settings)
    print_evaluations(evaluations, json)


@app.command()
def bench(
    dense: Annotated[Path, typer.Argument(help="Directory of the dense model.")],
    compressed: Annotated[Path, typer.Argument(help="Directory of the compressed model.")],
    prompt_tokens: PromptTokens = 128,
    new_tokens: NewTokens = 64,
    batch: Batch = 1,
    repeats: Repeats = 5,
    dtype: ComputeDtype = "auto",
    device: DeviceOption = None,
    threads: BenchThreads = None,
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Time two models in turn: prefill, decoding, time to first token, peak memory."""
    from orchestrator.bench import check_plot, compare, print_comparison, save_plot
    from workers.bench import BenchSettings

    if plot is not None:
        check_plot(plot)
    settings = BenchSettings(prompt_tokens, new_tokens, batch, dtype, device or "auto", threads)
    with tables.Meter("bench", "repetitions") as meter:
        comparison = compare(dense, compressed, settings, repeats, meter.update)
    if plot is not None:
        save_plot(comparison, plot)
    print_comparison(comparison, json)


def main() -> None:
    """Entry point of the command."""
    # A batch system ends a job with SIGTERM: end as with Ctrl-C, with all finished work kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # For terminals that know only ASCII.
    app(prog_name="lestd")
