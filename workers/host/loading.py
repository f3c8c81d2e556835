"""A model, loaded on the device of a worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

from lestd_kernels.backends.cpu import emulated
from lestd_kernels.errors import LestdError
from workers.checkpoint.headers import DTYPES
from workers.checkpoint.tensors import ShardIndex


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bar and no loading report on the terminal while the context lasts."""
    bar = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def auto_class(config: PretrainedConfig) -> Any:
    """The class by which Transformers loads a model that writes text, with its other inputs if any.

    Args:
        config: the model's.
    """
    # Takes a second, for which no reader of a manifest need wait.
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    more = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if more and not text else AutoModelForCausalLM


def auto_dtype(model_dir: str, device: str) -> tuple[torch.dtype, torch.dtype]:
    """Compute dtype that ``"auto"`` stands for: the one place that decides it.

    Args:
        model_dir: directory of the model.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        The compute dtype, and the checkpoint's, which differs where this CPU only emulates it: then
        the model is computed in float32, which is some times as fast there.
    """
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    own = config.dtype
    if own is None:  # As Transformers: that of the first tensor that is no integer.
        tensors = ShardIndex.from_directory(Path(model_dir)).tensors.values()
        stored = (DTYPES[ref.dtype] for ref in tensors)
        own = next((one for one in stored if one.is_floating_point), torch.float32)
    return torch.float32 if device == "cpu" and emulated(own) else own, own


def load_model(model_dir: str, dtype: str, device: str, gpus: int = 1) -> Any:
    """Load a dense or a compressed model, in evaluation mode; no code of the model is run.

    Args:
        model_dir: its directory.
        dtype: compute dtype: ``"auto"`` (see `auto_dtype`), ``"bfloat16"``, ``"float16"`` or
            ``"float32"``.
        device: ``"cpu"`` or ``"cuda"``.
        gpus: with more than one, layers are divided among the GPUs that this process sees.

    Raises:
        LestdError: a tensor is absent or has another shape than config.json makes it.
    """
    # Importing anything from lestd_kernels has registered its quantizer by now.
    with quiet_transformers():
        config = AutoConfig.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
        loaded: Any = auto_class(config).from_pretrained(
            model_dir,
            dtype=auto_dtype(model_dir, device)[0] if dtype == "auto" else dtype,
            device_map="auto" if device == "cuda" and gpus > 1 else {"": device},
            local_files_only=True,
            trust_remote_code=False,
            # Mismatches are refused below, in one sentence, together with absent tensors:
            # those Transformers would only warn of, and draw at random.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model, loading = loaded
    if absent := sorted(loading["missing_keys"]):
        raise LestdError(
            f"{model_dir} lacks {len(absent)} of the model's tensors, the first is {absent[0]}; "
            "download the checkpoint again"
        )
    if mismatched := sorted(loading["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise LestdError(
            f"{model_dir}: tensor {name} has shape {tuple(found)}, config.json makes it "
            f"{tuple(expected)}; download the checkpoint again"
        )
    return model
