"""vLLM learns to run ``quant_method: "lestd"``: its general plug-in, found by its entry point.

vLLM's Transformers backend (``--model-impl transformers``) builds the model of Transformers on the
meta device and puts its own layers in. The classes here exchange the modules of slice groups first
(lestd_kernels.modules.build), so that vLLM finds nothing there to replace, and load their tensors.

Both are at module level: vLLM pickles the configuration. Only vLLM imports this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.transformers import (
    TransformersForCausalLM,
    TransformersMoEForCausalLM,
)

from lestd_kernels import registration
from lestd_kernels.errors import LestdError
from lestd_kernels.formats.shared_tucker import QUANT_METHOD
from lestd_kernels.modules.build import build_groups
from lestd_kernels.modules.registry import MODULES


class LestdVllmConfig(QuantizationConfig):
    """The entries of ``quantization_config``, for vLLM.

    Attributes:
        groups: one entry per slice group, checked.
        built: whether a class of this file has built them; others would compute with the weights
            that are not there.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__()
        self.groups = groups
        self.built = False

    @classmethod
    def get_name(cls) -> str:
        """See `QuantizationConfig`."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """See `QuantizationConfig`."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """See `QuantizationConfig`: any GPU that vLLM runs on."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """See `QuantizationConfig`: config.json says it all."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LestdVllmConfig:
        """Read the entry of config.json.

        Raises:
            LestdError: see `lestd_kernels.transformers_plugin.LestdConfig.from_dict`.
        """
        return cls(registration.plugin().LestdConfig.from_dict(dict(config)).groups)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> UnquantizedLinearMethod | None:
        """How a layer of vLLM's own computes: as a dense one.

        Raises:
            LestdError: the model is not one of this file.
        """
        if not self.built:
            raise LestdError(
                "this model is compressed by lestd, which vLLM runs in its Transformers backend; "
                "add --model-impl transformers"
            )
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class _Compressed:
    """Mixed into a model class of vLLM's Transformers backend."""

    model: Any
    quant_config: Any
    model_config: Any
    device_config: Any
    tp_group: Any
    hf_to_vllm_mapper: Any

    def recursive_replace(self) -> None:
        """Build the compressed modules, then let vLLM replace the others."""
        if isinstance(self.quant_config, LestdVllmConfig):
            if self.tp_group.world_size > 1:
                raise LestdError(
                    "a model that lestd has compressed runs on one GPU, tensor parallel size "
                    f"{self.tp_group.world_size} was asked for; use --tensor-parallel-size 1, and "
                    "more replicas or --pipeline-parallel-size in place of it"
                )
            with torch.device("meta"):
                build_groups(self.model, self.quant_config.groups)
            for module in [one for one in self.model.modules() if isinstance(one, MODULES)]:
                self._materialize(module)
            _set_apart(self.model)
            self.quant_config.built = True
        super().recursive_replace()  # type: ignore[misc]

    def _materialize(self, module: nn.Module) -> None:
        """Give a module's tensors memory: floats in the model's dtype, indices in their own.

        vLLM would do so later, and make floats of the indices.
        """
        for part in module.modules():
            stores: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for store in stores:
                for name, tensor in store.items():
                    if tensor is None or not tensor.is_meta:
                        continue
                    dtype = self.model_config.dtype if tensor.is_floating_point() else None
                    empty = torch.empty_like(tensor, dtype=dtype, device=self.device_config.device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    store[name] = nn.Parameter(empty, False) if is_parameter else empty

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load our tensors here, and leave the others to vLLM.

        Raises:
            LestdError: one is absent, or has another shape.
        """
        ours = {
            f"model.{path}.{name}": tensor
            for path, module in self.model.named_modules()
            if isinstance(module, MODULES)
            for name, tensor in module.state_dict(keep_vars=True).items()
        }
        # Empty tensors, which stop who does not know the format.
        prefix = f"{self.model.base_model_prefix}."
        guards = {
            f"model.{entry['path'].removeprefix(prefix)}.{entry['guard']}"
            for entry in getattr(self.quant_config, "groups", ())
            if "guard" in entry
        }
        loaded: set[str] = set()

        def others() -> Iterator[tuple[str, torch.Tensor]]:
            for name, stored in weights:
                [(mapped, _)] = self.hf_to_vllm_mapper.apply([(name, stored)]) or [(name, stored)]
                if mapped in guards:
                    continue
                if mapped not in ours:
                    yield name, stored
                    continue
                target = ours[mapped]
                if target.shape != stored.shape:
                    raise LestdError(
                        f"the tensor {name} has shape {tuple(stored.shape)}, expected "
                        f"{tuple(target.shape)}: copy the model again from where it was made."
                    )
                with torch.no_grad():
                    target.copy_(stored)
                loaded.add(mapped)

        loaded |= super().load_weights(others())  # type: ignore[misc]
        if absent := sorted(ours.keys() - loaded):
            raise LestdError(
                f"the model lacks the tensor {absent[0]}: copy it again from where it was made."
            )
        registration.plugin().finish_loading(self.model, self.model_config.model)
        return loaded


def _set_apart(model: nn.Module) -> None:
    """Give modules that hold compressed ones a class of their own.

    vLLM looks once at each class of modules, and does to the others what it did to the first: a
    block with dense projections must not speak for one with compressed ones.
    """
    for module in list(model.modules()):
        if any(isinstance(child, MODULES) for child in module.children()):
            cls = type(module)
            module.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__})


class LestdForCausalLM(_Compressed, TransformersForCausalLM):
    """A decoder with compressed modules, in vLLM's Transformers backend."""


class LestdMoEForCausalLM(_Compressed, TransformersMoEForCausalLM):
    """The same with experts."""


def register() -> None:
    """Make the format known to vLLM, in each of its processes."""
    register_quantization_config(QUANT_METHOD)(LestdVllmConfig)
    # The names under which vLLM looks for its backend; without our format they are its own.
    for cls, name in (
        (LestdForCausalLM, "TransformersForCausalLM"),
        (LestdMoEForCausalLM, "TransformersMoEForCausalLM"),
    ):
        ModelRegistry.register_model(name, f"{__name__}:{cls.__name__}")
