"""Matrices as tensor trains (TT-matrix, matrix product operator) of three cores.

Shapes: W (in, out), y = x W; in = a1 a2 a3, out = b1 b2 b3, both balanced. W, reshaped, is the
tensor T (a1 b1, a2 b2, a3 b3), and its train has the ranks r1 and r2:

    T[i, j, k] ~ sum_{r1, r2} G1[i, r1] G2[r1, j, r2] G3[r2, k]

A train of three cores is the stack T (n = a2 b2, a = a1 b1, b = a3 b3) of lestd_kernels.stacked
with G1 = U and G3 = V^T, so ranks are found there.

References: Oseledets, "Tensor-train decomposition", SISC 33(5), 2011; Novikov et al., "Tensorizing
neural networks", NeurIPS 2015, section 3 (TT-matrix).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

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
