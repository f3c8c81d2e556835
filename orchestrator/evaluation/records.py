"""Evaluations as rows of the manifest's table `evaluations`.

They are kept with the compressed model that was evaluated, also those of the dense model it was
compared with: ``MODEL/manifest/evaluations/<evaluation_id>.parquet``. A dense model has no
manifest; when it is evaluated alone they are kept beside it, in ``MODEL.eval/manifest``.

An evaluation's id is a hash of the model and of all that decides the figure, so the same
evaluation made again replaces its rows, and one with another setting does not.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from lestd_kernels.errors import LestdError
from orchestrator.console import logs
from orchestrator.evaluation.model import EvaluationModel, open_model
from orchestrator.manifest.manifest import Manifest
from orchestrator.model.adapter import adapter_file
from orchestrator.model.verify import stored_scope_bytes
from orchestrator.source.checkpoint import read_config_json
from workers.checkpoint.digests import sample_digests
from workers.checkpoint.tensors import ShardIndex
from workers.host.devices import software_versions
from workers.storage.files import AnyPath, file_sha256
from workers.storage.names import MANIFEST_DIR

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class ModelFacts:
    """Row of the table for a model.

    Attributes:
        model: the model, as it was named.
        model_id: sha256 of its config and of samples of its weights.
        tokenizer_sha256: of the files of its tokenizer.
        compressed: whether lestd compressed it.
        model_bytes: bytes of its safetensors files, headers included.
        dense_bytes: bytes of its weights in scope when they were dense; None if not compressed.
        stored_bytes: bytes that these are stored in; None if not compressed.
    """

    model: str
    model_id: str
    tokenizer_sha256: str
    compressed: bool
    model_bytes: int
    dense_bytes: int | None
    stored_bytes: int | None


def model_facts(model: EvaluationModel) -> ModelFacts:
    """Tell a model from all others, without reading it whole.

    Raises:
        LestdError: a file of it is damaged.
    """
    directory = model.directory
    shards = sample_digests(ShardIndex.from_directory(directory))
    if (adapter := adapter_file(directory)) is not None:
        shards[adapter.name] = file_sha256(adapter)
    names = {*_TOKENIZER_FILES, *model.tokenizer.vocab_files_names.values()}
    tokenizer = {
        name: file_sha256(directory / name)
        for name in sorted(names)
        if (directory / name).is_file()
    }
    scope = stored_scope_bytes(directory) or {}
    return ModelFacts(
        model=str(directory),
        model_id=_digest({"config.json": read_config_json(directory), "shards": shards}),
        tokenizer_sha256=_digest(tokenizer),
        compressed=is_compressed(directory),
        model_bytes=model.bytes_on_disk,
        dense_bytes=scope.get("dense_bytes"),
        stored_bytes=scope.get("stored_bytes"),
    )


def open_models(
    models: Sequence[Path], window: int | None = None
) -> list[tuple[EvaluationModel, ModelFacts]]:
    """Find all models, and what identifies them, before the first is evaluated.

    Raises:
        LestdError: see `open_model`.
    """
    opened = [open_model(model, window) for model in models]
    return [(model, model_facts(model)) for model in opened]


def is_compressed(directory: Path) -> bool:
    """Whether a model is one of lestd, by its config.json."""
    quantization = read_config_json(directory).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "lestd"


def evaluation_versions(**more: str) -> dict[str, str]:
    """Versions of what decides a figure."""
    return software_versions() | {"transformers": transformers.__version__} | more


def evaluation_id(facts: ModelFacts, deciding: Mapping[str, Any]) -> str:
    """Names an evaluation: a hash of the model and of all that decides the figure."""
    return _digest({"model_id": facts.model_id, **deciding})[:32]


def model_columns(facts: ModelFacts) -> dict[str, Any]:
    """The columns that say which model a row is of."""
    return {
        "model": facts.model,
        "model_id": facts.model_id,
        "compressed": facts.compressed,
        "model_bytes": facts.model_bytes,
        "dense_bytes": facts.dense_bytes,
        "stored_bytes": facts.stored_bytes,
    }


def manifest_of_evaluations(model: Path, run_dir: AnyPath) -> Manifest:
    """Where the evaluations of a model, and of those it is held against, are kept."""
    return Manifest((model if is_compressed(model) else run_dir) / MANIFEST_DIR)


def record(rows: Sequence[dict[str, Any]], manifest: Manifest) -> None:
    """Record one evaluation; where its directory cannot be written, a warning says so."""
    try:
        manifest.record_evaluation(rows)
    except (OSError, LestdError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        logs.log(
            "evaluation_not_recorded",
            f"the evaluation of {rows[0]['model']} is not recorded, because {manifest.directory} "
            f"cannot be written ({reason})",
            logging.WARNING,
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
