"""The commands that work on models, compressed or not: convert, export, bench, push."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from lestd_kernels.errors import LestdError
from orchestrator.cli.application import app
from orchestrator.cli.options import Given, Json, absolute, options, output_option
from orchestrator.config.options import Checkpoint, Host, Precision, chosen
from orchestrator.console import output
from orchestrator.console.progress_bar import Meter


@app.command(rich_help_panel="Compress a model")
@options(Checkpoint)
def convert(
    model: Annotated[str, typer.Argument(help="Directory or Hub id of pickled .bin weights.")],
    out: Annotated[Path, typer.Argument(help="Directory of the safetensors checkpoint to write.")],
    given: Given,
) -> None:
    """Rewrite pickled .bin weights as safetensors, shard by shard, without running their code."""
    from orchestrator.source.convert import convert as convert_checkpoint

    with Meter("convert", "shards") as meter:
        index = convert_checkpoint(model, out, given["revision"], meter.update)
    output.out.print(
        f"{out}: {len(index.tensors)} tensors, {output.size(index.stored_bytes)} in "
        f"{len(index.shards)} shards",
        soft_wrap=True,
    )


@app.command(rich_help_panel="Use the result")
def export(
    model: Annotated[
        Path, typer.Argument(help="The compressed model's directory.", callback=absolute)
    ],
    dense: Annotated[
        Path | None,
        typer.Option(
            help="Directory of a dense checkpoint to write; must not exist, or be empty.",
            callback=absolute,
        ),
    ] = None,
    compressed_tensors: Annotated[
        Path | None,
        typer.Option(
            help="The same for few-bit weights, packed as vLLM and the library "
            "compressed-tensors read them; needs --scale-groups inputs when compressing.",
            callback=absolute,
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32"],
        typer.Option(help="Dtype of dense weights; auto: that of the stored values."),
    ] = "auto",
    json: Json = False,
) -> None:
    """Write a compressed model as a checkpoint for tools without the format: dense, or packed."""
    import torch

    from orchestrator.cli.summary import print_export
    from orchestrator.model.export import export_dense
    from orchestrator.model.packed_export import export_packed

    if (dense is None) == (compressed_tensors is None):
        raise LestdError("say what to write: either --dense DIR or --compressed-tensors DIR")
    if compressed_tensors is not None and dtype != "auto":
        raise LestdError(
            "--dtype is for --dense: weights in few bits keep the dtype of their scales"
        )
    with Meter("export", "bytes") as meter:
        if dense is not None:
            chosen = torch.float32 if dtype == "float32" else None
            exported = export_dense(model, dense, chosen, meter.update)
        elif compressed_tensors is not None:
            exported = export_packed(model, compressed_tensors, meter.update)
    print_export(exported, json)


@app.command(rich_help_panel="Evaluate and compare")
@options(Precision, Host)
def bench(
    dense: Annotated[Path, typer.Argument(help="Directory of the dense model.")],
    compressed: Annotated[Path, typer.Argument(help="Directory of the compressed model.")],
    given: Given,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Random tokens per prompt.")] = 128,
    new_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens to decode, including the one from the prefill.")
    ] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    repeats: Annotated[int, typer.Option(min=2, help="Measured repetitions per model.")] = 5,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="CPU threads per model.",
            show_default="torch's own",
            rich_help_panel="Where",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        output_option(help="Also draw the figures: FILE.png or FILE.svg; needs lestd[report]."),
    ] = None,
    json: Json = False,
) -> None:
    """Time two models in turn: prefill, decoding, time to first token, peak memory."""
    from orchestrator.console.plots import check_plot
    from orchestrator.experiments.speed import compare, print_comparison, save_plot
    from workers.bench import BenchSettings

    if plot is not None:
        check_plot(plot)
    dtype, device = chosen(Precision, given).dtype, given["device"] or "auto"
    settings = BenchSettings(prompt_tokens, new_tokens, batch, dtype, device, threads)
    with Meter("bench", "repetitions") as meter:
        comparison = compare(dense, compressed, settings, repeats, meter.update)
    if plot is not None:
        save_plot(comparison, plot)
    print_comparison(comparison, json)


@app.command(rich_help_panel="Use the result")
def push(
    model: Annotated[
        Path, typer.Argument(help="The compressed model's directory.", callback=absolute)
    ],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; created if absent.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a private repository; refuse a public one.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch; created if absent.", show_default="the main one"),
    ] = None,
    json: Json = False,
) -> None:
    """Upload a compressed model to the Hub. Run the same command again to continue."""
    from orchestrator.model.push import push as push_model

    pushed = push_model(model, repo, private, revision)
    if json:
        output.print_json(asdict(pushed))
        return
    output.out.print(
        f"{pushed.url}: {pushed.files} files, {output.size(pushed.bytes)}, commit {pushed.commit}",
        soft_wrap=True,
    )
