"""Shared Tucker form of a slice group: named tensors, a kind, and how to apply them.

Shapes: d model width, p head width, h heads, R1 R2 R3 ranks, S_m slices of module m, T = 4 types.

`SharedTucker` is the main kind. Every slice of the group is ``W_s ~ U1 M_s U2^T`` with
``M_s (R1 x R2)``; module m stores its slices side by side as one core M (R1 x S_m R2).

    type mode   core stored                                   M of module m
    identity    per module, (R1 x S_m R2)                     the core itself
    learned     one per group, G (R1 x R3 h R2), and U3       M_{t,i} = sum_r U3[t, r] G[:, r, i, :]

Names on disk, below the block's prefix: ``lestd_u1.weight``, ``lestd_u2.weight``, and for each
module ``<module>.weight`` (1-D: the core's values, or the module's rows of U3), ``<module>.mask``
and so on as the codec says. ``<module>.weight`` is 1-D on purpose: a loader that does not know
the format meets a shape it cannot use and stops, instead of initializing the weight at random.

Reference: LeSTD (ICLR 2026), eq. of the shared-basis Tucker form; Tucker notation as in Kolda and
Bader, "Tensor Decompositions and Applications", SIAM Review 51(3), 2009.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lestd_kernels.formats.entries import describe_layout, describe_module, guard_specs, layout_of
from lestd_kernels.storage.codecs import TensorSpec
from lestd_kernels.storage.matrix import EncodedCore, core_specs, stored_core
from lestd_kernels.tensorize import (
    PROJECTIONS,
    GroupLayout,
    ModuleLayout,
    below,
    fold_weights,
)

QUANT_METHOD = "lestd"
"""Name of the format in `quantization_config`."""
FORMAT_VERSION = 1
"""Version of the stored form: of the tensors' names and of `SharedTucker.describe`."""

U1_NAME, U2_NAME, CORE_NAME = "lestd_u1", "lestd_u2", "lestd_core"


def module_types(module: ModuleLayout) -> tuple[int, ...]:
    """Types (indices into `PROJECTIONS`) that a module holds, in storage order.

    Raises:
        ValueError: the module's slices are not heads-major with the same types for every head,
            which a learned type mode needs.
    """
    types = tuple(PROJECTIONS.index(p) for p, head in module.slices if head == 0)
    heads = len(module.slices) // max(len(types), 1)
    regular = tuple((PROJECTIONS[t], i) for i in range(heads) for t in types)
    if module.slices != regular:
        raise ValueError(f"{module.name}: slices are not regular over heads and types")
    return types


def mix_types(core: Tensor, U3_rows: Tensor, R2: int) -> Tensor:
    """The core of one module from the shared core of a group with a learned type mode.

    Args:
        core: G as ``(R1, R3 h R2)``.
        U3_rows: the module's rows of U3, ``(T_m, R3)``.
        R2: second rank.

    Returns:
        M ``(R1, h T_m R2)``: slices heads-major, the order in which the module stores them.
    """
    R1, R3 = core.shape[0], U3_rows.shape[1]
    G = core.reshape(R1, R3, -1, R2)
    return torch.einsum("arhb,tr->ahtb", G, U3_rows).reshape(R1, -1)


