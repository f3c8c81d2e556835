"""How far a compressed model's predictions are from the dense one's, as a whole and by its blocks.

Shapes: L inputs of a window, V vocabulary. As in workers.evaluation.perplexity a window is a
forward pass of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lestd_kernels.errors import LestdError
from workers.evaluation.contracts import DivergenceRequest, DivergenceResult
from workers.evaluation.worker import ModelWorker
from workers.host.loading import load_model

# Positions whose log-softmax is taken at once, in float32.
_CHUNK_POSITIONS = 128


def divergence(logits: Tensor, other: Tensor) -> float:
    """``KL(p || q)`` in nats, summed over the positions.

    Args:
        logits: of p, ``(L, V)``, any floating dtype; computed in float32.
        other: of q, likewise.

    Returns:
        The sum, accumulated in float64.
    """
    total = 0.0
    for mine, theirs in zip(
        *(torch.split(one, _CHUNK_POSITIONS) for one in (logits, other)), strict=True
    ):
        log_p, log_q = (one.float().log_softmax(dim=-1) for one in (mine, theirs))
        total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
    return total


class DivergenceWorker(ModelWorker):
    """Holds a compressed model against the dense one.

    Args:
        model_dir: directory of the compressed model.
        dense_dir: directory of the dense one.
        others: see `ModelWorker`.
    """

    def __init__(self, model_dir: str, dense_dir: str, **others: Any) -> None:
        super().__init__(model_dir, **others)
        self._dense_dir = dense_dir

    @cached_property
    def _dense(self) -> Any:
        return load_model(self._dense_dir, self._dtype, self._device, self._gpus)

    @contextmanager
    def _compressed(self, block: str) -> Iterator[None]:
        """The dense model with one block of the compressed one."""
        path, _, name = block.rpartition(".")
        try:
            parent, own = self._dense.get_submodule(path), self._dense.get_submodule(block)
            setattr(parent, name, self._model.get_submodule(block))
        except AttributeError as error:
            raise LestdError(
                f"{self._dense_dir} has no block {block}, which {self._model_dir} has; give the "
                "model that it was made of with --against"
            ) from error
        try:
            yield
        finally:
            setattr(parent, name, own)

    @torch.inference_mode()
    def _score(self, request: DivergenceRequest) -> DivergenceResult:
        found, start = [], time.perf_counter()
        for window, token_ids in zip(request.windows, request.token_ids, strict=True):
            tokens = torch.tensor([token_ids[:-1]], dtype=torch.int64, device=self._device)

            def logits(model: Any, tokens: Tensor = tokens) -> Tensor:
                one: Tensor = model(input_ids=tokens, use_cache=False).logits[0]
                return one

            dense = logits(self._dense)
            mine = [divergence(dense, logits(self._model))]
            for block in request.blocks:
                with self._compressed(block):
                    mine.append(divergence(dense, logits(self._dense)))
            if not all(map(math.isfinite, mine)):
                raise LestdError(
                    f"the predictions in window {window} are not finite, computed in "
                    f"{self._dtype}; try --dtype float32, and if it stays so the weights are broken"
                )
            found.append(tuple(mine))
        return DivergenceResult(
            task_id=request.task_id,
            windows=request.windows,
            blocks=request.blocks,
            divergences=tuple(found),
            tokens=tuple(len(ids) - 1 for ids in request.token_ids),
            seconds=time.perf_counter() - start,
            worker=self._name,
        )
