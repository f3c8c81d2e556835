"""The command that trains a compressed model: recover."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from lestd_kernels.errors import LestdError
from orchestrator.cli.application import app
from orchestrator.cli.options import Fresh, Given, Json, LogFormatOption, absolute, options
from orchestrator.config.options import Host, Windows, chosen
from orchestrator.console import logs, output
from orchestrator.console.logs import LogFormat


class Train(StrEnum):
    """Parameters to train."""

    lora = "lora"
    factors = "factors"


_RATES = {Train.lora: 1e-3, Train.factors: 3e-4}


@app.command(rich_help_panel="Use the result")
@options(Windows, Host)
def recover(
    model: Annotated[
        Path, typer.Argument(help="The compressed model's directory.", callback=absolute)
    ],
    text: Annotated[Path, typer.Option(help="UTF-8 text to train on.")],
    out: Annotated[Path, typer.Option(help="Directory of the trained model.", callback=absolute)],
    given: Given,
    train: Annotated[
        Train,
        typer.Option(
            help="lora: an adapter beside the model, which takes bytes of its own. factors: the "
            "stored factors and core values in place, at the same bytes."
        ),
    ] = Train.lora,
    eval_text: Annotated[
        Path | None,
        typer.Option(
            help="Text to evaluate on before and after.",
            show_default="the last tenth of --text, not trained on",
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the training text.")] = 1.0,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Optimizer steps, in place of --epochs.", show_default="epochs"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 8,
    rank: Annotated[int, typer.Option(min=1, help="Rank of an adapter.")] = 8,
    alpha: Annotated[float, typer.Option(help="The adapter is scaled by alpha / rank.")] = 16.0,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate.", show_default="0.001, for factors 0.0003"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the windows' order and the start.")] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saved states.")] = 50,
    fresh: Fresh = False,
    log_format: LogFormatOption = LogFormat.text,
    json: Json = False,
) -> None:
    """Train a compressed model on a text. Run the same command again to continue.

    Perplexity on held-out text is measured before and after.
    """
    logs.use(log_format)
    if train is Train.lora and find_spec("peft") is None:
        raise LestdError(
            '--train lora needs peft, which is not installed; pip install "lestd[recover]", or use '
            "--train factors"
        )
    rate = _RATES[train] if lr is None else lr
    if not (epochs > 0 and rate > 0 and alpha > 0):
        raise LestdError(
            f"--epochs, --lr and --alpha must be above 0, got {epochs}, {rate} and {alpha}"
        )
    from orchestrator.evaluation.perplexity_table import describe_evaluations, print_evaluations
    from orchestrator.recovery.train import recover as recover_model

    settings: dict[str, Any] = {"batch": batch, "rank": rank, "alpha": alpha, "seed": seed}
    settings |= asdict(chosen(Windows, given)) | asdict(chosen(Host, given))
    try:
        recovery = recover_model(
            model,
            text,
            out,
            eval_text=eval_text,
            epochs=epochs,
            steps=steps,
            fresh=fresh,
            train=train.value,
            lr=rate,
            save_every=save_every,
            **settings,
        )
    except KeyboardInterrupt:
        logs.log(
            "message",
            f"interrupted; the last state is kept in {out}.recover: run the same command again to "
            "continue",
        )
        raise typer.Exit(130) from None
    if json:
        described = describe_evaluations(recovery.evaluations)
        output.print_json(asdict(recovery) | {"evaluations": described})
        return
    print_evaluations(recovery.evaluations)
    first, last = recovery.losses
    output.out.print(
        f"{recovery.steps} steps, loss {first:.4f} -> {last:.4f}; {recovery.trainable:,} values "
        f"trained{_cost(recovery.adapter_bytes)}\nmodel {recovery.out}",
        soft_wrap=True,
    )


def _cost(adapter_bytes: int) -> str:
    if not adapter_bytes:
        return " in place, at the same bytes"
    return f" in an adapter of {output.size(adapter_bytes)}, counted above"
