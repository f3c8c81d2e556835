"""A model of which one decoder layer at a time is in memory.

All parameters are on the meta device but those of one layer and the few outside of the layers;
the first layer has the token embedding beside it. A pass goes through the model's own forward, so
the layer gets the mask, positions and rotary angles that the model gives it, whatever the family:
the layers before it hand on what they are given, and the pass ends when it has answered. The same
is done, with other means, by the calibration of GPTQ (arXiv 2210.17323, section 3).

Shapes: L tokens of a window, d model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lestd_kernels.errors import LestdError
from workers.checkpoint.tensors import read_tensor
from workers.contracts import TensorRef
from workers.host.loading import quiet_transformers


class LayerwiseModel:
    """A causal language model, computed layer by layer in float32.

    Args:
        config_json: contents of the checkpoint's config.json.
        tensors: all tensors of the checkpoint, by name.
        layers: path of the list of decoder layers in the model, ``"model.layers"``.
        device: where to compute.
    """

    def __init__(
        self,
        config_json: Mapping[str, Any],
        tensors: Mapping[str, TensorRef],
        layers: str,
        device: torch.device,
    ) -> None:
        config = CONFIG_MAPPING[config_json["model_type"]].from_dict(dict(config_json))
        # Buffers, such as rotary frequencies, are in no checkpoint and are computed here.
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            self.model: Any = AutoModelForCausalLM.from_config(
                config,
                trust_remote_code=False,
                dtype=torch.float32,
                # The plain one multiplies with each expert's matrix in turn, see `inputs.Watch`.
                experts_implementation="eager",
            )
        self.model.eval()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        self._tensors = tensors
        self._device = device
        self._path = layers
        self._layers: Any = self.model.get_submodule(layers)
        self._own_forwards = [layer.forward for layer in self._layers]
        self._embedding = self.model.get_input_embeddings()
        self.model.set_output_embeddings(nn.Identity())
        self._conversions: list[Any] = [*get_model_conversion_mapping(self.model)]
        self._loaded: int | None = None

    def load(self, layer: int) -> None:
        """Read the parameters of a layer, in place of those that were there.

        Raises:
            LestdError: a tensor of the layer is absent, has another shape or cannot be read.
        """
        if self._loaded == layer:
            return
        self._loaded = None
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = _on_meta(parameter)
        self.model.set_input_embeddings(self._embedding if layer == 0 else nn.Identity())
        wanted = {
            name: _Lazy(ref) for name, ref in self._tensors.items() if self._is_of(name, layer)
        }
        with quiet_transformers():
            loading, _ = convert_and_load_state_dict_in_model(
                self.model,
                {name: _Lazy(self._tensors[name]) for name in wanted},
                LoadStateDictConfig(
                    device_map={"": self._device},
                    dtype=torch.float32,
                    weight_mapping=self._conversions,
                ),
            )
        others = tuple(f"{self._path}.{i}." for i in range(len(self._layers)) if i != layer)
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta and not name.startswith(others):
                found = {key: shape for key, shape, _ in loading.mismatched_keys}
                what = f"has the shape {list(found[name])}" if name in found else "is absent"
                raise LestdError(
                    f"{name} {what}, but config.json says it has the shape "
                    f"{list(parameter.shape)}; use the config.json that belongs to the weights"
                )
        for i, module in enumerate(self._layers):
            module.forward = self._own_forwards[i] if i == layer else _hand_on
        self._loaded = layer

    def _is_of(self, name: str, layer: int) -> bool:
        """Whether a tensor of the checkpoint belongs to that layer, or to none."""
        prefix = f"{self.model.base_model_prefix}."
        # A checkpoint may leave the base model's prefix out.
        below = name.removeprefix(prefix).partition(f"{self._path.removeprefix(prefix)}.")
        return below[0] != "" or below[1] == "" or below[2].startswith(f"{layer}.")

    def run(self, given: Tensor) -> Tensor:
        """What the loaded layer makes of a window.

        Args:
            given: token ids ``(L,)``, int64, for the first layer; for any other the hidden states
                before it, ``(L, d)``, float32.

        Returns:
            Hidden states after it, ``(L, d)``, float32.
        """
        assert self._loaded is not None
        layer = self._layers[self._loaded]
        if self._loaded == 0:
            inputs = {"input_ids": given[None]}
        else:
            # Only their shape, dtype and device matter.
            width = self._embedding.embedding_dim
            inputs = {"inputs_embeds": given.new_zeros(1, len(given), width)}

        def put_in(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (given[None], *args[1:]), kwargs
            return args, kwargs | {"hidden_states": given[None]}

        answer: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            answer.append(output[0] if isinstance(output, tuple) else output)
            raise _Answered

        handles = [layer.register_forward_hook(stop)]
        if self._loaded > 0:
            handles.append(layer.register_forward_pre_hook(put_in, with_kwargs=True))
        try:
            with suppress(_Answered):
                self.model.base_model(**inputs, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return answer[0][0]


class _Answered(Exception):  # noqa: N818 - no error
    """The layer has answered; what comes after it is not computed."""


def _hand_on(*args: Any, **kwargs: Any) -> Any:
    """In place of the forward of a layer before the loaded one.

    Models either take the first of what a layer returns, or give it to the next as it is; either
    will do, since the loaded layer does not look at it.
    """
    return (args[0] if args else kwargs["hidden_states"],)


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


class _Lazy:
    """A tensor that is read when Transformers asks for its contents."""

    def __init__(self, ref: TensorRef) -> None:
        self._ref = ref

    def __getitem__(self, index: Any) -> Tensor:
        return read_tensor(self._ref)[index]
