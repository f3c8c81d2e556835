"""The commands that work on models, compressed or not: convert, export, evaluate, bench, push."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from orchestrator import logs, tables
from orchestrator.app import app
from orchestrator.logs import LogFormat
from orchestrator.meter import Meter
from orchestrator.options import (
    Address,
    Batch,
    BenchThreads,
    ClusterFile,
    ComputeDtype,
    DeviceOption,
    ExecutorOption,
    ExportDtype,
    Json,
    LogFormatOption,
    MaxWindows,
    NewTokens,
    Plot,
    PromptTokens,
    Repeats,
    Revision,
    Threads,
    Window,
    Workers,
    absolute,
)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Directory or Hub id of pickled .bin weights.")],
    out: Annotated[Path, typer.Argument(help="Directory of the safetensors checkpoint to write.")],
    revision: Revision = None,
) -> None:
    """Rewrite pickled .bin weights as safetensors, shard by shard, without running their code."""
    from orchestrator.convert import convert as convert_checkpoint

    with Meter("convert", "shards") as meter:
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
    with Meter("export", "bytes") as meter:
        exported = export_dense(model, dense, chosen, meter.update)
    print_export(exported, json)


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
    log_format: LogFormatOption = LogFormat.text,
    json: Json = False,
) -> None:
    """Measure token and word perplexity over non-overlapping windows of a text."""
    given = dict(locals())
    from orchestrator.config import cluster_options
    from orchestrator.executor import open_executor
    from orchestrator.recording import default_evaluation_dir, manifest_of_evaluations
    from orchestrator.submit import jobs_address, run_as_job
    from orchestrator.summary import evaluate_models, print_evaluations

    logs.use(log_format)
    cluster_config = cluster_options(cluster, executor=executor, workers=workers, address=address)
    if jobs := jobs_address(cluster_config):
        raise typer.Exit(run_as_job(jobs, "evaluate", given, cluster_config))
    models = [model] if against is None else [against, model]
    settings = {"window": window, "max_windows": max_windows, "dtype": dtype}
    settings |= {"device": device or "auto", "threads": 1 if threads is None else threads}
    manifest = manifest_of_evaluations(model, default_evaluation_dir(model))
    with open_executor(cluster_config) as runner:
        evaluations = evaluate_models(models, text, runner, settings, manifest)
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
    with Meter("bench", "repetitions") as meter:
        comparison = compare(dense, compressed, settings, repeats, meter.update)
    if plot is not None:
        save_plot(comparison, plot)
    print_comparison(comparison, json)


@app.command()
def push(
    model: Annotated[
        Path, typer.Argument(help="The compressed model's directory.", callback=absolute)
    ],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; made if it is not there.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a private repository; refuse a public one.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch; made if it is not there.", show_default="the main one"),
    ] = None,
    json: Json = False,
) -> None:
    """Upload a compressed model to the Hub. Run the same command again to continue."""
    from orchestrator.push import push as push_model

    pushed = push_model(model, repo, private, revision)
    if json:
        tables.print_json(asdict(pushed))
        return
    tables.out.print(
        f"{pushed.url}: {pushed.files} files, {tables.size(pushed.bytes)}, commit {pushed.commit}",
        soft_wrap=True,
    )
