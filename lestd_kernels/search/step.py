"""The finest step whose numbers fit a byte budget."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import TypeVar

T = TypeVar("T")

_TRIES = 24
_CLOSE, _AIM = 0.9955, 0.9975
# Where nothing is known of the slope: about what one octave of the step takes off each element.
_BITS_PER_OCTAVE = 0.6
_MOST_OCTAVES = 3.0
_NUDGE = 0.01
# Octaves between two steps of which one is too fine: what is left are jumps of the bytes.
_NARROW = 1e-3


def finest_within(
    at: Callable[[float], tuple[int, T]],
    byte_budget: int,
    elements: int,
    finest: float,
    start: float,
) -> tuple[float, T]:
    """Search by the secant rule, inside of a bracket once there is one.

    Args:
        at: the base-2 logarithm of a step -> bytes, which fall as the step grows, and the numbers.
        byte_budget: which something within 24 octaves of the start fits.
        elements: how many numbers there are.
        finest: logarithm of the step below which nothing is gained.
        start: logarithm of the step to begin with.

    Returns:
        Of the tries the one that uses most of the budget: the logarithm of its step, and its
        numbers.
    """
    fits: tuple[float, int, T] | None = None
    exceeds: tuple[float, int] | None = None
    here = max(start, finest)
    for tries in count(1):
        size, numbers = at(here)
        if size > byte_budget:
            exceeds = here, size
        elif fits is None or size >= fits[1]:
            fits = here, size, numbers
        narrow = fits is not None and exceeds is not None and fits[0] - exceeds[0] < _NARROW
        if fits is not None and (
            fits[1] >= _CLOSE * byte_budget or fits[0] <= finest or narrow or tries >= _TRIES
        ):
            return fits[0], fits[2]
        if fits is None or exceeds is None:
            missing = 8 * (size - _AIM * byte_budget) / elements / _BITS_PER_OCTAVE
            here += max(-_MOST_OCTAVES, min(_MOST_OCTAVES, missing))
            here = max(here + _NUDGE * (fits is None), finest)
        else:
            share = (exceeds[1] - _AIM * byte_budget) / (exceeds[1] - fits[1])
            # Halved now and then, where the secant creeps.
            share = 0.5 if tries % 4 == 0 else min(max(share, 0.05), 0.95)
            here = exceeds[0] + (fits[0] - exceeds[0]) * share
    raise AssertionError("not reached")
