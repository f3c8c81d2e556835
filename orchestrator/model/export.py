"""A compressed model -> an ordinary dense checkpoint, for tools that do not support the format.

In place of each group's factors and cores stands its reconstruction W-hat, with the adapter beside
the model, if there is one, merged into it; every other tensor is copied byte for byte. The
directory is built beside its name and renamed last, so it is complete or absent. Groups are read,
reconstructed and written one after the other: memory stays bounded by the adapter, the largest
group in float32 and the copy buffer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lestd_kernels.errors import LestdError
from orchestrator.console.markdown import template
from orchestrator.model.adapter import ADAPTER_FILES, adapter_deltas
from orchestrator.model.card import CARD_FILE, card_metadata
from orchestrator.model.reader import CompressedGroup, CompressedModel, open_compressed
from orchestrator.source.checkpoint import CONFIG_FILE
from orchestrator.source.side_files import copy_side_files
from workers.checkpoint.tensors import INDEX_FILE, write_safetensors, write_safetensors_stream
from workers.contracts import TensorRef
from workers.host.devices import return_freed_memory
from workers.storage.building import building_directory, is_free
from workers.storage.files import atomic_write, explain_os_errors, fsync_directory
from workers.storage.json_files import write_json

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) after each file that is checked or written."""


@dataclass(frozen=True)
class Export:
    """A dense checkpoint that was written.

    Attributes:
        model: directory of the compressed model.
        out: directory of the dense one.
        dtypes: dtypes of the reconstructed weights, usually one.
        groups: slice groups reconstructed.
        tensors: tensors of the dense checkpoint.
        shards: its safetensors files.
        stored_bytes: bytes of the groups' tensors in the compressed model.
        dense_bytes: bytes of the reconstructed weights.
        untouched_bytes: bytes of all other tensors.
        seconds: wall clock.
    """

    model: str
    out: str
    dtypes: tuple[str, ...]
    groups: int
    tensors: int
    shards: int
    stored_bytes: int
    dense_bytes: int
    untouched_bytes: int
    seconds: float


def export_dense(
    model_dir: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Export:
    """Write the dense reconstruction of a compressed model.

    Args:
        model_dir: the compressed model.
        out: the new directory; must not exist, or be empty.
        dtype: of the reconstructed weights, rounded once from float32; None for the dtype in
            which a group's values are stored. config.json then names it too, so that an ordinary
            load does not round again.
        progress: told of every finished file.

    Raises:
        LestdError: `model_dir` holds no model compressed by lestd, or a damaged one; `out` is
            taken, or another process exports into it; no space is left.
    """
    began = time.perf_counter()
    return_freed_memory()
    out = out.absolute()
    _require_free(out)
    if out.resolve().is_relative_to(model_dir.resolve()):
        raise LestdError(
            f"{out} lies inside of the compressed model {model_dir}; give --dense a name elsewhere"
        )
    model = open_compressed(model_dir)
    stated = model.stated_shards()
    untouched_bytes = sum(ref.stored_bytes for ref in model.untouched)
    dense_bytes = sum(_dense_bytes(group, dtype) for group in model.groups)
    done, total = 0, untouched_bytes + dense_bytes + sum(row["payload_bytes"] for row in stated)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    advance(0)
    for row in stated:
        model.check_shard(row)
        advance(row["payload_bytes"])
    out.parent.mkdir(parents=True, exist_ok=True)
    busy = f"another process exports into {out}; wait for it to end, or give --dense another name"
    with explain_os_errors(out), building_directory(out, "exporting", busy) as building:
        new = building.new
        weight_map = _write_shards(model, new, dtype, advance)
        dtypes = {_dtype_name(dtype or group.value_type) for group in model.groups}
        export = Export(
            model=str(model.directory),
            out=str(out),
            dtypes=tuple(sorted(dtypes)),
            groups=len(model.groups),
            tensors=len(weight_map),
            shards=len(set(weight_map.values())),
            stored_bytes=sum(ref.stored_bytes for ref in model.stored.values()),
            dense_bytes=dense_bytes,
            untouched_bytes=untouched_bytes,
            seconds=time.perf_counter() - began,
        )
        write_json(
            new / INDEX_FILE,
            {
                "metadata": {"total_size": untouched_bytes + dense_bytes},
                "weight_map": dict(sorted(weight_map.items())),
            },
        )
        copy_side_files(model.directory, new, but=ADAPTER_FILES)
        write_json(new / CONFIG_FILE, _dense_config(model.config_json, dtype))
        card = _model_card(model, export).encode()
        atomic_write(new / CARD_FILE, lambda file: file.write(card))
        fsync_directory(new)
        _require_free(out)  # Somebody may have put a file there in the meantime.
        building.finish()
    return export


def _require_free(out: Path) -> None:
    if not is_free(out):
        raise LestdError(
            f"{out} already exists and is not an empty directory; choose a new name for "
            "--dense, or remove it"
        )


def _write_shards(
    model: CompressedModel,
    target: Path,
    dtype: torch.dtype | None,
    advance: Callable[[int], None],
) -> dict[str, str]:
    """One shard for the untouched tensors of each shard, and one per group: the weight map."""
    untouched: dict[str, list[TensorRef]] = {}
    for ref in model.untouched:
        untouched.setdefault(ref.shard, []).append(ref)
    count = len(untouched) + len(model.groups)
    names = (f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1))
    weight_map: dict[str, str] = {}
    for _, refs in sorted(untouched.items()):
        name = next(names)
        atomic_write(target / name, partial(write_safetensors_stream, refs=refs))
        weight_map |= dict.fromkeys((ref.name for ref in refs), name)
        advance(sum(ref.stored_bytes for ref in refs))
    deltas = adapter_deltas(model.directory)
    for group in model.groups:
        name = next(names)
        weights = _reconstruct(group, deltas, dtype or group.value_type)
        atomic_write(target / name, partial(write_safetensors, tensors=weights))
        weight_map |= dict.fromkeys(weights, name)
        advance(_dense_bytes(group, dtype))
    return weight_map


def _dense_bytes(group: CompressedGroup, dtype: torch.dtype | None) -> int:
    return group.elements * (dtype or group.value_type).itemsize


def _reconstruct(
    group: CompressedGroup, deltas: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """W-hat of each module, and what an adapter adds to it, rounded once."""
    weights = {}
    for name, weight in group.to_dense().items():
        weights[name] = (weight + deltas[name] if name in deltas else weight).to(dtype)
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            shard = next(iter(group.refs.values())).shard
            raise LestdError(
                f"the reconstruction of {name} is not finite in {_dtype_name(dtype)}: its tensors "
                f"in {shard} are damaged, or it needs --dtype float32"
            )
    return weights


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dense_config(config_json: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    config = {key: value for key, value in config_json.items() if key != "quantization_config"}
    if dtype is not None:
        config.pop("torch_dtype", None)  # What older configs call it.
        config["dtype"] = _dtype_name(dtype)
    return config


def _model_card(model: CompressedModel, export: Export) -> str:
    return template("model/dense_card.md.jinja").render(
        # A path of this machine is nobody else's business.
        name=model.directory.name,
        metadata=card_metadata(model.directory),
        export=export,
    )
