"""Files of JSON that LeSTD writes for itself."""

from __future__ import annotations

import json
from typing import Any

from lestd_kernels.errors import LestdError
from workers.storage.files import AnyPath, atomic_write, read_file
from workers.storage.untrusted_files import parse_json


def read_json(path: AnyPath) -> dict[str, Any]:
    """Read a JSON object that LeSTD wrote.

    Raises:
        LestdError: the file is missing or damaged, or the object store does not answer.
    """
    try:
        data = parse_json(read_file(path))
    except (OSError, ValueError) as error:
        raise LestdError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise LestdError(f"{path} must hold a JSON object")
    return data


def write_json(path: AnyPath, data: dict[str, Any]) -> None:
    """Write a JSON object, atomically, with sorted keys."""
    content = json_bytes(data)
    atomic_write(path, lambda file: file.write(content))


def json_bytes(data: dict[str, Any]) -> bytes:
    """Text that `write_json` writes."""
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()
