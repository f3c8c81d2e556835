"""Base of evaluation workers: a model that is loaded once."""

from __future__ import annotations

import os
import socket
from functools import cached_property
from typing import Any

import torch

from workers.host.failures import failure_of
from workers.host.loading import load_model


class ModelWorker:
    """Works on pieces of an evaluation with one model on one device.

    The model is loaded with the first piece, so that a model that cannot be loaded is a `Failure`
    like any other.

    Args:
        model_dir: directory of a dense or a compressed model.
        dtype: compute dtype, see `load_model`.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads to compute with; they decide the order of reductions, so the last
            bit of a score.
        gpus: GPUs to divide the model among.
    """

    def __init__(
        self,
        model_dir: str,
        dtype: str = "auto",
        device: str = "cpu",
        threads: int = 1,
        gpus: int = 1,
    ) -> None:
        torch.set_num_threads(threads)
        self._model_dir = model_dir
        self._dtype = dtype
        self._device = device
        self._gpus = gpus
        self._name = f"{socket.gethostname()}:{os.getpid()}"

    def run(self, request: Any) -> Any:
        """The result of a piece, or a `Failure`; never raises for a problem with its input."""
        try:
            return self._score(request)
        except Exception as error:
            return failure_of(request.task_id, request.task_id, error)

    def _score(self, request: Any) -> Any:
        raise NotImplementedError

    @cached_property
    def _model(self) -> Any:
        return load_model(self._model_dir, self._dtype, self._device, self._gpus)
