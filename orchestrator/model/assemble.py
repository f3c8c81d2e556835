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
Whoever writes or deletes there holds a lease, ``.OUT.assembling`` beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from upath import UPath

from lestd_kernels.errors import LestdError
from lestd_kernels.formats.entries import groups_sha256
from lestd_kernels.formats.shared_tucker import FORMAT_VERSION
from orchestrator.manifest.checks import ABOUT_FILE
from orchestrator.manifest.manifest import Manifest, keep_evaluations
from orchestrator.model.card import CARD_FILE, model_card
from orchestrator.model.directory import (
    _check_ours,
    _remove_objects,
    about_model,
    building_model,
    check_output,
    list_model,
    sole_writer,
)
from orchestrator.model.untouched import UNTOUCHED_DIR, fetch_shard
from orchestrator.planning.plan import Plan
from orchestrator.run.fingerprint import require_same
from orchestrator.source.checkpoint import CONFIG_FILE, Source
from orchestrator.source.side_files import copy_side_files, find_side_files
from workers.checkpoint.tensors import INDEX_FILE, read_header, write_safetensors_stream
from workers.contracts import OUTSIDE, TensorRef
from workers.storage.files import (
    AnyPath,
    atomic_write,
    explain_os_errors,
    file_sha256,
    fsync_directory,
    in_parallel,
    link_or_copy,
    make_directory,
    remove_tree,
)
from workers.storage.json_files import json_bytes, write_json
from workers.storage.names import MANIFEST_DIR, is_inside
from workers.storage.ranges import is_url

# Written anew, whatever the source has under these names.
_OF_OUR_OWN = (CONFIG_FILE, CARD_FILE)


def payload_shard_name(row: dict[str, Any]) -> str:
    """Name of a group's payload as a shard of the model: its layer and block.

    Raises:
        LestdError: it would be no name of a file, as that of a damaged manifest.
    """
    path = row["block"]
    layer = "outside" if row["layer"] == OUTSIDE else f"{row['layer']:05d}"
    block = path.partition(f".{row['layer']}.")[2]
    if row["layer"] == OUTSIDE:
        block = path
    elif row["scope"] == "experts":
        block = path.rpartition(".")[2]
    elif not block:  # Modules of the layer itself.
        block = row["scope"]
    name = f"lestd-{layer}-{block}.safetensors"
    if "/" in name or not is_inside(name):
        raise LestdError(
            f"the manifest names the group {row['block']!r}, whose shard would be {name!r}: it is "
            "damaged or malicious, get the model from a source you trust"
        )
    return name


