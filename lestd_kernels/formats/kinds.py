"""The kinds of decompositions, by the name that an entry of ``quantization_config`` states."""

from __future__ import annotations

from lestd_kernels.formats.chain import Chain
from lestd_kernels.formats.shared_tucker import SharedTucker

Decomposition = SharedTucker | Chain
"""Decomposition of either kind; both are described, stored and read back alike."""

KINDS: dict[str, type[SharedTucker] | type[Chain]] = {
    SharedTucker.kind: SharedTucker,
    Chain.kind: Chain,
}
