"""The command recipes: what comes with --recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.application import app
from orchestrator.cli.options import Json
from orchestrator.console import output


@app.command(rich_help_panel="Compress a model")
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Of one recipe its options, as a run.yaml.")
    ] = None,
    json: Json = False,
) -> None:
    """Show the named recipes for --recipe, or of one its options."""
    from orchestrator.config import recipes as named

    if name is not None and not json:
        output.out.print(named.recipe(name).text, markup=False, highlight=False, end="")
        return
    chosen = list(named.recipes().values()) if name is None else [named.recipe(name)]
    if json:
        output.print_json(
            {
                one.name: {"summary": one.summary, "options": named.options_of(one.name)}
                for one in chosen
            }
        )
        return
    width = max(len(one.name) for one in chosen)
    for one in chosen:
        output.out.print(f"{one.name:{width}}  {one.summary}", markup=False, soft_wrap=True)
