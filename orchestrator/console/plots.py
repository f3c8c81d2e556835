"""Plots of matplotlib: refused before any work where they could not be written, same bytes."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

from lestd_kernels.errors import LestdError
from workers.storage.files import atomic_write

PLOT_FORMATS = ("png", "svg")


def check_plot(path: Path) -> None:
    """Refuse a plot that could not be written, before anything is measured for it.

    Raises:
        LestdError: the file's ending is no format, its directory is not there, or matplotlib is
            not installed.
    """
    if path.suffix.removeprefix(".") not in PLOT_FORMATS:
        raise LestdError(
            f"--plot {path} ends in {path.suffix!r}, expected .{' or .'.join(PLOT_FORMATS)}"
        )
    if not path.parent.is_dir():
        raise LestdError(f"--plot {path}: there is no directory {path.parent}; make it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise LestdError(
            "--plot needs matplotlib, which is not installed; pip install 'lestd[report]', or "
            "leave --plot out"
        )


def write_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib; same figure and same matplotlib, same bytes.

    Args:
        figure: the figure.
        path: see `save_plot`.
    """
    import matplotlib

    drawn = io.BytesIO()
    kind = path.suffix.removeprefix(".")
    with matplotlib.rc_context({"svg.hashsalt": "lestd"}):
        figure.savefig(drawn, format=kind, metadata={"Date": None} if kind == "svg" else None)
    atomic_write(path, lambda file: file.write(drawn.getvalue()))
