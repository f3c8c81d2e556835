"""The adapter beside a compressed model: peft's two files, in the model's own directory.

Transformers loads them with the model, by one `from_pretrained`; `PeftModel.from_pretrained` takes
the directory as an adapter's. Its tensors count where the model's size does.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from lestd_kernels.errors import LestdError
from workers.checkpoint.tensors import read_header, read_tensor
from workers.storage.json_files import read_json

ADAPTER_FILES = (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME)
"""Configuration and tensors."""

_PREFIX = "base_model.model."


def adapter_file(model: Path) -> Path | None:
    """The tensors of the adapter in a model's directory; None where there is none."""
    path = model / ADAPTER_SAFE_WEIGHTS_NAME
    return path if path.is_file() else None


def adapter_stored_bytes(model: Path) -> int:
    """Bytes of the adapter's tensors; 0 where there is none.

    Raises:
        LestdError: the file is damaged.
    """
    path = adapter_file(model)
    return 0 if path is None else sum(ref.stored_bytes for ref in read_header(path).values())


def adapter_deltas(model: Path) -> dict[str, Tensor]:
    """Weights that the adapter adds: tensor name -> ``(out, in)``, float32.

    ``alpha / r B A`` in the shapes of ``nn.Linear.weight``. Empty where there is no adapter.

    Raises:
        LestdError: the files are damaged.
    """
    path = adapter_file(model)
    if path is None:
        return {}
    config, refs = read_json(model / ADAPTER_CONFIG_NAME), read_header(path)
    try:
        scale = config["lora_alpha"] / config["r"]
        down = {name: ref for name, ref in refs.items() if name.endswith(".lora_A.weight")}
        deltas = {}
        for name, ref in down.items():
            module = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
            up = read_tensor(refs[f"{_PREFIX}{module}.lora_B.weight"]).float()
            deltas[f"{module}.weight"] = scale * (up @ read_tensor(ref).float())
    except (KeyError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise LestdError(
            f"the adapter of {model} cannot be read ({type(error).__name__}: {error}); copy the "
            "model again from where it was made"
        ) from error
    return deltas
