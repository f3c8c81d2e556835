"""What the inputs of a layer's modules are like: Gram matrices and channel statistics.

Which weight tells of which input, given the loaded layer:

    attention   "in": what Q, K and V read           "heads": what O reads
    FFN         "in": what gate and up read          "hidden": what down reads
    linear      "in": what the matrix reads
    experts     "in_<e>", "hidden_<e>": the same for expert e, of the tokens routed to it. Their
                weights are stacked in memory: `gate_up_proj` (or `up_proj`) and `down_proj`,
                ``(E, .., ..)``

Every input is seen where PyTorch multiplies it with a weight, so nothing of a family's forward is
repeated here. Shapes: T rows (tokens), n channels of the input, m of the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_PRODUCTS = (functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)
_STACKED = {"gate_up_proj": "in", "up_proj": "in", "down_proj": "hidden"}


@dataclass(frozen=True)
class Watched:
    """An input that is looked at.

    Attributes:
        name: name of its statistics; with `stacked` the expert's index goes on at the end.
        weight: path of a weight that reads it, in the model.
        stacked: whether the weight holds all experts, one behind the other.
        outputs: whether the outputs matter as well.
    """

    name: str
    weight: str
    stacked: bool
    outputs: bool


def watched_inputs(model: nn.Module, group: str, modules: Mapping[str, str]) -> list[Watched]:
    """The weights by which the inputs of a block are seen.

    Args:
        model: the model.
        group: path of the block in it.
        modules: module of the block -> name of the input that it reads. Those that read one input
            must be given the same tensor; the first is looked at. Experts that are stacked in
            memory are found by their parameters, whatever their modules are called on disk.
    """
    block = model.get_submodule(group)
    parameters = dict(block.named_parameters(recurse=False))
    if "weight" in parameters:  # The matrix itself, which is a block of its own.
        [reads] = modules.values()
        return [Watched(f"{group}.{reads}", f"{group}.weight", False, False)]
    stacked = {name: reads for name, reads in _STACKED.items() if name in parameters}
    if stacked:
        return [
            Watched(f"{group}.{reads}_", f"{group}.{name}", True, reads == "hidden")
            for name, reads in stacked.items()
        ]
    first: dict[str, str] = {}
    for module, reads in modules.items():
        first.setdefault(reads, module)
    return [
        Watched(f"{group}.{reads}", f"{group}.{module}.weight", False, reads == "hidden")
        for reads, module in first.items()
    ]


class InputStatistics:
    """Sums and maxima over the rows of an input; float32, added up in the order of the calls.

    Attributes:
        tokens: T, the rows so far.
        gram: ``X^T X`` ``(n, n)``, or its blocks on the diagonal ``(k, p, p)``.
        sum_abs: sum of ``|x|`` ``(n,)``.
        max_abs: maximum of ``|x|`` ``(n,)``.
        out_max_abs: maximum of ``|y|`` of the outputs ``(m,)``, where they matter: those of a down
            projection tell of super weights (arXiv 2411.07191, section 3.1).
    """

    def __init__(self, gram: tuple[int, ...], device: torch.device) -> None:
        width = math.prod(gram[:-1])
        self.tokens = 0
        self.gram = torch.zeros(gram, device=device)
        self.sum_abs = torch.zeros(width, device=device)
        self.max_abs = torch.zeros(width, device=device)
        self.out_max_abs: Tensor | None = None

    def add(self, inputs: Tensor, outputs: Tensor | None) -> None:
        """Take in rows ``(.., n)``, and their outputs ``(.., m)``."""
        X = inputs.reshape(-1, inputs.shape[-1]).float()
        self.tokens += len(X)
        if self.gram.dim() == 2:
            self.gram.addmm_(X.T, X)
        else:
            blocks = X.view(len(X), len(self.gram), -1).transpose(0, 1)
            self.gram.baddbmm_(blocks.mT, blocks)
        magnitudes = X.abs()
        self.sum_abs += magnitudes.sum(dim=0)
        self.max_abs = torch.maximum(self.max_abs, magnitudes.amax(dim=0))
        if outputs is not None:
            largest = outputs.reshape(-1, outputs.shape[-1]).float().abs().amax(dim=0)
            before = self.out_max_abs
            self.out_max_abs = largest if before is None else torch.maximum(before, largest)

    def named_tensors(self, name: str) -> dict[str, Tensor]:
        """The statistics under the name of their input; `tokens` is int64 ``(1,)``."""
        tensors = {
            name: self.gram,
            f"{name}.sum_abs": self.sum_abs,
            f"{name}.max_abs": self.max_abs,
            f"{name}.tokens": torch.tensor([self.tokens]),
        }
        if self.out_max_abs is not None:
            tensors[f"{name}.out_max_abs"] = self.out_max_abs
        return tensors


Take = Callable[[int, Tensor, Tensor], None]
"""``(which, inputs (.., n), outputs (.., m))`` of a product with a weight; of a stacked one `which`
of them, else 0."""


class Watch(TorchFunctionMode):
    """While the context lasts, hands on what is multiplied with some weights.

    Args:
        model: these weights of it are loaded.
        takers: path of a weight -> who takes in its products.
    """

    def __init__(self, model: nn.Module, takers: Mapping[str, Take]) -> None:
        super().__init__()
        self._takers: dict[int, tuple[Tensor, Take]] = {}
        for path, take in takers.items():
            weight = model.get_parameter(path)
            self._takers[weight.untyped_storage().data_ptr()] = weight, take

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if func is torch.bmm:
            self._hand_on_each(args[0], args[1], outputs)
        if func in _PRODUCTS or func is torch.addmm:
            inputs, factor = args[1:3] if func is torch.addmm else args[:2]
            found = self._takers.get(factor.untyped_storage().data_ptr())
            if found is not None and inputs.numel():
                weight, take = found
                which = 0
                if weight.dim() == 3:  # The factor is a view of one expert's own matrix.
                    offset = factor.storage_offset() - weight.storage_offset()
                    which = offset // weight.stride(0)
                take(which, inputs, outputs)
        return outputs

    def _hand_on_each(self, inputs: Tensor, factor: Tensor, outputs: Tensor) -> None:
        """Products of stacked matrices, each with rows of its own; zeros are of no token."""
        found = self._takers.get(factor.untyped_storage().data_ptr())
        if found is None:
            return
        _, take = found
        for which, given in enumerate(inputs):
            rows = given.any(dim=-1).nonzero()[:, 0]
            if len(rows):
                made: Any = outputs[which][rows]
                if outputs.requires_grad:
                    made = _Rows(outputs, which, rows)
                take(which, given[rows], made)


class _Rows:
    """Outputs of some rows of one of several products, which know their gradient."""

    def __init__(self, outputs: Tensor, which: int, rows: Tensor) -> None:
        self._outputs, self._which, self._rows = outputs, which, rows
        self.requires_grad = True

    def register_hook(self, hook: Callable[[Tensor], None]) -> None:
        """See `Tensor.register_hook`."""
        which, rows = self._which, self._rows
        outputs: Any = self._outputs
        outputs.register_hook(lambda gradient: hook(gradient[which][rows]))


def input_takers(
    watched: Iterable[Watched],
    grams: Mapping[str, tuple[int, ...]],
    found: dict[str, InputStatistics],
) -> dict[str, Take]:
    """For `Watch`: functions that add to the statistics of inputs.

    Args:
        watched: what to look at.
        grams: the shape of each input's Gram matrix, by the input's name.
        found: gets the statistics by the inputs' names; none of an expert that gets no token.
    """

    def take(one: Watched, which: int, inputs: Tensor, outputs: Tensor) -> None:
        name = f"{one.name}{which}" if one.stacked else one.name
        if name not in found:
            found[name] = InputStatistics(grams[name], inputs.device)
        found[name].add(inputs, outputs if one.outputs else None)

    return {one.weight: partial(take, one) for one in watched}
