"""Layout of a slice group in an entry of ``quantization_config["groups"]``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lestd_kernels.storage.codecs import TensorSpec
from lestd_kernels.tensorize import (
    GUARD_DTYPE,
    GUARD_SHAPE,
    GroupLayout,
    ModuleLayout,
    StoredWeight,
    below,
    entry_slices,
)


def describe_layout(layout: GroupLayout, group: str) -> dict[str, Any]:
    """Path, sizes and guard of a group."""
    entry: dict[str, Any] = {"path": group, "width": layout.width, "head_dim": layout.head_dim}
    return entry if layout.guard is None else entry | {"guard": layout.guard}


def with_stored_path(entry: dict[str, Any], path: str, dense_path: str = "") -> dict[str, Any]:
    """The entry of a group whose tensors lie below `path`, which it states where it must.

    Transformers calls some blocks otherwise in memory than on disk; that the base model's prefix
    alone is missing, one name, is found by who reads the model. The dense model's tensors may lie
    elsewhere again, below `dense_path`.
    """
    if path not in (entry["path"], entry["path"].partition(".")[2]):
        entry = entry | {"stored_path": path}
    return entry | {"dense_path": dense_path} if dense_path not in ("", path) else entry


def groups_sha256(entries: Sequence[Mapping[str, Any]]) -> str:
    """Of all entries of a model, whatever the order of their keys.

    A number that changed may make another model of the same tensors, which nothing else tells.
    """
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def describe_module(module: ModuleLayout) -> dict[str, Any]:
    """Side and number of slices of a module, and where its dense weight lies if not as usual."""
    entry: dict[str, Any] = {"basis_side": module.basis_side, "slices": len(module.slices)}
    if module.stored is None:
        return entry
    stored: dict[str, Any] = {"tensor": module.stored.tensor}
    if module.stored.index is not None:
        stored["index"] = module.stored.index
    if module.stored.part != (0, 1):
        stored["part"] = list(module.stored.part)
    if module.stored.transposed:
        stored["transposed"] = True
    if module.stored.concatenated:
        stored["concatenated"] = True
    return entry | {"stored": stored}


def layout_of(entry: Mapping[str, Any]) -> GroupLayout:
    """The layout that an entry describes; see `entry_slices` for the names of its slices.

    Raises:
        KeyError: the entry lacks a key.
    """
    modules = tuple(
        ModuleLayout(
            name, module["basis_side"], entry_slices(name, module), stored=_stored_of(module)
        )
        for name, module in entry["modules"].items()
    )
    return GroupLayout(entry["width"], entry["head_dim"], modules, entry.get("guard"))


def _stored_of(module: Mapping[str, Any]) -> StoredWeight | None:
    if "stored" not in module:
        return None
    stored = module["stored"]
    return StoredWeight(
        stored["tensor"],
        stored.get("index"),
        tuple(stored.get("part", (0, 1))),
        stored.get("transposed", False),
        stored.get("concatenated", False),
    )


def guard_specs(entry: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """Name on disk, shape and dtype of the group's guard, where it has one."""
    if "guard" not in entry:
        return {}
    return {below(entry["path"], entry["guard"]): (GUARD_SHAPE, GUARD_DTYPE)}
