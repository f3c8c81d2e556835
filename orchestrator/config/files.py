"""YAML files of configuration: read, and validated at the door."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from lestd_kernels.errors import LestdError
from orchestrator.config.yaml_text import parse_yaml
from workers.storage.regular import read_regular


class Strict(BaseModel):
    """A configuration that refuses unknown keys, and is not changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


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


def validated(model: type[ModelT], values: dict[str, Any], origin: str) -> ModelT:
    """Build a configuration from plain values.

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
        raise LestdError(f"{origin}: {key + ': ' if key else ''}{message}{shown}") from None
