"""Decompositions in which every module is a product of packed matrices.

Shapes: W (in, out) of a module, row-vector convention y = x W.

    low rank             W = A B                     two own matrices
    shared basis         W = U1 M                    U1 shared, an own core M
      on the output side W = M U1^T                  likewise
    Tucker per head      W = A blockdiag(M_i) blockdiag(U_i^T)
    TT matrix            W = permutations and TT cores in turn
    pruned or quantized  W = M                       one own matrix

and to any of them a sparse side matrix may be added, whose elements are exact.

Names on disk, below the block's path: ``<shared>.weight`` and what else the matrix has; for each
module ``<module>.weight`` (its first own matrix), ``<module>.m1.weight`` (the second), ..., and
``<module>.side.weight``. ``<module>.weight`` is 1-D on purpose, see
lestd_kernels.formats.shared_tucker.

Reference: the general form of a slice group; "Rethinking the Role of Tensor Decompositions in
Post-Training LLM Compression", arXiv 2606.03465, for the formats that it holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lestd_kernels.formats.entries import describe_layout, describe_module, guard_specs, layout_of
from lestd_kernels.formats.ops import Mix, Op, Permute, describe_op, op_of, product_of
from lestd_kernels.storage.codecs import TensorSpec
from lestd_kernels.storage.matrix import EncodedCore, core_specs, stored_core
from lestd_kernels.tensorize import GroupLayout, below


@dataclass(frozen=True)
class ModuleChain:
    """One module: ``W = op_1 op_2 ... (+ side)``.

    Attributes:
        ops: applied to x in order.
        own: the module's own matrices, at least one.
        side: ``(in, out)``, added.
    """

    ops: tuple[Op, ...]
    own: tuple[EncodedCore, ...]
    side: EncodedCore | None = None

    def weight(self, in_features: int, shared: Mapping[str, EncodedCore]) -> Tensor:
        """W-hat, ``(in, out)``, float32."""
        dense = [self.dense(op, shared) for op in self.ops]
        W = product_of(self.ops, dense, in_features)
        return W if self.side is None else W + self.side.decode().float()

    def dense(self, op: Op, shared: Mapping[str, EncodedCore]) -> Tensor:
        """Matrix that an op multiplies by, dense, float32; none for a permutation."""
        if isinstance(op, Permute):
            return torch.empty(0, device=self.own[0].device)
        if isinstance(op, Mix):
            weights = self.own[op.weights].decode().float()
            return (weights @ shared[op.matrices].decode().float()).view(op.rows, -1)
        matrix = self.own[op.matrix] if isinstance(op.matrix, int) else shared[op.matrix]
        return matrix.decode().float()


@dataclass(frozen=True)
class Chain:
    """A slice group whose modules are chains.

    Attributes:
        layout: the group.
        shared: matrices that several modules use, by name.
        modules: module name -> its chain; every module of the layout.
        ranks: named ranks of the group, to show; ``R1``, ``R2`` and ``R3`` have columns in the
            manifest.
        value_dtype: of values and scales.
    """

    layout: GroupLayout
    shared: Mapping[str, EncodedCore]
    modules: Mapping[str, ModuleChain]
    ranks: dict[str, int]
    value_dtype: torch.dtype

    kind = "chain"

    def _matrices(self) -> Iterator[tuple[str, EncodedCore]]:
        """Every stored matrix, with its path below the block."""
        yield from self.shared.items()
        for name, chain in self.modules.items():
            for index, matrix in enumerate(chain.own):
                yield own_path(name, index), matrix
            if chain.side is not None:
                yield f"{name}.side", chain.side

    @property
    def own_matrices(self) -> list[EncodedCore]:
        """The matrices of the modules, without those that they share and without side matrices."""
        return [matrix for chain in self.modules.values() for matrix in chain.own]

    @property
    def nnz(self) -> int:
        """Stored non-zeros of the modules' own matrices."""
        return sum(matrix.nnz for matrix in self.own_matrices)

    @property
    def core_elements(self) -> int:
        """Elements of the modules' own matrices, stored or not."""
        return sum(matrix.rows * matrix.columns for matrix in self.own_matrices)

    @property
    def chosen_bits(self) -> int | None:
        """The fewest bits of a value where every module is one matrix: its method may choose."""
        bits = {matrix.value_bits for matrix in self.own_matrices}
        whole = not self.shared and all(len(chain.own) == 1 for chain in self.modules.values())
        return min(bits) if whole else None

    @property
    def codecs(self) -> list[str]:
        """Names of the codecs of the modules' own matrices, sorted."""
        return sorted({matrix.codec for matrix in self.own_matrices})

    @property
    def stored_bytes(self) -> int:
        """Bytes of every tensor: values, scales and indices."""
        return sum(matrix.stored_bytes for _, matrix in self._matrices())

    @property
    def memory_bytes(self) -> int:
        """Bytes of every tensor once it is loaded."""
        return sum(matrix.memory_bytes for _, matrix in self._matrices())

    def check(self) -> None:
        """See `EncodedCore.check`."""
        for _, matrix in self._matrices():
            matrix.check()

    def module_weight(self, name: str) -> Tensor:
        """W-hat of one module, ``(in, out)``, float32."""
        module = next(module for module in self.layout.modules if module.name == name)
        in_features = self.layout.weight_shape(module)[1]
        return self.modules[name].weight(in_features, self.shared)

    def to_dense(self) -> dict[str, Tensor]:
        """Reconstruct the weights: module name -> W-hat ``(out, in)``, float32."""
        return {name: self.module_weight(name).T.contiguous() for name in self.modules}

    def named_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Every stored tensor under its name on disk, below `prefix` (a block's path)."""
        tensors: dict[str, Tensor] = {}
        for path, matrix in self._matrices():
            tensors |= matrix.named_tensors(below(prefix, path))
        tensors |= self.layout.guard_tensors(prefix)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def describe(self, group: str) -> dict[str, Any]:
        """The group's entry in ``quantization_config["groups"]`` of the compressed model."""
        return {
            **describe_layout(self.layout, group),
            "kind": self.kind,
            "ranks": self.ranks,
            "value_type": str(self.value_dtype).removeprefix("torch."),
            "shared": {
                name: {"path": below(group, name)} | describe_matrix(matrix)
                for name, matrix in self.shared.items()
            },
            "modules": {
                module.name: describe_module(module)
                | {
                    "ops": [describe_op(op) for op in self.modules[module.name].ops],
                    "own": [describe_matrix(own) for own in self.modules[module.name].own],
                }
                | _describe_side(self.modules[module.name].side)
                for module in self.layout.modules
            },
        }

    @staticmethod
    def stored_specs(entry: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """Name on disk, shape and dtype of every tensor that a group's entry needs, without data.

        Raises:
            KeyError: the entry lacks a key, or names a codec that does not exist.
        """
        specs: dict[str, TensorSpec] = {}
        for path, matrix in _entry_matrices(entry):
            specs |= core_specs(path, matrix, matrix["rows"], matrix["columns"])
        return specs | guard_specs(entry)

    @classmethod
    def from_named_tensors(cls, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Chain:
        """Invert `named_tensors` and `describe`; see `SharedTucker.from_named_tensors`.

        Raises:
            KeyError: the entry lacks a key, or `tensors` a tensor.
        """
        found = {
            path: stored_core(path, matrix, matrix["rows"], matrix["columns"], tensors)
            for path, matrix in _entry_matrices(entry)
        }
        block = entry["path"]
        modules = {
            name: ModuleChain(
                tuple(op_of(op) for op in module["ops"]),
                tuple(found[below(block, own_path(name, i))] for i in range(len(module["own"]))),
                found.get(below(block, f"{name}.side")),
            )
            for name, module in entry["modules"].items()
        }
        shared = {name: found[matrix["path"]] for name, matrix in entry["shared"].items()}
        dtype = getattr(torch, entry["value_type"])
        return cls(layout_of(entry), shared, modules, dict(entry["ranks"]), dtype)


def own_path(module: str, index: int) -> str:
    """Path of a module's own matrix below the block."""
    return module if index == 0 else f"{module}.m{index}"


def describe_matrix(matrix: EncodedCore) -> dict[str, Any]:
    """Description of a matrix that a loader needs before it sees the tensors."""
    return {"rows": matrix.rows, "columns": matrix.columns} | matrix.describe()


def _describe_side(side: EncodedCore | None) -> dict[str, Any]:
    return {} if side is None else {"side": describe_matrix(side)}


def _entry_matrices(entry: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Path and description of every stored matrix of a group's entry."""
    for matrix in entry["shared"].values():
        yield matrix["path"], matrix
    for name, module in entry["modules"].items():
        for index, matrix in enumerate(module["own"]):
            yield below(entry["path"], own_path(name, index)), matrix
        if "side" in module:
            yield below(entry["path"], f"{name}.side"), module["side"]
