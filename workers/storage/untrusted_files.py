"""Files that others may have put here: opened without waiting, and parsed within bounds.

What is read back, from config.json to a part of a manifest, is a regular file of bounded size: a
named pipe would be waited for without end, and a device such as ``/dev/zero`` has no end.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

MAX_SMALL_BYTES = 100_000_000
"""Largest file that is read as a whole: what safetensors allows a header, an index of a million
tensors."""
MAX_TEXT_BYTES = 2**34
"""Largest text that a user names."""
_MAX_DEPTH = 64


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to be read; symbolic links are followed.

    Raises:
        OSError: it cannot be read, or is no regular file; `strerror` says why.
    """
    # O_NONBLOCK: to open a pipe is else to wait for somebody who writes to it.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(handle, "rb")


def read_regular(path: Path, limit: int = MAX_SMALL_BYTES) -> bytes:
    """The content of a small regular file.

    Args:
        path: the file.
        limit: bytes that it may have.

    Raises:
        OSError: as `open_regular`, or it has more than `limit` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            said = f"{size} bytes, expected at most {limit}"
            raise OSError(errno.EINVAL, said, str(path))
        return file.read(size)


def parse_json(content: bytes | str) -> Any:
    """The value of an untrusted JSON text.

    Raises:
        ValueError: it is not JSON, or is nested deeper than anything of ours.
    """
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [child for one in level for child in _children(one)]
        if not level:
            return value
    raise ValueError("nested too deeply")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
