"""A hook of mkdocs: the page `commands.md`, made from the commands themselves."""

from __future__ import annotations

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer import Context
from typer.cli import get_docs_for_click
from typer.main import get_command

from orchestrator.cli import app


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page."""
    command = get_command(app)
    context = Context(command, info_name="lestd", obj={})
    page = get_docs_for_click(obj=command, ctx=context, name="lestd", title="Commands")
    files.append(File.generated(config, "commands.md", content=page))
    return files
