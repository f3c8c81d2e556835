"""Options of commands: those of `orchestrator.config.options`, and a few of their own."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from functools import partial, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from lestd_kernels.errors import LestdError
from orchestrator.config.options import Described, described
from orchestrator.console.logs import LogFormat
from workers.storage.files import as_path


def absolute(path: Path | None) -> Path | None:
    """An absolute path without ``..``; unlike `Path.resolve`, a link at its end is kept."""
    return path and Path(os.path.abspath(path))  # noqa: PTH100


output_option = partial(typer.Option, rich_help_panel="Output")

# Typer knows no unions: what `as_path` returns is an `AnyPath`.
Out = Annotated[
    Path,
    typer.Argument(help="The compressed model's directory, given as --out.", parser=as_path),
]
RunDir = Annotated[
    Path | None,
    output_option(help="Run directory.", show_default="OUT.run, beside OUT", parser=as_path),
]
CalibrationDir = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="Directory of the text's activations, which runs may share.",
        show_default="calibration, in the run directory",
        parser=as_path,
        rich_help_panel="Calibration",
    ),
]
Fresh = Annotated[
    bool,
    output_option("--fresh", help="Discard what an earlier call left at --out and start over."),
]
Time = Annotated[
    bool,
    output_option("--time", help="Also predict the time; measures this machine briefly."),
]
Json = Annotated[bool, output_option("--json", help="Print one JSON object instead of tables.")]
LogFormatOption = Annotated[
    LogFormat, output_option(help="Log format on stderr: text, or one JSON object per line.")
]

Given = dict[str, Any]
"""All that was given to a command, by name; None where nothing was."""


def options(*groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of these classes, in the place of its parameter `given`.

    There it finds what was given of them, and of its own parameters. A parameter that it declares
    itself replaces the option of that name.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = dict(inspect.signature(command, eval_str=True).parameters)
        shared = {one.name: one for group in groups for one in described(group)}
        generated = [
            _parameter(one)
            for one in shared.values()
            if not one.option.file_only and one.name not in own
        ]
        parameters: list[inspect.Parameter] = []
        for parameter in own.values():
            named = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
            parameters += generated if parameter.name == "given" else named

        @wraps(command)
        def called(**values: Any) -> None:
            command(**{name: values.get(name) for name in own} | {"given": values})

        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return called

    return decorate


def _parameter(one: Described) -> inspect.Parameter:
    """Typer's form of an option; it defaults to None, so that a file may say more."""
    option = one.option
    info: Any
    if option.argument:
        info = typer.Argument(None, help=option.help)
    else:
        unseen = option.gt is not None or option.lt is not None
        default = option.default or (None if one.default is None else str(one.default))
        info = typer.Option(
            None,
            help=option.help + (f" {option.bounds.capitalize()}." if unseen else ""),
            min=option.ge,
            show_default=default or False,
            rich_help_panel=None if option.first else option.panel,
        )
    kind = one.type if option.parse is None else str  # Parsed where files are, with their words.
    return inspect.Parameter(
        one.name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=kind | None
    )


def given_of(given: Mapping[str, Any], *groups: type) -> Any:
    """What was given of the options of these classes, by name, for a function of `lestd`."""
    return {one.name: given.get(one.name) for group in groups for one in described(group)}


_BELONG = {
    "text": ("window", "max_windows"),
    "tasks": ("data", "include_path", "limit", "fewshot", "batch_size", "log_samples"),
}


def refuse_unused(given: Mapping[str, Any]) -> None:
    """Refuse what belongs to one way of evaluating and would be ignored in the other.

    Args:
        given: the options.

    Raises:
        LestdError: there is such an option, or lm_eval is needed and not installed.
    """
    for needed, options in _BELONG.items():
        unused = [name for name in options if given.get(name) not in (None, False)]
        if given[needed] is None and unused:
            raise LestdError(
                f"--{unused[0].replace('_', '-')} belongs to --{needed}, which is not given; give "
                "both or neither"
            )
    if given["tasks"] is not None and find_spec("lm_eval") is None:
        raise LestdError('--tasks needs lm_eval, which is not installed; pip install "lestd[eval]"')
