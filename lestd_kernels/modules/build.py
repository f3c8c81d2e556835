"""From an entry of ``quantization_config`` to the compressed modules of one slice group.

Everything is built on the meta device, with tensors of exactly the stored shapes, in a model whose
own modules stand there too; `from_pretrained` then loads what it finds. Paths in the entries may
have or lack the base model's prefix (``model.``), and so may the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lestd_kernels.errors import LestdError
from lestd_kernels.formats.chain import Chain
from lestd_kernels.formats.entry_schema import damaged, module_shape
from lestd_kernels.formats.ops import op_of
from lestd_kernels.formats.shared_tucker import SharedTucker
from lestd_kernels.modules.chain_linear import ChainLinear, PackedMatrix
from lestd_kernels.modules.experts import (
    CompressedExperts,
    compressed_experts,
    expert_modules,
    is_experts,
    is_transposed,
)
from lestd_kernels.modules.shared_tucker_linear import (
    CompressedLinear,
    CoreSpec,
    Factor,
    SharedCore,
    share_products,
)
from lestd_kernels.storage.codecs import UNSTRUCTURED
from lestd_kernels.tensorize import below

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Subclasses of nn.Linear in Transformers that compute what it computes.
_LINEAR_SUBCLASSES = ("FalconLinear",)


@dataclass(frozen=True)
class _Original:
    """Facts of the linear module that a compressed module stands in for."""

    in_features: int
    out_features: int
    bias: bool
    dtype: torch.dtype


def build_groups(model: PreTrainedModel, entries: Sequence[dict[str, Any]]) -> None:
    """Exchange the linear modules of slice groups for compressed ones, on the meta device.

    Args:
        model: on the meta device.
        entries: which `lestd_kernels.formats.entry_schema.check_groups` has checked.

    Raises:
        LestdError: an entry does not fit the model, or puts something where something is, or
            where it would not be of the model.
    """
    build = {SharedTucker.kind: _build_shared_tucker, Chain.kind: _build_chains}
    shared: dict[str, nn.Module] = {}
    for entry in entries:
        block, originals = _find_block(model, entry)
        for name, original in originals.items():
            _check_shape(name, entry, original)
        for name, module in build[entry["kind"]](model, entry, originals, shared).items():
            block.set_submodule(name, module)
        if len(originals) > 1:  # One alone may stand in the model itself.
            share_products(block)
    present = set(model.modules())
    for path, module in shared.items():
        if module not in present:
            raise damaged(f"quantization_config places {path} in a module that it takes away")


def _find_block(
    model: PreTrainedModel, entry: dict[str, Any]
) -> tuple[nn.Module, dict[str, _Original]]:
    """The block of a group, and the linear modules in it that are exchanged."""
    if "guard" in entry:
        return _place_experts(model, entry)
    block = find_module(model, entry["path"])
    return block, {name: _find_linear(block, entry["path"], name) for name in entry["modules"]}


def _check_shape(name: str, entry: dict[str, Any], original: _Original) -> None:
    expected = module_shape(entry, entry["modules"][name])[::-1]
    if (found := (original.out_features, original.in_features)) != expected:
        raise LestdError(
            f"config.json: {below(entry['path'], name)} has weight {found} in the model and "
            f"{expected} in quantization_config: one of the two was changed after the model was "
            "compressed, restore it."
        )


def _place_experts(
    model: PreTrainedModel, entry: dict[str, Any]
) -> tuple[CompressedExperts, dict[str, _Original]]:
    """Exchange an experts module of Transformers for one that holds compressed modules."""
    path = entry["path"]
    parent_path, _, name = path.rpartition(".")
    parent = find_module(model, parent_path)
    found: Any = getattr(parent, name, None)
    guard = getattr(found, entry["guard"], None)
    if not is_experts(found) or not isinstance(guard, nn.Parameter):
        raise LestdError(
            f"config.json: quantization_config names {path}, expected experts there, found "
            f"{type(found).__name__}: load the architecture that was compressed."
        )
    count, d, f = found.down_proj.shape
    if is_transposed(found):
        d, f = f, d
    dtype = found.down_proj.dtype
    for roles in expert_modules(found):
        originals = {
            f"expert_{expert}.{role}": _Original(
                *((f, d) if role == roles[-1] else (d, f)), bias=False, dtype=dtype
            )
            for expert in range(count)
            for role in roles
        }
        if originals.keys() == entry["modules"].keys():
            break
    else:
        raise LestdError(
            f"config.json: {path} has {count} experts in the model and other modules in "
            "quantization_config: one of the two was changed after the model was compressed, "
            "restore it."
        )
    experts = compressed_experts(found, "meta")
    parent.add_module(name, experts)
    if not [*parent.parameters(recurse=False), *parent.buffers(recurse=False)]:
        # Nothing in it is to be initialized when the weights are loaded. Some families (Qwen3-Omni)
        # would reach through it for the stacked matrices, which are no more.
        parent._is_hf_initialized = True  # type: ignore[assignment]
    return experts, originals


def _build_chains(
    model: PreTrainedModel,
    entry: dict[str, Any],
    originals: dict[str, _Original],
    shared: dict[str, nn.Module],
) -> dict[str, nn.Module]:
    """Modules of a `Chain`; the matrices that they share are placed."""
    dtype = next(iter(originals.values())).dtype
    matrices = {name: PackedMatrix(one, dtype, "meta") for name, one in entry["shared"].items()}
    for name, matrix in matrices.items():
        _place(model, entry["shared"][name]["path"], matrix, shared)
    modules: dict[str, nn.Module] = {}
    for name, original in originals.items():
        module = entry["modules"][name]
        modules[name] = ChainLinear(
            module,
            original.in_features,
            original.out_features,
            tuple(op_of(op) for op in module["ops"]),
            matrices,
            bias=original.bias,
            dtype=dtype,
            device="meta",
        )
    return modules


def _build_shared_tucker(
    model: PreTrainedModel,
    entry: dict[str, Any],
    originals: dict[str, _Original],
    shared: dict[str, nn.Module],
) -> dict[str, nn.Module]:
    """Modules of a `SharedTucker`; its factors, and a core that the modules share, are placed."""
    ranks, core = entry["ranks"], entry.get("core")
    dtype = next(iter(originals.values())).dtype
    factors = []
    for name, rows, rank in (("U1", entry["width"], "R1"), ("U2", entry["head_dim"], "R2")):
        path = entry["factors"][name]
        if path not in shared:  # Else an earlier group has put it there.
            _place(model, path, Factor(rows, ranks[rank], dtype, "meta"), shared)
        factor = shared[path]
        assert isinstance(factor, Factor)
        factors.append(factor)
    shared_core = None
    if core is not None:
        shared_core = SharedCore(_core_spec(core, ranks["R1"], core["columns"]), dtype, "meta")
        _place(model, core["path"], shared_core, shared)

    modules: dict[str, nn.Module] = {}
    for name, original in originals.items():
        module = entry["modules"][name]
        slices = module["slices"]
        modules[name] = CompressedLinear(
            original.in_features,
            original.out_features,
            module["basis_side"],
            slices,
            (factors[0], factors[1]),
            shared_core or _core_spec(module, ranks["R1"], slices * ranks["R2"]),
            types=len(module.get("types", (0,))),
            bias=original.bias,
            dtype=original.dtype,
            device="meta",
        )
    return modules


def _core_spec(entry: dict[str, Any], rows: int, columns: int) -> CoreSpec:
    pattern = entry.get("pattern", UNSTRUCTURED)
    return CoreSpec(entry["codec"], rows, columns, entry["nnz"], pattern)


def _place(
    model: PreTrainedModel, path: str, module: nn.Module, shared: dict[str, nn.Module]
) -> None:
    """Put what modules share at its path, where nothing must be yet; and remember it there."""
    parent_path, _, name = path.rpartition(".")
    parent = find_module(model, parent_path)
    if hasattr(parent, name) or isinstance(parent, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        raise damaged(
            f"quantization_config places {path} in a {type(parent).__name__}, which has "
            "something there, or room for its own kind only"
        )
    parent.add_module(name, module)
    shared[path] = module


def find_module(model: PreTrainedModel, path: str) -> nn.Module:
    """The module at `path`, see `module_path`."""
    return model.get_submodule(module_path(model, path))


def module_path(model: PreTrainedModel, path: str) -> str:
    """Path in this model of the module that another class of it has at `path`.

    It may have or lack the base model's prefix; in a model with other inputs than text the decoder
    stands deeper.

    Raises:
        LestdError: there is no such module.
    """
    prefix = f"{model.base_model_prefix}."
    without = f"{path}.".removeprefix(prefix).removesuffix(".")  # the base model itself: ""
    for candidate in (path, without, prefix + path, f"{_decoder_path(model)}.{without}"):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    raise LestdError(
        f"config.json: quantization_config names the module {path}, which "
        f"{type(model).__name__} does not have: load the architecture that was compressed."
    )


def _decoder_path(model: PreTrainedModel) -> str:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return next((name for name, one in model.named_modules() if one is decoder), "")


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes ``x W + b`` and nothing else, so that another may stand in."""
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ in _LINEAR_SUBCLASSES


def _find_linear(block: nn.Module, path: str, name: str) -> _Original:
    try:
        module = block.get_submodule(name)
    except AttributeError:
        module = None
    if module is None or not is_linear(module):
        raise LestdError(
            f"config.json: quantization_config names {below(path, name)}, expected a linear module "
            f"there, found {type(module).__name__}: load the architecture that was compressed."
        )
    linear: Any = module
    outputs, inputs = linear.weight.shape
    if isinstance(module, Conv1D):
        inputs, outputs = outputs, inputs
    return _Original(inputs, outputs, linear.bias is not None, linear.weight.dtype)
