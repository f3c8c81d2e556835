"""A model that `rtn` or `gptq` has rounded -> what the library compressed-tensors reads.

Its layout is `pack-quantized`: transformers and vLLM load and run it without lestd, in kernels of
their own. With `MethodArgs.scale_groups` ``"inputs"`` few-bit values lie as it has them, so that
no value is rounded again, and none unpacked:

    weight_packed  (out, in bits / 32) int32: the codes, the first one in the lowest bits
    weight_scale   (out, in / 64): the scale of each group
    weight_shape   (2,) int64: out, in

and a weight is ``(code - 2^(bits - 1)) scale``, see lestd_kernels.storage.few_bits.

Reference: compressed-tensors, ``compressors/pack_quantized`` (github.com/vllm-project).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lestd_kernels.errors import LestdError
from lestd_kernels.formats.chain import Chain
from lestd_kernels.formats.kinds import Decomposition
from lestd_kernels.formats.ops import Multiply, op_of
from lestd_kernels.storage.few_bits import FULL_BITS, GROUP
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.tensorize import below
from orchestrator.model.adapter import ADAPTER_FILES
from orchestrator.model.export import Export, Form, Progress, export_model
from orchestrator.model.reader import CompressedGroup, CompressedModel

_OPTION = "--compressed-tensors"
_SHAPE_BYTES = 2 * 8


def export_packed(model_dir: Path, out: Path, progress: Progress | None = None) -> Export:
    """Write a model of few-bit weights in the layout `pack-quantized` of compressed-tensors.

    Args:
        model_dir: the compressed model.
        out: the new directory; must not exist, or be empty.
        progress: told of every finished file.

    Raises:
        LestdError: as `export_model`; or something in the model is no matrix of few-bit values
            with groups along the inputs.
    """
    form = Form(
        option=_OPTION,
        check=_check,
        group_bytes=_group_bytes,
        tensors=lambda group: group.decoded(lambda stored: _packed(group, stored)),
        dtype=lambda group: group.value_type,
        config=_config,
        card="model/packed_card.md.jinja",
    )
    return export_model(model_dir, out, form, progress)


def _modules(group: CompressedGroup) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and entry of each module of a group."""
    yield from group.entry["modules"].items()


def _path(group: CompressedGroup, name: str) -> str:
    """Of a module in the checkpoint."""
    return below(group.entry.get("dense_path", group.entry["path"]), name)


def _check(model: CompressedModel) -> None:
    if found := [name for name in ADAPTER_FILES if (model.directory / name).exists()]:
        raise LestdError(
            f"{model.directory} has an adapter ({found[0]}), which weights in few bits cannot take "
            "in; export it with --dense, or without the adapter"
        )
    for group in model.groups:
        for name, module in _modules(group):
            if problem := _problem(group.entry, module):
                raise LestdError(
                    f"{_path(group, name)} of {model.directory} cannot be written for "
                    f"compressed-tensors: {problem}; compress with --method gptq or rtn, "
                    "--value-bits 4 or 8, and --scale-groups inputs, or export with --dense"
                )


def _problem(entry: Mapping[str, Any], module: Mapping[str, Any]) -> str | None:
    """What keeps a module from being packed; None if nothing does."""
    own = module.get("own", [])
    if entry["kind"] != Chain.kind or entry["shared"] or len(own) != 1:
        return "it is not stored as one matrix"
    if "side" in module:
        return "outliers are kept beside it"
    if "stored" in module:
        return "its dense weight is part of another tensor, or transposed"
    if own[0]["codec"] != "dense" or own[0].get("value_bits", FULL_BITS) == FULL_BITS:
        return "its values are not in few bits of a fixed grid"
    if not own[0].get("with_zero") or [op_of(op) for op in module["ops"]] != [Multiply(0, True)]:
        return "its scales are those of groups of outputs"
    return None


def _group_bytes(group: CompressedGroup) -> int:
    return sum(ref.stored_bytes for ref in group.refs.values()) + _SHAPE_BYTES * len(
        group.entry["modules"]
    )


def _packed(group: CompressedGroup, stored: Decomposition) -> dict[str, Tensor]:
    assert isinstance(stored, Chain)  # See `_check`.
    tensors = {}
    for name, chain in stored.modules.items():
        matrix, path = chain.own[0], _path(group, name)
        tensors[f"{path}.weight_packed"] = (
            matrix.tensors["codes"].view(torch.int32).view(matrix.rows, -1)
        )
        tensors[f"{path}.weight_scale"] = _scales(matrix, path)
        tensors[f"{path}.weight_shape"] = torch.tensor([matrix.rows, matrix.columns])
    return tensors


def _scales(matrix: EncodedCore, path: str) -> Tensor:
    stored = matrix.tensors["scales"]
    scales = (stored.double() * 2.0**matrix.exponent).to(stored.dtype)
    if not torch.equal(scales.double(), stored.double() * 2.0**matrix.exponent):
        raise LestdError(
            f"the scales of {path} are too small for {stored.dtype}; export with --dense, or "
            "compress a checkpoint in bfloat16"
        )
    return scales.view(matrix.rows, -1)


def _config(model: CompressedModel) -> dict[str, Any]:
    """config.json; modules are named one by one, so that nothing else is taken for quantized."""
    targets: dict[int, list[str]] = {}
    for group in model.groups:
        for name, module in _modules(group):
            bits = module["own"][0]["value_bits"]
            targets.setdefault(bits, []).append(below(group.entry["path"], name))
    groups = {
        f"group_{number}": {
            "targets": names,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP,
            },
        }
        for number, (bits, names) in enumerate(sorted(targets.items()))
    }
    return model.config_json | {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [],
        }
    }
