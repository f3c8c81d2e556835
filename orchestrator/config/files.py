"""YAML files of configuration: read, and validated at the door."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError, ValidationInfo, field_validator

from lestd_kernels.errors import LestdError
from lestd_kernels.options import Option
from orchestrator.config.yaml_text import parse_yaml
from workers.storage.untrusted_files import read_regular


class Strict(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """A configuration that refuses unknown keys, and is not changed."""

    @field_validator("*", mode="before")
    @classmethod
    def _parsed(cls, value: Any, info: ValidationInfo) -> Any:
        for option in cls._options(info):
            if option.parse is not None and isinstance(value, str):
                return option.parse(value)
        return value

    @field_validator("*")
    @classmethod
    def _in_bounds(cls, value: Any, info: ValidationInfo) -> Any:
        for option in cls._options(info):
            option.check(value)
        return value

    @classmethod
    def _options(cls, info: ValidationInfo) -> list[Option]:
        marks = cls.model_fields[str(info.field_name)].metadata
        return [mark for mark in marks if isinstance(mark, Option)]


ModelT = TypeVar("ModelT", bound=BaseModel)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        LestdError: the file cannot be read, or is no mapping.
    """
    try:
        data = parse_yaml(read_regular(path).decode())
    except OSError as error:
        raise LestdError(f"{path} cannot be read as YAML ({error.strerror or error})") from error
    except ValueError as error:
        raise LestdError(f"{path} cannot be read as YAML ({error}); correct it") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise LestdError(f"{path} must hold keys and values, found a {type(data).__name__}")
    return data


def validated(
    model: type[ModelT], values: dict[str, Any], origin: str, names: Mapping[str, str] | None = None
) -> ModelT:
    """Build a configuration from plain values.

    Args:
        model: its class.
        values: the values.
        origin: where they are from, for messages.
        names: what the user calls single keys, where that is not the key in `origin`.

    Raises:
        LestdError: one sentence that names the first wrong key, and for a misspelt one the key
            that was probably meant.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"] if part != "[key]")
        if problem["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(problem["loc"][0]), model.model_fields, n=1)
            hint = (
                f"did you mean {close[0]!r}" if close else "known: " + ", ".join(model.model_fields)
            )
            raise LestdError(f"{origin}: unknown key {key!r}; {hint}") from None
        message = re.sub(r"^Value error, ", "", problem["msg"])
        given = problem.get("input")
        shown = "" if isinstance(given, (BaseModel, dict)) else f", got {given!r}"
        where = (names or {}).get(key) or (f"{origin}: {key}" if key else origin)
        raise LestdError(f"{where}: {message}{shown}") from None


def option_name(field: str) -> str:
    """Name of a field on the command line."""
    return f"--{field.replace('_', '-')}"


def typed(model: type[BaseModel], given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a model that were given on the command line; None stands for nothing."""
    return {k: v for k, v in given.items() if k in model.model_fields and v is not None}
