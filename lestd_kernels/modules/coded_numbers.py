"""The whole numbers of a coded matrix: loaded as a stream, and packed in few bits from then on.

Decoding is done once, for many matrices of a model side by side. What is saved is the stream again:
coding is deterministic, so that it is the one that was loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from lestd_kernels import backends
from lestd_kernels.backends import packing, rans_lanes
from lestd_kernels.storage import rans
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.storage.packed_integers import PackedIntegers
from lestd_kernels.storage.rans_stream import Bytes, Numbers

_STREAM = "stream"
_ELEMENTS_OF_A_THREAD = 1 << 24


class CodedNumbers(nn.Module):
    """Whole numbers Z ``(rows, columns)``.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        stream_bytes: of the stream.
        device: where it is made (uninitialized, to be loaded).
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        stream_bytes: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.sizes = rows, columns
        # Codec, bits and count of `PackedIntegers`; its tensors are buffers of their own names.
        self._packing: tuple[str, int, int] | None = None
        self._packed_names: tuple[str, ...] = ()
        stream = torch.empty(stream_bytes, dtype=torch.uint8, device=device)
        self.register_buffer(_STREAM, stream)

    def coded(self) -> Tensor:
        """The stream, coded anew where the numbers are packed."""
        if self._packing is None:
            return self.get_buffer(_STREAM)
        Z = self._packed().integers()
        return torch.from_numpy(rans.encode([Z.cpu().numpy()])[0]).to(Z.device)

    @property
    def waits(self) -> bool:
        """Whether the stream is there and has not been decoded."""
        return self._packing is None and not self.get_buffer(_STREAM).is_meta

    def pack(self, Z: Tensor) -> None:
        """Hold these numbers ``(rows, columns)``, int16, in place of the stream."""
        packed = PackedIntegers.pack(Z, packing.compiled())
        for name in (*self._packed_names, _STREAM):
            self._buffers.pop(name, None)
        self._packing = packed.codec, packed.bits, packed.count
        self._packed_names = tuple(packed.tensors)
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def _packed(self) -> PackedIntegers:
        if self._packing is None:  # As where weights are offloaded: for this call only.
            return PackedIntegers.pack(self.integers())
        codec, bits, count = self._packing
        tensors = {name: self.get_buffer(name) for name in self._packed_names}
        return PackedIntegers(codec, bits, *self.sizes, count, tensors)

    def integers(self) -> Tensor:
        """Z, int16.

        Raises:
            ValueError: the stream is damaged.
        """
        if self._packing is not None:
            return self._packed().integers()
        stream = self.get_buffer(_STREAM)
        [Z] = rans.decode([(stream.cpu().numpy(), *self.sizes)])
        return torch.from_numpy(Z).to(stream.device)

    def forward(
        self, x: Tensor, transposed: bool, dtype: torch.dtype, backend: str | None
    ) -> Tensor:
        """``x @ Z``, or with `transposed` ``x @ Z.T``, with Z in a dtype."""
        rows, columns = self.sizes
        products = [
            backends.apply_core(
                x,
                EncodedCore(codec, rows, columns, tensors["values"].numel(), tensors),
                transposed,
                backend,
            )
            for codec, tensors in self._packed().parts(dtype)
        ]
        return products[0] if len(products) == 1 else products[0] + products[1]

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + _STREAM] = self.coded()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        stream = state_dict.get(prefix + _STREAM)
        if self._packing is not None and stream is not None:
            [Z] = rans.decode([(stream.cpu().numpy(), *self.sizes)])
            device = next(iter(self.buffers())).device
            self.pack(torch.from_numpy(Z).to(device))
            state_dict = {name: one for name, one in state_dict.items() if name != prefix + _STREAM}
        super()._load_from_state_dict(state_dict, prefix, *args)


def decode_all(modules: Sequence[tuple[str, CodedNumbers]]) -> None:
    """Decode and pack what waits among named modules, so many at a time that memory stays small.

    Raises:
        ValueError: a stream is damaged; says whose.
    """
    waiting = [(name, module) for name, module in modules if module.waits]
    if not waiting:
        return
    lanes, threads = rans_lanes.compiled(), torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        for some in _parts(waiting, _ELEMENTS_OF_A_THREAD * threads):
            try:
                decoded = rans.decode([_coded(module) for _, module in some], threads, lanes)
            except ValueError:
                for name, module in some:
                    try:
                        rans.decode([_coded(module)], lanes=lanes)
                    except ValueError as error:
                        raise ValueError(f"{name} is damaged, {error}") from error
                raise
            list(pool.map(_pack, (module for _, module in some), decoded))


def _parts(
    modules: Sequence[tuple[str, CodedNumbers]], most: int
) -> Iterator[list[tuple[str, CodedNumbers]]]:
    """Modules of so many elements together, or one of more."""
    part: list[tuple[str, CodedNumbers]] = []
    elements = 0
    for name, module in modules:
        own = math.prod(module.sizes)
        if part and elements + own > most:
            yield part
            part, elements = [], 0
        part.append((name, module))
        elements += own
    yield part


def _pack(module: CodedNumbers, Z: Numbers) -> None:
    module.pack(torch.from_numpy(Z).to(module.get_buffer(_STREAM).device))


def _coded(module: CodedNumbers) -> tuple[Bytes, int, int]:
    return module.coded().cpu().numpy(), *module.sizes
