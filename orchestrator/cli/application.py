"""The command `lestd` as a whole: its help, its version, and how every command ends."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lestd_kernels.errors import LestdError
from orchestrator.console import logs, output
from workers.storage.files import AnyPath


def _version(asked: bool) -> None:
    if asked:
        output.out.print(f"lestd {version('lestd')}")
        raise typer.Exit


# The commands in the order in which a user meets them.
_STORY = [
    "plan",
    "recipes",
    "audit",
    "compress",
    "status",
    "verify",
    "clean",
    "convert",
    "families",
    "evaluate",
    "compare",
    "sweep",
    "bench",
    "recover",
    "serve",
    "export",
    "push",
    "report",
    "query",
    "diff",
    "compact",
]


class _Group(TyperGroup):
    """Ends every command with one sentence and an exit code, whatever went wrong."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=_STORY.index)

    def invoke(self, ctx: Any) -> Any:
        logs.use(logs.LogFormat.text)  # Whatever a command before it, in this process, has set.
        try:
            return super().invoke(ctx)
        except LestdError as error:
            logs.error(error)
            raise typer.Exit(2) from None
        except BrokenPipeError:  # Whoever read our output has seen enough; click ends quietly.
            raise
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            logs.error(f"{where}{error.strerror or error}; check the path and its permissions")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            logs.log("message", "interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Compress the weights of a language model into shared bases with sparse cores, on one
machine or a Ray cluster; resume after any crash; load the result with plain transformers.

A first run:

    lestd plan MODEL --keep 0.4

    lestd compress MODEL --keep 0.4 --out OUT

    lestd evaluate OUT --text FILE --against MODEL

`keep` is stored bytes / dense bytes of the weights in scope, indices included. Run the same
command again to continue where the last one stopped.

Exit codes: 0 done; 1 ended with failed tasks or problems found; 2 bad input or refused;
130 interrupted.""",
)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def require_folder(option: str, file: AnyPath) -> None:
    """Refuse a file in a folder that is not there, before any work."""
    if isinstance(file, Path) and not file.parent.is_dir():
        raise LestdError(f"{option} {file}: there is no directory {file.parent}; make it first")