@dataclass(frozen=True)
class SharedTucker:
    """A slice group in a shared basis: ``W_s ~ U1 M_s U2^T`` for each of its slices.

    Attributes:
        layout: the group.
        U1: ``(d, R1)``, value dtype.
        U2: ``(p, R2)``, value dtype.
        cores: type mode identity: module name -> core ``(R1, S_m R2)``.
            Type mode learned: ``{"lestd_core": G (R1, R3 h R2)}``.
        U3: ``(4, R3)``, value dtype, type mode learned only.
    """

    layout: GroupLayout
    U1: Tensor
    U2: Tensor
    cores: Mapping[str, EncodedCore]
    U3: Tensor | None = None

    kind = "shared_tucker"

    @property
    def ranks(self) -> dict[str, int]:
        """``R1``, ``R2`` and, with a learned type mode, ``R3``."""
        ranks = {"R1": self.U1.shape[1], "R2": self.U2.shape[1]}
        return ranks if self.U3 is None else ranks | {"R3": self.U3.shape[1]}

    @property
    def nnz(self) -> int:
        """Non-zero core elements of the group."""
        return sum(core.nnz for core in self.cores.values())

    @property
    def core_elements(self) -> int:
        """Elements of the cores, stored or not."""
        return sum(core.rows * core.columns for core in self.cores.values())

    @property
    def codecs(self) -> list[str]:
        """Names of the cores' codecs, sorted."""
        return sorted({core.codec for core in self.cores.values()})

    def check(self) -> None:
        """See `EncodedCore.check`."""
        for core in self.cores.values():
            core.check()

    @property
    def stored_bytes(self) -> int:
        """Bytes of every tensor of the decomposition: factors, values and indices."""
        tensors = self.named_tensors("").values()
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the tensors once they are loaded: none of them is coded."""
        return self.stored_bytes

    def module_cores(self) -> Iterator[Tensor]:
        """M ``(R1, S_m R2)`` of every module in order, dense, float32."""
        return self.mixed_cores(core.decode() for core in self.cores.values())

    def mixed_cores(self, cores: Iterable[Tensor]) -> Iterator[Tensor]:
        """`module_cores` for cores that are decoded already, in order, in the value dtype."""
        if self.U3 is None:
            for core in cores:
                yield core.float()
            return
        [core] = (core.float() for core in cores)
        for module in self.layout.modules:
            U3_rows = self.U3[list(module_types(module))].float()
            yield mix_types(core, U3_rows, self.U2.shape[1])

    def to_dense(self) -> dict[str, Tensor]:
        """Reconstruct the weights: module name -> W-hat ``(out, in)``, float32."""
        return fold_weights(self.reconstruct(), self.layout)

    def reconstruct(self) -> Tensor:
        """Reconstruct the unfolding ``(d, S p)``, float32."""
        U1, U2 = self.U1.float(), self.U2.float()
        blocks = []
        for core in self.module_cores():
            M = core.reshape(U1.shape[1], -1, U2.shape[1])
            blocks.append(U1 @ (M @ U2.T).flatten(1))
        return torch.cat(blocks, dim=1)

    def named_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Every stored tensor under its name on disk, below `prefix` (a block's path)."""
        tensors = {
            below(prefix, f"{U1_NAME}.weight"): self.U1,
            below(prefix, f"{U2_NAME}.weight"): self.U2,
        }
        for name, core in self.cores.items():
            tensors |= core.named_tensors(below(prefix, name))
        if self.U3 is not None:
            for module in self.layout.modules:
                rows = self.U3[list(module_types(module))]
                tensors[below(prefix, f"{module.name}.weight")] = rows.reshape(-1)
        tensors |= self.layout.guard_tensors(prefix)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    @classmethod
    def from_named_tensors(
        cls, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> SharedTucker:
        """Invert `named_tensors` and `describe`.

        Args:
            entry: the group's entry, as `describe` wrote it.
            tensors: tensor name on disk -> tensor; read for each name of `stored_specs`, others
                are left alone.

        Returns:
            The group. An identity type mode does not say which projection a slice belongs to:
            slice i of module m is then called ``(m, i)``.

        Raises:
            KeyError: the entry lacks a key, or `tensors` a tensor.
        """
        path, ranks, modules = entry["path"], entry["ranks"], entry["modules"]
        U1 = tensors[f"{entry['factors']['U1']}.weight"]
        U2 = tensors[f"{entry['factors']['U2']}.weight"]
        layout = layout_of(entry)
        if "core" not in entry:
            cores = {
                name: stored_core(
                    f"{path}.{name}", module, ranks["R1"], module["slices"] * ranks["R2"], tensors
                )
                for name, module in modules.items()
            }
            return cls(layout, U1, U2, cores)
        core = entry["core"]
        shared = stored_core(core["path"], core, ranks["R1"], core["columns"], tensors)
        U3 = U1.new_zeros(len(PROJECTIONS), ranks["R3"])
        for name, module in modules.items():
            U3[module["types"]] = tensors[f"{path}.{name}.weight"].reshape(-1, ranks["R3"])
        return cls(layout, U1, U2, {CORE_NAME: shared}, U3)

    @staticmethod
    def stored_specs(entry: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """Name on disk, shape and dtype of every tensor that a group's entry needs, without data.

        Args:
            entry: as `describe` wrote it.

        Raises:
            KeyError: the entry lacks a key, or names a codec that does not exist.
        """
        path, ranks, modules = entry["path"], entry["ranks"], entry["modules"]
        specs: dict[str, TensorSpec] = {
            f"{entry['factors']['U1']}.weight": ((entry["width"], ranks["R1"]), None),
            f"{entry['factors']['U2']}.weight": ((entry["head_dim"], ranks["R2"]), None),
        }
        if "core" in entry:
            core = entry["core"]
            specs |= core_specs(core["path"], core, ranks["R1"], core["columns"])
            for name, module in modules.items():
                specs[f"{path}.{name}.weight"] = ((len(module["types"]) * ranks["R3"],), None)
            return specs
        for name, module in modules.items():
            columns = module["slices"] * ranks["R2"]
            specs |= core_specs(f"{path}.{name}", module, ranks["R1"], columns)
        return specs | guard_specs(entry)

    def describe(self, group: str) -> dict[str, Any]:
        """The group's entry in ``quantization_config["groups"]`` of the compressed model.

        Factors are named by the path of the module that holds them, so that several groups can
        share one.
        """
        modules = {}
        for module in self.layout.modules:
            entry = describe_module(module)
            if self.U3 is None:
                entry |= self.cores[module.name].describe()
            else:
                entry["types"] = list(module_types(module))
            modules[module.name] = entry
        factors = {"U1": f"{group}.{U1_NAME}", "U2": f"{group}.{U2_NAME}"}
        description: dict[str, Any] = {
            **describe_layout(self.layout, group),
            "kind": self.kind,
            "ranks": self.ranks,
            "value_type": str(self.U1.dtype).removeprefix("torch."),
            "factors": factors,
            "modules": modules,
        }
        if self.U3 is not None:
            core = self.cores[CORE_NAME]
            description["core"] = {"path": f"{group}.{CORE_NAME}", "columns": core.columns}
            description["core"] |= core.describe()
        return description
