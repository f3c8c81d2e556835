"""Output of a command: tables to read, one JSON object for programs.

Results go to standard output; what is said on the way goes to standard error (see `logs`), so
that output can be piped.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Piped output has no width of its own; a table must not be cut because of that.
_PIPED_WIDTH = 160


class _Console(Console):
    """Shows every text as it is: without markup, and control characters as escapes.

    Names of tensors, values of a manifest and what libraries say are anybody's: they must not
    steer the terminal.
    """

    def __init__(self, is_terminal: bool, *, stderr: bool = False) -> None:
        width = None if is_terminal else _PIPED_WIDTH
        super().__init__(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text, but="\n"), **options)


out = _Console(sys.stdout.isatty())
err = _Console(sys.stderr.isatty(), stderr=True)


def size(count: float) -> str:
    """Bytes as text, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def print_json(value: Any) -> None:
    """One JSON object on standard output; numbers that JSON lacks become null."""
    print(json.dumps(finite(value), indent=2))


def visible(text: str, but: str = "") -> str:
    """The text with its control characters as escapes, but some."""
    return "".join(
        char if char.isprintable() or char in but else char.encode("unicode_escape").decode()
        for char in text
    )


def finite(value: Any) -> Any:
    """The value with None for the numbers that JSON lacks, however deep they lie."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> None:
    """Print a title, and a table whose first column stands left and whose others stand right."""
    result = Table()
    for number, column in enumerate(columns):
        result.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        result.add_row(*row)
    # Not as the table's own title: that would be wrapped to the table's width.
    out.print(title, style="bold", soft_wrap=True)
    out.print(result)


def with_error(value: float, stderr: float | None, sign: str = "") -> str:
    """A figure with its standard error, where it has one; `sign` as in format specifications."""
    return f"{value:{sign}.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def ranks(row: dict[str, Any]) -> str:
    """Ranks of a group row, ``R1 x R2`` or ``R1 x R2 x R3``."""
    return " x ".join(str(row[name]) for name in ("R1", "R2", "R3") if row.get(name) is not None)
