"""Manifest + source -> a directory that is a Hugging Face model.

Finished payloads become shards as they are (by hard link, a copy where links are impossible);
every other tensor is copied byte for byte in a stream, or fetched, where the source lies
elsewhere. The directory is built beside its name and
renamed last, so it is complete or absent. Memory stays bounded by the copy buffer.

``manifest/model.json`` states the run's fingerprint and the size and sha256 of every file: what
`lestd verify` checks, and what tells a file of ours from one that somebody else put there.
"""

from __future__ import annotations

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

from lestd_kernels.decomposition import FORMAT_VERSION
from lestd_kernels.errors import LestdError
from orchestrator.manifest import Manifest, read_json, write_json
from orchestrator.plan import Plan
from orchestrator.source import Source, copy_side_files
from orchestrator.untouched import UNTOUCHED_DIR, fetch_shard
from workers.checkpoint import INDEX_FILE, read_header, write_safetensors_stream
from workers.contracts import TensorRef
from workers.files import (
    atomic_write,
    building_directory,
    explain_os_errors,
    file_sha256,
    fsync_directory,
)
from workers.ranges import is_url

MANIFEST_DIR = "manifest"
_ABOUT = "model.json"
_MANIFEST_FILES = {"groups.parquet", "slices.parquet", "curves.parquet", _ABOUT}


def payload_shard_name(row: dict[str, Any]) -> str:
    """Name of a group's payload as a shard of the model."""
    return f"lestd-{row['layer']:05d}-{row['group'].rpartition('.')[2]}.safetensors"


def assemble(
    source: Source,
    plan: Plan,
    rows: Sequence[dict[str, Any]],
    run_dir: Path,
    out: Path,
    fingerprint: dict[str, Any],
) -> None:
    """Build the compressed model at `out` from the run's finished payloads.

    Args:
        source: the checkpoint.
        plan: the run's plan.
        rows: the group row of every task, all finished.
        run_dir: the run directory.
        out: the model's directory; an earlier model of lestd there is replaced.
        fingerprint: the run's.

    Raises:
        LestdError: no space left, a source shard changed under the run, `out` has become
            somebody else's, or another driver assembles it.
    """
    building = out.with_name(f".{out.name}.assembling")
    out.parent.mkdir(parents=True, exist_ok=True)
    busy = f"another driver assembles {out}; wait for it to end, or choose another --out"
    with explain_os_errors(building), building_directory(building, busy):
        weight_map = _link_payloads(rows, run_dir / "payloads", building)
        weight_map |= _copy_untouched(plan.untouched, run_dir / UNTOUCHED_DIR, building)
        total = sum(row["stored_bytes"] for row in rows) + plan.untouched_bytes
        write_json(
            building / INDEX_FILE,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
        copy_side_files(source.fetch_side_files(), building)
        write_json(building / "config.json", compressed_config(source.config_json, rows))
        card = model_card(source, plan, rows, building)
        atomic_write(building / "README.md", lambda file: file.write(card.encode()))
        Manifest(run_dir / MANIFEST_DIR).export(
            building / MANIFEST_DIR,
            [row["task_id"] for row in rows],
            [task.task_id for task in plan.curve_tasks],
        )
        write_json(
            building / MANIFEST_DIR / _ABOUT,
            {"fingerprint": fingerprint, "files": _describe_files(building)},
        )
        fsync_directory(building)
        remove_model(out)
        building.replace(out)
        fsync_directory(out.parent)
        shutil.rmtree(run_dir / UNTOUCHED_DIR, ignore_errors=True)


def _link_payloads(rows: Iterable[dict[str, Any]], payloads: Path, target: Path) -> dict[str, str]:
    weight_map: dict[str, str] = {}
    for row in rows:
        shard = target / payload_shard_name(row)
        _link(payloads / row["payload"], shard)
        weight_map |= dict.fromkeys(read_header(shard), shard.name)
    return weight_map


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # Another file system, or one without links.
        with path.open("rb") as original:
            atomic_write(target, partial(shutil.copyfileobj, original))


def _copy_untouched(untouched: Sequence[TensorRef], fetched: Path, target: Path) -> dict[str, str]:
    """One shard for the untouched tensors of each source shard; keeps the source's sharding.

    What has to be fetched from elsewhere is kept in `fetched`, and survives an interruption.
    """
    by_shard: dict[str, list[TensorRef]] = {}
    for ref in untouched:
        by_shard.setdefault(ref.shard, []).append(ref)
    weight_map: dict[str, str] = {}
    for number, (_, refs) in enumerate(sorted(by_shard.items()), start=1):
        name = f"dense-{number:05d}-of-{len(by_shard):05d}.safetensors"
        if is_url(refs[0].shard):
            _link(fetch_shard(refs, fetched, name), target / name)
        else:
            atomic_write(target / name, partial(write_safetensors_stream, refs=refs))
        weight_map |= {ref.name: name for ref in refs}
    return weight_map


def _describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file but the manifest's own."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(directory.iterdir())
        if path.is_file()
    }


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


def model_card(source: Source, plan: Plan, rows: Sequence[dict[str, Any]], directory: Path) -> str:
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
        file_bytes=sum(path.stat().st_size for path in directory.glob("*.safetensors")),
        mib=lambda size: f"{size / 2**20:,.2f} MiB",
    )


def card_metadata(directory: Path) -> dict[str, Any]:
    """Licence and language from the source's model card, if it has one; they bind ours too."""
    card = directory / "README.md"
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


def about_model(out: Path) -> dict[str, Any] | None:
    """What ``manifest/model.json`` of a finished compressed model says; None if there is none.

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


def check_output(out: Path) -> dict[str, Any] | None:
    """What is at `out`: nothing (None), or a compressed model (what `about_model` says).

    Raises:
        LestdError: it is, or holds, something that lestd did not make and nobody may overwrite.
    """
    if out.is_symlink() or os.path.ismount(out) or (out.exists() and not out.is_dir()):
        raise LestdError(
            f"{out} is a link, a mount point or a file, and cannot be replaced by a finished "
            "model; choose a new name for --out"
        )
    if not out.exists() or not any(out.iterdir()):
        return None
    about = about_model(out)
    ours = {MANIFEST_DIR} if about is None else {MANIFEST_DIR, *about["files"]}
    foreign = [entry for entry in out.iterdir() if entry.name not in ours]
    if (out / MANIFEST_DIR).is_dir():
        foreign += [e for e in (out / MANIFEST_DIR).iterdir() if e.name not in _MANIFEST_FILES]
    if foreign:
        raise LestdError(
            f"{out} is not empty, and {min(foreign)} was not made by lestd; move it away, or "
            "choose another --out"
        )
    return about


def remove_model(out: Path) -> None:
    """Delete the compressed model at `out`; a crash leaves it whole, or gone from that name.

    Raises:
        LestdError: it holds something that lestd did not make.
    """
    replaced = out.with_name(f".{out.name}.replaced")
    if replaced.exists():
        shutil.rmtree(replaced)
    if check_output(out) is not None:
        out.replace(replaced)
        shutil.rmtree(replaced)
