"""Decompositions of one module, with metrics of made inputs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lestd_kernels.methods import METHODS, MethodArgs
from lestd_kernels.methods.common.base import ACTIVATION, NORM, Decomposed
from lestd_kernels.tensorize import GroupLayout, ModuleLayout
from support.groups import fused, gqa, mha
from support.groups import unfolding as random_unfolding

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


FFN = GroupLayout(
    24,
    40,
    (
        ModuleLayout("gate_proj", "input", (("gate", 0),)),
        ModuleLayout("up_proj", "input", (("up", 0),)),
        ModuleLayout("down_proj", "output", (("down", 0),), "hidden"),
    ),
)


LAYOUTS = {"mha": mha(48, 12, 4), "odd": mha(37, 7, 3), "gqa": gqa(40, 16, 6, 2), "ffn": FFN}


LAYOUTS["fused"] = fused(44, 11, 4)


def layout_of(name: str) -> GroupLayout:
    """With the inputs of O and down told apart."""
    layout = LAYOUTS[name]
    modules = (
        replace(m, reads="in" if m.basis_side == "input" else "inner") for m in layout.modules
    )
    return replace(layout, modules=tuple(modules))


def inputs(rows: int, seed: int = 0) -> Tensor:
    """Correlated inputs ``(200, rows)`` of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(200, rows, generator=generator)
    mixed = mixed @ torch.randn(rows, rows, generator=generator)
    return mixed * torch.arange(1, rows + 1) ** -0.5


def metrics_of(layout: GroupLayout, metric: str) -> dict[str, Tensor]:
    found = {}
    for module in layout.modules:
        rows = layout.weight_shape(module)[1]
        X = inputs(rows, len(module.reads))
        if metric == ACTIVATION:
            found[module.name] = X.T @ X
            found[f"{module.name}.mean_abs"] = X.abs().mean(dim=0)
        elif metric == NORM and module.basis_side == "input":
            found[module.name] = torch.linspace(0.1, 3, rows).square()
    return found


def decompose(
    method: str, layout: GroupLayout, keep: float, dtype: torch.dtype = FP32, **more: object
) -> Decomposed:
    metric = METHODS[method].metrics[0]
    args = MethodArgs(**({"metric": metric} | more))  # type: ignore[arg-type]
    budget = int(keep * layout.elements * dtype.itemsize)
    W = random_unfolding(layout)
    return METHODS[method].decompose(
        W, layout, budget, dtype, args, (), metrics_of(layout, args.metric)
    )
