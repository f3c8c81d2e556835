"""Transformers learns to load and save ``quant_method: "lestd"``; importing lestd_kernels does it.

`config.json` of a compressed model has::

    "quantization_config": {"quant_method": "lestd", "format_version": 1, "groups": [...]}

with one entry per slice group, as a kind's `describe` writes it. Before the weights are
loaded, `LestdQuantizer` exchanges the linear modules that the entries name for `CompressedLinear`
modules of exactly the stored shapes; the rest is ordinary loading. Paths in the entries may have
or lack the base model's prefix (``model.``), and so may the model: ``AutoModel`` loads it too.

Transformers without the plug-in finds a 1-D ``weight`` where it expects a matrix, and raises.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME
from transformers.utils.quantization_config import QuantizationConfigMixin

from lestd_kernels.chain import Chain, op_of
from lestd_kernels.chain_linear import ChainLinear, PackedMatrix
from lestd_kernels.codecs import CODECS, PATTERNS, UNSTRUCTURED
from lestd_kernels.decomposition import FORMAT_VERSION, QUANT_METHOD, SharedTucker
from lestd_kernels.errors import LestdError
from lestd_kernels.kinds import KINDS
from lestd_kernels.linear import (
    CompressedLinear,
    CoreSpec,
    Factor,
    SharedCore,
    share_products,
)
from lestd_kernels.modules import MODULES, check_core
from lestd_kernels.packing import FULL_BITS, QUANTIZED_BITS
from lestd_kernels.tensorize import BasisSide

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VALUE_TYPES = ("bfloat16", "float16", "float32")
_UPGRADE = "upgrade lestd, or compress the model again with this version"


@dataclass
class LestdConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed model.

    Attributes:
        groups: one entry per slice group, see `SharedTucker.describe`.
        format_version: version of the entries and of the tensors' names and layout.
        quant_method: always ``"lestd"``.
    """

    groups: list[dict[str, Any]] = field(default_factory=list)
    format_version: int = FORMAT_VERSION
    quant_method: str = QUANT_METHOD  # type: ignore[assignment]  # not in their enum

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Read the entry of `config.json`.

        Raises:
            LestdError: a format version that this package does not read, or an unknown key.
        """
        version = config_dict.get("format_version")
        if version != FORMAT_VERSION:
            raise LestdError(
                f"config.json: quantization_config has format_version {version!r}, "
                f"this version of lestd reads {FORMAT_VERSION}: {_UPGRADE}."
            )
        unknown = sorted(config_dict.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise LestdError(
                f"config.json: quantization_config has the unknown key {unknown[0]!r}, expected "
                f"{', '.join(f.name for f in fields(cls))}: remove it."
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)  # type: ignore[no-untyped-call]


class LestdQuantizer(HfQuantizer):
    """Builds the compressed modules before `from_pretrained` loads their tensors."""

    requires_calibration = True
    quantization_config: LestdConfig

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        for number, entry in enumerate(self.quantization_config.groups):
            with _complete_entry(number):
                _build_group(model, entry)
        if checkpoint_files is not None:
            _check_presence(model, checkpoint_files)
            _expect_adapter(Path(checkpoint_files[0]).parent)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for path, module in model.named_modules():
            if isinstance(module, MODULES):
                try:
                    check_core(module)
                except ValueError as error:
                    raise LestdError(
                        f"{model.name_or_path}: the core of {path} is damaged, {error}: copy the "
                        "model again from where it was made."
                    ) from error

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the tensors and the configuration as they were loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients reach the inputs, the factors and the stored core values."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The modules' forward has no graph break."""
        return True


