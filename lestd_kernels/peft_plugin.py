"""LoRA adapters of `peft` on compressed projections; `register` makes peft accept them.

    import lestd_kernels.peft_plugin

    lestd_kernels.peft_plugin.register()
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))

Name the projections: ``target_modules="all-linear"`` means instances of `nn.Linear`, which these
are not. An adapter is y = x W_hat + s (x A) B as ever: its files are ordinary ones, and fit the
dense model with W_hat put back as well. Nothing else of lestd_kernels imports peft.

Reference: LoRA, Hu et al., ICLR 2022, section 4.1.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear
from torch import Tensor, nn

from lestd_kernels.errors import LestdError
from lestd_kernels.modules.chain_linear import ChainLinear
from lestd_kernels.modules.shared_tucker_linear import CompressedLinear

_INITIALIZATIONS = (True, False, "gaussian", "orthogonal")
"""Values of ``init_lora_weights`` that need neither the base weight nor other data."""


class CompressedLoraLinear(Linear):
    """A compressed linear module with adapters: plain LoRA, without merging."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        # peft's own warns that it does not know the type.
        assert isinstance(module, CompressedLinear | ChainLinear)
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """None but plain LoRA: DoRA and the like need the norms of the dense weight."""
        return {(): None}

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter of rank `r`; called by peft.

        Raises:
            LestdError: an initialization or a variant of LoRA that needs the dense weight.
        """
        if config.init_lora_weights not in _INITIALIZATIONS:
            raise LestdError(
                f"LoraConfig has init_lora_weights {config.init_lora_weights!r}, but a compressed "
                "projection has no dense weight to start from: use one of "
                f"{', '.join(map(repr, _INITIALIZATIONS))}."
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> None:
        """Refuse what `lora_variants` lacks; called by peft.

        Raises:
            LestdError: the configuration asks for a variant of LoRA.
        """
        try:
            super().resolve_lora_variant(config=config, **kwargs)
        except ValueError as error:
            raise LestdError(
                "a compressed projection has no dense weight, which the requested variant of LoRA "
                f"needs ({error}): use plain LoRA there."
            ) from error

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: W_hat + s A B has neither the shared bases nor the sparse core any more.

        Raises:
            LestdError: always.
        """
        raise LestdError(
            "an adapter cannot be merged into a compressed projection, whose dense weight is not "
            "stored: keep the adapter beside the model, or write the dense model with "
            "`lestd export DIR --dense OUT` and merge it there."
        )


@functools.cache
def register() -> None:
    """Let every `LoraConfig` made from now on support compressed projections.

    peft takes custom layers from the configuration that an adapter is made with
    (``LoraConfig._register_custom_module``) and does not write them to the adapter's files. Each
    configuration registers them as it is made, so that ``PeftModel.from_pretrained`` and
    ``model.load_adapter``, which make their own, work too. A second call changes nothing.
    """
    prepare: Callable[[LoraConfig], None] = LoraConfig.__post_init__

    @functools.wraps(prepare)
    def prepare_and_register(config: LoraConfig) -> None:
        prepare(config)
        kinds = (CompressedLinear, ChainLinear)
        config._register_custom_module(dict.fromkeys(kinds, CompressedLoraLinear))

    LoraConfig.__post_init__ = prepare_and_register  # type: ignore[method-assign]


def attach_adapter(model: Any, rank: int, alpha: float) -> PeftModel:
    """Give every compressed projection of a model, and nothing else, an adapter.

    Args:
        model: a compressed model, as `from_pretrained` returns it.
        rank: r.
        alpha: the product of A and B counts ``alpha / rank`` times.
    """
    register()
    kinds = (CompressedLinear, ChainLinear)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=names,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks Transformers for an attribute by its old name.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def adapter_files(model: PeftModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Contents of peft's files of a model's adapter: its configuration and its tensors.

    The same adapter gives the same two; no path of this machine is in them.
    """
    config: dict[str, Any] = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": None, "inference_mode": True}
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    tensors = get_peft_model_state_dict(model)
    return plain, {name: tensor.detach().cpu() for name, tensor in tensors.items()}
