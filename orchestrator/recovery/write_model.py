"""A trained compressed model as a directory: again a model of lestd, with card and manifest.

Files that training left alone are hard links to those of the model it began with. Of a model whose
own values were trained, the errors of the decomposition are not known any more (they are of other
values) and are null in the manifest; sizes, ranks and positions stay what they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from lestd_kernels.errors import LestdError
from orchestrator.console.markdown import template
from orchestrator.manifest.checks import ABOUT_FILE
from orchestrator.manifest.manifest import Manifest
from orchestrator.manifest.part_files import compacted_path, write_table
from orchestrator.manifest.schemas import CURVES, EVENTS, GROUPS, RUNS, SLICES
from orchestrator.model.adapter import ADAPTER_FILES
from orchestrator.model.assemble import payload_shard_name
from orchestrator.model.card import CARD_FILE
from orchestrator.model.directory import about_model
from orchestrator.model.reader import CompressedModel
from workers.checkpoint.tensors import read_header, read_tensor, write_safetensors
from workers.recover import LORA, Trained
from workers.storage.building import building_directory, is_free
from workers.storage.files import (
    atomic_write,
    explain_os_errors,
    file_sha256,
    fsync_directory,
    in_parallel,
    link_or_copy,
    list_tree,
    make_directory,
)
from workers.storage.json_files import json_bytes, write_json
from workers.storage.names import MANIFEST_DIR

_OF_OTHER_VALUES = {
    GROUPS.name: (
        *("relative_error", "squared_error", "squared_energy_stage1", "squared_energy_stage2"),
        *("threshold", "metric_squared_error", "expected_loss"),
    ),
    SLICES.name: ("relative_error", "squared_energy"),
}


def require_free(out: Path) -> None:
    """Refuse to write where something is.

    Raises:
        LestdError: `out` is there and is no empty directory.
    """
    if not is_free(out):
        raise LestdError(
            f"{out} already exists and is not what this recovery writes; choose another --out, "
            "or move it away"
        )


def write_recovered(
    model: CompressedModel,
    trained: Trained,
    out: Path,
    fingerprint: dict[str, Any],
    settings: Mapping[str, Any],
) -> None:
    """Write the trained model; the directory is complete or absent.

    Args:
        model: what was trained, with a manifest.
        trained: what training left.
        out: the new directory.
        fingerprint: of the new model.
        settings: for its card.

    Raises:
        LestdError: `out` is taken, or no space is left.
    """
    about = about_model(model.directory)
    assert about is not None
    out.parent.mkdir(parents=True, exist_ok=True)
    busy = f"another process writes {out}; wait for it to end, or choose another --out"
    with explain_os_errors(out), building_directory(out, "recovering", busy) as building:
        new = building.new
        in_place = trained.tensors if trained.adapter_config is None else {}
        by_shard: dict[str, dict[str, Tensor]] = {}
        for name, tensor in in_place.items():
            shard = Path(model.index.tensors[name].shard).name
            by_shard.setdefault(shard, {})[name] = tensor
        for name in about["files"]:
            if name in by_shard:
                _rewrite(model.directory / name, new / name, by_shard[name])
            elif name != CARD_FILE:
                make_directory((new / name).parent)
                link_or_copy(model.directory / name, new / name)
        if trained.adapter_config is not None:
            write_json(new / ADAPTER_FILES[0], trained.adapter_config)
            atomic_write(
                new / ADAPTER_FILES[1], lambda file: write_safetensors(file, trained.tensors)
            )
        card = _card(model.directory, settings, trained)
        atomic_write(new / CARD_FILE, lambda file: file.write(card.encode()))
        _write_manifest(model.directory, new, bool(by_shard))
        sizes = list_tree(new, lambda folder: folder != MANIFEST_DIR)
        digests = in_parallel(lambda name: file_sha256(new / name), sizes)
        files = {
            name: {"bytes": size, "sha256": digest}
            for (name, size), digest in zip(sizes.items(), digests, strict=True)
        }
        content = json_bytes({"fingerprint": fingerprint, "files": files})
        atomic_write(new / MANIFEST_DIR / ABOUT_FILE, lambda file: file.write(content))
        fsync_directory(new)
        require_free(out)
        building.finish()


def _rewrite(shard: Path, target: Path, changed: Mapping[str, Tensor]) -> None:
    """A shard with other values in some of its tensors: same names, shapes, dtypes and size."""
    tensors = {name: read_tensor(ref) for name, ref in read_header(shard).items()}
    for name, tensor in changed.items():
        old = tensors[name]
        assert (tensor.shape, tensor.dtype) == (old.shape, old.dtype), name
        tensors[name] = tensor
    atomic_write(target, lambda file: write_safetensors(file, tensors))


def _write_manifest(model: Path, target: Path, changed: bool) -> None:
    """The model's tables but its evaluations; with other payloads where values have changed."""
    manifest = Manifest(model / MANIFEST_DIR)
    (target / MANIFEST_DIR).mkdir()
    for spec in (GROUPS, SLICES, CURVES, EVENTS, RUNS):
        rows = manifest.table(spec.name).to_pylist()
        if changed:
            for row in rows:
                row |= {key: None for key in _OF_OTHER_VALUES.get(spec.name, ()) if key in row}
                if spec is GROUPS:
                    row["sha256"] = file_sha256(target / payload_shard_name(row))
                    row["payload"] = f"{row['task_id']}-{row['sha256']}.safetensors"
        if rows:
            table = pa.Table.from_pylist(rows, schema=spec.schema)
            write_table(compacted_path(target / MANIFEST_DIR, spec), table)


def _card(model: Path, settings: Mapping[str, Any], trained: Trained) -> str:
    path = model / CARD_FILE
    before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    section = template("recovery/recovery_card.md.jinja").render(
        settings=settings,
        adapter=settings["train"] == LORA,
        first_loss=trained.losses[0],
        last_loss=trained.losses[-1],
        adapter_bytes=sum(t.numel() * t.element_size() for t in trained.tensors.values()),
    )
    return f"{before.rstrip()}\n\n{section.strip()}\n"
