"""Cores with the pattern 2:4 on the sparse tensor cores of NVIDIA GPUs, Ampere and later.

The core is turned into PyTorch's semi-structured tensor on first use and kept so, beside the
packed tensors (`Kept`): half of the padded values and two bits of index for each, much like
the bitmask that it comes from. A product then does half of the dense one's multiply-adds.

Reference: Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378, 2021.
"""

from __future__ import annotations

import warnings
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from lestd_kernels.backends.base import Backend, is_plain
from lestd_kernels.backends.cache import Kept
from lestd_kernels.errors import LestdError
from lestd_kernels.storage.codecs import TWO_OF_FOUR
from lestd_kernels.storage.matrix import EncodedCore

_VALUE_TYPES = (torch.float16, torch.bfloat16)
# What PyTorch's formats want rows and columns to be multiples of (the stricter one, CUTLASS).
_ROWS, _COLUMNS = 32, 64

# PyTorch says so once per process, to whoever comes first.
warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor")


@cache
def _is_supported(device: torch.device) -> bool:
    """Whether the GPU has sparse tensor cores and this PyTorch the library that drives them."""
    capability = torch.cuda.get_device_capability(device)
    return capability >= (8, 0) and bool(torch.backends.cusparselt.is_available())


def runs(x: Tensor, core: EncodedCore) -> bool:
    """For 2:4 cores in 16 bits on CUDA, outside of autograd, autocast and torch.compile."""
    return (
        core.pattern == TWO_OF_FOUR
        and x.device.type == "cuda"
        and x.dtype in _VALUE_TYPES
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and is_plain(x, core)
        and _is_supported(x.device)
    )


def padded_weight(core: EncodedCore, transposed: bool) -> Tensor:
    """The operand of `torch.nn.functional.linear`: M.T, or with `transposed` M, zero-padded.

    Returns:
        ``(out, in)``, both multiples of what the hardware's format wants, groups of four along
        the last dimension.

    Raises:
        LestdError: the core does not have the pattern along the dimension that is summed over.
    """
    M = core.decode().detach()
    weight = M if transposed else M.T
    rows, columns = weight.shape
    weight = functional.pad(weight, (0, -columns % _COLUMNS, 0, -rows % _ROWS)).contiguous()
    fullest = int(weight.view(-1, 4).count_nonzero(dim=1).max())
    if fullest > 2:
        raise LestdError(
            f"a core ({core.rows} x {core.columns}) is marked as having the pattern 2:4, but four "
            f"of its elements in a row hold {fullest} non-zeros, expected at most 2: the model is "
            "damaged, copy it again from where it was made"
        )
    return weight


def _pack(core: EncodedCore, transposed: bool) -> Tensor:
    return torch.sparse.to_sparse_semi_structured(padded_weight(core, transposed))


packed = Kept(partial(_pack, transposed=False))
packed_transposed = Kept(partial(_pack, transposed=True))


def apply_core(x: Tensor, core: EncodedCore, transposed: bool) -> Tensor:
    """``x @ M``, or with `transposed` ``x @ M.T``: whichever the pattern was chosen for."""
    weight = (packed_transposed if transposed else packed)(core)
    width = x.shape[-1]
    tokens = functional.pad(x.reshape(-1, width), (0, weight.shape[1] - width)).contiguous()
    out = functional.linear(tokens, weight)[:, : core.rows if transposed else core.columns]
    return out.reshape(*x.shape[:-1], out.shape[-1])


def release(values: Tensor) -> None:
    """Forget what is kept for the core whose values these are."""
    packed.release(values)
    packed_transposed.release(values)


BACKEND = Backend(runs, apply_core, EncodedCore.decode)
