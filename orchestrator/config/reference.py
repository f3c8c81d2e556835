"""The page docs/options.md, made from the options: ``make reference`` writes it."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.files import option_name
from orchestrator.config.options import ClusterFile, ConfigFile, Described, Evaluation, described
from orchestrator.config.run import RunFile

_SOURCES = (
    (RunFile, "run.yaml"),
    (ConfigFile, ""),
    (ClusterConfig, "cluster.yaml"),
    (ClusterFile, ""),
    (Evaluation, ""),
)
_WORDS = {float: "number", int: "whole number", str: "text", Path: "path", bool: "true or false"}
_HEAD = """# Options

Made from the options themselves by `make reference`.

`--config run.yaml` says what to compute, `--cluster cluster.yaml` where. Both take the keys below
and no others. What is given on the command line wins over the file, and the file over the default.
What has no key is an option of the command line only; what has no option is a key of the file only.
`lestd COMMAND --help` says which of them a command takes, and shows its own.
"""


def page() -> str:
    """The Markdown text: a table for each panel of the help."""
    panels: dict[str, list[str]] = {}
    for group, file in _SOURCES:
        for one in described(group):
            panels.setdefault(one.option.panel, []).append(_row(one, file))
    head = "| option | key | values | default | what it does |\n| --- | --- | --- | --- | --- |\n"
    tables = (f"## {panel}\n\n{head}" + "".join(rows) for panel, rows in panels.items())
    return "\n".join((_HEAD, *tables))


def _row(one: Described, file: str) -> str:
    option = "" if one.option.file_only else f"`{option_name(one.name)}`"
    cells = (
        f"`{one.name.upper()}`" if one.option.argument else option,
        f"`{one.name}` in {file}" if file else "",
        _values(one),
        one.option.default or ("" if one.default is None else f"`{str(one.default).lower()}`"),
        one.option.help,
    )
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _values(one: Described) -> str:
    kind: Any = one.type
    if NoneType in get_args(kind):
        [kind] = set(get_args(kind)) - {NoneType}
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    return " ".join(filter(None, (_WORDS.get(kind, "mapping"), one.option.bounds)))


if __name__ == "__main__":
    Path("docs/options.md").write_text(page(), encoding="utf-8")
