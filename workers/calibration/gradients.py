"""The gradients of a model's own expected loss, by the outputs of its modules.

The loss of a window is the sum of the cross entropies of all its positions, with labels that are
drawn from the model's own distribution: then the mean of ``g^T g`` is the Fisher information of
its predictions, and no text but any text is needed (Martens and Grosse, "Optimizing Neural Networks
with Kronecker-factored Approximate Curvature", arXiv 1503.05671, section 2.2).

Shapes: L tokens of a window, V vocabulary, m outputs of a module.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from lestd_kernels.errors import LestdError
from lestd_kernels.linalg.metric import diagonal_of
from workers.calibration.contracts import CalibratedBlock, WatchedOutput
from workers.calibration.statistics import Take

# Rows of probabilities in float64 at a time.
_ROWS = 16
# So many times the next a window may weigh, where there are enough of them to compare.
_MOST_WEIGHT, _FEWEST_WINDOWS = 2.0, 4


def sampled_labels(logits: Tensor, window: int) -> Tensor:
    """A label for each position of a window, drawn from the model's distribution.

    Inverse transform sampling with numbers from the CPU's generator, seeded by the window: they do
    not depend on the pieces, nor on the machine.

    Args:
        logits: ``(L, V)``, floating, finite.
        window: index of the window.

    Returns:
        ``(L,)``, int64, on the device of the logits.
    """
    generator = torch.Generator().manual_seed(window)
    drawn = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator).to(logits.device)
    labels = []
    parts = torch.split(logits, _ROWS), torch.split(drawn, _ROWS)
    for rows, points in zip(*parts, strict=True):
        reached = rows.double().softmax(dim=-1).cumsum(dim=-1)
        labels.append(torch.searchsorted(reached, points * reached[:, -1:], right=True)[:, 0])
    return torch.cat(labels).clamp(max=logits.shape[-1] - 1)


def logit_gradient(logits: Tensor, window: int) -> Tensor:
    """The gradient of a window's loss by its logits: probabilities less the drawn labels.

    Args:
        logits: ``(L, V)``, float32.
        window: index of the window, see `sampled_labels`.

    Returns:
        ``(L, V)``, float32.

    Raises:
        LestdError: a logit is not finite.
    """
    if not bool(torch.isfinite(logits).all()):
        raise LestdError(
            "the model's predictions are not finite, computed in float32; the weights are broken, "
            "download the checkpoint again"
        )
    labels = sampled_labels(logits, window)
    gradient = logits.softmax(dim=-1)
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
    return gradient


class SumOfWindows:
    """B of modules, summed over the windows of a piece, of which none outweighs the others.

    A few tokens have gradients so large that one of them would be most of B: of SmolLM2's first 128
    windows of WikiText-2 one has three quarters of the trace of B of V in layers 0 and 10. Such a B
    says little of other texts. So the window that weighs most, by the trace of B, counts at most
    twice what the next one does (a winsorized mean). Where windows are alike this changes nothing.

    Attributes:
        window: of the present window: B of each module, see `gradient_takers`.
    """

    def __init__(self) -> None:
        self.window: dict[str, Tensor] = {}
        self._weights: dict[str, list[float]] = {}
        self._heaviest: dict[str, Tensor] = {}
        self._others: dict[str, Tensor] = {}

    def end_window(self) -> None:
        """Add the present window; the heaviest so far stays apart."""
        for name, B in self.window.items():
            weight = float(diagonal_of(B).double().sum())
            known = self._weights.setdefault(name, [])
            if not known:
                self._heaviest[name] = B
            else:
                lighter = B
                if weight > max(known):
                    lighter, self._heaviest[name] = self._heaviest[name], B
                others = self._others.get(name)
                self._others[name] = lighter if others is None else others.add_(lighter)
            known.append(weight)
        self.window.clear()

    def total(self) -> dict[str, Tensor]:
        """B of each module that any window has reached; the sums are then empty."""
        total, self._heaviest = self._heaviest, {}
        for name, B in total.items():
            *_, following, heaviest = [0.0, *sorted(self._weights[name])]
            most = _MOST_WEIGHT * following
            if len(self._weights[name]) >= _FEWEST_WINDOWS and 0 < most < heaviest:
                B *= most / heaviest
            if name in self._others:
                B += self._others.pop(name)
        self._weights = {}
        return total


def gradient_takers(block: CalibratedBlock, found: dict[str, Tensor]) -> dict[str, Take]:
    """For `Watch`: functions that add up ``g^T g`` of a block's outputs in the backward pass.

    Args:
        block: its `outputs` are looked at.
        found: gets B of each module, summed over the tokens it sees, float32, by the name
            ``<block>.<module>.output``; none of an expert that gets no token.
    """
    makers: dict[str, dict[int, list[WatchedOutput]]] = {}
    for one in block.outputs:
        makers.setdefault(one.weight, {}).setdefault(one.expert or 0, []).append(one)

    def add(wanted: Iterable[WatchedOutput], gradient: Tensor) -> None:
        rows = gradient.reshape(-1, gradient.shape[-1]).float()
        for one in wanted:
            name = f"{block.path}.{one.module}.output"
            if name not in found:
                found[name] = rows.new_zeros(one.shape)
            _add_squares(found[name], rows[:, slice(*one.columns)])

    def take(
        of: dict[int, list[WatchedOutput]], which: int, inputs: Tensor, outputs: Tensor
    ) -> None:
        if which in of and outputs.requires_grad:
            outputs.register_hook(partial(add, of[which]))  # type: ignore[no-untyped-call]

    return {f"{block.path}.{weight}": partial(take, of) for weight, of in makers.items()}


def _add_squares(total: Tensor, G: Tensor) -> None:
    """Add ``G^T G`` of ``G (T, m)`` to all of B, to its blocks on the diagonal, or to that."""
    if total.dim() == 1:
        total += G.square().sum(dim=0)
    elif total.dim() == 2:
        total.addmm_(G.T, G)
    else:
        heads = G.reshape(len(G), len(total), -1).transpose(0, 1)
        total.baddbmm_(heads.mT, heads)
