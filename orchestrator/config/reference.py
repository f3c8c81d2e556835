"""Made from the options by ``make reference``: the page docs/options.md, and
`orchestrator.config.keywords`, what the functions of `lestd` take by keyword."""

from __future__ import annotations

import json
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.files import option_name
from orchestrator.config.options import (
    ClusterFile,
    ConfigFile,
    Described,
    Evaluation,
    Host,
    Tracking,
    described,
)
from orchestrator.config.run import RunFile

_SOURCES = (
    (RunFile, "run.yaml"),
    (ConfigFile, ""),
    (ClusterConfig, "cluster.yaml"),
    (ClusterFile, ""),
    (Tracking, ""),
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


_KEYWORDS_HEAD = '''"""Options as keywords. Made from the options themselves by `make reference`."""

from __future__ import annotations

import os
from typing import Literal, TypedDict
'''


def keywords() -> str:
    """The Python text of `orchestrator.config.keywords`."""
    classes = {
        "RunOptions": (RunFile, ClusterConfig, ConfigFile, ClusterFile, Tracking),
        "EvaluateOptions": (Evaluation, Host, ClusterConfig, ClusterFile, Tracking),
    }
    text = _KEYWORDS_HEAD
    for name, groups in classes.items():
        kinds = {one.name: _keyword(one) for group in groups for one in described(group)}
        kinds.pop("model", None)  # It is no keyword.
        lines = (f"    {option}: {kind}\n" for option, kind in kinds.items())
        text += f'\n\nclass {name}(TypedDict, total=False):\n    """Options of `lestd`."""\n\n'
        text += "".join(lines)
    return text


def _keyword(one: Described) -> str:
    kind = _annotation(one.type)
    return kind.replace("float", "float | str") if one.option.parse else kind


def _annotation(kind: Any) -> str:
    """Source of a type; a path may be text."""
    if get_origin(kind) is Literal:
        return f"Literal[{', '.join(json.dumps(choice) for choice in get_args(kind))}]"
    if get_origin(kind) is dict:
        return f"dict[{', '.join(map(_annotation, get_args(kind)))}]"
    if get_origin(kind) is Annotated:
        return _annotation(get_args(kind)[0])
    if parts := get_args(kind):
        return " | ".join(map(_annotation, parts))
    names = {Path: "str | os.PathLike[str]", NoneType: "None"}
    return names.get(kind) or str(kind.__name__)


if __name__ == "__main__":
    Path("docs/options.md").write_text(page(), encoding="utf-8")
    Path("orchestrator/config/keywords.py").write_text(keywords(), encoding="utf-8")
