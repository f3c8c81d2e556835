"""A model of which one decoder layer at a time is in memory.

All parameters are on the meta device but those of one layer and the few outside of the layers;
the first layer has the token embedding beside it. A pass goes through the model's own forward, so
the layer gets the mask, positions and rotary angles that the model gives it, whatever the family:
the layers before it hand on what they are given, and the pass ends when it has answered. The same
is done, with other means, by the calibration of GPTQ (arXiv 2210.17323, section 3).

A gradient goes the other way: through the layer, once more computed, to what it was given. What
comes behind the last layer counts as one more, the final norm and the head, and begins that way
with the gradient of the loss.

Shapes: L tokens of a window, d model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightRenaming,
    apply_renamings,
    convert_and_load_state_dict_in_model,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lestd_kernels.errors import LestdError
from workers.calibration.gradients import logit_gradient
from workers.checkpoint.tensors import read_tensor
from workers.contracts import TensorRef
from workers.host.loading import auto_class, quiet_transformers


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
        family: Any = CONFIG_MAPPING[config_json["model_type"]]
        # As when a file is read: JSON has no infinity.
        config = family.from_dict(family._decode_special_floats(dict(config_json)))
        # Buffers, such as rotary frequencies, are in no checkpoint and are computed here.
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            self.model: Any = auto_class(config).from_config(
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
        self._head = self.model.get_output_embeddings()
        self._conversions: list[Any] = [*get_model_conversion_mapping(self.model)]
        renamings = [one for one in self._conversions if isinstance(one, WeightRenaming)]
        self._called = {name: apply_renamings(name, renamings) for name in tensors}
        self._loaded: int | None = None

    @property
    def layers(self) -> int:
        """How many decoder layers there are; as a layer, what comes behind the last of them."""
        return len(self._layers)

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
        is_head = layer == self.layers
        tied = is_head and bool(self.model.all_tied_weights_keys)
        embedded = layer == 0 or tied
        self.model.set_input_embeddings(self._embedding if embedded else nn.Identity())
        self.model.set_output_embeddings(self._head if is_head else nn.Identity())
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
        if tied:
            self.model.tie_weights(missing_keys=loading.missing_keys, recompute_mapping=False)
        self.model.requires_grad_(False)
        others = tuple(f"{self._path}.{i}." for i in range(self.layers) if i != layer)
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
        below = (
            self._called[name].removeprefix(prefix).partition(f"{self._path.removeprefix(prefix)}.")
        )
        return below[0] != "" or below[1] == "" or below[2].startswith(f"{layer}.")

    def run(self, given: Tensor) -> Tensor:
        """Output of the loaded layer for a window.

        Args:
            given: token ids ``(L,)``, int64, for the first layer; for any other the hidden states
                before it, ``(L, d)``, float32.

        Returns:
            Hidden states after it, ``(L, d)``, float32.
        """
        _, after = self._through_layer(given)
        return after

    def pull_back(self, given: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of a window's loss by what the loaded layer is given.

        Args:
            given: see `run`.
            gradient: that by the hidden states after it, ``(L, d)``, float32.

        Returns:
            That by the hidden states before it, ``(L, d)``, float32; of the first layer, by the
            embedded tokens.
        """
        # Other kernels of attention add up a gradient in an order of their own each time.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            before, after = self._through_layer(given)
            [found] = torch.autograd.grad(after, before, gradient)
        return found

    def loss_gradient(self, given: Tensor, window: int) -> Tensor:
        """The gradient of a window's loss by the hidden states after the last layer.

        Args:
            given: these, ``(L, d)``, float32.
            window: index of the window, see `workers.calibration.gradients.sampled_labels`.

        Returns:
            ``(L, d)``, float32.

        Raises:
            LestdError: a prediction is not finite.
        """
        with torch.enable_grad():
            before = given.detach().requires_grad_()
            logits = self._logits(before)
            [found] = torch.autograd.grad(logits, before, logit_gradient(logits.detach(), window))
        return found

    def _through_layer(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """Input of the loaded layer, a leaf where gradients are on, and its output."""
        assert self._loaded is not None
        layer = self._layers[self._loaded]
        inputs = {"input_ids": given[None]} if self._loaded == 0 else self._like_embedded(given)
        met: list[Tensor] = []

        def put_in(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            own = args[0] if args else kwargs["hidden_states"]
            before = (own[0] if self._loaded == 0 else given).detach()
            met.append(before.requires_grad_(torch.is_grad_enabled()))
            if args:
                return (before[None], *args[1:]), kwargs
            return args, kwargs | {"hidden_states": before[None]}

        def stop(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            met.append((output[0] if isinstance(output, tuple) else output)[0])
            raise _Answered

        handles = [
            layer.register_forward_pre_hook(put_in, with_kwargs=True),
            layer.register_forward_hook(stop),
        ]
        try:
            with suppress(_Answered):
                self.model.base_model(**inputs, use_cache=False)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # The layers of some families want more of the layers before them than hidden states.
            raise LestdError(
                f"{type(self.model).__name__} cannot be computed a layer at a time "
                f"({type(error).__name__}: {error}); choose a method and a metric that need no "
                "calibration text"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        before, after = met
        return before, after

    def _logits(self, given: Tensor) -> Tensor:
        """Predictions ``(L, V)`` from the hidden states after the last layer."""
        assert self._loaded == self.layers
        reached: list[bool] = []

        def reach(*args: Any, **kwargs: Any) -> Any:
            reached.append(True)
            return _hand_on(*args, **kwargs)

        def put_in(_: nn.Module, args: tuple[Any, ...]) -> Any:
            if reached == [True]:  # The first module behind the layers.
                reached.append(False)
                return (given[None], *args[1:])
            return None

        self._layers[-1].forward = reach
        handles = [
            module.register_forward_pre_hook(put_in)
            for name, module in self.model.named_modules()
            if not name.startswith(f"{self._path}.") and not any(module.children())
        ]
        try:
            logits: Tensor = self.model(**self._like_embedded(given), use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits[0]

    def _like_embedded(self, given: Tensor) -> dict[str, Tensor]:
        """Arguments of a forward whose layers hand on: only shape, dtype and device matter."""
        return {"inputs_embeds": given.new_zeros(1, len(given), self._embedding.embedding_dim)}


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
