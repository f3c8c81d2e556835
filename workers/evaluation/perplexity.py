"""Score windows of a text with a model that was loaded once.

Shapes: L inputs of a window, V vocabulary. A window is a forward pass of its own (batch 1), so
its score depends on nothing but its tokens, the model, the device and the number of threads: not
on the other windows of the piece, and not on how many workers share the pieces.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor
from torch.nn import functional

from lestd_kernels.errors import LestdError
from workers.evaluation.contracts import EvalRequest, EvalResult
from workers.evaluation.worker import ModelWorker

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


class EvalWorker(ModelWorker):
    """Scores windows with one model."""

    @torch.inference_mode()
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
