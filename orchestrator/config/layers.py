"""Lists of layers, as options and run files name them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lestd_kernels.errors import LestdError

MAX_LAYERS = 10_000
"""No list of layers goes further: a slip of the pen must not fill the memory."""

_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")


def parse_layers(text: str) -> frozenset[int]:
    """Layer indices named by a list like ``"0-3,7"``; both ends of a range belong to it.

    Raises:
        ValueError: it is no such list, or a range runs backwards or beyond `MAX_LAYERS`.
    """
    layers: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError('expected layers like "0-3,7"')
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f'the range {part} runs backwards; write "{last}-{first}"')
        if last >= MAX_LAYERS:
            raise ValueError(f"layer {last} is too high; expected layers below {MAX_LAYERS:,}")
        layers.update(range(first, last + 1))
    return frozenset(layers)


def list_of_layers(layers: Iterable[int]) -> str:
    """The list that `parse_layers` reads back: ``"0-3,7"``."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def check_layers(text: str) -> str:
    """The list itself, if it is one; raises as `parse_layers` does."""
    parse_layers(text)
    return text


def parse_keeps(text: str) -> list[float]:
    """Keeps from a list like ``"0.8,0.6"``, in its order.

    Raises:
        LestdError: it is no such list, or names a keep twice.
    """
    try:
        keeps = [float(part) for part in text.split(",")]
    except ValueError:
        raise LestdError(f"--keep must be numbers like 0.8,0.6,0.4, got {text!r}") from None
    if len(set(keeps)) < len(keeps):
        raise LestdError(f"--keep names a number twice in {text!r}; name each once")
    return keeps
