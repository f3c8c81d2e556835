"""Ops of a chain: what its modules do to a vector, one after the other.

Shapes: x (..., n), row-vector convention y = x W; W (in, out) is the product of a module's ops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ROWS, _ELEMENTS = 512, 1 << 23


@dataclass(frozen=True)
class Multiply:
    """``x (..., blocks rows) -> (..., blocks columns)``: each block of x times a matrix.

    Attributes:
        matrix: name of a shared matrix, or index of one of the module's own.
        transposed: multiply by the transposed matrix.
        blocks: number of blocks.
        distinct: whether the matrix holds one for each block, stacked along its rows; otherwise
            all blocks are multiplied by the same.
        each: with `distinct`, consecutive blocks that share a matrix.
    """

    matrix: str | int
    transposed: bool = False
    blocks: int = 1
    distinct: bool = False
    each: int = 1


@dataclass(frozen=True)
class Permute:
    """Reshape the last dimension to `shape`, permute by `order`, flatten."""

    shape: tuple[int, ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class Mix:
    """``x (..., rows) -> (..., columns)``: times a mixture of matrices that modules share.

    Attributes:
        weights: index of the module's own matrix ``(1, n)`` of their weights.
        matrices: name of the shared matrix whose n rows are the matrices, flattened.
        rows: of each of them.
    """

    weights: int
    matrices: str
    rows: int


Op = Multiply | Permute | Mix


def product_of(ops: Sequence[Op], dense: Sequence[Tensor], in_features: int) -> Tensor:
    """The matrix ``(in, out)`` that ops amount to, float32.

    Args:
        ops: applied to x in order.
        dense: what each multiplies by, float32; anything for a permutation.
        in_features: elements of x.
    """
    if scales_inputs(ops[0], dense[0], in_features) and len(ops) > 1:
        return dense[0] * product_of(ops[1:], dense[1:], in_features)
    cores = train_cores(ops, dense, in_features)
    return _rows_of(ops, dense, in_features) if cores is None else train_product(cores)


def scales_inputs(op: Op, matrix: Tensor, in_features: int) -> bool:
    """Whether an op multiplies each input by a number of its own."""
    apart = isinstance(op, Multiply) and op.distinct and op.blocks == in_features
    return apart and matrix.shape == (in_features, 1)


def train_cores(
    ops: Sequence[Op], dense: Sequence[Tensor], in_features: int
) -> list[tuple[int, Tensor]] | None:
    """Modes and cores of a tensor train, see methods.tt; None for ops of another form."""
    cores, columns = [], 1
    for permute, core, matrix in zip(ops[::2], ops[1::2], dense[1::2], strict=False):
        if not isinstance(permute, Permute) or permute.order != (1, 0):
            return None
        mode = permute.shape[0]
        plain = isinstance(core, Multiply) and not core.transposed and not core.distinct
        if not plain or len(matrix) % mode or columns * mode % len(matrix):
            return None
        columns = columns * mode // len(matrix) * matrix.shape[1]
        cores.append((mode, matrix))
    whole = math.prod(mode for mode, _ in cores) == in_features
    return cores if whole and len(ops) == 2 * len(cores) else None


def train_product(cores: Sequence[tuple[int, Tensor]]) -> Tensor:
    """W ``(a1 a2 ..., b1 b2 ...)`` of a tensor train, core by core.

    The rows of the identity are zeros but for one element, and most of what they become is zeros
    as long as some modes have met no core; here those modes are left away until they do.

    Args:
        cores: mode a_k and ``(r_{k-1} a_k, b_k r_k)``; the first rank and the last are 1.
    """
    W = cores[0][1].new_ones(1, 1)
    for mode, core in cores:
        rank = len(core) // mode
        # (rows so far, columns so far, mode, new columns): the mode joins the rows.
        product = W.reshape(-1, rank) @ core.reshape(rank, -1)
        apart = product.view(len(W), -1, mode, core.shape[1])
        W = apart.transpose(1, 2).reshape(len(W) * mode, -1)
    return W


def _rows_of(ops: Sequence[Op], dense: Sequence[Tensor], in_features: int) -> Tensor:
    """Rows of the identity after the ops."""
    steps = list(zip(ops, dense, strict=True))
    first, rows = steps[0]
    begins = isinstance(first, Multiply) and first.blocks == 1
    if isinstance(first, Multiply) and begins:
        # The rows of the identity become those of the matrix.
        steps = steps[1:]
        rows = rows.T if first.transposed else rows
    blocks = []
    # What the rows of the identity become: a few at a time, since they are wide.
    widths = [_width(op, matrix) for op, matrix in zip(ops, dense, strict=True)]
    step = max(1, min(_ROWS, _ELEMENTS // max(in_features, *widths)))
    for start in range(0, in_features, step):
        count = min(step, in_features - start)
        if begins:
            x = rows[start : start + count]
        else:
            x = torch.zeros(count, in_features, device=dense[0].device)
            x[:, start : start + count].fill_diagonal_(1)
        for op, matrix in steps:
            if isinstance(op, Permute):
                x = apply_permute(x, op)
            elif isinstance(op, Mix):
                x = x @ matrix
            else:
                x = apply_dense(x, op, matrix)
        blocks.append(x)
    return torch.cat(blocks)


def _width(op: Op, matrix: Tensor) -> int:
    """Elements that an op makes of one row; 0 for a permutation, which makes no more."""
    if isinstance(op, Permute):
        return 0
    if isinstance(op, Mix) or not op.transposed:
        return matrix.shape[-1] * (1 if isinstance(op, Mix) else op.blocks)
    return matrix.shape[0] * (op.each if op.distinct else op.blocks)


def apply_permute(x: Tensor, op: Permute) -> Tensor:
    """``x (..., prod(shape))``, permuted."""
    head = x.dim() - 1
    order = (*range(head), *(head + axis for axis in op.order))
    return x.reshape(*x.shape[:-1], *op.shape).permute(order).flatten(head)


def apply_dense(x: Tensor, op: Multiply, matrix: Tensor) -> Tensor:
    """``x (..., blocks rows) -> (..., blocks columns)`` with the dense matrix of an op."""
    blocks = x.reshape(*x.shape[:-1], op.blocks, -1)
    if op.distinct:
        count, rows = op.blocks // op.each, blocks.shape[-1]
        stacked = matrix.reshape(count, -1, matrix.shape[-1])
        # (matrices, everything that one multiplies, rows): one product each, nothing repeated.
        apart = x.reshape(-1, count, op.each, rows).transpose(0, 1).flatten(1, 2)
        product = apart @ (stacked.mT if op.transposed else stacked)
        product = product.view(count, -1, op.each, product.shape[-1])
        return product.transpose(0, 1).reshape(*x.shape[:-1], -1)
    return (blocks @ (matrix.T if op.transposed else matrix)).flatten(-2)


def describe_op(op: Op) -> dict[str, Any]:
    """The op as JSON, see `op_of`."""
    if isinstance(op, Permute):
        return {"permute": list(op.order), "shape": list(op.shape)}
    if isinstance(op, Mix):
        return {"mix": op.matrices, "weights": op.weights, "rows": op.rows}
    entry: dict[str, Any] = {"matrix": op.matrix}
    if op.transposed:
        entry["transposed"] = True
    if op.blocks != 1:
        entry["blocks"] = op.blocks
    if op.distinct:
        entry["distinct"] = True
    if op.each != 1:
        entry["each"] = op.each
    return entry


def op_of(entry: Mapping[str, Any]) -> Op:
    """The op that an entry describes.

    Raises:
        KeyError: the entry lacks a key.
    """
    if "permute" in entry:
        return Permute(tuple(entry["shape"]), tuple(entry["permute"]))
    if "mix" in entry:
        return Mix(entry["weights"], entry["mix"], entry["rows"])
    return Multiply(
        entry["matrix"],
        entry.get("transposed", False),
        entry.get("blocks", 1),
        entry.get("distinct", False),
        entry.get("each", 1),
    )
