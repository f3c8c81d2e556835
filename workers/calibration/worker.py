"""The work of one actor at a calibration: a piece of the samples through one layer, or back.

Gram matrices are taken of a dense model on samples of a text. The samples are divided into pieces,
which do not depend on the pool, and each piece goes through the layers in turn; where the
gradients of outputs are wanted, too, its hidden states are kept, and the gradient of its loss goes
the whole way back. `workers.calibration.contracts` says where everything lies.

Everything is written atomically and depends on the samples alone, so what is done twice is the
same. A worker's memory holds one layer in float32, the matrices that it finds there, and the
activations of one window; on the way back those that its gradient needs.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lestd_kernels.errors import LestdError
from workers.calibration.contracts import (
    Calibrated,
    CalibrationItem,
    CalibrationPiece,
    CalibrationSum,
    gradient_path,
    hidden_path,
    part_path,
)
from workers.calibration.gradients import SumOfWindows, gradient_takers
from workers.calibration.statistics import (
    InputStatistics,
    Take,
    Watch,
    input_takers,
    watched_inputs,
)
from workers.checkpoint.tensors import read_header, read_tensor, write_safetensors
from workers.contracts import Failure, TensorRef
from workers.host.devices import require_exact_products, return_freed_memory
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
        require_exact_products()
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
            with torch.no_grad():
                if isinstance(item, CalibrationSum):
                    self._add_up(item)
                elif item.back:
                    self._go_back(item)
                else:
                    self._go_on(item)
            seconds = {"calibrate": time.perf_counter() - start}
            return Calibrated(item.task_id, item.dense_bytes, seconds, self._name)
        except Exception as error:
            return failure_of(item.task_id, item.block, error)

    def _go_on(self, item: CalibrationPiece) -> None:
        """Take a piece through a layer, and see what its modules read."""
        before = hidden_path(self._directory, item.layer, item.piece)
        after = hidden_path(self._directory, item.layer + 1, item.piece)
        if item.layer > 0 and not is_file(before) and self._is_done(item, after):
            return  # By another worker, who was thought to be lost.
        given = self._given(item)
        self._model.load(item.layer)
        model = self._model.model
        watched = [watched_inputs(model, block.path, block.modules) for block in item.blocks]
        found: dict[str, InputStatistics] = {}
        grams = {
            f"{block.path}.{reads}": shape
            for block in item.blocks
            for reads, shape in block.grams.items()
        }
        watch = Watch(model, input_takers(chain.from_iterable(watched), grams, found))
        hidden = []
        for window in given:
            with watch:
                states = self._model.run(window.to(self._device))
            if not bool(torch.isfinite(states).all()):
                raise LestdError(
                    f"the hidden states after layer {item.layer} are not finite, computed in "
                    "float32; the weights are broken, download the checkpoint again"
                )
            hidden.append(states.cpu())
        for block in item.blocks:
            tensors: dict[str, Tensor] = {}
            for reads in block.grams:
                name = f"{block.path}.{reads}"
                if name in found:
                    known = found.pop(name).named_tensors(name)
                    tensors |= {name: tensor.cpu() for name, tensor in known.items()}
            _write(part_path(self._directory, block, item.piece, back=False), tensors)
        if not item.last:
            _write(after, {"hidden": torch.stack(hidden)})
        if not item.keeps:
            remove_file(before)

    def _go_back(self, item: CalibrationPiece) -> None:
        """Take the gradient of a piece back through a layer, and see that of its outputs."""
        hidden = hidden_path(self._directory, item.layer, item.piece)
        behind = gradient_path(self._directory, item.layer + 1, item.piece)
        before = gradient_path(self._directory, item.layer, item.piece)
        self._model.load(item.layer)
        is_head = item.layer == self._model.layers
        used = hidden if is_head else behind
        if not is_file(used) and self._is_done(item, before):
            return  # By another worker, who was thought to be lost.
        given = self._given(item)
        gradients = None if is_head else _read(behind, "gradient")
        squares = SumOfWindows()
        takers: dict[str, Take] = {}
        for block in item.blocks:
            takers |= gradient_takers(block, squares.window)
        watch = Watch(self._model.model, takers)
        gradient = []
        for number, window in enumerate(given):
            states = window.to(self._device)
            if gradients is None:
                found_here = self._model.loss_gradient(states, item.first_window + number)
            else:
                with watch:
                    found_here = self._model.pull_back(states, gradients[number].to(self._device))
                squares.end_window()
            if not bool(torch.isfinite(found_here).all()):
                raise LestdError(
                    f"the gradients before layer {item.layer} are not finite, computed in "
                    "float32; use --metric activation, which needs none"
                )
            gradient.append(found_here.cpu())
        found = squares.total()
        for block in item.blocks:
            tensors: dict[str, Tensor] = {}
            for one in block.outputs:
                name = f"{block.path}.{one.module}.output"
                if name in found:
                    tensors[name] = found.pop(name).cpu()
                elif one.expert is None:
                    raise LestdError(
                        f"the loss of {type(self._model.model).__name__} does not reach "
                        f"{block.path}.{one.weight}; use --metric activation"
                    )
            _write(part_path(self._directory, block, item.piece, back=True), tensors)
        if not item.last:
            _write(before, {"gradient": torch.stack(gradient)})
        remove_file(hidden)
        remove_file(behind)

    def _given(self, item: CalibrationPiece) -> list[Tensor] | Tensor:
        """Windows of a piece before a layer: token ids ``(L,)``, or ``(.., L, d)``."""
        if item.layer == 0:
            return [torch.tensor(ids, dtype=torch.int64) for ids in item.token_ids]
        return _read(hidden_path(self._directory, item.layer, item.piece), "hidden")

    def _is_done(self, item: CalibrationPiece, handed_on: AnyPath) -> bool:
        """Whether there is what this item leaves behind."""
        left = [part_path(self._directory, one, item.piece, item.back) for one in item.blocks]
        if not item.last:
            left.append(handed_on)
        return all(map(is_file, left))

    def _add_up(self, item: CalibrationSum) -> None:
        for block in item.blocks:
            path = self._directory / (block.outputs_file if item.back else block.file)
            if is_file(path):
                continue  # By another worker, who was thought to be lost.
            parts = [part_path(self._directory, block, i, item.back) for i in range(item.pieces)]
            headers = [read_header(_readable(part)) for part in parts]
            tensors: dict[str, Tensor] = {}
            if item.back:
                for one in block.outputs:
                    name = f"{block.path}.{one.module}.output"
                    tensors[name] = _total(name, torch.zeros(one.shape), headers) / item.tokens
            else:
                for reads, shape in block.grams.items():
                    tensors |= _sum(f"{block.path}.{reads}", shape, headers)
            _write(path, tensors)
            del tensors
            for part in parts:
                remove_file(part)


def _total(name: str, total: Tensor, headers: list[dict[str, TensorRef]]) -> Tensor:
    """Add up a tensor over the pieces that have it."""
    for header in headers:
        if name in header:
            total += read_tensor(header[name])
    return total


def _sum(
    name: str, gram: tuple[int, ...], headers: list[dict[str, TensorRef]]
) -> dict[str, Tensor]:
    """The statistics of one input over all pieces; an expert may have got no token of some."""
    tokens, width = torch.zeros(1, dtype=torch.int64), math.prod(gram[:-1])
    total = {
        name: _total(name, torch.zeros(gram), headers),
        f"{name}.sum_abs": _total(f"{name}.sum_abs", torch.zeros(width), headers),
        f"{name}.max_abs": torch.zeros(width),
        f"{name}.tokens": _total(f"{name}.tokens", tokens, headers),
    }
    for header in headers:
        for part in (f"{name}.max_abs", f"{name}.out_max_abs"):
            if part in header:
                found = read_tensor(header[part])
                total[part] = torch.maximum(total.get(part, found), found)
    total[f"{name}.mean_abs"] = total.pop(f"{name}.sum_abs") / total[f"{name}.tokens"].clamp(min=1)
    return total


def _read(path: AnyPath, name: str) -> Tensor:
    return read_tensor(read_header(_readable(path))[name])


def _readable(path: AnyPath) -> AnyPath | str:
    """As `read_header` wants it, so that tensors are read by range wherever the file lies."""
    return path if isinstance(path, Path) else str(path)


def _write(path: AnyPath, tensors: Mapping[str, Tensor]) -> None:
    make_directory(path.parent)
    atomic_write(path, lambda file: write_safetensors(file, tensors))
