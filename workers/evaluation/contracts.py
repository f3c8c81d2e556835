"""What a measurement of divergence is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from workers.contracts import EvalRequest


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
