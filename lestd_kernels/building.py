"""From an entry of ``quantization_config`` to the compressed modules of one slice group.

Everything is built on the meta device, with tensors of exactly the stored shapes, in a model whose
own modules stand there too; `from_pretrained` then loads what it finds. Paths in the entries may
have or lack the base model's prefix (``model.``), and so may the model.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from lestd_kernels.chain import Chain
from lestd_kernels.chain_linear import ChainLinear, PackedMatrix
from lestd_kernels.codecs import CODECS, PATTERNS, UNSTRUCTURED
from lestd_kernels.decomposition import SharedTucker
from lestd_kernels.errors import LestdError
from lestd_kernels.experts import ROLES, CompressedExperts
from lestd_kernels.kinds import KINDS
from lestd_kernels.linear import CompressedLinear, CoreSpec, Factor, SharedCore, share_products
from lestd_kernels.ops import op_of
from lestd_kernels.packing import FULL_BITS, QUANTIZED_BITS
from lestd_kernels.tensorize import BasisSide

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VALUE_TYPES = ("bfloat16", "float16", "float32")
UPGRADE = "upgrade lestd, or compress the model again with this version"


@dataclass(frozen=True)
class _Original:
    """What a compressed module must know of the linear module that it stands in for."""

    in_features: int
    out_features: int
    bias: bool
    dtype: torch.dtype


def build_group(model: PreTrainedModel, entry: dict[str, Any]) -> None:
    """Exchange the linear modules of one slice group for compressed ones, on the meta device."""
    path = entry["path"]
    _check_known(path, "kind", entry["kind"], KINDS)
    _check_known(path, "value_type", entry["value_type"], _VALUE_TYPES)
    block: nn.Module
    if "guard" in entry:
        block, originals = _place_experts(model, entry)
    else:
        block = find_module(model, path)
        originals = {name: _find_linear(block, path, name) for name in entry["modules"]}
    for name, original in originals.items():
        _check_shape(path, name, entry, original)
    build = {SharedTucker.kind: _build_shared_tucker, Chain.kind: _build_chains}
    for name, module in build[entry["kind"]](model, entry, originals).items():
        block.set_submodule(name, module)
    share_products(block)


def _check_shape(path: str, name: str, entry: dict[str, Any], original: _Original) -> None:
    module = entry["modules"][name]
    _check_known(f"{path}.{name}", "basis_side", module["basis_side"], get_args(BasisSide))
    columns = module["slices"] * entry["head_dim"]
    wide = module["basis_side"] == "input"
    expected = (columns, entry["width"]) if wide else (entry["width"], columns)
    if (found := (original.out_features, original.in_features)) != expected:
        raise LestdError(
            f"config.json: {path}.{name} has weight {found} in the model and {expected} in "
            "quantization_config: one of the two was changed after the model was compressed, "
            "restore it."
        )


def _place_experts(
    model: PreTrainedModel, entry: dict[str, Any]
) -> tuple[CompressedExperts, dict[str, _Original]]:
    """Exchange an experts module of Transformers for one that holds compressed modules."""
    path = entry["path"]
    parent_path, _, name = path.rpartition(".")
    parent = find_module(model, parent_path)
    found: Any = getattr(parent, name, None)
    if not hasattr(found, "_apply_gate") or not hasattr(found, entry["guard"]):
        raise LestdError(
            f"config.json: quantization_config names {path}, expected experts there, found "
            f"{type(found).__name__}: load the architecture that was compressed."
        )
    count, d, f = found.down_proj.shape
    if found.is_transposed:
        d, f = f, d
    dtype = found.down_proj.dtype
    originals = {}
    for expert in range(count):
        for role in ROLES:
            shape = (f, d) if role == "down" else (d, f)
            originals[f"expert_{expert}.{role}"] = _Original(*shape, bias=False, dtype=dtype)
    if originals.keys() != entry["modules"].keys():
        raise LestdError(
            f"config.json: {path} has {count} experts in the model and other modules in "
            "quantization_config: one of the two was changed after the model was compressed, "
            "restore it."
        )
    experts = CompressedExperts(found, "meta")
    parent.add_module(name, experts)
    return experts, originals


def _build_chains(
    model: PreTrainedModel, entry: dict[str, Any], originals: dict[str, _Original]
) -> dict[str, nn.Module]:
    """Modules of a `Chain`, and its shared matrices in the block."""
    path = entry["path"]
    dtype = next(iter(originals.values())).dtype
    shared = {}
    for name, matrix in entry["shared"].items():
        _check_matrix(matrix["path"], matrix)
        parent, _, attribute = matrix["path"].rpartition(".")
        shared[name] = PackedMatrix(matrix, dtype, "meta")
        find_module(model, parent).add_module(attribute, shared[name])
    modules: dict[str, nn.Module] = {}
    for name, original in originals.items():
        module = entry["modules"][name]
        sides = [module["side"]] if "side" in module else []
        for matrix in (*module["own"], *sides):
            _check_matrix(f"{path}.{name}", matrix)
        modules[name] = ChainLinear(
            module,
            original.in_features,
            original.out_features,
            tuple(op_of(op) for op in module["ops"]),
            shared,
            bias=original.bias,
            dtype=dtype,
            device="meta",
        )
    return modules


def _check_matrix(path: str, entry: dict[str, Any]) -> None:
    _check_known(path, "codec", entry["codec"], CODECS)
    _check_known(path, "pattern", entry.get("pattern", UNSTRUCTURED), PATTERNS)
    _check_known(
        path, "value_bits", entry.get("value_bits", FULL_BITS), (FULL_BITS, *QUANTIZED_BITS)
    )


def _build_shared_tucker(
    model: PreTrainedModel, entry: dict[str, Any], originals: dict[str, _Original]
) -> dict[str, nn.Module]:
    """Modules of a `SharedTucker`; its factors, and a core that the modules share, in the block."""
    path, ranks = entry["path"], entry["ranks"]
    dtype = next(iter(originals.values())).dtype
    U1 = _place_factor(model, entry["factors"]["U1"], entry["width"], ranks["R1"], dtype)
    U2 = _place_factor(model, entry["factors"]["U2"], entry["head_dim"], ranks["R2"], dtype)
    shared_core = None
    if "core" in entry:
        spec = _core_spec(path, entry["core"], ranks["R1"], entry["core"]["columns"])
        shared_core = SharedCore(spec, dtype, "meta")
        core_parent, _, core_name = entry["core"]["path"].rpartition(".")
        find_module(model, core_parent).add_module(core_name, shared_core)

    modules: dict[str, nn.Module] = {}
    for name, original in originals.items():
        module = entry["modules"][name]
        slices = module["slices"]
        modules[name] = CompressedLinear(
            original.in_features,
            original.out_features,
            module["basis_side"],
            slices,
            (U1, U2),
            shared_core or _core_spec(f"{path}.{name}", module, ranks["R1"], slices * ranks["R2"]),
            types=len(module.get("types", (0,))),
            bias=original.bias,
            dtype=original.dtype,
            device="meta",
        )
    return modules


def _check_known(path: str, what: str, found: Any, known: Collection[object]) -> None:
    if found not in known:
        raise LestdError(
            f"config.json: {path} has {what} {found!r}, expected "
            f"{' or '.join(map(str, known))}: {UPGRADE}."
        )


def _core_spec(path: str, entry: dict[str, Any], rows: int, columns: int) -> CoreSpec:
    _check_known(path, "codec", entry["codec"], CODECS)
    pattern = entry.get("pattern", UNSTRUCTURED)
    _check_known(path, "pattern", pattern, PATTERNS)
    return CoreSpec(entry["codec"], rows, columns, entry["nnz"], pattern)


def find_module(model: PreTrainedModel, path: str) -> nn.Module:
    """The module at `path`, which may have or lack the base model's prefix."""
    prefix = f"{model.base_model_prefix}."
    without = f"{path}.".removeprefix(prefix).removesuffix(".")  # the base model itself: ""
    for candidate in (path, without, prefix + path):
        try:
            return model.get_submodule(candidate)
        except AttributeError:
            continue
    raise LestdError(
        f"config.json: quantization_config names the module {path}, which "
        f"{type(model).__name__} does not have: load the architecture that was compressed."
    )


def _find_linear(block: nn.Module, path: str, name: str) -> _Original:
    try:
        module = block.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise LestdError(
            f"config.json: quantization_config names {path}.{name}, expected a linear module "
            f"there, found {type(module).__name__}: load the architecture that was compressed."
        )
    bias = module.bias is not None
    return _Original(module.in_features, module.out_features, bias, module.weight.dtype)


def _place_factor(
    model: PreTrainedModel, path: str, rows: int, rank: int, dtype: torch.dtype
) -> Factor:
    """The factor at `path`: the one that an earlier group put there, or a new one."""
    parent_path, _, name = path.rpartition(".")
    parent = find_module(model, parent_path)
    factor = getattr(parent, name, None)
    if not isinstance(factor, Factor):
        factor = Factor(rows, rank, dtype, "meta")
        parent.add_module(name, factor)
    if tuple(factor.weight.shape) != (rows, rank):
        raise LestdError(
            f"config.json: groups disagree about the shape of {path}, {(rows, rank)} and "
            f"{tuple(factor.weight.shape)}: the file is damaged, copy it again."
        )
    return factor
