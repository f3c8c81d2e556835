"""Variants to compare: methods with their options, from one line.

    lestd, svd, lestd:metric=activation,value_bits=8; rtn:value_bits=4

Methods stand apart by commas, semicolons or spaces. Options follow a method after a colon and
stand apart by commas: a part with an equals sign belongs to the method before it. Options are those
of run.yaml that decide how a block is decomposed; what they are of a command they are for all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lestd_kernels.errors import LestdError
from lestd_kernels.methods import METHODS
from orchestrator.config.run import TARGETS, RunConfig
from orchestrator.config.yaml_text import parse_yaml

_SAME_FOR_ALL = frozenset(
    (
        *(*TARGETS, "layer_keep", "method", "scope", "include", "exclude", "device"),
        *("calibrate_on", "samples", "sample_tokens", "gram_width"),
    )
)
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._]+")


@dataclass(frozen=True, eq=False)
class Contender:
    """A method with options.

    Attributes:
        method: key of `METHODS`; empty for the one that a command's own options name.
        options: fields of `RunConfig`, as written.
    """

    method: str
    options: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Name in tables."""
        return " ".join([self.method, *(f"{k}={v}" for k, v in self.options.items())])

    @property
    def directory(self) -> str:
        """Name of its directory; empty for the experiment's own."""
        return _NOT_IN_A_NAME.sub("-", self.label)

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of `RunConfig` that it decides."""
        return {"method": self.method, **self.options} if self.method else {}


def parse_contenders(text: str) -> list[Contender]:
    """Methods and their options, in their order.

    Raises:
        LestdError: there is none, a method or an option does not exist, or one is named twice.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    for part in filter(None, re.split(r"[,;\s]+", text)):
        head, colon, option = part.partition(":")
        # The value of an option may have a colon, as 2:4 has.
        if "=" in head or not colon:
            head, option = ("", part) if "=" in part else (part, "")
        if head:
            if head not in METHODS:
                raise LestdError(
                    f"--methods names {head!r}, expected methods of {', '.join(METHODS)}"
                )
            found.append((head, {}))
        if option:
            _add_option(found, option)
    contenders = [Contender(method, options) for method, options in found]
    if not contenders:
        raise LestdError(f"--methods names no method; expected some of {', '.join(METHODS)}")
    names = [contender.directory for contender in contenders]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise LestdError(f"--methods names {twice!r} twice; name each once")
    return contenders


def _add_option(found: list[tuple[str, dict[str, Any]]], option: str) -> None:
    name, equals, value = option.partition("=")
    known = sorted(RunConfig.model_fields.keys() - _SAME_FOR_ALL)
    if not found or not equals or name not in known:
        raise LestdError(
            f"--methods has {option!r}, expected METHOD:OPTION=VALUE,OPTION=VALUE with options of "
            f"{', '.join(known)}"
        )
    try:
        # "2:4" is a number to base 60 in YAML.
        found[-1][1][name] = value if ":" in value else parse_yaml(value)
    except ValueError:
        raise LestdError(f"--methods: the value of {option!r} cannot be read") from None
