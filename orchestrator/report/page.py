"""Parts of pages: embedded scripts and styles, and the meanings of columns."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from datetime import datetime
from importlib.resources import files
from typing import Any

from lestd_kernels.errors import LestdError
from orchestrator.manifest.schemas import TABLES, Row

_SIGNIFICANT_DIGITS = 7


_MEANINGS = {
    "energy_share": ("squared_energy / squared_norm", ""),
    "slices": ("heads of all finished layers", ""),
    "row": ("row of the table of layers", ""),
    "measured_on": ("text, windows, samples, examples shown", ""),
    "what": ("figure of the plan, or part of the time", ""),
    "mode": ("1: the model's width, 2: the head dimension", ""),
    "index": ("1 is the largest", ""),
    "singular_value": ("of the unfolding", "weights"),
    "read_at": ("when reading began", "UTC"),
    "computed_at": ("when decomposing began", "UTC"),
    "written_at": ("when writing began", "UTC"),
    "ended_at": ("when the payload was written", "UTC"),
    "stage": ("what the workers did", ""),
    "before": ("the dense model", ""),
    "after": ("the compressed model", ""),
    "change": ("after / before - 1", ""),
    "planned": ("what the plan said", ""),
    "point": ("hull: of expected loss against bytes; stored: what the block got", ""),
    "bytes": ("of the block, as stored", "bytes"),
    "measured": ("divergence of the dense model's predictions", "nats per token"),
    "actual": ("what came", ""),
}


def require_plotly() -> None:
    """Refuse to gather for a report that could not be drawn.

    Raises:
        LestdError: plotly is not installed.
    """
    plotly_js()


def plotly_js() -> str:
    """Plotly's script.

    Raises:
        LestdError: plotly is not installed.
    """
    # An extra of the package: only who asks for a report needs it.
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise LestdError(
            "a report in HTML needs plotly, which is not installed; "
            'pip install "lestd[report]", or ask for --format md'
        ) from error
    return str(get_plotlyjs())


def package_file(name: str) -> str:
    """The text file of that path in this package."""
    return files("orchestrator").joinpath(name).read_text(encoding="utf-8")


def inline_script(script: str) -> str:
    """A script that does not end the element that holds it; its hash is that of this text."""
    return script.replace("</script", "<\\/script").replace("\r\n", "\n")


def csp_hash(script: str) -> str:
    """Hash by which a Content-Security-Policy names a script."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def column_table(rows: Sequence[Row], names: Iterable[str]) -> dict[str, Any]:
    """Columns with their meanings, and their values, one list per column."""
    names = list(names)
    return {
        "columns": [{"name": name} | _meaning(name) for name in names],
        "data": [[_plain(row[name]) for row in rows] for name in names],
    }


def _meaning(name: str) -> dict[str, str]:
    """Meaning and unit of a column, from the manifest's tables where it is one of theirs."""
    meaning, unit = _MEANINGS.get(name, ("", ""))
    for column in (column for table in TABLES.values() for column in table.columns):
        if column.name == name and not meaning:
            meaning, unit = column.meaning, column.unit
    return {"meaning": meaning, "unit": unit}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_SIGNIFICANT_DIGITS}g}")
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return value
