"""Score windows of a text with a model that was loaded once.

Shapes: L inputs of a window, V vocabulary. A window is a forward pass of its own (batch 1), so
its score depends on nothing but its tokens, the model, the device and the number of threads: not
on the other windows of the piece, and not on how many workers share the pieces.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from lestd_kernels.cpu import emulated
from lestd_kernels.errors import LestdError
from workers.checkpoint import ShardIndex
from workers.contracts import EvalRequest, EvalResult, Failure
from workers.failures import failure_of
from workers.headers import DTYPES

# Positions whose log-softmax is taken at once, in float32: with V = 150,000 that is 150 MB,
# where all 2048 positions of a window would need 1.2 GB.
_CHUNK_POSITIONS = 256


def window_nll(logits: Tensor, targets: Tensor) -> float:
    """Negative log-likelihood of the targets, in nats, summed over the positions.

    Args:
        logits: ``(L, V)``, any floating dtype; the log-softmax is computed in float32.
        targets: ``(L,)``, int64.

    Returns:
        The sum, accumulated in float64.
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for start in range(0, targets.numel(), _CHUNK_POSITIONS):
        chunk = slice(start, start + _CHUNK_POSITIONS)
        losses = functional.cross_entropy(logits[chunk].float(), targets[chunk], reduction="none")
        total += losses.sum(dtype=torch.float64)
    return float(total)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bar and no loading report on the terminal while the context lasts."""
    bar = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def auto_dtype(model_dir: str, device: str) -> tuple[torch.dtype, torch.dtype]:
    """What a compute dtype of ``"auto"`` stands for: the one place that decides it.

    Args:
        model_dir: directory of the model.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        The compute dtype, and the checkpoint's, which differs where this CPU only emulates it: then
        the model is computed in float32, which is some times as fast there.
    """
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    own = config.dtype
    if own is None:  # As Transformers: that of the first tensor that is no integer.
        tensors = ShardIndex.from_directory(Path(model_dir)).tensors.values()
        stored = (DTYPES[ref.dtype] for ref in tensors)
        own = next((one for one in stored if one.is_floating_point), torch.float32)
    return torch.float32 if device == "cpu" and emulated(own) else own, own


def load_model(model_dir: str, dtype: str, device: str, gpus: int = 1) -> Any:
    """Load a dense or a compressed model, in evaluation mode; no code of the model is run.

    Args:
        model_dir: its directory.
        dtype: compute dtype: ``"auto"`` (see `auto_dtype`), ``"bfloat16"``, ``"float16"`` or
            ``"float32"``.
        device: ``"cpu"`` or ``"cuda"``.
        gpus: with more than one, layers are divided among the GPUs that this process sees.

    Raises:
        LestdError: a tensor is absent or has another shape than config.json makes it.
    """
    # Importing anything from lestd_kernels has registered its quantizer by now.
    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=auto_dtype(model_dir, device)[0] if dtype == "auto" else dtype,
            device_map="auto" if device == "cuda" and gpus > 1 else {"": device},
            local_files_only=True,
            trust_remote_code=False,
            # Mismatches are refused below, in one sentence, together with absent tensors:
            # those Transformers would only warn of, and draw at random.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model, loading = loaded
    if absent := sorted(loading["missing_keys"]):
        raise LestdError(
            f"{model_dir} lacks {len(absent)} of the model's tensors, the first is {absent[0]}; "
            "get the checkpoint again"
        )
    if mismatched := sorted(loading["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise LestdError(
            f"{model_dir}: tensor {name} has shape {tuple(found)}, config.json makes it "
            f"{tuple(expected)}; get the checkpoint again"
        )
    return model


class EvalWorker:
    """Scores windows with one model on one device.

    The model is loaded with the first request, so that a model that cannot be loaded is a
    `Failure` like any other.

    Args:
        model_dir: directory of a dense or a compressed model.
        dtype: compute dtype: ``"auto"`` (see `auto_dtype`), ``"bfloat16"``, ``"float16"`` or
            ``"float32"``.
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

    def run(self, request: EvalRequest) -> EvalResult | Failure:
        """Score the windows of one piece; never raises for a problem with its input."""
        try:
            with torch.inference_mode():
                return self._score(request)
        except Exception as error:
            return failure_of(request.task_id, request.task_id, error)

    @cached_property
    def _model(self) -> Any:
        return load_model(self._model_dir, self._dtype, self._device, self._gpus)

    def _score(self, request: EvalRequest) -> EvalResult:
        model = self._model
        start = time.perf_counter()
        nll = []
        for window, token_ids in zip(request.windows, request.token_ids, strict=True):
            tokens = torch.tensor(token_ids, dtype=torch.int64, device=self._device)
            logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0]
            loss = window_nll(logits, tokens[1:])
            if not math.isfinite(loss):
                raise LestdError(
                    f"the loss of window {window} is {loss}, computed in {model.dtype}; try "
                    "--dtype float32, and if it stays so the weights are broken"
                )
            nll.append(loss)
        return EvalResult(
            task_id=request.task_id,
            windows=request.windows,
            nll=tuple(nll),
            tokens=tuple(len(ids) - 1 for ids in request.token_ids),
            seconds=time.perf_counter() - start,
            worker=self._name,
        )
