"""Manifest + source -> a directory that is a Hugging Face model.

Finished payloads become shards as they are (by hard link, a copy where links are impossible, by
the store's own copy within an object store); every other tensor is copied byte for byte in a
stream, or fetched where the source lies elsewhere. Memory stays bounded by the copy buffer.

``manifest/model.json`` states the run's fingerprint and the size and sha256 of every file: what
`lestd verify` checks, and what tells a file of ours from one that somebody else put there.

On a disk the directory is built beside its name and renamed last, so it is complete or absent. An
object store has no rename, and the objects appear one by one. There model.json is put first, with
the names of what is to come, and config.json last: without it no library loads the model, and
lestd does not take it for complete but knows what to delete. An interrupted assembly starts over.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from upath import UPath

from lestd_kernels.decomposition import FORMAT_VERSION
from lestd_kernels.errors import LestdError
from orchestrator.manifest import Manifest, json_bytes, read_json, write_json
from orchestrator.plan import Plan
from orchestrator.source import CONFIG_FILE, Source, copy_side_files, is_side_file
from orchestrator.untouched import UNTOUCHED_DIR, fetch_shard
from workers.checkpoint import INDEX_FILE, read_header, write_safetensors_stream
from workers.contracts import TensorRef
from workers.files import (
    AnyPath,
    atomic_write,
    building_directory,
    copy_file,
    explain_os_errors,
    file_sha256,
    fsync_directory,
    in_parallel,
    list_files,
    make_directory,
    remove_tree,
)
from workers.ranges import is_url

MANIFEST_DIR = "manifest"
_ABOUT = "model.json"
_CARD = "README.md"
# Written anew, whatever the source has under these names.
_OF_OUR_OWN = (CONFIG_FILE, _CARD)
_MANIFEST_FILES = {"groups.parquet", "slices.parquet", "curves.parquet", _ABOUT}


def payload_shard_name(row: dict[str, Any]) -> str:
    """Name of a group's payload as a shard of the model."""
    return f"lestd-{row['layer']:05d}-{row['group'].rpartition('.')[2]}.safetensors"


def assemble(
    source: Source,
    plan: Plan,
    rows: Sequence[dict[str, Any]],
    run_dir: AnyPath,
    out: AnyPath,
    fingerprint: dict[str, Any],
) -> None:
    """Build the compressed model at `out` from the run's finished payloads.

    Args:
        source: the checkpoint.
        plan: the run's plan.
        rows: the group row of every task, all finished.
        run_dir: the run directory.
        out: the model's directory; an earlier model of lestd there is replaced, in an object store
            before the new one is there.
        fingerprint: the run's.

    Raises:
        LestdError: no space left, a source shard changed under the run, `out` has become
            somebody else's, another driver assembles it, or the object store does not answer.
    """
    if isinstance(out, UPath):
        _assemble_in_store(source, plan, rows, run_dir, out, fingerprint)
    else:
        building = out.with_name(f".{out.name}.assembling")
        make_directory(out.parent)
        busy = f"another driver assembles {out}; wait for it to end, or choose another --out"
        with explain_os_errors(building), building_directory(building, busy):
            _build(source, plan, rows, run_dir, building, fingerprint)
            fsync_directory(building)
            remove_model(out)
            building.replace(out)
            fsync_directory(out.parent)
    remove_tree(run_dir / UNTOUCHED_DIR)


def _assemble_in_store(
    source: Source,
    plan: Plan,
    rows: Sequence[dict[str, Any]],
    run_dir: AnyPath,
    out: UPath,
    fingerprint: dict[str, Any],
) -> None:
    """Build the model where nothing can be renamed; what is about to be there is stated first."""
    remove_model(out)
    names = [payload_shard_name(row) for row in rows]
    names += [*_dense_shards(plan.untouched), INDEX_FILE, *_OF_OUR_OWN]
    names += filter(is_side_file, list_files(source.fetch_side_files()))
    _write_about(out, fingerprint, {name: {} for name in names})
    _build(source, plan, rows, run_dir, out, fingerprint)


