"""What evaluations are asked, and what they answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EvalRequest:
    """Some windows of a text, to be scored by one evaluation worker.

    Attributes:
        task_id: names the piece in failure reports.
        windows: indices of the windows of this piece, ascending.
        token_ids: for each window its L inputs and, one token further, its last target: at most
            L + 1 token ids. A few thousand numbers, so they travel with the request and a worker
            needs neither the text nor a tokenizer.
    """

    task_id: str
    windows: tuple[int, ...]
    token_ids: tuple[tuple[int, ...], ...]

    @property
    def span(self) -> tuple[int, int]:
        """Index of the first window, and of the one after the last."""
        return self.windows[0], self.windows[-1] + 1


@dataclass(frozen=True)
class EvalResult:
    """Scores of a piece's windows.

    Attributes:
        task_id: the request's.
        windows: the request's.
        nll: negative log-likelihood of each window in nats, summed over its predicted tokens.
        tokens: predicted tokens of each window.
        seconds: time the piece took, without loading the model.
        worker: who did it, ``host:pid``.
    """

    task_id: str
    windows: tuple[int, ...]
    nll: tuple[float, ...]
    tokens: tuple[int, ...]
    seconds: float
    worker: str

    @property
    def span(self) -> tuple[int, int]:
        """Index of the first window, and of the one after the last."""
        return self.windows[0], self.windows[-1] + 1


@dataclass(frozen=True)
class LmEvalRequest:
    """Some documents of a task of lm-eval, to be evaluated by one worker.

    Attributes:
        task_id: names the piece in failure reports.
        name: task, group or tag that was asked for, by which the task is found.
        task: the task.
        documents: index of the first document, and of the one after the last.
        sha256: of all requests of the task, as the driver has built them; a worker that builds
            others has other data or another version of lm-eval.
    """

    task_id: str
    name: str
    task: str
    documents: tuple[int, int]
    sha256: str

    @property
    def span(self) -> tuple[int, int]:
        """The documents."""
        return self.documents


@dataclass(frozen=True)
class LmEvalResult:
    """Scores of a piece's documents; plain values that JSON can hold.

    Attributes:
        task_id: the request's.
        task: the request's.
        documents: the request's.
        metrics: filter -> metric -> value of each document, in their order. A value is a number,
            or a list that the metric's aggregation understands.
        responses: of each document, the model's responses to each of its requests.
        filtered: filter -> of each document, the filtered response to each of its requests.
        cut: inputs of the model that were longer than its positions, and lost their beginning.
        seconds: time the piece took, without loading the model.
        worker: who did it, ``host:pid``.
    """

    task_id: str
    task: str
    documents: tuple[int, int]
    metrics: dict[str, dict[str, list[Any]]]
    responses: list[Any]
    filtered: dict[str, list[Any]]
    cut: int
    seconds: float
    worker: str

    @property
    def span(self) -> tuple[int, int]:
        """The documents."""
        return self.documents


@dataclass(frozen=True)
class DivergenceRequest(EvalRequest):
    """Some windows of a text, on which a compressed model is held against the dense one.

    Attributes:
        blocks: paths of blocks; each is measured as the only one that is compressed.
    """

    blocks: tuple[str, ...]


@dataclass(frozen=True)
class DivergenceResult:
    """Divergences of a piece's windows.

    Attributes:
        task_id: the request's.
        windows: the request's.
        blocks: the request's.
        divergences: of each window ``KL(dense || other)`` in nats, summed over its positions: of
            the compressed model, then of the dense one with each block in turn compressed.
        tokens: positions of each window.
        seconds: time the piece took, without loading the models.
        worker: who did it, ``host:pid``.
    """

    task_id: str
    windows: tuple[int, ...]
    blocks: tuple[str, ...]
    divergences: tuple[tuple[float, ...], ...]
    tokens: tuple[int, ...]
    seconds: float
    worker: str

    @property
    def span(self) -> tuple[int, int]:
        """Index of the first window, and of the one after the last."""
        return self.windows[0], self.windows[-1] + 1
