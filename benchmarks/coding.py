"""Time to code and to decode matrices by their entropy, beside their sizes on disk and in memory.

    OMP_NUM_THREADS=1 python benchmarks/coding.py [--size 4096]

Numbers are normal ones, rounded; times are the least of three.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from lestd_kernels.backends import rans_lanes
from lestd_kernels.storage import rans
from lestd_kernels.storage.packed_integers import PackedIntegers

DEVIATIONS = (0.42, 0.92, 2.2)
"""Of about 1, 2 and 3.2 bits."""


def seconds(work: Callable[[], object]) -> float:
    """The least of three times."""
    found = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def main() -> None:
    """Print a line for each entropy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns")
    size = parser.parse_args().size
    for deviation in DEVIATIONS:
        Z = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).mul(deviation)
        integers = Z.round().to(torch.int16)
        numbers = integers.numpy().astype("int64")
        [stream] = rans.encode([numbers])
        packed = PackedIntegers.pack(integers)
        weights = size * size
        coding = seconds(lambda numbers=numbers: rans.encode([numbers]))
        decoding, plain = (
            seconds(lambda stream=stream, by=by: rans.decode([(stream, size, size)], lanes=by))
            for by in (rans_lanes.compiled(), None)
        )
        packing = seconds(lambda integers=integers: PackedIntegers.pack(integers))
        print(
            f"{8 * len(stream) / weights:.2f} bits on disk, "
            f"{8 * packed.packed_bytes / weights:.2f} in memory; million numbers per second: "
            f"coded {weights / coding / 1e6:.1f}, decoded {weights / decoding / 1e6:.1f} "
            f"(by numpy {weights / plain / 1e6:.1f}), "
            f"decoded and packed {weights / (decoding + packing) / 1e6:.1f}"
        )


if __name__ == "__main__":
    main()
