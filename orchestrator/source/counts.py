"""Counts of a config.json, bounded by the tensors before anything is gone through one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lestd_kernels.errors import LestdError
from workers.checkpoint.tensors import ShardIndex

# What is gone through one by one, and how many are nothing to worry about.
_COUNT = re.compile(
    r"(\w+_)?(num|n)_(\w+_)?(layers?|heads?|experts|labels|blocks|groups|codebooks)(_per_\w+)?"
    r"|(\w+_)?(layers|depths?|experts|heads)"
)
_FEW = 1000


def check_counts(
    path: Path, config_json: dict[str, Any], read_index: Callable[[], ShardIndex]
) -> None:
    """Check that a model has no more layers, heads or experts than its tensors have room for.

    Args:
        path: of its config.json.
        config_json: what stands there.
        read_index: reads the model's tensors, which only large counts need.

    Raises:
        LestdError: names the count.
    """
    large = [item for item in _numbers(config_json) if _COUNT.fullmatch(item[0]) and item[1] > _FEW]
    if not large:
        return
    index = read_index()
    stored = [ref for ref in index.tensors.values() if ref.stored_bytes]
    room = max([len(index.tensors), *(size for ref in stored for size in ref.shape)])
    for name, count in large:
        if count > room:
            raise LestdError(
                f"{path} has {name} {count}, more than the tensors have room for; use the "
                "config.json that belongs to the weights"
            )


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a configuration and its parts, with the names that they stand under."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _numbers(one, key)
    elif isinstance(value, list):
        for one in value:
            yield from _numbers(one, name)
    elif isinstance(value, int | float):
        yield name, value
