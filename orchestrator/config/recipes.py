"""Named recipes: run files that come with lestd, one for each thing that people want.

They are in `orchestrator/config/named/`, and hold keys of run.yaml and nothing else; the first
line, a comment, says what the recipe is for.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from lestd_kernels.errors import LestdError
from orchestrator.config.yaml_text import parse_yaml


@dataclass(frozen=True)
class Recipe:
    """Options under a name.

    Attributes:
        name: how it is asked for.
        summary: one line that says what it is for.
        text: of its file.
    """

    name: str
    summary: str
    text: str

    @property
    def options(self) -> dict[str, Any]:
        """Its options, by key."""
        return dict(parse_yaml(self.text))


def recipes() -> dict[str, Recipe]:
    """All recipes, by name."""
    found = {}
    for file in files("orchestrator.config").joinpath("named").iterdir():
        name, _, ending = file.name.rpartition(".")
        if ending == "yaml":
            text = file.read_text(encoding="utf-8")
            found[name] = Recipe(name, text.splitlines()[0].removeprefix("# "), text)
    return dict(sorted(found.items()))


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        LestdError: there is none.
    """
    known = recipes()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise LestdError(f"there is no recipe named {name!r}; {hint}lestd recipes shows all")
    return known[name]
