"""Tucker for every head on its own: TensorLLM without the basis that the heads share.

The slices (d x p) of a head, W_q, W_k, W_v and W_o^T, are one tensor with factors of its own, U1
(d, R1) and U2 (p, R2), and a dense core (R1, R2) per slice; the type mode stays whole. Query heads
that share a key and value head belong to one unit with it. The ranks are those of least error in
the byte budget, the same for all heads.

    module q, k, v    x (d) -> U1 of all units -> cores -> U2^T
    module o          x (heads p) -> U2 -> cores^T -> U1^T, summed over the units

Reference: "TensorLLM: Tensorising Multi-Head Attention for Enhanced Reasoning and Compression in
LLMs", arXiv 2501.15674, section 3, where all heads share the factors; the comparison says what the
sharing is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lestd_kernels.errors import LestdError
from lestd_kernels.formats.chain import ModuleChain
from lestd_kernels.formats.ops import Multiply, Op, Permute
from lestd_kernels.linalg.low_rank import matrix_bytes
from lestd_kernels.linalg.stage1 import squared_sum
from lestd_kernels.methods.common.base import Decomposed, Group, MethodArgs
from lestd_kernels.methods.common.per_module import StoredChains, chain_method
from lestd_kernels.methods.common.stopwatch import Stopwatch
from lestd_kernels.search.tucker_stack import (
    RankGrid,
    StackFactors,
    StackRanks,
    best_ranks,
    fit_core,
    full_bases,
    full_ranks,
    kept_energy,
    leading_energies,
    search_grid,
)
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.tensorize import PROJECTIONS, GroupLayout, ModuleLayout
from lestd_kernels.with_tensorly import partial_tucker

_U1, _U2 = "lestd_u1", "lestd_u2"


@dataclass(frozen=True)
class _Units:
    """How the slices of a group belong to heads.

    Attributes:
        members: unit -> positions of its slices in the unfolding, in the modules' order.
        per_unit: module -> its slices of one unit.
        type_major: modules whose slices stand one type after the other instead of unit after unit.
    """

    members: tuple[tuple[int, ...], ...]
    per_unit: dict[str, int]
    type_major: frozenset[str]

    @property
    def count(self) -> int:
        """Number of units."""
        return len(self.members)


def _units_of(layout: GroupLayout) -> _Units:
    """See `_Units`.

    Raises:
        LestdError: the group is not of attention, or its heads stand in no regular order.
    """
    heads = {t: sum(s[0] == t for s in layout.slices) for t in PROJECTIONS}
    if sum(heads.values()) != len(layout.slices) or not all(heads.values()):
        raise LestdError(
            "method 'per_head_tucker' decomposes the heads of an attention block, but this group "
            f"has the modules {', '.join(m.name for m in layout.modules)}; use scope attention"
        )
    count = heads["k"]
    members: list[list[int]] = [[] for _ in range(count)]
    per_unit: dict[str, int] = {}
    type_major = set()
    position = 0
    for module in layout.modules:
        units = [head // (heads[t] // count) for t, head in module.slices]
        per = per_unit[module.name] = len(units) // count
        if units == [u for _ in range(per) for u in range(count)] and per > 1:
            type_major.add(module.name)
        elif units != [u for u in range(count) for _ in range(per)]:
            raise LestdError(
                f"method 'per_head_tucker' needs the heads of {module.name} in order, each next to "
                "its own or each type by itself; use method 'tucker'"
            )
        for offset, unit in enumerate(units):
            members[unit].append(position + offset)
        position += len(units)
    return _Units(tuple(map(tuple, members)), per_unit, frozenset(type_major))


@dataclass(kw_only=True)
class PreparedHeads(Group):
    """A group with the bases of every unit.

    Attributes:
        units: how slices belong to them.
        bases: of each unit's stack (n, d, p).
        grid: of the ranks that are looked at.
        energies: see `leading_energies`, summed over the units.
    """

    units: _Units
    bases: list[StackFactors]
    grid: RankGrid
    energies: Tensor

    def stack(self, unit: int) -> Tensor:
        """The slices of a unit, ``(n, d, p)``."""
        slices = self.unfolding.view(self.layout.width, -1, self.layout.head_dim)
        return slices[:, list(self.units.members[unit])].transpose(0, 1)


def prepare(group: Group) -> PreparedHeads:
    """Find every unit's HOSVD bases; see `Method.prepare`."""
    units, layout = _units_of(group.layout), group.layout
    shape = (len(units.members[0]), layout.width, layout.head_dim)
    grid = search_grid(shape, compress=False)
    energies = torch.zeros(1, len(grid.rows), len(grid.columns), dtype=torch.float64)
    prepared = PreparedHeads(**vars(group), units=units, bases=[], grid=grid, energies=energies)
    for unit in range(units.count):
        T = prepared.stack(unit)
        prepared.bases.append(full_bases(T, compress=False))
        energies += leading_energies(T, prepared.bases[-1], grid)
    return prepared


def _stored_bytes(
    layout: GroupLayout, units: _Units, ranks: StackRanks, value_bytes: int, args: MethodArgs
) -> int:
    _, R1, R2 = ranks
    total = matrix_bytes(layout.width, units.count * R1, value_bytes, args.factor_bits)
    total += matrix_bytes(units.count * layout.head_dim, R2, value_bytes, args.factor_bits)
    return total + sum(
        matrix_bytes(units.count * R1, per * R2, value_bytes, args.value_bits)
        for per in units.per_unit.values()
    )


