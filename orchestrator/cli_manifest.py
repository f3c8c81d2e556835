"""The commands that read manifests: diff."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator import tables
from orchestrator.app import app
from orchestrator.options import Json


@app.command()
def diff(
    before: Annotated[str, typer.Argument(help="A model, a run directory, or a URL of one.")],
    after: Annotated[str, typer.Argument(help="What it is compared with.")],
    every_layer: Annotated[
        bool, typer.Option("--all", help="Every layer, not only those that differ most.")
    ] = False,
    json: Json = False,
) -> None:
    """Show what changed between two runs, finished or not: configuration, bytes, error, time,
    quality, layers. Exits with 0 whether or not anything did."""
    from orchestrator.diff import compare
    from orchestrator.diff_text import print_diff

    found = compare(before, after)
    if json:
        tables.print_json(found)
    else:
        print_diff(found, every_layer)
