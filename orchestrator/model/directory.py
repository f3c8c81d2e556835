"""The directory of a compressed model: its own record, its completeness, its replacement."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from upath import UPath

from lestd_kernels.errors import LestdError
from orchestrator.manifest.checks import ABOUT_FILE, foreign_files
from orchestrator.model.card import CARD_FILE
from orchestrator.run.lease import leased
from orchestrator.source.checkpoint import CONFIG_FILE
from workers.storage.building import Building, building_directory, is_free
from workers.storage.files import (
    AnyPath,
    in_parallel,
    is_file,
    list_names,
    list_tree,
    remove_file,
    remove_tree,
)
from workers.storage.json_files import read_json
from workers.storage.names import MANIFEST_DIR, is_inside


def building_model(out: Path) -> AbstractContextManager[Building]:
    """Build `out` beside its name, as the only driver that does; see `building_directory`."""
    busy = f"another driver assembles {out}; wait for it to end, or choose another --out"
    return building_directory(out, "assembling", busy)


def sole_writer(out: UPath) -> AbstractContextManager[Callable[[], None]]:
    """Keep the drivers of other runs from `out` while the context lasts; see `leased`."""
    return leased(out.with_name(f".{out.name}.assembling"), out)


def list_model(directory: AnyPath) -> dict[str, int]:
    """All files of a model but those of its manifest: path -> bytes."""
    return list_tree(directory, lambda folder: folder != MANIFEST_DIR)


def about_model(out: AnyPath) -> dict[str, Any] | None:
    """Contents of ``manifest/model.json`` of a compressed model; None if there is none.

    Raises:
        LestdError: the file is damaged.
    """
    path = out / MANIFEST_DIR / ABOUT_FILE
    if not is_file(path):
        return None
    about = read_json(path)
    parts = [about.get("fingerprint"), files := about.get("files")]
    parts += files.values() if isinstance(files, dict) else []
    if not all(isinstance(part, dict) for part in parts):
        raise LestdError(f"{path} is damaged: expected fingerprint and files; move {out} away")
    if outside := [name for name in about["files"] if not is_inside(name)]:
        raise LestdError(
            f"{path} names the file {outside[0]!r}, which is not a path inside of {out}; it is "
            "damaged or malicious, get the model from a source you trust"
        )
    return about


def is_complete(out: AnyPath) -> bool:
    """Whether a model is assembled at `out`.

    Raises:
        LestdError: its model.json is damaged, or the object store does not answer.
    """
    about = about_model(out)
    return about is not None and _is_whole(out, about)


def _is_whole(out: AnyPath, about: dict[str, Any]) -> bool:
    """Whether what model.json states is there."""
    found = list_model(out)
    files = about["files"]
    if CONFIG_FILE not in found or not all("bytes" in stated for stated in files.values()):
        return False
    # On a disk it appeared at once; in a store, objects of two drivers may lie side by side.
    return isinstance(out, Path) or all(
        name == CARD_FILE or found.get(name) == stated["bytes"]  # People edit the card.
        for name, stated in files.items()
    )


def check_output(out: AnyPath) -> dict[str, Any] | None:
    """Look at `out`: None for no finished model, `about_model` of a compressed one.

    Raises:
        LestdError: it is, or holds, something that lestd did not make and nobody may overwrite;
            or the object store does not answer.
    """
    about = _check_ours(out)
    return about if about is not None and _is_whole(out, about) else None


def _check_ours(out: AnyPath) -> dict[str, Any] | None:
    if isinstance(out, Path):
        is_directory = out.is_dir() or not out.exists()
        taken = out.is_symlink() or os.path.ismount(out) or not is_directory
    else:
        taken = is_file(out)
    if taken:
        raise LestdError(
            f"{out} is a link, a mount point or a file, and cannot be replaced by a finished "
            "model; choose a new name for --out"
        )
    names = list_names(out)
    if not names:
        return None
    about = about_model(out)
    ours = {MANIFEST_DIR} if about is None else {MANIFEST_DIR, *about["files"]}
    ours |= {name.partition("/")[0] for name in ours if "/" in name}
    foreign = [name for name in {*names, *list_model(out)} if name not in ours]
    inside = foreign_files(out / MANIFEST_DIR)
    if foreign := [str(f) for f in (*(out / name for name in foreign), *inside)]:
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
        LestdError: it holds something that lestd did not make, another driver is at work there, or
            it cannot be deleted.
    """
    if isinstance(out, UPath):
        with sole_writer(out):
            _remove_objects(out)
        return
    _check_ours(out)
    if not is_free(out):
        with building_model(out) as building:
            building.remove_out()


def _remove_objects(out: UPath) -> None:
    about = _check_ours(out)
    names = [] if about is None else [*about["files"]]
    remove_file(out / CONFIG_FILE)
    in_parallel(lambda name: remove_file(out / name), names)
    manifest = out / MANIFEST_DIR
    for name in sorted(list_names(manifest), key=lambda name: name == ABOUT_FILE):
        remove_tree(manifest / name)
