"""The answer to a query, to read and for programs.

Values that JSON and CSV lack are written as text: times in ISO 8601, bytes as Python says them.
Exact decimals become whole numbers or doubles. In tables, and in CSV on a
terminal, control characters are shown as escapes.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from lestd_kernels.errors import LestdError, first_line
from orchestrator.console import output
from workers.storage.files import AnyPath, atomic_write

SHOWN_ROWS = 50
"""Rows of a table for people."""
_SHOWN_RECORDS = 5
_CELL_CHARACTERS = 60
_BATCH_ROWS = 10_000
_EXACT = 1e15
# Of a column of numbers, in powers of ten, that is shown with the same decimals throughout.
_SPAN, _LARGEST, _MOST_DECIMALS = 5, 9, 8


def print_answer(answer: pa.Table) -> None:
    """Print the first rows as a table, or one block per row if that is too wide."""
    shown = answer.slice(0, SHOWN_ROWS)
    values = [*zip(*_rows(shown), strict=True)] or [()] * len(answer.column_names)
    named = zip(answer.column_names, values, strict=True)
    columns = [_cells(name, [*column]) for name, column in named]
    cells = [list(row) for row in zip(*columns, strict=True)]
    table = Table()
    for field in answer.schema:
        is_text = pa.types.is_string(field.type)
        name = Text(output.visible(field.name))
        table.add_column(name, justify="left" if is_text else "right")
    for row in cells:
        table.add_row(*map(Text, row))
    if Measurement.get(output.out, output.out.options.update(width=10_000), table).maximum > (
        output.out.width
    ):
        cells = cells[:_SHOWN_RECORDS]
        _print_records(answer.column_names, cells)
    else:
        output.out.print(table)
    if len(cells) < len(answer):
        left_out = f"{len(cells)} of {len(answer)} rows; all: --csv, --json or --parquet FILE"
        output.out.print(left_out, soft_wrap=True)
    else:
        output.out.print("1 row" if len(answer) == 1 else f"{len(answer)} rows")


def _print_records(names: list[str], rows: list[list[str]]) -> None:
    names = list(map(output.visible, names))
    width = max(map(len, names))
    for row in rows:
        for name, cell in zip(names, row, strict=True):
            output.out.print(Text(f"{name:{width}}  {cell}"), soft_wrap=True)
        output.out.print()


def print_csv(answer: pa.Table) -> None:
    """All rows as CSV with a header; null is empty.

    Texts that a spreadsheet would take for a formula begin with an apostrophe; on a terminal,
    control characters but line feeds and tabs are escapes.
    """
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(map(_csv_value, answer.column_names))
    for row in _rows(answer):
        writer.writerow([_csv_value(plain(value)) for value in row])


def print_json(answer: pa.Table) -> None:
    """All rows as one JSON object, ``{"rows": [{column: value, ...}, ...]}``, a row a line."""
    names = answer.column_names
    before = '{"rows": [\n'
    for row in _rows(answer):
        values = dict(zip(names, map(plain, row), strict=True))
        sys.stdout.write(before + json.dumps(output.finite(values)))
        before = ",\n"
    sys.stdout.write("\n]}\n" if len(answer) else '{"rows": []}\n')


def write_parquet(answer: pa.Table, path: AnyPath) -> None:
    """All rows as a Parquet file, whole or not at all.

    Raises:
        OutOfSpaceError: no space left.
        LestdError: the object store does not take it, or Parquet has no such type.
    """
    try:
        atomic_write(path, lambda file: pq.write_table(answer, file, compression="zstd"))
    except pa.ArrowException as error:
        raise LestdError(
            f"{path} cannot be written ({first_line(error)}); cast the column to a type that "
            "Parquet has, such as VARCHAR"
        ) from error


def plain(value: Any) -> Any:
    """A value of a row as JSON has it; numbers that it lacks stay as they are."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def unique_names(answer: pa.Table) -> pa.Table:
    """The same with ``_2``, ``_3``, ... behind names that an earlier column has."""
    names: list[str] = []
    for name in answer.column_names:
        candidate, number = name, 2
        while candidate in names:
            candidate, number = f"{name}_{number}", number + 1
        names.append(candidate)
    return answer.rename_columns(names)


def _rows(answer: pa.Table) -> Iterator[tuple[Any, ...]]:
    """All rows, as Python's values.

    Raises:
        LestdError: Python lacks one of them.
    """
    for batch in answer.to_batches(max_chunksize=_BATCH_ROWS):
        columns = []
        for name, column in zip(batch.column_names, batch.columns, strict=True):
            try:
                columns.append(column.to_pylist())
            except (OverflowError, ValueError) as error:
                name = output.visible(name)
                raise LestdError(
                    f"column {name} has a date or time that is infinite, outside of the years 1 to "
                    f'9999, or finer than a microsecond; cast it: "{name}"::varchar'
                ) from error
        yield from zip(*columns, strict=True)


def _csv_value(value: Any) -> Any:
    if isinstance(value, dict | list):
        return json.dumps(output.finite(value))
    if isinstance(value, str):
        quoted = value.startswith(("=", "+", "-", "@", "\t", "\r"))
        shown = output.visible(value, but="\n\t") if sys.stdout.isatty() else value
        return "'" * quoted + shown
    return str(value).lower() if isinstance(value, bool) else value


def _cells(name: str, values: list[Any]) -> list[str]:
    """A column for people: numbers with as many decimals each, where one number of them suits."""
    values = [float(value) if isinstance(value, Decimal) else value for value in values]
    numbers = [v for v in values if isinstance(v, float) and math.isfinite(v)]
    decimals = 0 if name.split("_")[-1] == "bytes" else _decimals([v for v in numbers if v])
    return [
        f"{value:.{decimals}f}"
        if isinstance(value, float) and math.isfinite(value) and decimals is not None
        else _cell(value)
        for value in values
    ]


def _decimals(numbers: list[float]) -> int | None:
    """Decimals that show four digits of the largest, and two of the least; None if none do.

    Fewer, where these show every digit there is.
    """
    if not numbers or all(number.is_integer() for number in numbers):
        return 0 if numbers and max(map(abs, numbers)) < _EXACT else None
    least, largest = (math.floor(math.log10(f(map(abs, numbers)))) for f in (min, max))
    if largest - least > _SPAN or largest > _LARGEST:
        return None
    decimals = max(3 - largest, 1 - least, 1)
    if decimals > _MOST_DECIMALS:
        return None
    return next(d for d in range(decimals + 1) if d == decimals or _shows_all(numbers, d))


def _shows_all(numbers: list[float], decimals: int) -> bool:
    return all(float(f"{number:.{decimals}f}") == number for number in numbers)


def _cell(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat(" ", "seconds").removesuffix("+00:00")
    value = plain(value)
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < _EXACT else _digits(value)
    text = str(value).lower() if isinstance(value, bool) else _one_line(str(value))
    return text if len(text) <= _CELL_CHARACTERS else text[: _CELL_CHARACTERS - 1] + "…"


def _digits(value: float) -> str:
    return f"{value:.1f}" if 1000 <= abs(value) < _EXACT else f"{value:.4g}"


def _one_line(text: str) -> str:
    return output.visible(" ".join(text.split()))