def _build(
    source: Source,
    plan: Plan,
    rows: Sequence[dict[str, Any]],
    run_dir: AnyPath,
    target: AnyPath,
    fingerprint: dict[str, Any],
) -> None:
    """Write every file of the model, config.json last."""
    weight_map = _link_payloads(rows, run_dir / "payloads", target)
    weight_map |= _copy_untouched(plan.untouched, run_dir, target)
    total = sum(row["stored_bytes"] for row in rows) + plan.untouched_bytes
    write_json(
        target / INDEX_FILE,
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )
    side_files = source.fetch_side_files()
    copy_side_files(side_files, target, but=_OF_OUR_OWN)
    card = model_card(source, plan, rows, target)
    atomic_write(target / _CARD, lambda file: file.write(card.encode()))
    Manifest(run_dir / MANIFEST_DIR).export(
        target / MANIFEST_DIR,
        [row["task_id"] for row in rows],
        [task.task_id for task in plan.curve_tasks],
    )
    config = json_bytes(compressed_config(source.config_json, rows))
    described = _describe_files(target, rows) | {
        CONFIG_FILE: {"bytes": len(config), "sha256": hashlib.sha256(config).hexdigest()}
    }
    _write_about(target, fingerprint, described)
    atomic_write(target / CONFIG_FILE, lambda file: file.write(config))


def _write_about(
    target: AnyPath, fingerprint: dict[str, Any], described: dict[str, dict[str, Any]]
) -> None:
    make_directory(target / MANIFEST_DIR)
    write_json(
        target / MANIFEST_DIR / _ABOUT,
        {"fingerprint": fingerprint, "files": dict(sorted(described.items()))},
    )


def _link_payloads(
    rows: Sequence[dict[str, Any]], payloads: AnyPath, target: AnyPath
) -> dict[str, str]:
    def link(row: dict[str, Any]) -> dict[str, str]:
        shard = target / payload_shard_name(row)
        _link(payloads / row["payload"], shard)
        return dict.fromkeys(read_header(shard), shard.name)

    return {name: shard for names in in_parallel(link, rows) for name, shard in names.items()}


def _link(path: AnyPath, target: AnyPath) -> None:
    try:
        if isinstance(path, UPath) or isinstance(target, UPath):
            raise OSError("no links there")
        os.link(path, target)
    except OSError:  # Another file system, or one without links.
        copy_file(path, target)


def _dense_shards(untouched: Sequence[TensorRef]) -> dict[str, list[TensorRef]]:
    """One shard for the untouched tensors of each source shard; keeps the source's sharding."""
    by_shard: dict[str, list[TensorRef]] = {}
    for ref in untouched:
        by_shard.setdefault(ref.shard, []).append(ref)
    return {
        f"dense-{number:05d}-of-{len(by_shard):05d}.safetensors": refs
        for number, (_, refs) in enumerate(sorted(by_shard.items()), start=1)
    }


def _copy_untouched(
    untouched: Sequence[TensorRef], run_dir: AnyPath, target: AnyPath
) -> dict[str, str]:
    """Copy what is not compressed; what a local run directory has of it is not fetched again."""
    weight_map: dict[str, str] = {}
    for name, refs in _dense_shards(untouched).items():
        if is_url(refs[0].shard) and isinstance(run_dir, Path):
            _link(fetch_shard(refs, run_dir / UNTOUCHED_DIR, name), target / name)
        else:  # An unfinished object cannot be kept: what is killed is fetched again.
            atomic_write(target / name, partial(write_safetensors_stream, refs=refs))
        weight_map |= {ref.name: name for ref in refs}
    return weight_map


