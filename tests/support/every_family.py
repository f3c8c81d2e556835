"""Tiny random models of any family that Transformers has, and whose heads a slice belongs to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from lestd_kernels.tensorize import GroupLayout, ModuleLayout
from orchestrator.architectures import SliceGroup
from orchestrator.architectures.tiny import tiny_config
from support.fresh_logits import reader_of_text
from workers.host.loading import auto_class

TOKENS = 6


def save_any(family: str, directory: Path, config: PretrainedConfig | None = None) -> Path:
    """Write a seeded random model of a family and return `directory`.

    Matrices, biases and norms are random; other vectors keep what the family begins with, since
    those of state space models are not free.
    """
    torch.manual_seed(0)
    config = config or tiny_config(family)
    model = auto_class(config).from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.12 * noise)
            elif "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * noise)
    model.save_pretrained(directory)
    return directory


class Heads:
    """The attention block of a model's first layer that has one, seen from outside.

    What its output projection reads, ``(tokens, heads, p)``, tells which slice of the weights does
    what: the labels of the layout are not looked at. Biases are zero, so that slices act alone, and
    weights are small, so that no head attends to one token alone.

    Args:
        model: with weights.
        group: of the block.
    """

    def __init__(self, model: Any, group: SliceGroup) -> None:
        self.layout: GroupLayout = group.layout
        self._reader, _ = reader_of_text(model)
        self._block = model.get_submodule(group.block)
        self._generator = torch.Generator().manual_seed(1)
        self._inputs: dict[str, Tensor] = {}
        for module in self.layout.modules:
            linear = self._block.get_submodule(module.name)
            if linear.bias is not None:
                torch.nn.init.zeros_(linear.bias)
            with torch.no_grad():
                linear.weight.mul_(0.3)
            linear.register_forward_pre_hook(self._remember(module.name))
        *into, out = self.layout.modules
        self._reads, self._out = into[0].name, out.name
        self.tokens = torch.randint(3, 90, (1, TOKENS), generator=self._generator)
        self.before = self.run()

    def _remember(self, name: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            self._inputs[name] = args[0].detach().reshape(-1, args[0].shape[-1])

        return hook

    def run(self) -> Tensor:
        """What the output projection reads, ``(tokens, heads, p)``."""
        with torch.no_grad():
            self._reader(input_ids=self.tokens, use_cache=False)
        return self._inputs[self._out].reshape(TOKENS, -1, self.layout.head_dim).clone()

    def norms_all_heads(self) -> bool:
        """Whether a norm makes each head's queries and keys depend on those of all others."""
        return any(
            "norm" in type(module).__name__.lower()
            and getattr(module, "weight", self.before[0, 0]).numel() > self.layout.head_dim
            for module in self._block.modules()
        )

    def changed(self, projection: str, number: int, change: Callable[[Tensor], Tensor]) -> Tensor:
        """The same after `change` of one slice ``(p, d)``, which is undone again."""
        module, rows = self._find(projection, number)
        linear = self._block.get_submodule(module.name)
        own = linear.weight.detach().clone()
        with torch.no_grad():
            weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
            weight[rows] = change(weight[rows].clone())
            found = self.run()
            linear.weight.copy_(own)
        return found

    def seen_by_one(self, token: int) -> Callable[[Tensor], Tensor]:
        """A change of a slice that only one token's channels feel."""
        direction = torch.linalg.pinv(self._inputs[self._reads].double())[:, token].float()
        new = torch.randn(self.layout.head_dim, 1, generator=self._generator)
        return lambda piece: piece + new * direction

    def _find(self, projection: str, number: int) -> tuple[ModuleLayout, slice]:
        for module in self.layout.modules:
            if (projection, number) in module.slices:
                place = module.slices.index((projection, number)) * self.layout.head_dim
                return module, slice(place, place + self.layout.head_dim)
        raise AssertionError(f"no {projection} {number}")


def check_heads(model: Any, group: SliceGroup) -> None:
    """Every q, k and v slice is that of the head that its layout says.

    A value slice that is negated negates what its heads put out. A query that changes for one
    token changes what its head puts out there, a key what its heads put out there and later, and
    earlier where attention goes both ways.
    """
    heads = Heads(model, group)
    config = model.config.get_text_config()
    both_ways = getattr(config, "use_bidirectional_attention", None) is True  # PaliGemma
    counts = {p: sum(one == p for one, _ in heads.layout.slices) for p in "qkv"}
    share = counts["q"] // counts["k"]
    token = TOKENS // 2
    together = heads.norms_all_heads()
    for number in range(counts["v"]):
        own = range(number * share, (number + 1) * share)
        negated = heads.before.clone()
        negated[:, list(own)] *= -1
        found = heads.changed("v", number, torch.neg)  # Which a norm of the values lets through.
        torch.testing.assert_close(found, negated)
        if together:
            continue
        felt = _felt(heads, "k", number, token)
        assert felt[:token].any() == both_ways, f"k {number} acts on earlier tokens, or does not"
        assert felt.any(0).nonzero().flatten().tolist() == list(own), f"k {number}"
        assert felt[token + 1 :].any(), f"k {number} does not act on later tokens"
    for number in range(0 if together else counts["q"]):
        felt = _felt(heads, "q", number, token)
        assert felt.nonzero().tolist() == [[token, number]], f"q {number}"


def _felt(heads: Heads, projection: str, number: int, token: int) -> Tensor:
    """Which outputs ``(tokens, heads)`` feel that one token's channels of a slice change."""
    difference = heads.changed(projection, number, heads.seen_by_one(token)) - heads.before
    return difference.abs().amax(-1) > 1e-4 * heads.before.abs().max()
