"""A compressed model on disk: its groups, their tensors, and what they reconstruct to.

Everything is found and checked by config.json and the shards' headers; data are read for one
group at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lestd_kernels import LestdConfig
from lestd_kernels.errors import LestdError, first_line
from lestd_kernels.formats.as_tensorly import Opened, open_modules
from lestd_kernels.formats.kinds import KINDS, Decomposition
from lestd_kernels.formats.shared_tucker import QUANT_METHOD
from lestd_kernels.storage.codecs import TensorSpec
from lestd_kernels.tensorize import GroupLayout, below, dense_tensors
from orchestrator.manifest.checks import payload_problem
from orchestrator.model.directory import about_model
from orchestrator.source.checkpoint import CONFIG_FILE, check_pointers, read_config_json
from workers.checkpoint.headers import DTYPE_NAMES, DTYPES
from workers.checkpoint.tensors import ShardIndex, read_tensor
from workers.contracts import TensorRef

T = TypeVar("T")
_VALUE_DTYPES = ("BF16", "F16", "F32")
_COPY_AGAIN = "copy the model again from where it was made"


@dataclass(frozen=True)
class CompressedGroup:
    """One slice group as it is stored.

    Attributes:
        entry: its entry in ``quantization_config``, with paths as the tensors' names have them.
        refs: name -> where it lies, for each tensor that it needs; groups may share factors.
        value_type: dtype in which its values are stored.
    """

    entry: dict[str, Any]
    refs: dict[str, TensorRef]
    value_type: torch.dtype

    @property
    def elements(self) -> int:
        """Number of weight elements of the dense modules, ``S d p``."""
        slices = sum(module["slices"] for module in self.entry["modules"].values())
        return int(self.entry["width"] * self.entry["head_dim"] * slices)

    def to_dense(self) -> dict[str, Tensor]:
        """Read the group and reconstruct it: tensor name in the dense model -> W-hat, float32.

        Raises:
            LestdError: see `weights`.
        """
        weights, layout = self.weights()
        dense = dense_tensors(weights, layout)
        path = self.entry.get("dense_path", self.entry["path"])
        return {below(path, name): tensor for name, tensor in dense.items()}

    def weights(self) -> tuple[dict[str, Tensor], GroupLayout]:
        """Read and reconstruct the group: module -> W-hat ``(out, in)``, float32; its layout.

        Raises:
            LestdError: the tensors cannot be read, or do not decode.
        """
        return self.decoded(lambda stored: (stored.to_dense(), stored.layout))

    def open_modules(self) -> dict[str, Opened]:
        """Read the group: module -> its factors and cores, as tensorly's tensors.

        Raises:
            LestdError: see `weights`.
        """
        return self.decoded(open_modules)

    def decoded(self, use: Callable[[Decomposition], T]) -> T:
        """Read the group, check it, and hand it to `use`.

        Raises:
            LestdError: the tensors cannot be read, or do not decode.
        """
        path, shard = self.entry["path"], next(iter(self.refs.values())).shard
        tensors = {name: read_tensor(ref) for name, ref in self.refs.items()}
        try:
            decomposition = KINDS[self.entry["kind"]].from_named_tensors(self.entry, tensors)
            decomposition.check()
            return use(decomposition)
        except (RuntimeError, IndexError, ValueError) as error:
            raise LestdError(
                f"the tensors of {path} in {shard} do not decode ({first_line(error)}); "
                f"{_COPY_AGAIN}"
            ) from error


@dataclass(frozen=True)
class CompressedModel:
    """A compressed model whose headers agree with its config.json.

    Attributes:
        directory: where it lies.
        config_json: its config.json as it stands in the file.
        index: its tensors.
        groups: its slice groups.
    """

    directory: Path
    config_json: dict[str, Any]
    index: ShardIndex
    groups: tuple[CompressedGroup, ...]

    @property
    def stored(self) -> dict[str, TensorRef]:
        """The tensors of all groups; a factor that several groups share stands once."""
        return {name: ref for group in self.groups for name, ref in group.refs.items()}

    @property
    def untouched(self) -> list[TensorRef]:
        """All other tensors, sorted by name."""
        stored = self.stored
        return [ref for name, ref in self.index.tensors.items() if name not in stored]

    def open_block(self, block: str) -> dict[str, Opened]:
        """The modules of a block, such as ``"model.layers.0.self_attn"``, as tensorly's tensors.

        Raises:
            LestdError: no such block is compressed, or its tensors cannot be read.
        """
        groups = {group.entry["path"]: group for group in self.groups}
        if block not in groups:
            raise LestdError(
                f"{self.directory} has no compressed block {block!r}; it has {', '.join(groups)}"
            )
        return groups[block].open_modules()

    def stated_shards(self) -> list[dict[str, Any]]:
        """Name, size and sha256 of the shards that the model's manifest states, for `check_shard`.

        Empty for a model without a manifest, as `save_pretrained` writes it.

        Raises:
            LestdError: the manifest is damaged.
        """
        about = about_model(self.directory)
        files = {} if about is None else about["files"]
        rows = []
        for shard in self.index.shards:
            stated = files.get(shard)
            if stated is None:
                continue
            if not isinstance(stated, dict) or not {"bytes", "sha256"} <= stated.keys():
                raise LestdError(
                    f"the manifest of {self.directory} does not state bytes and sha256 of {shard}; "
                    f"{_COPY_AGAIN}"
                )
            row = {"payload": shard, "payload_bytes": stated["bytes"], "sha256": stated["sha256"]}
            rows.append(row)
        return rows

    def check_shard(self, row: dict[str, Any]) -> None:
        """Compare a shard with its row of `stated_shards`.

        A flipped bit in a shard would go into every weight of a layer, and nobody would see it.

        Raises:
            LestdError: it is not what the manifest says.
        """
        if problem := payload_problem(row, self.directory):
            raise LestdError(f"{problem}; {_COPY_AGAIN}")


def open_compressed(directory: Path | str) -> CompressedModel:
    """Find a compressed model, and check that config.json and the shards' headers agree.

    Raises:
        LestdError: the directory holds no model compressed by lestd, one of a newer version, or a
            damaged one.
    """
    directory = Path(directory).absolute()
    check_pointers(directory)
    config_json = read_config_json(directory)
    quantization = config_json.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != QUANT_METHOD:
        found = "no quantization_config" if method is None else f"quant_method {method!r}"
        raise LestdError(
            f"{directory} is not a model compressed by lestd: its {CONFIG_FILE} has {found}, "
            f"expected quant_method {QUANT_METHOD!r}; give the directory that lestd compress wrote"
        )
    try:
        entries = LestdConfig.from_dict(dict(quantization or {})).groups
    except LestdError as error:  # Which begins with the name of the file.
        raise LestdError(f"{directory}/{error}") from error
    index = ShardIndex.from_directory(directory)
    groups = (_open_group(entry, index) for entry in entries)
    return CompressedModel(directory, config_json, index, tuple(groups))


def _open_group(entry: dict[str, Any], index: ShardIndex) -> CompressedGroup:
    specs_of = KINDS[entry["kind"]].stored_specs
    if "stored_path" in entry:
        path, stored = entry["path"], entry["stored_path"]
        elsewhere = {k: v for k, v in entry.items() if k == "dense_path"}
        entry = (
            _with_paths(entry, lambda one: below(stored, one.removeprefix(path).removeprefix(".")))
            | elsewhere
        )
    entry = _as_on_disk(entry, next(iter(specs_of(entry))), index.tensors)
    return _find_tensors(entry, specs_of(entry), index)


def _as_on_disk(
    entry: Mapping[str, Any], first: str, names: Mapping[str, object]
) -> dict[str, Any]:
    """The entry with its paths as the tensors have them: with or without the base model's prefix.

    A model that was saved by another class than it was compressed from differs in that. `first` is
    the name of a tensor that the entry needs.
    """
    shorter = first.partition(".")[2]
    longer = next((name for name in names if name.endswith(f".{first}")), None)
    if first in names or (shorter not in names and longer is None):
        return dict(entry)

    def renamed(path: str) -> str:
        if longer is None:
            return path.partition(".")[2]
        return (longer.removesuffix(first) + path).removesuffix(".")

    return _with_paths(entry, renamed)


def _with_paths(entry: Mapping[str, Any], renamed: Callable[[str], str]) -> dict[str, Any]:
    """The entry with all of its paths renamed."""
    changed = dict(entry) | {k: renamed(entry[k]) for k in ("path", "dense_path") if k in entry}
    if "factors" in entry:
        changed["factors"] = {name: renamed(path) for name, path in entry["factors"].items()}
    if "core" in entry:
        changed["core"] = entry["core"] | {"path": renamed(entry["core"]["path"])}
    if "shared" in entry:
        changed["shared"] = {
            name: matrix | {"path": renamed(matrix["path"])}
            for name, matrix in entry["shared"].items()
        }
    return changed


def _find_tensors(
    entry: dict[str, Any], specs: Mapping[str, TensorSpec], index: ShardIndex
) -> CompressedGroup:
    """Find the tensors of a group; all its values have one dtype, that of the first."""
    refs = {}
    for name, (shape, _) in specs.items():
        ref = index.tensors.get(name)
        if ref is None:
            raise LestdError(
                f"{index.location} lacks the tensor {name}, which {CONFIG_FILE} names; "
                f"{_COPY_AGAIN}"
            )
        if ref.shape != shape:
            raise LestdError(
                f"tensor {name} in {ref.shard} has shape {list(ref.shape)}, {CONFIG_FILE} makes it "
                f"{list(shape)}; {_COPY_AGAIN}"
            )
        refs[name] = ref
    first = refs[next(name for name, (_, index_dtype) in specs.items() if index_dtype is None)]
    for name, (_, index_dtype) in specs.items():
        known = _VALUE_DTYPES if name == first.name else (first.dtype,)
        if index_dtype is not None:
            known = (DTYPE_NAMES[index_dtype],)
        if refs[name].dtype not in known:
            raise LestdError(
                f"tensor {name} in {refs[name].shard} is {refs[name].dtype}, expected "
                f"{' or '.join(known)}; {_COPY_AGAIN}"
            )
    return CompressedGroup(entry, refs, DTYPES[first.dtype])
