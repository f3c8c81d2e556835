"""Models that can be evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lestd_kernels.errors import LestdError
from orchestrator.console import logs
from orchestrator.execution.executor import WorkerSpec
from orchestrator.model.adapter import adapter_file
from orchestrator.planning.calibration_costs import WORKER_BASE_BYTES
from orchestrator.source.checkpoint import check_pointers, load_config, read_config_json
from orchestrator.source.tokenizer import load_tokenizer, window_length
from workers.checkpoint.tensors import ShardIndex
from workers.evaluation.worker import ModelWorker
from workers.host.loading import auto_dtype

DTYPES = ("auto", "bfloat16", "float16", "float32")
"""Compute dtypes that can be asked for; see `resolve_dtype`."""


@dataclass(frozen=True)
class EvaluationModel:
    """A model that can be evaluated, as far as this is known before its weights are read.

    Attributes:
        directory: where it lies.
        tokenizer: its tokenizer.
        vocabulary: number of token ids that it knows.
        window_length: inputs of a full window.
        bytes_on_disk: bytes of its safetensors files, headers and an adapter included.
    """

    directory: Path
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    window_length: int
    bytes_on_disk: int


def open_model(model_dir: Path, window: int | None = None) -> EvaluationModel:
    """Find a dense or a compressed model, and what evaluating it takes.

    Args:
        model_dir: directory of the model, with its tokenizer.
        window: inputs per window; None for the smaller of 2048 and the model's positions.

    Raises:
        LestdError: its config, its tokenizer, its index or a shard is missing or damaged, it is no
            language model, or the window is longer than its positions.
    """
    require_positive("window", window)
    check_pointers(model_dir)
    config_json = read_config_json(model_dir)
    config = load_config(model_dir)
    text_config = config.get_text_config()
    vocabulary = getattr(text_config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise LestdError(
            f"{model_dir} is not a language model: its config.json, of model_type "
            f"{config_json.get('model_type')!r}, has no vocab_size"
        )
    files = [model_dir / shard for shard in ShardIndex.from_directory(model_dir).shards]
    if (adapter := adapter_file(model_dir)) is not None:
        files.append(adapter)
    return EvaluationModel(
        directory=model_dir,
        tokenizer=load_tokenizer(model_dir, str(model_dir)),
        vocabulary=vocabulary,
        window_length=window_length(config, window, str(model_dir)),
        bytes_on_disk=sum(file.stat().st_size for file in files),
    )


def worker_spec(
    cls: type[ModelWorker], model: EvaluationModel, logits_bytes: int, **kwargs: Any
) -> WorkerSpec:
    """Workers with a model.

    Args:
        cls: their class.
        model: the model.
        logits_bytes: memory beside the model.
        kwargs: of the class; those of `ModelWorker` among them.
    """
    return WorkerSpec(
        cls,
        {"model_dir": str(model.directory.resolve()), **kwargs},
        threads=kwargs["threads"],
        # Twice the weights leaves room for 16-bit weights computed in float32.
        memory_bytes=WORKER_BASE_BYTES + 2 * model.bytes_on_disk + logits_bytes,
        device=kwargs["device"],
        gpus=kwargs["gpus"],
    )


def resolve_dtype(model_dir: Path, dtype: str, device: str) -> str:
    """The compute dtype that is asked for; of ``"auto"`` that which `auto_dtype` gives here.

    It decides digits, and is part of what identifies an evaluation: who shares out the work
    resolves it once, and all workers compute in it, whatever CPUs they have.

    Args:
        model_dir: directory of the model.
        dtype: one of `DTYPES`.
        device: ``"cpu"`` or ``"cuda"``.
    """
    if dtype != "auto":
        return dtype
    chosen, own = (str(one).removeprefix("torch.") for one in auto_dtype(str(model_dir), device))
    if chosen != own:
        _say_other(chosen, own)
    return chosen


@cache
def _say_other(chosen: str, own: str) -> None:
    """Once, however many models are evaluated."""
    logs.log(
        "message",
        f"computed in {chosen}, because this CPU only emulates {own}; --dtype {own} for the "
        "checkpoint's own dtype",
    )


def require_positive(name: str, value: int | None) -> None:
    """Refuse the value of an option that is given, and below 1.

    Raises:
        LestdError: it is.
    """
    if value is not None and value < 1:
        raise LestdError(f"{name} must be at least 1, got {value}")