def _ranks_for(prepared: PreparedHeads, byte_budget: int) -> StackRanks:
    def size(ranks: StackRanks) -> int:
        value_bytes = prepared.value_dtype.itemsize
        return _stored_bytes(prepared.layout, prepared.units, ranks, value_bytes, prepared.args)

    ranks = best_ranks(prepared.energies, prepared.grid, size, byte_budget)
    assert ranks is not None  # bounds has said so
    return ranks


def store(prepared: PreparedHeads, byte_budget: int, clock: Stopwatch) -> StoredChains:
    """Decompose every head."""
    layout, dtype, args = prepared.layout, prepared.value_dtype, prepared.args
    with clock("rank_search"):
        ranks = _ranks_for(prepared, byte_budget)
        [expected] = _left_out(prepared, [ranks])
        # Slices that one factor has projected span no more directions of the other mode.
        n, Ra, Rb = len(prepared.units.members[0]), ranks.Ra, ranks.Rb
        ranks = ranks._replace(Ra=min(Ra, n * Rb), Rb=min(Rb, n * Ra))
    with clock("stage1"):
        factors = [_fit(prepared, unit, ranks) for unit in range(prepared.units.count)]
    with clock("stage2"):
        U1 = torch.cat([U for U, _ in factors], dim=1)
        U2 = torch.cat([V for _, V in factors])
        shared = {
            _U1: EncodedCore.quantized(U1, args.factor_bits, dtype),
            _U2: EncodedCore.quantized(U2, args.factor_bits, dtype),
        }
        cores = _fit_cores(prepared, shared)
        modules = {module.name: _chain(prepared, module, cores, ranks) for module in layout.modules}
    return StoredChains(modules, shared, {"R1": ranks.Ra, "R2": ranks.Rb}, expected)


def _fit(prepared: PreparedHeads, unit: int, ranks: StackRanks) -> list[Tensor]:
    """U1 and U2 of a unit, by HOOI from its HOSVD bases."""
    T, args = prepared.stack(unit), prepared.args
    start, full = prepared.bases[unit].leading(ranks), full_ranks(T.shape)
    if ranks.Ra == full.Ra or ranks.Rb == full.Rb:
        return [start.U, start.V]  # With one mode truncated the HOSVD is the optimum.
    return partial_tucker(T, (start.U, start.V), (1, 2), args.hooi_tol, args.hooi_max_iter)


def _left_out(prepared: PreparedHeads, every: Sequence[StackRanks]) -> list[float]:
    """The squared error of each choice of ranks, before anything is rounded."""
    norm = squared_sum(prepared.unfolding)
    kept = (kept_energy(prepared.energies, prepared.grid, ranks) for ranks in every)
    return [max(norm - energy, 0.0) for energy in kept]


def errors(
    prepared: PreparedHeads, done: Decomposed, byte_budget: int, budgets: Sequence[int]
) -> list[float]:
    """The error to expect at other byte budgets."""
    return _left_out(prepared, [_ranks_for(prepared, budget) for budget in budgets])


def _fit_cores(prepared: PreparedHeads, shared: dict[str, EncodedCore]) -> dict[int, Tensor]:
    """Position of a slice in the unfolding -> its core for the factors as stored, ``(R1, R2)``."""
    count = prepared.units.count
    U1 = shared[_U1].decode().float().chunk(count, dim=1)
    U2 = shared[_U2].decode().float().chunk(count)
    cores: dict[int, Tensor] = {}
    for unit, members in enumerate(prepared.units.members):
        fitted = fit_core(prepared.stack(unit), StackFactors(U1[unit], U2[unit], None))
        cores |= dict(zip(members, fitted, strict=True))
    return cores


def _chain(
    prepared: PreparedHeads, module: ModuleLayout, cores: dict[int, Tensor], ranks: StackRanks
) -> ModuleChain:
    layout, units, args = prepared.layout, prepared.units, prepared.args
    count, per = units.count, units.per_unit[module.name]
    first = layout.columns(module).start // layout.head_dim
    own = [
        [cores[s] for s in members if first <= s < first + len(module.slices)]
        for members in units.members
    ]
    shape = (per, count, layout.head_dim)
    apart: tuple[Op, ...] = ()
    if module.basis_side == "input":
        # (units, slices of it, p), which is the module's order unless that is type after type.
        if module.name in units.type_major:
            apart = (Permute((count, per, layout.head_dim), (1, 0, 2)),)
        matrix = torch.cat([torch.cat(unit, dim=1) for unit in own])
        ops: tuple[Op, ...] = (
            Multiply(_U1),
            Multiply(0, blocks=count, distinct=True),
            Multiply(_U2, transposed=True, blocks=count * per, distinct=True, each=per),
            *apart,
        )
    else:
        if module.name in units.type_major:
            apart = (Permute(shape, (1, 0, 2)),)
        matrix = torch.cat([core.T for unit in own for core in unit])
        ops = (
            *apart,
            Multiply(_U2, blocks=count * per, distinct=True, each=per),
            Multiply(0, blocks=count, distinct=True),
            Multiply(_U1, transposed=True),
        )
    return ModuleChain(ops, (EncodedCore.quantized(matrix, args.value_bits, prepared.value_dtype),))


def workspace(layout: GroupLayout, args: MethodArgs) -> int:
    """The bases of every unit, and eigenvectors of one."""
    units = _units_of(layout)
    n = len(units.members[0]) * layout.head_dim
    bases = 4 * units.count * (layout.width * min(layout.width, n) + layout.head_dim**2)
    return bases + 48 * min(layout.width, n) ** 2


def least(layout: GroupLayout, value_bytes: int, args: MethodArgs) -> int:
    """Bytes at rank one."""
    return _stored_bytes(layout, _units_of(layout), StackRanks(1, 1, 1), value_bytes, args)


METHOD = chain_method("per_head_tucker", prepare, store, errors, least, workspace)
