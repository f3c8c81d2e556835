"""Tensor trains: every matrix as a TT-matrix of three cores with balanced modes.

The ranks are those of least error in the byte budget. The first and the last core are factors with
orthonormal columns, the one between them holds the values and is fitted to the factors as stored.
In the metric ``norm`` the rows are scaled, and the inverse scaling is stored as one vector.

Measured on trained weights a train of two cores errs less at the same bytes, and the plain SVD
much less than both: reshaping breaks the structure that the matrix has.

References: Oseledets, "Tensor-train decomposition", SISC 33(5), 2011, algorithm 1 (TT-SVD); Novikov
et al., "Tensorizing neural networks", NeurIPS 2015 (TT-matrix); "Rethinking the Role of Tensor
Decompositions in Post-Training LLM Compression", arXiv 2606.03465 (trains for FFN).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lestd_kernels.errors import LestdError
from lestd_kernels.formats.chain import ModuleChain
from lestd_kernels.formats.ops import Multiply, Op, Permute
from lestd_kernels.linalg.low_rank import matrix_bytes
from lestd_kernels.linalg.metric import Metric, Root
from lestd_kernels.linalg.stage1 import squared_sum
from lestd_kernels.methods.common.base import NORM, WEIGHT, MethodArgs
from lestd_kernels.methods.common.per_module import module_method
from lestd_kernels.search.tucker_stack import (
    StackFactors,
    StackRanks,
    best_ranks,
    fit_core,
    full_bases,
    kept_energy,
    leading_energies,
    search_grid,
)
from lestd_kernels.storage.few_bits import FULL_BITS
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.with_tensorly import tt_matrix

_CORES = 3


class TrainModes(NamedTuple):
    """Factors of the input and of the output dimension, one each per core."""

    rows: tuple[int, int, int]
    columns: tuple[int, int, int]


def balanced_modes(dimension: int) -> tuple[int, int, int]:
    """Three factors of a dimension, as equal as its primes allow, ascending.

    The primes, largest first, each go to the smallest factor so far: 704 = 8 * 8 * 11.
    """
    modes, rest, prime, primes = [1] * _CORES, dimension, 2, []
    while prime * prime <= rest:
        if rest % prime:
            prime += 1
        else:
            primes.append(prime)
            rest //= prime
    for factor in [rest, *reversed(primes)]:
        smallest = modes.index(min(modes))
        modes[smallest] *= factor
    first, second, third = sorted(modes)
    return first, second, third


def train_modes(rows: int, columns: int) -> TrainModes:
    """The modes of a matrix ``(rows, columns)``."""
    return TrainModes(balanced_modes(rows), balanced_modes(columns))


def stack_of(W: Tensor, modes: TrainModes) -> Tensor:
    """W ``(in, out)`` as the stack ``(a2 b2, a1 b1, a3 b3)``, contiguous."""
    (a1, a2, a3), (b1, b2, b3) = modes
    T = W.reshape(a1, a2, a3, b1, b2, b3).permute(1, 4, 0, 3, 2, 5)
    return T.reshape(a2 * b2, a1 * b1, a3 * b3)


def _train_bytes(modes: TrainModes, ranks: StackRanks, value_bytes: int, args: MethodArgs) -> int:
    (a1, a2, a3), (b1, b2, b3) = modes
    _, r1, r2 = ranks
    factors = ((a1 * b1, r1), (r2, a3 * b3))
    return sum(matrix_bytes(*f, value_bytes, args.factor_bits) for f in factors) + matrix_bytes(
        r1 * a2 * b2, r2, value_bytes, args.value_bits
    )


def _least_bytes(rows: int, columns: int, value_bytes: int, args: MethodArgs) -> int:
    scaling = 0 if args.metric == WEIGHT else rows * value_bytes
    ranks = StackRanks(1, 1, 1)
    return scaling + _train_bytes(train_modes(rows, columns), ranks, value_bytes, args)


def encode_module(
    W: Tensor, metric: Metric, byte_budget: int, value_dtype: torch.dtype, args: MethodArgs
) -> tuple[ModuleChain, float]:
    """The train of one module ``(in, out)``.

    Raises:
        LestdError: no ranks fit the budget.
    """
    modes, root = train_modes(*W.shape), Root.of_gram(metric.input)
    first: tuple[EncodedCore, ...] = ()
    if root.factor is not None:
        inverse = (1 / root.factor)[:, None]
        first = (EncodedCore.quantized(inverse, FULL_BITS, value_dtype),)
        root = Root(1 / first[0].decode().float()[:, 0])
    scaled = root.apply(W)
    T = stack_of(scaled, modes)
    grid, bases = search_grid(T.shape, compress=False), full_bases(T, compress=False)
    left = byte_budget - sum(matrix.stored_bytes for matrix in first)

    def size(ranks: StackRanks) -> int:
        return _train_bytes(modes, ranks, value_dtype.itemsize, args)

    energies = leading_energies(T, bases, grid)
    ranks = best_ranks(energies, grid, size, left)
    if ranks is None:
        raise LestdError(f"no tensor train fits into {byte_budget:,} bytes; raise keep")
    first_core, _, last = tt_matrix(scaled.reshape(*modes.rows, *modes.columns), ranks[1:])
    # The last core has the singular values, which belong to the one between the factors.
    U, V = first_core.reshape(-1, ranks.Ra), torch.linalg.qr(last.flatten(1).T)[0]
    cores = _encode_cores(T, StackFactors(U, V, None), modes, value_dtype, args)
    share = 1 - kept_energy(energies, grid, ranks) / max(squared_sum(T), 1e-300)
    expected = max(share, 0.0) * metric.squares(W)
    return ModuleChain(_ops(modes, U.shape[1], V.shape[1], len(first)), (*first, *cores)), expected


def _encode_cores(
    T: Tensor,
    factors: StackFactors,
    modes: TrainModes,
    value_dtype: torch.dtype,
    args: MethodArgs,
) -> tuple[EncodedCore, EncodedCore, EncodedCore]:
    """The cores as matrices (a1, b1 r1), (r1 a2, b2 r2) and (r2 a3, b3)."""
    (a1, a2, a3), (_, b2, b3) = modes
    U, V = factors.U, factors.V
    r1, r2 = U.shape[1], V.shape[1]
    G1 = EncodedCore.quantized(U.reshape(a1, -1), args.factor_bits, value_dtype)
    last = V.T.reshape(r2 * a3, b3)
    G3 = EncodedCore.quantized(last, args.factor_bits, value_dtype)
    stored = StackFactors(
        G1.decode().float().reshape(-1, r1), G3.decode().float().reshape(r2, -1).T, None
    )
    K = fit_core(T, stored).view(a2, b2, r1, r2).permute(2, 0, 1, 3)
    G2 = EncodedCore.quantized(K.reshape(r1 * a2, b2 * r2), args.value_bits, value_dtype)
    return G1, G2, G3


def _ops(modes: TrainModes, r1: int, r2: int, first: int) -> tuple[Op, ...]:
    """Contract a1, a2 and a3 in turn; `first` matrices of scaling come before."""
    (a1, a2, a3), (b1, b2, _) = modes
    scaling = (Multiply(0, blocks=a1 * a2 * a3, distinct=True),) * first
    return (
        *scaling,
        Permute((a1, a2 * a3), (1, 0)),
        Multiply(first, blocks=a2 * a3),  # (a2, a3, b1, r1)
        Permute((a2, a3 * b1 * r1), (1, 0)),
        Multiply(first + 1, blocks=a3 * b1),  # (a3, b1, b2, r2)
        Permute((a3, b1 * b2 * r2), (1, 0)),
        Multiply(first + 2, blocks=b1 * b2),  # (b1, b2, b3)
    )


METHOD = module_method("tt", encode_module, _least_bytes, (WEIGHT, NORM))
