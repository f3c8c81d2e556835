"""The command that puts a model behind HTTP."""

from __future__ import annotations

from importlib.util import find_spec
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
    engine: Annotated[
        Literal["auto", "vllm", "transformers"],
        typer.Option(help="auto: vLLM where it is installed."),
    ] = "auto",
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        typer.Option(help="Of the engine transformers. auto: a GPU where there is one."),
    ] = "auto",
) -> None:
    """Serve a model with OpenAI's API: completions, chat, streaming. Ctrl-C ends it."""
    from orchestrator.evaluation.model import open_model
    from orchestrator.serving import transformers_server, vllm_server
    from orchestrator.serving.address import example, free_port

    tokenizer = open_model(model).tokenizer  # Refuse what is damaged before seconds of imports.
    port = free_port(host, port)

    def ready(url: str) -> None:
        output.out.print(f"serving {model} at {url}; Ctrl-C ends it", soft_wrap=True)
        line = example(url, str(model), chat=bool(tokenizer.chat_template))
        output.out.print(line, soft_wrap=True, markup=False, highlight=False)

    dtype = chosen(Precision, given).dtype
    if engine == "vllm" or (engine == "auto" and find_spec("vllm") is not None):
        vllm_server.serve(model, host, port, dtype, ready)
    else:
        transformers_server.serve(model, host, port, dtype, device, ready)
    output.out.print("stopped")
