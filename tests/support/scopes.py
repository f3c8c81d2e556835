"""Compressed models of any scope, written by hand from a dense checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from lestd_kernels.formats.chain import Chain, ModuleChain
from lestd_kernels.formats.entries import with_stored_path
from lestd_kernels.formats.kinds import Decomposition
from lestd_kernels.formats.ops import Multiply
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.tensorize import GroupLayout, fold_weights, unfold_weights
from orchestrator.architectures import SliceGroup, find_architecture
from workers.checkpoint.tensors import ShardIndex, read_tensor

Decompose = Callable[[GroupLayout, dict[str, Tensor]], Decomposition]
"""``(layout, module -> weight (out, in))``."""


def groups_of(directory: Path, scope: str) -> list[SliceGroup]:
    config = AutoConfig.from_pretrained(directory)
    index = ShardIndex.from_directory(directory)
    return find_architecture(config, index).groups(config, index, scope)


def weights_of(group: SliceGroup) -> dict[str, Tensor]:
    """Module -> weight (out, in), float32, by way of the unfolding."""
    matrices = {source: read_tensor(ref) for source, ref in group.tensors.items()}
    return fold_weights(unfold_weights(matrices, group.layout), group.layout)


def dense_chain(
    layout: GroupLayout, weights: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> Chain:
    """Every module as it is: one dense matrix of its own."""
    modules = {
        name: ModuleChain((Multiply(0),), (EncodedCore.encode(weight.T.to(dtype).contiguous()),))
        for name, weight in weights.items()
    }
    return Chain(layout, {}, modules, {}, dtype)


def rotated_chain(layout: GroupLayout, weights: dict[str, Tensor]) -> Chain:
    """Lossless too, through one orthogonal matrix on the residual stream's side of all modules."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(layout.width, layout.width, generator=generator)).Q
    modules = {}
    for module in layout.modules:
        W = weights[module.name].T.float()
        if module.basis_side == "input":
            ops, own = (Multiply("lestd_q"), Multiply(0)), Q.T @ W
        else:
            ops, own = (Multiply(0), Multiply("lestd_q", transposed=True)), W @ Q
        modules[module.name] = ModuleChain(ops, (EncodedCore.encode(own.contiguous()),))
    return Chain(layout, {"lestd_q": EncodedCore.encode(Q)}, modules, {}, torch.float32)


def write_model(source: Path, groups: list[SliceGroup], decompose: Decompose, out: Path) -> Path:
    """A compressed directory with these groups of `source`, the rest as it is."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors |= load_file(shard)
    entries = []
    for group in groups:
        decomposition = decompose(group.layout, weights_of(group))
        for ref in group.tensors.values():
            tensors.pop(ref.name, None)
        tensors |= decomposition.named_tensors(group.tensor_prefix)
        entries.append(with_stored_path(decomposition.describe(group.block), group.tensor_prefix))
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "lestd",
        "format_version": 1,
        "groups": entries,
    }
    (out / "config.json").write_text(json.dumps(config))
    return out
