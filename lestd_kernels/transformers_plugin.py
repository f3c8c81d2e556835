"""Transformers learns to load and save ``quant_method: "lestd"``; importing lestd_kernels does it.

`config.json` of a compressed model has::

    "quantization_config": {"quant_method": "lestd", "format_version": 1, "groups": [...],
                            "groups_sha256": "..."}

with one entry per slice group, as a kind's `describe` writes it. Before the weights are
loaded, `LestdQuantizer` exchanges the modules that the entries name for compressed ones of exactly
the stored shapes (lestd_kernels.modules.build); the rest is ordinary loading.

Transformers without the plug-in finds a 1-D ``weight`` where it expects a matrix, and raises. Where
it would fuse the matrices of a layer's experts while loading, which are absent, it finds an empty
tensor under the fused parameter's name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, WeightTransform, rename_source_key
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME
from transformers.utils.quantization_config import QuantizationConfigMixin

from lestd_kernels.errors import LestdError
from lestd_kernels.formats.entries import guard_specs
from lestd_kernels.formats.entry_schema import check_groups
from lestd_kernels.formats.shared_tucker import FORMAT_VERSION, QUANT_METHOD
from lestd_kernels.modules.build import build_groups, module_path
from lestd_kernels.modules.coded_numbers import CodedNumbers, decode_all
from lestd_kernels.modules.experts import GUARD_NAME
from lestd_kernels.modules.registry import MODULES, check_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VALUES = ("BF16", "F16", "F32")
_INDICES = {torch.uint8: "U8", torch.uint16: "U16", torch.int32: "I32"}
_COPY_AGAIN = "copy the model again from where it was made"
_UPGRADE = "upgrade lestd, or compress the model again with this version"


@dataclass
class LestdConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed model.

    Attributes:
        groups: one entry per slice group, see `SharedTucker.describe`.
        format_version: version of the entries and of the tensors' names and layout.
        quant_method: always ``"lestd"``.
        groups_sha256: see `lestd_kernels.formats.entries.groups_sha256`; None where nobody has
            stated it.
    """

    groups: list[dict[str, Any]] = field(default_factory=list)
    format_version: int = FORMAT_VERSION
    quant_method: str = QUANT_METHOD  # type: ignore[assignment]  # not in their enum
    groups_sha256: str | None = None

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Read the entry of `config.json`.

        Raises:
            LestdError: a format version that this package does not read, an unknown key, or
                entries that are damaged.
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
        check_groups(config_dict.get("groups"), config_dict.get("groups_sha256"))
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
        build_groups(model, self.quantization_config.groups)
        prefix = f"{model.base_model_prefix}."
        self._guarded = {
            entry["path"]: module_path(model, entry["path"]).removeprefix(prefix)
            for entry in self.quantization_config.groups
            if "guard" in entry
        }
        if checkpoint_files is not None:
            _check_headers(model, self.quantization_config.groups, checkpoint_files)
            _expect_adapter(Path(checkpoint_files[0]).parent)

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], *model: PreTrainedModel
    ) -> list[WeightTransform]:
        """Transformers' conversions, and that of a guard's name, on disk and in memory.

        In memory it has another name than the parameter that it guards, since a conversion of
        layers whose experts are dense would take it for one of theirs when the model is saved.
        Transformers before 5.20 does not name the model.
        """
        guards: dict[str, list[str]] = {}
        for entry in self.quantization_config.groups:
            if "guard" in entry:
                path = re.escape(self._guarded[entry["path"]])
                guards.setdefault(entry["guard"], []).append(path)
        renamings = [
            # Transformers' form: the group stands in the target, and is \\1 in the source.
            WeightRenaming(rf"\1\.{guard}", rf"({'|'.join(paths)})\.{GUARD_NAME}")
            for guard, paths in guards.items()
        ]
        updated = super().update_weight_conversions(weight_conversions, *model)  # type: ignore[no-untyped-call]
        return [*updated, *renamings]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if all(weight.is_meta for weight in model.parameters()):
            return  # A model without weights was asked for; it computes nothing.
        finish_loading(model, str(model.name_or_path))

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the tensors and the configuration as they were loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients reach the inputs, the factors and the stored core values."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Transformers' Trainer may train the model without adapters: codes and masks stay."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The modules' forward has no graph break, but where experts are dealt their tokens."""
        return not any("guard" in entry for entry in self.quantization_config.groups)


def finish_loading(model: nn.Module, name: str) -> None:
    """Decode what is coded, and check every compressed module.

    Args:
        model: whose tensors are loaded.
        name: of the model, for messages.

    Raises:
        LestdError: a tensor is damaged.
    """
    present = set(model.modules())
    coded = [(n, one) for n, one in model.named_modules() if isinstance(one, CodedNumbers)]
    try:
        decode_all(coded)
    except ValueError as error:
        raise LestdError(f"{name}: {error}: {_COPY_AGAIN}.") from error
    for path, module in model.named_modules():
        if isinstance(module, MODULES):
            try:
                check_module(module, present)
            except ValueError as error:
                raise LestdError(f"{name}: {path} is damaged, {error}: {_COPY_AGAIN}.") from error


def register() -> None:
    """Register the plug-in with Transformers; a second call changes nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(LestdConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(LestdQuantizer)


def _check_headers(
    model: PreTrainedModel, groups: Sequence[dict[str, Any]], checkpoint_files: Sequence[str]
) -> None:
    """Refuse a checkpoint that lacks a tensor, or has another in its place.

    Transformers would only warn of the first, and make one up; and change the dtype of the second.
    """
    prefix = f"{model.base_model_prefix}."
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    present: dict[str, tuple[str, list[int], str]] = {}
    for file in checkpoint_files:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                stored = shard.get_slice(name)
                known = file, stored.get_shape(), stored.get_dtype()
                renamed, _ = rename_source_key(name, renamings, [])
                present[renamed.removeprefix(prefix)] = known
    wanted = {
        f"{path}.{name}": (tensor.shape, tensor.dtype)
        for path, module in model.named_modules()
        if isinstance(module, MODULES)
        for name, tensor in module.state_dict().items()
    }
    for entry in groups:
        wanted |= guard_specs(entry | {"path": module_path(model, entry["path"])})
    for name, (shape, dtype) in wanted.items():
        found = present.get(name.removeprefix(prefix))
        if found is None:
            raise LestdError(
                f"{checkpoint_files[0]}: neither this file nor the model's other shards hold "
                f"the tensor {name}: {_COPY_AGAIN}."
            )
        file, found_shape, found_dtype = found
        expected = _VALUES if dtype.is_floating_point else (_INDICES[dtype],)
        if found_shape != list(shape) or found_dtype not in expected:
            raise LestdError(
                f"{file}: the tensor {name} is {found_dtype} {found_shape}, expected "
                f"{' or '.join(expected)} {list(shape)}: {_COPY_AGAIN}."
            )


def _expect_adapter(directory: Path) -> None:
    """Have peft support compressed projections where an adapter will be loaded with the model.

    Raises:
        LestdError: peft is not there; Transformers would leave the adapter out, and say nothing.
    """
    if not (directory / ADAPTER_CONFIG_NAME).is_file():
        return
    if find_spec("peft") is None:
        raise LestdError(
            f"{directory} has an adapter beside the model, but peft, which loads it, is not "
            'installed: pip install "lestd[recover]".'
        )
    from lestd_kernels import peft_plugin  # slow to import, and an extra

    peft_plugin.register()


register()