def _describe_files(
    directory: AnyPath, rows: Iterable[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file but the manifest's own; payloads were read when it was due."""
    known = {payload_shard_name(row): row["sha256"] for row in rows}
    sizes = list_files(directory)
    others = [name for name in sizes if name not in known]
    digests = in_parallel(lambda name: file_sha256(directory / name), others)
    known |= dict(zip(others, digests, strict=True))
    return {name: {"bytes": size, "sha256": known[name]} for name, size in sizes.items()}


def compressed_config(
    config_json: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """config.json of the compressed model: the source's, and how each group is stored."""
    return config_json | {
        "quantization_config": {
            "quant_method": "lestd",
            "format_version": FORMAT_VERSION,
            "groups": [json.loads(row["format"]) for row in rows],
        }
    }


def model_card(
    source: Source, plan: Plan, rows: Sequence[dict[str, Any]], directory: AnyPath
) -> str:
    """The model's README.md: source, method, sizes, and how to load it."""
    stored = sum(row["stored_bytes"] for row in rows)
    template = files("orchestrator").joinpath("model_card.md.jinja").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, autoescape=False)
    return environment.from_string(template).render(
        # A path of this machine is nobody else's business; a Hub id is a name.
        name=source.model if source.revision else source.directory.name,
        source=source,
        plan=plan,
        rows=rows,
        method=rows[0]["method"],
        pattern=rows[0]["pattern"],
        metadata=card_metadata(source.directory),
        stored_bytes=stored,
        keep=stored / plan.dense_bytes,
        model_keep=(stored + plan.untouched_bytes) / plan.model_bytes,
        model_stored_bytes=stored + plan.untouched_bytes,
        file_bytes=sum(
            size for name, size in list_files(directory).items() if name.endswith(".safetensors")
        ),
        mib=lambda size: f"{size / 2**20:,.2f} MiB",
    )


def card_metadata(directory: Path) -> dict[str, Any]:
    """Licence and language from the source's model card, if it has one; they bind ours too."""
    card = directory / _CARD
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        metadata = yaml.safe_load(text[4 : text.index("\n---", 4)])
    except yaml.YAMLError:
        return {}
    if not isinstance(metadata, dict):
        return {}
    kept = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
    return {key: metadata[key] for key in kept if key in metadata}


def about_model(out: AnyPath) -> dict[str, Any] | None:
    """What ``manifest/model.json`` says of a compressed model; None if there is none.

    Raises:
        LestdError: the file is damaged.
    """
    path = out / MANIFEST_DIR / _ABOUT
    if not path.is_file():
        return None
    about = read_json(path)
    if not all(isinstance(about.get(key), dict) for key in ("fingerprint", "files")):
        raise LestdError(f"{path} is damaged: expected fingerprint and files; move {out} away")
    return about


def is_complete(out: AnyPath) -> bool:
    """Whether a model is assembled at `out`."""
    return (out / CONFIG_FILE).is_file() and (out / MANIFEST_DIR / _ABOUT).is_file()


def check_output(out: AnyPath) -> dict[str, Any] | None:
    """What is at `out`: no finished model (None), or a compressed one (what `about_model` says).

    Raises:
        LestdError: it is, or holds, something that lestd did not make and nobody may overwrite;
            or the object store does not answer.
    """
    with explain_os_errors(out):
        about = _check_ours(out)
        return about if is_complete(out) else None


def _check_ours(out: AnyPath) -> dict[str, Any] | None:
    linked = isinstance(out, Path) and (out.is_symlink() or os.path.ismount(out))
    if linked or (out.exists() and not out.is_dir()):
        raise LestdError(
            f"{out} is a link, a mount point or a file, and cannot be replaced by a finished "
            "model; choose a new name for --out"
        )
    if not out.exists() or not any(out.iterdir()):
        return None
    about = about_model(out)
    ours = {MANIFEST_DIR} if about is None else {MANIFEST_DIR, *about["files"]}
    foreign = [str(entry) for entry in out.iterdir() if entry.name not in ours]
    if (out / MANIFEST_DIR).is_dir():
        inside = (out / MANIFEST_DIR).iterdir()
        foreign += [str(entry) for entry in inside if entry.name not in _MANIFEST_FILES]
    if foreign:
        raise LestdError(
            f"{out} is not empty, and {min(foreign)} was not made by lestd; move it away, or "
            "choose another --out"
        )
    return about


def remove_model(out: AnyPath) -> None:
    """Delete the compressed model at `out`, or what an interrupted assembly has left there.

    On a disk a crash leaves it whole, or gone from that name; in an object store config.json goes
    first and model.json last, so what a crash leaves neither loads nor is taken for another's.

    Raises:
        LestdError: it holds something that lestd did not make.
    """
    if isinstance(out, UPath):
        with explain_os_errors(out):
            about = _check_ours(out)
            names = [] if about is None else [*about["files"]]
            (out / CONFIG_FILE).unlink(missing_ok=True)
            in_parallel(lambda name: (out / name).unlink(missing_ok=True), names)
            for name in (*sorted(_MANIFEST_FILES - {_ABOUT}), _ABOUT):
                (out / MANIFEST_DIR / name).unlink(missing_ok=True)
        return
    replaced = out.with_name(f".{out.name}.replaced")
    if replaced.exists():
        shutil.rmtree(replaced)
    _check_ours(out)
    if out.exists() and any(out.iterdir()):
        out.replace(replaced)
        shutil.rmtree(replaced)
