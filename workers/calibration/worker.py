"""The work of one actor at a calibration: a piece of the samples through one layer.

Gram matrices are taken of a dense model on samples of a text. The samples are divided into pieces,
which do not depend on the pool, and each piece goes through the layers in turn:

    CALIBRATION/                                        see `orchestrator.compression.calibration`
        layer-00007-self_attn.safetensors               done: the sums over all pieces
        pieces/layer-00007-00003.hidden                 a piece's hidden states before that layer
        pieces/layer-00007-self_attn-00003.grams        what the modules of a block read of it

Everything is written atomically and depends on the samples alone, so what is done twice is the
same. A worker's memory holds one layer in float32, the Gram matrices of its inputs, and the
activations of one window.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lestd_kernels.errors import LestdError
from workers.calibration.statistics import Watch, watched_inputs
from workers.checkpoint.tensors import read_header, read_tensor, write_safetensors
from workers.contracts import Failure, TensorRef
from workers.host.devices import return_freed_memory
from workers.host.failures import failure_of
from workers.storage.files import (
    AnyPath,
    as_path,
    atomic_write,
    is_file,
    make_directory,
    not_shared,
    remove_file,
)

if TYPE_CHECKING:
    from workers.calibration.layerwise import LayerwiseModel

PIECES_DIR = "pieces"


@dataclass(frozen=True)
class CalibratedBlock:
    """A block of one layer, the inputs of whose modules are wanted.

    Attributes:
        layer: index of the decoder layer.
        group: path of the block in the loaded model, ``"model.layers.7.self_attn"``.
        modules: module of the block -> name of the input that it reads.
        widths: name of the input -> its channels.
    """

    layer: int
    group: str
    modules: dict[str, str]
    widths: dict[str, int]

    @property
    def layers(self) -> str:
        """Path of the list of decoder layers, ``"model.layers"``."""
        return f"{self.group}.".partition(f".{self.layer}.")[0]

    @property
    def file(self) -> str:
        """Name of the file of its Gram matrices."""
        block = f"{self.group}.".partition(f".{self.layer}.")[2].rstrip(".")
        return f"layer-{self.layer:05d}-{block or 'layer'}.safetensors"


@dataclass(frozen=True)
class CalibrationPiece:
    """One piece of the samples, to go through one layer.

    Attributes:
        task_id: its id among those of the calibration.
        group: names it in messages.
        layer: index of the layer.
        piece: index of the piece.
        blocks: whose inputs are wanted, of this layer.
        token_ids: the samples; for the first layer only.
        last: whether nobody wants to know what comes after this layer.
        after: items that must have ended before.
        dense_bytes: how much work it is: its share of the layer's weights.
    """

    task_id: str
    group: str
    layer: int
    piece: int
    blocks: tuple[CalibratedBlock, ...]
    token_ids: tuple[tuple[int, ...], ...]
    last: bool
    after: tuple[str, ...]
    dense_bytes: int


@dataclass(frozen=True)
class CalibrationSum:
    """The Gram matrices of one layer, to be added up over all pieces, in their order."""

    task_id: str
    group: str
    layer: int
    pieces: int
    blocks: tuple[CalibratedBlock, ...]
    after: tuple[str, ...]
    dense_bytes: int


CalibrationItem = CalibrationPiece | CalibrationSum


@dataclass(frozen=True)
class Calibrated:
    """An item is done: its files are written.

    Attributes:
        task_id: the item's.
        dense_bytes: the item's.
        seconds: what it took, by stage.
        worker: who did it, ``host:pid``.
        attempt: 1 for the first.
    """

    task_id: str
    dense_bytes: int
    seconds: dict[str, float]
    worker: str
    attempt: int = 1


def hidden_path(directory: AnyPath, layer: int, piece: int) -> AnyPath:
    """The hidden states of a piece before a layer."""
    return directory / PIECES_DIR / f"layer-{layer:05d}-{piece:05d}.hidden"


def grams_path(directory: AnyPath, block: CalibratedBlock, piece: int) -> AnyPath:
    """What the modules of a block read of a piece."""
    stem = block.file.removesuffix(".safetensors")
    return directory / PIECES_DIR / f"{stem}-{piece:05d}.grams"


class CalibrationWorker:
    """Takes pieces through layers, and adds up what they leave behind.

    Args:
        directory: path or URL of the calibration; the driver sees it too.
        config_json: contents of the checkpoint's config.json.
        tensors: all tensors of the checkpoint, by name.
        layers: path of the list of decoder layers in the model.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads to compute with; the last bit of a sum depends on them.

    Raises:
        LestdError: no `directory` as seen from here.
    """

    def __init__(
        self,
        directory: str,
        config_json: Mapping[str, Any],
        tensors: Mapping[str, TensorRef],
        layers: str,
        device: str = "cpu",
        threads: int = 1,
    ) -> None:
        # Takes seconds, for which every run would wait, calibrated or not.
        from workers.calibration.layerwise import LayerwiseModel

        self._directory = as_path(directory)
        if isinstance(self._directory, Path) and not self._directory.is_dir():
            raise LestdError(not_shared([socket.gethostname()], [directory]))
        return_freed_memory()
        self._threads = threads
        torch.backends.cuda.matmul.allow_tf32 = False
        self._device = torch.device(device)
        self._make_model: Callable[[], LayerwiseModel] = partial(
            LayerwiseModel, config_json, tensors, layers, self._device
        )
        self._name = f"{socket.gethostname()}:{os.getpid()}"

    @cached_property
    def _model(self) -> LayerwiseModel:
        return self._make_model()

    def run(self, item: CalibrationItem) -> Calibrated | Failure:
        """Do what an item asks for; never raises for a problem with its input."""
        try:
            start = time.perf_counter()
            torch.set_num_threads(self._threads)  # Of this thread, which need not be the first.
            with torch.inference_mode():
                if isinstance(item, CalibrationPiece):
                    self._pass_through(item)
                else:
                    self._add_up(item)
            seconds = {"calibrate": time.perf_counter() - start}
            return Calibrated(item.task_id, item.dense_bytes, seconds, self._name)
        except Exception as error:
            return failure_of(item.task_id, item.group, error)

    def _pass_through(self, item: CalibrationPiece) -> None:
        given: list[Tensor] | Tensor
        before = hidden_path(self._directory, item.layer, item.piece)
        if item.layer == 0:
            given = [torch.tensor(ids, dtype=torch.int64) for ids in item.token_ids]
        elif not is_file(before) and self._is_done(item):
            return  # By another worker, who was thought to be lost.
        else:
            given = read_tensor(read_header(_readable(before))["hidden"])
        self._model.load(item.layer)
        model = self._model.model
        watched = [watched_inputs(model, block.group, block.modules) for block in item.blocks]
        watch = Watch(model, list(chain.from_iterable(watched)))
        hidden = []
        for window in given:
            with watch:
                states = self._model.run(window.to(self._device))
            if not bool(torch.isfinite(states).all()):
                raise LestdError(
                    f"the hidden states after layer {item.layer} are not finite, computed in "
                    "float32; the weights are broken, get the checkpoint again"
                )
            hidden.append(states.cpu())
        for block in item.blocks:
            tensors: dict[str, Tensor] = {}
            for reads in block.widths:
                name = f"{block.group}.{reads}"
                if name in watch.found:
                    found = watch.found.pop(name).named_tensors(name)
                    tensors |= {name: tensor.cpu() for name, tensor in found.items()}
            _write(grams_path(self._directory, block, item.piece), tensors)
        if not item.last:
            after = hidden_path(self._directory, item.layer + 1, item.piece)
            _write(after, {"hidden": torch.stack(hidden)})
        remove_file(before)

    def _is_done(self, item: CalibrationPiece) -> bool:
        """Whether there is what this item leaves behind."""
        left = [grams_path(self._directory, block, item.piece) for block in item.blocks]
        if not item.last:
            left.append(hidden_path(self._directory, item.layer + 1, item.piece))
        return all(map(is_file, left))

    def _add_up(self, item: CalibrationSum) -> None:
        for block in item.blocks:
            if is_file(self._directory / block.file):
                continue  # By another worker, who was thought to be lost.
            paths = [grams_path(self._directory, block, piece) for piece in range(item.pieces)]
            headers = [read_header(_readable(path)) for path in paths]
            tensors: dict[str, Tensor] = {}
            for reads, width in block.widths.items():
                tensors |= _sum(f"{block.group}.{reads}", width, headers)
            _write(self._directory / block.file, tensors)
            del tensors
            for path in paths:
                remove_file(path)


def _sum(name: str, width: int, headers: list[dict[str, TensorRef]]) -> dict[str, Tensor]:
    """The statistics of one input over all pieces; an expert may have got no token of some."""
    total = {
        name: torch.zeros(width, width),
        f"{name}.sum_abs": torch.zeros(width),
        f"{name}.max_abs": torch.zeros(width),
        f"{name}.tokens": torch.zeros(1, dtype=torch.int64),
    }
    for header in headers:
        for part in (name, *(f"{name}.{what}" for what in ("sum_abs", "tokens"))):
            if part in header:
                total[part] += read_tensor(header[part])
        for part in (f"{name}.max_abs", f"{name}.out_max_abs"):
            if part in header:
                found = read_tensor(header[part])
                total[part] = torch.maximum(total.get(part, found), found)
    total[f"{name}.mean_abs"] = total.pop(f"{name}.sum_abs") / total[f"{name}.tokens"].clamp(min=1)
    return total


def _readable(path: AnyPath) -> AnyPath | str:
    """As `read_header` wants it, so that tensors are read by range wherever the file lies."""
    return path if isinstance(path, Path) else str(path)


def _write(path: AnyPath, tensors: Mapping[str, Tensor]) -> None:
    make_directory(path.parent)
    atomic_write(path, lambda file: write_safetensors(file, tensors))
