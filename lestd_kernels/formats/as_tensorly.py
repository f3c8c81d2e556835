"""A compressed group as tensorly's tensors, to look into.

    shared basis, Tucker     TuckerTensor
    Tucker per head          a list of them: one for each key head and the query heads that share it
    tensor train             TTMatrix
    everything else          the matrices whose product the weights are: a pair, or a single one

Shapes: W (in, out) of a module, y = x W. A TuckerTensor is (d, slices, p): a slice holds columns of
W in a module that reads the model's width, and columns of W^T in one that writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lestd_kernels.formats.chain import Chain, ModuleChain
from lestd_kernels.formats.kinds import Decomposition
from lestd_kernels.formats.ops import Multiply, Op, Permute, scales_inputs, train_cores
from lestd_kernels.tensorize import ModuleLayout
from lestd_kernels.with_tensorly import pytorch_backend

if TYPE_CHECKING:
    from tensorly.tt_matrix import TTMatrix
    from tensorly.tucker_tensor import TuckerTensor


@dataclass(frozen=True)
class Opened:
    """One module, decoded, float32: ``W = diag(scale) form + side``.

    Attributes:
        form: TuckerTensor with core ``(R1, slices, R2)`` and factors ``(d, R1)``, the identity and
            ``(p, R2)``; a list of those; TTMatrix with cores ``(r, a, b, r')``; or a list of
            matrices, in the order of their product.
        scale: ``(in,)``; None where rows are not scaled.
        side: ``(in, out)``, the outliers that are stored exactly; None where there are none.
    """

    form: TuckerTensor | list[TuckerTensor] | TTMatrix | list[Tensor]
    scale: Tensor | None = None
    side: Tensor | None = None


def open_modules(stored: Decomposition) -> dict[str, Opened]:
    """The modules of a group by name. tensorly's objects hold PyTorch tensors."""
    with pytorch_backend():
        if isinstance(stored, Chain):
            return {
                module.name: _open_chain(stored, stored.modules[module.name], module)
                for module in stored.layout.modules
            }
        cores = zip(stored.layout.modules, stored.module_cores(), strict=True)
        U1, U2 = stored.U1.float(), stored.U2.float()
        return {module.name: Opened(_tucker(core, U1, U2)) for module, core in cores}


def _tucker(core: Tensor, U1: Tensor, U2: Tensor) -> TuckerTensor:
    """From a core ``(R1, slices R2)``."""
    from tensorly.tucker_tensor import TuckerTensor

    core = core.reshape(U1.shape[1], -1, U2.shape[1])
    return TuckerTensor((core, [U1, torch.eye(core.shape[1], device=core.device), U2]))


def _open_chain(stored: Chain, chain: ModuleChain, module: ModuleLayout) -> Opened:
    ops, dense = chain.ops, [chain.dense(op, stored.shared) for op in chain.ops]
    side, scale = None if chain.side is None else chain.side.decode().float(), None
    in_features = stored.layout.weight_shape(module)[1]
    if len(ops) > 1 and scales_inputs(ops[0], dense[0], in_features):
        scale, ops, dense = dense[0][:, 0], ops[1:], dense[1:]
    cores = train_cores(ops, dense, in_features)
    if cores is not None:
        return Opened(_train(cores), scale, side)
    steps = [(op, one) for op, one in zip(ops, dense, strict=True) if not isinstance(op, Permute)]
    if any(isinstance(op, Multiply) and op.blocks > 1 for op, _ in steps):
        heads = _heads(steps if module.basis_side == "input" else steps[::-1], module.basis_side)
        return Opened(heads[0] if len(heads) == 1 else heads, scale, side)
    return Opened([_factor(op, matrix) for op, matrix in steps], scale, side)


def _factor(op: Op, matrix: Tensor) -> Tensor:
    return matrix.T if isinstance(op, Multiply) and op.transposed else matrix


def _heads(steps: Sequence[tuple[Op, Tensor]], side: str) -> list[TuckerTensor]:
    """From U1 ``(d, units R1)``, cores, and U2 ``(units p, R2)``; one unit where heads share."""
    (_, U1), (middle, core), (last, U2) = steps
    assert isinstance(last, Multiply), "the last factor of a head is a matrix"
    units = last.blocks // last.each if last.distinct else 1
    parts = _factor(middle, core).chunk(units)
    parts = parts if side == "input" else tuple(part.T for part in parts)
    each = zip(parts, U1.chunk(units, dim=1), U2.chunk(units), strict=True)
    return [_tucker(*one) for one in each]


def _train(cores: Sequence[tuple[int, Tensor]]) -> TTMatrix:
    from tensorly.tt_matrix import TTMatrix

    ranks = [*(len(core) // mode for mode, core in cores), 1]
    shaped = zip(cores, ranks, ranks[1:], strict=False)
    return TTMatrix([core.reshape(r, mode, -1, after) for (mode, core), r, after in shaped])
