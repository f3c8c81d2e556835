"""Compressions of any scope."""

from __future__ import annotations

from pathlib import Path

import lestd_kernels  # noqa: F401 - registers the format
from support.cli import lestd


def compress(source: Path, out: Path, *options: object) -> Path:
    result = lestd("compress", source, "--out", out, "--executor", "serial", *options)
    assert result.code == 0, result.err
    return out
