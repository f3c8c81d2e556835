"""Which norm makes the input of a linear module, seen by running the model without weights.

On the meta device nothing is computed, but every tensor is an object: a linear module that is given
the very output of a norm reads that norm, whatever the two are called and wherever they stand.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lestd_kernels.modules.experts import is_experts

_TOKENS = 4


def input_norms(model: Any) -> dict[str, str]:
    """Linear module -> the scale of the norm whose output it reads, both as paths in the model.

    Only norms are listed whose output is proportional to their scale: not of those that act as
    1 + w. Where the forward fails without weights, what was seen before counts.

    Args:
        model: on the meta device.
    """
    made: dict[int, tuple[str, Tensor]] = {}
    found: dict[str, str] = {}
    handles = []

    def remember(path: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                whole = _whole(output)
                made[id(whole)] = path, whole  # Kept alive, so that no other has its id.

        return hook

    def look_up(path: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(given, Tensor) and id(_whole(given)) in made:
                found.setdefault(path, made[id(_whole(given))][0])

        return hook

    own_forwards: list[tuple[Any, Any]] = []
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor):
            handles.append(module.register_forward_hook(remember(path)))
        elif isinstance(weight, Tensor) or is_experts(module):
            handles.append(module.register_forward_pre_hook(look_up(path), with_kwargs=True))
        if is_experts(module):  # What experts compute depends on data.
            own_forwards.append((module, module.__dict__.get("forward")))
            module.forward = lambda hidden_states, *_, **__: hidden_states
    try:
        with torch.no_grad(), suppress(Exception), _NoData():
            tokens = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
            model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for module, _ in own_forwards:
            del module.forward
    plain = {path: _is_proportional(model.get_submodule(path)) for path in set(found.values())}
    return {path: f"{norm}.weight" for path, norm in found.items() if plain[norm]}


def _whole(tensor: Tensor) -> Tensor:
    """The tensor of which this is another view with all of its elements."""
    base = tensor._base
    return base if base is not None and base.numel() == tensor.numel() else tensor


class _NoData(TorchFunctionMode):
    """Answers questions about the contents of tensors that have none: nothing holds of them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__bool__:
            return False
        if func in (Tensor.item, Tensor.__int__, Tensor.__index__):
            return 0
        return func(*args, **(kwargs or {}))


def _is_proportional(norm: nn.Module) -> bool:
    """Whether a norm's output is its weight times something that does not depend on it."""
    here: Any = copy.deepcopy(norm).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in here.parameters():
            parameter.zero_()
        here.weight.copy_(1 + torch.rand(here.weight.shape, generator=generator))
        given = torch.randn(1, 2, here.weight.shape[-1], generator=generator)
        try:
            once = here(given)
            here.weight.mul_(2)
            twice = here(given)
        except Exception:  # A norm that wants more than its input.
            return False
    return bool(torch.allclose(twice, 2 * once, rtol=1e-4, atol=1e-6))