def register() -> None:
    """Make the plug-in known to Transformers; a second call changes nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(LestdConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(LestdQuantizer)


@contextmanager
def _complete_entry(number: int) -> Iterator[None]:
    """Say which entry of the configuration lacks a key."""
    try:
        yield
    except KeyError as missing:
        raise LestdError(
            f"config.json: quantization_config.groups[{number}] has no {missing}: "
            "the file is damaged, copy it again from where the model was made."
        ) from missing


def _build_group(model: PreTrainedModel, entry: dict[str, Any]) -> None:
    """Exchange the linear modules of one slice group for compressed ones, on the meta device."""
    path = entry["path"]
    _check_known(path, "kind", entry["kind"], KINDS)
    _check_known(path, "value_type", entry["value_type"], _VALUE_TYPES)
    block = _find_module(model, path)
    originals = {name: _find_linear(block, path, name) for name in entry["modules"]}
    for name, original in originals.items():
        _check_shape(path, name, entry, original)
    build = {SharedTucker.kind: _build_shared_tucker, Chain.kind: _build_chains}
    for name, module in build[entry["kind"]](model, entry, originals).items():
        block.set_submodule(name, module)
    share_products(block)


def _check_shape(path: str, name: str, entry: dict[str, Any], original: nn.Linear) -> None:
    module = entry["modules"][name]
    _check_known(f"{path}.{name}", "basis_side", module["basis_side"], get_args(BasisSide))
    columns = module["slices"] * entry["head_dim"]
    wide = module["basis_side"] == "input"
    expected = (columns, entry["width"]) if wide else (entry["width"], columns)
    if tuple(original.weight.shape) != expected:
        raise LestdError(
            f"config.json: {path}.{name} has weight {tuple(original.weight.shape)} in the "
            f"model and {expected} in quantization_config: one of the two was changed after "
            "the model was compressed, restore it."
        )


def _build_chains(
    model: PreTrainedModel, entry: dict[str, Any], originals: dict[str, nn.Linear]
) -> dict[str, nn.Module]:
    """Modules of a `Chain`, and its shared matrices in the block."""
    path = entry["path"]
    dtype = next(iter(originals.values())).weight.dtype
    shared = {}
    for name, matrix in entry["shared"].items():
        _check_matrix(matrix["path"], matrix)
        parent, _, attribute = matrix["path"].rpartition(".")
        shared[name] = PackedMatrix(matrix, dtype, "meta")
        _find_module(model, parent).add_module(attribute, shared[name])
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
            bias=original.bias is not None,
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
    model: PreTrainedModel, entry: dict[str, Any], originals: dict[str, nn.Linear]
) -> dict[str, nn.Module]:
    """Modules of a `SharedTucker`; its factors, and a core that the modules share, in the block."""
    path, ranks = entry["path"], entry["ranks"]
    dtype = next(iter(originals.values())).weight.dtype
    U1 = _place_factor(model, entry["factors"]["U1"], entry["width"], ranks["R1"], dtype)
    U2 = _place_factor(model, entry["factors"]["U2"], entry["head_dim"], ranks["R2"], dtype)
    shared_core = None
    if "core" in entry:
        spec = _core_spec(path, entry["core"], ranks["R1"], entry["core"]["columns"])
        shared_core = SharedCore(spec, dtype, "meta")
        core_parent, _, core_name = entry["core"]["path"].rpartition(".")
        _find_module(model, core_parent).add_module(core_name, shared_core)

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
            bias=original.bias is not None,
            dtype=original.weight.dtype,
            device="meta",
        )
    return modules


def _check_known(path: str, what: str, found: Any, known: Collection[object]) -> None:
    if found not in known:
        raise LestdError(
            f"config.json: {path} has {what} {found!r}, expected "
            f"{' or '.join(map(str, known))}: {_UPGRADE}."
        )


def _core_spec(path: str, entry: dict[str, Any], rows: int, columns: int) -> CoreSpec:
    _check_known(path, "codec", entry["codec"], CODECS)
    pattern = entry.get("pattern", UNSTRUCTURED)
    _check_known(path, "pattern", pattern, PATTERNS)
    return CoreSpec(entry["codec"], rows, columns, entry["nnz"], pattern)


def _find_module(model: PreTrainedModel, path: str) -> nn.Module:
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


def _find_linear(block: nn.Module, path: str, name: str) -> nn.Linear:
    try:
        module = block.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise LestdError(
            f"config.json: quantization_config names {path}.{name}, expected a linear module "
            f"there, found {type(module).__name__}: load the architecture that was compressed."
        )
    return module


def _place_factor(
    model: PreTrainedModel, path: str, rows: int, rank: int, dtype: torch.dtype
) -> Factor:
    """The factor at `path`: the one that an earlier group put there, or a new one."""
    parent_path, _, name = path.rpartition(".")
    parent = _find_module(model, parent_path)
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


def _check_presence(model: PreTrainedModel, checkpoint_files: Sequence[str]) -> None:
    """Refuse a checkpoint that lacks a tensor; Transformers would only warn, and make one up."""
    prefix = f"{model.base_model_prefix}."
    present: set[str] = set()
    for file in checkpoint_files:
        with safe_open(file, framework="pt") as shard:
            present.update(name.removeprefix(prefix) for name in shard.keys())  # noqa: SIM118
    for path, module in model.named_modules():
        if not isinstance(module, MODULES):
            continue
        for name in module.state_dict():
            if f"{path}.{name}".removeprefix(prefix) not in present:
                raise LestdError(
                    f"{checkpoint_files[0]}: neither this file nor the model's other shards hold "
                    f"the tensor {path}.{name}: copy the model again from where it was made."
                )


def _expect_adapter(directory: Path) -> None:
    """Have peft know compressed projections where an adapter will be loaded with the model.

    Raises:
        LestdError: peft is not there; Transformers would leave the adapter out, and say nothing.
    """
    if not (directory / ADAPTER_CONFIG_NAME).is_file():
        return
    if find_spec("peft") is None:
        raise LestdError(
            f"{directory} has an adapter beside the model, and peft, which loads it, is not "
            'installed: pip install "lestd[recover]".'
        )
    from lestd_kernels import peft_plugin  # slow to import, and an extra

    peft_plugin.register()


register()
