"""Named recipes: run files that come with lestd, one for each thing that people want.

They are in `orchestrator/config/named/`, and hold keys of run.yaml and nothing else.
"""

from __future__ import annotations

from typing import Any

from orchestrator.config.named_files import NamedFile, named_files, one_of
from orchestrator.config.yaml_text import parse_yaml


def recipes() -> dict[str, NamedFile]:
    """All recipes, by name."""
    return named_files("orchestrator.config", "yaml")


def recipe(name: str) -> NamedFile:
    """The recipe of that name; LestdError if there is none."""
    return one_of(recipes(), name, "recipe", "lestd recipes")


def options_of(name: str) -> dict[str, Any]:
    """The options of the recipe of that name, by key; LestdError if there is none."""
    return dict(parse_yaml(recipe(name).text))
