"""Slice groups for the tests of the mathematics."""

import torch
from torch import Tensor

from lestd_kernels.tensorize import GroupLayout, ModuleLayout


def mha(d: int, p: int, h: int) -> GroupLayout:
    return gqa(d, p, h, h)


def gqa(d: int, p: int, h: int, h_kv: int) -> GroupLayout:
    heads = {"q": h, "k": h_kv, "v": h_kv, "o": h}
    return GroupLayout(
        d,
        p,
        tuple(
            ModuleLayout(
                f"{t}_proj", "output" if t == "o" else "input", tuple((t, i) for i in range(n))
            )
            for t, n in heads.items()
        ),
    )


def fused(d: int, p: int, h: int) -> GroupLayout:
    """GPT-NeoX: one query_key_value, interleaved per head."""
    qkv = tuple((t, i) for i in range(h) for t in "qkv")
    output = tuple(("o", i) for i in range(h))
    return GroupLayout(
        d, p, (ModuleLayout("qkv", "input", qkv), ModuleLayout("dense", "output", output))
    )


def experts(d: int, p: int, count: int) -> GroupLayout:
    modules = (("gate", "input", "in"), ("up", "input", "in"), ("down", "output", "hidden"))
    return GroupLayout(
        d,
        p,
        tuple(
            ModuleLayout(f"expert_{e}.{t}", side, ((t, e),), f"{reads}_{e}")
            for e in range(count)
            for t, side, reads in modules
        ),
    )


def grams(layout: GroupLayout) -> dict[str, Tensor]:
    """Of random inputs and gradients, fewer than there are channels; one for an input."""
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Tensor] = {}
    found = {}
    for module in layout.modules:
        for n, name in zip(layout.weight_shape(module), (".output", ""), strict=True):
            X = torch.randn(n // 2, n, generator=generator)
            gram = X.T @ X / len(X)
            found[module.name + name] = gram if name else inputs.setdefault(module.reads, gram)
    return found


def unfolding(layout: GroupLayout, seed: int = 0) -> Tensor:
    """A random unfolding (d, S p) whose spectra decay along both shared modes."""
    generator = torch.Generator().manual_seed(seed)
    d, p, S = layout.width, layout.head_dim, len(layout.slices)
    W = torch.randn(d, S, p, generator=generator)
    W *= torch.arange(1, d + 1)[:, None, None] ** -0.6 * torch.arange(1, p + 1) ** -0.4
    left, right = (torch.linalg.qr(torch.randn(m, m, generator=generator))[0] for m in (d, p))
    return (left @ (W @ right).flatten(1)).contiguous()


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]