def assemble(
    source: Source,
    plan: Plan,
    rows: Sequence[dict[str, Any]],
    run_dir: AnyPath,
    out: AnyPath,
    fingerprint: dict[str, Any],
    run_row: Callable[[], dict[str, Any]],
    require_lock: Callable[[], None],
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
        run_row: asked last, for the row of this call in the model's own table `runs`: the call
            as it is when only model.json and config.json are to be written.
        require_lock: raises LestdError when the run is no longer this driver's.

    Raises:
        LestdError: no space left, a source shard changed under the run, `out` has become
            somebody else's, another driver assembles it or has taken the run over, or the object
            store does not answer.
    """
    names = _file_names(source, plan, rows)

    def build(target: AnyPath, check: Callable[[], None]) -> None:
        _build(source, plan, rows, run_dir, target, fingerprint, run_row, names, check)

    if isinstance(out, UPath):
        _assemble_in_store(out, fingerprint, names, build, require_lock)
    else:
        make_directory(out.parent)
        with explain_os_errors(out), building_model(out) as building:
            build(building.new, require_lock)
            if (about := about_model(out)) and about["fingerprint"] == fingerprint:
                keep_evaluations(out, building.new)
            fsync_directory(building.new)
            _check_ours(out)
            building.finish()
    remove_tree(run_dir / UNTOUCHED_DIR)


def _assemble_in_store(
    out: UPath,
    fingerprint: dict[str, Any],
    names: Collection[str],
    build: Callable[[AnyPath, Callable[[], None]], None],
    require_lock: Callable[[], None],
) -> None:
    """Build the model where nothing can be renamed; what is about to be there is stated first."""
    with sole_writer(out) as require_out:

        def check() -> None:
            require_lock()
            require_out()

        # Another run's driver may have finished it while this one computed.
        if (about := check_output(out)) is not None:
            require_same(about["fingerprint"], fingerprint, out)
            return
        _remove_objects(out)
        check()
        _write_about(out, fingerprint, {name: {} for name in names})
        build(out, check)


def _file_names(source: Source, plan: Plan, rows: Sequence[dict[str, Any]]) -> set[str]:
    """Names of all files of the model but those of its manifest."""
    side_files = find_side_files(source.fetch_side_files())
    shards = map(payload_shard_name, rows)
    return {*shards, *_dense_shards(plan.untouched), INDEX_FILE, *side_files, *_OF_OUR_OWN}


def _build(
    source: Source,
    plan: Plan,
    rows: Sequence[dict[str, Any]],
    run_dir: AnyPath,
    target: AnyPath,
    fingerprint: dict[str, Any],
    run_row: Callable[[], dict[str, Any]],
    names: Collection[str],
    check: Callable[[], None],
) -> None:
    """Write every file of the model, config.json last; `check` is called before each."""
    weight_map = _link_payloads(rows, run_dir / "payloads", target, check)
    weight_map |= _copy_untouched(plan.untouched, run_dir, target, check)
    check()
    total = sum(row["stored_bytes"] for row in rows) + plan.untouched_bytes
    write_json(
        target / INDEX_FILE,
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )
    check()
    copy_side_files(source.fetch_side_files(), target, but=_OF_OUR_OWN)
    card = model_card(source, plan, rows, target)
    check()
    atomic_write(target / CARD_FILE, lambda file: file.write(card.encode()))
    config = json_bytes(compressed_config(source.config_json, rows))
    described = _describe_files(target, rows, names) | {
        CONFIG_FILE: {"bytes": len(config), "sha256": hashlib.sha256(config).hexdigest()}
    }
    check()
    tasks = [row["task_id"] for row in rows] + [task.task_id for task in plan.curve_tasks]
    Manifest(run_dir / MANIFEST_DIR).export(target / MANIFEST_DIR, tasks, run_row())
    check()
    _write_about(target, fingerprint, described)
    check()
    atomic_write(target / CONFIG_FILE, lambda file: file.write(config))


def _write_about(
    target: AnyPath, fingerprint: dict[str, Any], described: dict[str, dict[str, Any]]
) -> None:
    make_directory(target / MANIFEST_DIR)
    write_json(
        target / MANIFEST_DIR / ABOUT_FILE,
        {"fingerprint": fingerprint, "files": dict(sorted(described.items()))},
    )


def _link_payloads(
    rows: Sequence[dict[str, Any]], payloads: AnyPath, target: AnyPath, check: Callable[[], None]
) -> dict[str, str]:
    def link(row: dict[str, Any]) -> dict[str, str]:
        check()
        shard = target / payload_shard_name(row)
        link_or_copy(payloads / row["payload"], shard)
        return dict.fromkeys(read_header(shard), shard.name)

    return {name: shard for names in in_parallel(link, rows) for name, shard in names.items()}


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
    untouched: Sequence[TensorRef], run_dir: AnyPath, target: AnyPath, check: Callable[[], None]
) -> dict[str, str]:
    """Copy what is not compressed; what a local run directory has of it is not fetched again."""
    weight_map: dict[str, str] = {}
    for name, refs in _dense_shards(untouched).items():
        check()
        if is_url(refs[0].shard) and isinstance(run_dir, Path):
            link_or_copy(fetch_shard(refs, run_dir / UNTOUCHED_DIR, name), target / name)
        else:  # An unfinished object cannot be kept: what is killed is fetched again.
            atomic_write(target / name, partial(write_safetensors_stream, refs=refs))
        weight_map |= {ref.name: name for ref in refs}
    return weight_map


def _describe_files(
    directory: AnyPath, rows: Sequence[dict[str, Any]], names: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file but config.json and the manifest's own.

    Payloads were read when it was due.

    Raises:
        LestdError: there are other files than those of these names.
    """
    known = {payload_shard_name(row): row["sha256"] for row in rows}
    sizes = list_model(directory)
    if changed := sizes.keys() ^ (set(names) - {CONFIG_FILE}):
        raise LestdError(
            f"{directory / min(changed)} was put there or deleted by somebody else while the model "
            "was assembled; leave there only what lestd made, and run the same command again"
        )
    others = [name for name in sizes if name not in known]
    digests = in_parallel(lambda name: file_sha256(directory / name), others)
    known |= dict(zip(others, digests, strict=True))
    return {name: {"bytes": size, "sha256": known[name]} for name, size in sizes.items()}


def compressed_config(
    config_json: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """config.json of the compressed model: the source's, and how each group is stored."""
    groups = [json.loads(row["format"]) for row in rows]
    return config_json | {
        "quantization_config": {
            "quant_method": "lestd",
            "format_version": FORMAT_VERSION,
            "groups": groups,
            "groups_sha256": groups_sha256(groups),
        }
    }
