"""The lanes of coded numbers, decoded by the compiled kernel.

What lestd_kernels.storage.rans does in numpy, which is the specification, with the same result and
some times as fast. The kernel (`rans_lanes.h`) is compiled together with that for products.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lestd_kernels.backends import bitmask
from lestd_kernels.storage.rans_stream import Lanes, Numbers, Parsed

_SLOT = np.dtype([("frequency", "u2"), ("offset", "u2"), ("number", "i2"), ("unused", "u2")])


def compiled() -> Lanes | None:
    """A decoder of lanes for `rans.decode`; None where nothing can be compiled."""
    return _decode if bitmask.is_available() else None


def _decode(parsed: Parsed) -> Numbers | None:
    if not parsed.tables:
        return np.zeros(0, np.int16)
    slots = np.zeros(len(parsed.tables) << parsed.precision, _SLOT)
    for own, table in zip(np.split(slots, len(parsed.tables)), parsed.tables, strict=True):
        own["number"], own["frequency"], own["offset"] = table.of_slots()
    numbers, ended = torch.ops.lestd.rans_lanes(
        _tensor(slots.view(np.int64)),
        # Two more, which are read together with the last.
        _tensor(np.append(parsed.words, np.zeros(2, np.uint16)).view(np.int16)),
        _tensor(parsed.counts.cumsum()),
        _tensor(parsed.states.view(np.int32)),
        _tensor(parsed.classes.rows),
        _tensor(parsed.classes.columns),
        _tensor(parsed.classes.of_sums()),
        parsed.precision,
        bitmask.path(),
    )
    flat: Numbers = numbers.numpy()
    return flat if ended else None


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
