"""A compressed model -> a checkpoint in a form that tools without the format read.

In place of each group stands what the form makes of it; every other tensor is copied byte for byte.
The directory is built beside its name and renamed last, so it is complete or absent. Groups are
read and written one after the other: memory stays bounded by the adapter, the largest group in
float32 and the copy buffer.

The dense form is the reconstruction W-hat, with the adapter beside the model, if there is one,
merged into it. The other one is that of orchestrator/model/packed_export.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
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
    """A checkpoint that was written.

    Attributes:
        model: directory of the compressed model.
        out: directory of the checkpoint.
        dtypes: of the groups' weights, or of their scales, usually one.
        groups: slice groups written.
        tensors: tensors of the checkpoint.
        shards: its safetensors files.
        stored_bytes: bytes of the groups' tensors in the compressed model.
        exported_bytes: bytes of the groups' tensors in the checkpoint.
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
    exported_bytes: int
    untouched_bytes: int
    seconds: float


@dataclass(frozen=True)
class Form:
    """What a checkpoint holds in place of the groups of a compressed model.

    Attributes:
        option: of the command line that asks for it.
        check: the model can be written so; raises LestdError where not. Reads no tensors.
        group_bytes: of what takes the place of a group.
        tensors: reads a group: name in the checkpoint -> tensor.
        dtype: of a group's weights, or of their scales.
        config: the checkpoint's config.json.
        card: template of its model card.
    """

    option: str
    check: Callable[[CompressedModel], None]
    group_bytes: Callable[[CompressedGroup], int]
    tensors: Callable[[CompressedGroup], dict[str, Tensor]]
    dtype: Callable[[CompressedGroup], torch.dtype]
    config: Callable[[CompressedModel], dict[str, Any]]
    card: str


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
        LestdError: see `export_model`.
    """

    @cache
    def deltas() -> dict[str, Tensor]:
        return adapter_deltas(model_dir.absolute())

    def dtype_of(group: CompressedGroup) -> torch.dtype:
        return dtype or group.value_type

    form = Form(
        option="--dense",
        check=lambda model: None,
        group_bytes=lambda group: group.elements * dtype_of(group).itemsize,
        tensors=lambda group: _reconstruct(group, deltas(), dtype_of(group)),
        dtype=dtype_of,
        config=lambda model: _dense_config(model.config_json, dtype),
        card="model/dense_card.md.jinja",
    )
    return export_model(model_dir, out, form, progress)


def export_model(
    model_dir: Path, out: Path, form: Form, progress: Progress | None = None
) -> Export:
    """Write a compressed model in another form.

    Args:
        model_dir: the compressed model.
        out: the new directory; must not exist, or be empty.
        form: of the checkpoint.
        progress: told of every finished file.

    Raises:
        LestdError: `model_dir` holds no model compressed by lestd, or a damaged one, or one that
            has no such form; `out` is taken, or another process exports into it; no space is left.
    """
    began = time.perf_counter()
    return_freed_memory()
    out = out.absolute()
    _require_free(out, form.option)
    if out.resolve().is_relative_to(model_dir.resolve()):
        raise LestdError(
            f"{out} lies inside of the compressed model {model_dir}; give {form.option} a name "
            "elsewhere"
        )
    model = open_compressed(model_dir)
    form.check(model)
    stated = model.stated_shards()
    untouched_bytes = sum(ref.stored_bytes for ref in model.untouched)
    exported_bytes = sum(map(form.group_bytes, model.groups))
    done, total = 0, untouched_bytes + exported_bytes + sum(row["payload_bytes"] for row in stated)

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
    busy = (
        f"another process exports into {out}; wait for it to end, or give {form.option} another "
        "name"
    )
    with explain_os_errors(out), building_directory(out, "exporting", busy) as building:
        new = building.new
        weight_map = _write_shards(model, new, form, advance)
        dtypes = {_dtype_name(form.dtype(group)) for group in model.groups}
        export = Export(
            model=str(model.directory),
            out=str(out),
            dtypes=tuple(sorted(dtypes)),
            groups=len(model.groups),
            tensors=len(weight_map),
            shards=len(set(weight_map.values())),
            stored_bytes=sum(ref.stored_bytes for ref in model.stored.values()),
            exported_bytes=exported_bytes,
            untouched_bytes=untouched_bytes,
            seconds=time.perf_counter() - began,
        )
        write_json(
            new / INDEX_FILE,
            {
                "metadata": {"total_size": untouched_bytes + exported_bytes},
                "weight_map": dict(sorted(weight_map.items())),
            },
        )
        copy_side_files(model.directory, new, but=ADAPTER_FILES)
        write_json(new / CONFIG_FILE, form.config(model))
        card = _model_card(model, export, form.card).encode()
        atomic_write(new / CARD_FILE, lambda file: file.write(card))
        fsync_directory(new)
        _require_free(out, form.option)  # Somebody may have put a file there in the meantime.
        building.finish()
    return export


def _require_free(out: Path, option: str) -> None:
    if not is_free(out):
        raise LestdError(
            f"{out} already exists and is not an empty directory; choose a new name for "
            f"{option}, or remove it"
        )


def _write_shards(
    model: CompressedModel,
    target: Path,
    form: Form,
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
    for group in model.groups:
        name = next(names)
        weights = form.tensors(group)
        atomic_write(target / name, partial(write_safetensors, tensors=weights))
        weight_map |= dict.fromkeys(weights, name)
        advance(form.group_bytes(group))
    return weight_map


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


def _model_card(model: CompressedModel, export: Export, card: str) -> str:
    return template(card).render(
        # A path of this machine is nobody else's business.
        name=model.directory.name,
        metadata=card_metadata(model.directory),
        export=export,
    )
