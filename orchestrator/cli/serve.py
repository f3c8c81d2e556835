"""The command that puts a model behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from orchestrator.cli.application import app
from orchestrator.cli.options import Given, absolute, options
from orchestrator.config.options import Precision, chosen
from orchestrator.console import output


@app.command(rich_help_panel="Use the result")
@options(Precision)
def serve(
    model: Annotated[
        Path, typer.Argument(help="Directory of a compressed or a dense model.", callback=absolute)
    ],
    given: Given,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")
    ] = 8000,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU where there is one.")
    ] = "auto",
) -> None:
    """Serve a model with OpenAI's API: completions, chat, streaming. Ctrl-C ends it."""
    from orchestrator.serving.server import example
    from orchestrator.serving.server import serve as serve_model

    def ready(url: str) -> None:
        output.out.print(f"serving {model} at {url}; Ctrl-C ends it", soft_wrap=True)
        output.out.print(example(url, model), soft_wrap=True, markup=False, highlight=False)

    serve_model(model, host, port, chosen(Precision, given).dtype, device, ready)
    output.out.print("stopped")
