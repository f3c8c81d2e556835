"""Weights and layouts with known diagnostics."""

import torch
from torch import Tensor

from lestd_kernels.tensorize import GroupLayout, ModuleLayout


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def feed_forward(d: int, f: int, experts: int) -> GroupLayout:
    modules = [
        ModuleLayout(f"expert_{e}.{name}", "output" if name == "down" else "input", ((name, e),))
        for e in range(experts)
        for name in ("gate", "up", "down")
    ]
    return GroupLayout(d, f, tuple(modules))
