"""Manifest + source -> a directory that is a Hugging Face model.

Finished payloads become shards as they are (by hard link, a copy where links are impossible);
every other tensor is copied byte for byte in a stream. The directory is built beside its name and
renamed last, so it is complete or absent. Memory stays bounded by the copy buffer.
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

from jinja2 import Environment, StrictUndefined

from lestd_kernels.decomposition import FORMAT_VERSION
from lestd_kernels.errors import LestdError
from orchestrator.manifest import Manifest, write_json
from orchestrator.plan import Plan
from orchestrator.source import Source, is_side_file
from workers.checkpoint import (
    atomic_write,
    explain_os_errors,
    fsync_directory,
    read_header,
    write_safetensors_stream,
)
from workers.contracts import TensorRef

MANIFEST_DIR = "manifest"
INDEX_NAME = "model.safetensors.index.json"


def payload_shard_name(row: dict[str, Any]) -> str:
    """Name of a group's payload as a shard of the model."""
    return f"lestd-{row['layer']:05d}-{row['group'].rpartition('.')[2]}.safetensors"


def assemble(
    source: Source, plan: Plan, rows: Sequence[dict[str, Any]], run_dir: Path, out: Path
) -> None:
    """Build the compressed model at `out` from the run's finished payloads.

    Args:
        source: the checkpoint.
        plan: the run's plan.
        rows: the group row of every task, all finished.
        run_dir: the run directory.
        out: the model's directory; must not exist, or be empty.

    Raises:
        LestdError: no space left, a source shard changed under the run.
    """
    building = out.with_name(f".{out.name}.assembling")
    if building.exists():
        shutil.rmtree(building)
    building.mkdir(parents=True)
    with explain_os_errors(building):
        weight_map = _link_payloads(rows, run_dir / "payloads", building)
        weight_map |= _copy_untouched(plan.untouched, building)
        total = sum(row["stored_bytes"] for row in rows) + plan.untouched_bytes
        write_json(
            building / INDEX_NAME,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
        _copy_side_files(source.directory, building)
        write_json(building / "config.json", compressed_config(source.config_json, rows))
        Manifest(run_dir / MANIFEST_DIR).export(
            building / MANIFEST_DIR, [row["task_id"] for row in rows]
        )
        card = model_card(source, plan, rows, building)
        atomic_write(building / "README.md", lambda file: file.write(card.encode()))
        fsync_directory(building / MANIFEST_DIR)
        fsync_directory(building)
        building.replace(out)
        fsync_directory(out.parent)


def _link_payloads(rows: Iterable[dict[str, Any]], payloads: Path, target: Path) -> dict[str, str]:
    weight_map: dict[str, str] = {}
    for row in rows:
        shard = target / payload_shard_name(row)
        try:
            os.link(payloads / row["payload"], shard)
        except OSError:  # Another file system, or one without links.
            shutil.copyfile(payloads / row["payload"], shard)
            with shard.open("rb") as copied:
                os.fsync(copied.fileno())
        weight_map |= dict.fromkeys(read_header(shard), shard.name)
    return weight_map


def _copy_untouched(untouched: Sequence[TensorRef], target: Path) -> dict[str, str]:
    """One shard for the untouched tensors of each source shard; keeps the source's sharding."""
    by_shard: dict[str, list[TensorRef]] = {}
    for ref in untouched:
        by_shard.setdefault(ref.shard, []).append(ref)
    weight_map: dict[str, str] = {}
    for number, (_, refs) in enumerate(sorted(by_shard.items()), start=1):
        name = f"dense-{number:05d}-of-{len(by_shard):05d}.safetensors"
        atomic_write(target / name, partial(write_safetensors_stream, refs=refs))
        weight_map |= {ref.name: name for ref in refs}
    return weight_map


def _copy_side_files(directory: Path, target: Path) -> None:
    """Tokenizer, generation settings, licence: small files that belong to the model."""
    for path in sorted(directory.iterdir()):
        if is_side_file(path.name) and path.is_file():
            with path.open("rb") as original:
                atomic_write(target / path.name, partial(shutil.copyfileobj, original))


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
    import yaml

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


def check_output(out: Path) -> bool:
    """Whether `out` holds a finished compressed model already.

    Raises:
        LestdError: it holds something else, which is nobody's to overwrite.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    config = out / "config.json"
    if config.is_file() and (out / MANIFEST_DIR / "groups.parquet").is_file():
        try:
            data = json.loads(config.read_text(encoding="utf-8"))
            if data["quantization_config"]["quant_method"] == "lestd":
                return True
        except (ValueError, KeyError, TypeError):
            pass
    raise LestdError(
        f"{out} is not empty and was not made by lestd; choose another --out, or empty it yourself"
    )
