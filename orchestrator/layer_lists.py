"""Lists of layers, as options and run files name them."""

from __future__ import annotations

import re

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


def check_layers(text: str) -> str:
    """The list itself, if it is one; raises as `parse_layers` does."""
    parse_layers(text)
    return text
