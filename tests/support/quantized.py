"""Tiny models as they are published in few bits, made of random numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Quantize = Callable[[str, Tensor], dict[str, Tensor]]
"""Name and weight of a linear module of the layers -> the tensors that it is stored in."""


def quantized(dense: Path, out: Path, config: dict[str, Any], quantize: Quantize) -> Path:
    """A copy of a tiny model whose linear modules are quantized, the head and the rest not."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(dense.glob("*.safetensors")):
        for name, one in load_file(shard).items():
            is_linear = name.endswith("proj.weight") and ".layers." in name
            found = quantize(name, one) if is_linear else {name: one.bfloat16()}
            tensors |= {name: one.contiguous() for name, one in found.items()}
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    told = json.loads((dense / "config.json").read_text())
    told |= {"dtype": "bfloat16", "quantization_config": config}
    (out / "config.json").write_text(json.dumps(told))
    return out


def fp8(block: tuple[int, int] | None, scale_dtype: torch.dtype) -> tuple[dict[str, Any], Quantize]:
    """As DeepSeek and Qwen publish it, in blocks or with one scale."""

    def quantize(name: str, weight: Tensor) -> dict[str, Tensor]:
        a, b = block or tuple(weight.shape)
        grid = [math.ceil(size / each) for size, each in zip(weight.shape, (a, b), strict=True)]
        scale = (0.001 + 0.01 * torch.rand(grid)).to(scale_dtype)
        whole = scale.float().repeat_interleave(a, 0).repeat_interleave(b, 1)
        whole = whole[: weight.shape[0], : weight.shape[1]]
        numbers = (weight / whole).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {name: numbers, f"{name}_scale_inv": scale if block else scale.reshape(())}

    config = {
        **{"quant_method": "fp8", "activation_scheme": "dynamic"},
        **{"weight_block_size": block and list(block), "modules_to_not_convert": ["lm_head"]},
    }
    return config, quantize


def compressed_tensors(
    bits: int, strategy: str, more: frozenset[str] = frozenset(), kind: str = "int"
) -> tuple[dict[str, Any], Quantize]:
    """As vLLM's llm-compressor writes it: `more` has ``zero``, ``order`` and ``plain``."""
    group = 8

    def quantize(name: str, weight: Tensor) -> dict[str, Tensor]:
        rows, columns = weight.shape
        groups = {"tensor": (1, 1), "channel": (rows, 1), "group": (rows, columns // group)}
        grid = groups[strategy]
        scale = (0.001 + 0.01 * torch.rand(grid)).bfloat16()
        path = name.removesuffix(".weight")
        found = {f"{path}.weight_scale": scale.reshape(-1) if strategy == "tensor" else scale}
        if kind == "float":
            numbers = (weight / scale.float().mean()).clamp(-448, 448)
            return found | {name: numbers.to(torch.float8_e4m3fn)}
        most = 2 ** (bits - 1)
        numbers = torch.randint(-most, most, (rows, columns))
        if "plain" in more:
            return found | {name: numbers.to(torch.int8)}
        found[f"{path}.weight_packed"] = words(numbers, bits)
        found[f"{path}.weight_shape"] = torch.tensor([rows, columns])
        if "zero" in more:
            zero = torch.randint(-most, most, grid)
            found[f"{path}.weight_zero_point"] = words(zero.T, bits).T
        if "order" in more:
            found[f"{path}.weight_g_idx"] = (torch.randperm(columns) // group).to(torch.int32)
        return found

    weights = {
        **{"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": "zero" not in more},
        **{"group_size": group if strategy == "group" else None, "dynamic": False},
        **{"actorder": "group" if "order" in more else None, "observer": "minmax"},
    }
    form = "float-quantized" if kind == "float" else "pack-quantized"
    config = {
        **{"quant_method": "compressed-tensors", "quantization_status": "compressed"},
        **{"format": "int-quantized" if "plain" in more else form, "ignore": ["lm_head"]},
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    return config, quantize


def words(numbers: Tensor, bits: int) -> Tensor:
    """Numbers ``(n, m)`` with an offset, several to a word of 32 bits along the rows, int32."""
    each = 32 // bits
    rows = []
    for row in numbers.tolist():
        row += [-(2 ** (bits - 1))] * (-len(row) % each)
        packed = [
            sum((row[i + j] + 2 ** (bits - 1)) << (bits * j) for j in range(each))
            for i in range(0, len(row), each)
        ]
        rows.append([word - 2**32 if word >= 2**31 else word for word in packed])
    return torch.tensor(rows, dtype=torch.int32)


def mxfp4(dense: Path, out: Path) -> Path:
    """A tiny gpt-oss as it lies on the Hub; its numbers are new ones."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(dense.glob("*.safetensors")):
        for name, one in load_file(shard).items():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                experts, into, outputs = one.shape
                grid = (experts, outputs, into // 32)
                tensors[f"{name}_blocks"] = torch.randint(0, 256, (*grid, 16), dtype=torch.uint8)
                tensors[f"{name}_scales"] = torch.randint(118, 124, grid, dtype=torch.uint8)
            else:
                tensors[name] = one.bfloat16()
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    told = json.loads((dense / "config.json").read_text())
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    config = {"quant_method": "mxfp4", "modules_to_not_convert": [*left, "model.embed_tokens"]}
    told |= {"dtype": "bfloat16", "quantization_config": config}
    (out / "config.json").write_text(json.dumps(told))
    return out
