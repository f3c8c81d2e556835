"""Very sparse cores on CPU: the product of `torch.sparse` (MKL), for cores stored as csr.

MKL multiplies float32 only, so values in 16 bits are widened for the call, and the 16-bit column
indices with them; both have nnz elements, far fewer than M.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lestd_kernels.backends.base import Backend, is_plain
from lestd_kernels.storage.codecs import csr_rows
from lestd_kernels.storage.matrix import EncodedCore

# For x M, MKL first transposes M, which costs as much as adding up the rows for this many tokens.
_FEW_TOKENS = 8

# PyTorch says so once per process, to whoever comes first.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


def runs(x: Tensor, core: EncodedCore) -> bool:
    """For cores stored as csr, on CPU, outside of autograd, autocast and torch.compile."""
    return (
        core.codec == "csr"
        and not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        and x.numel() > 0
        and is_plain(x, core)
    )


def apply_core(x: Tensor, core: EncodedCore, transposed: bool) -> Tensor:
    """``x @ M``, or with `transposed` ``x @ M.T``; sums in float32."""
    values = core.tensors["values"].float()
    columns, pointers = core.tensors["columns"].to(torch.int32), core.tensors["row_pointers"]
    tokens = x.reshape(-1, x.shape[-1]).float()
    if not transposed and tokens.shape[0] <= _FEW_TOKENS:
        row = csr_rows(pointers, values.numel())
        zeros = values.new_zeros(core.columns)
        out = torch.stack([zeros.index_add(0, columns, t[row] * values) for t in tokens])
    else:
        # Checked, since MKL follows an index that a damaged file has to wherever it leads.
        M = torch.sparse_csr_tensor(
            pointers, columns, values, (core.rows, core.columns), check_invariants=True
        )
        out = (M @ tokens.T).T if transposed else tokens @ M
    return out.to(x.dtype).reshape(*x.shape[:-1], out.shape[-1])


BACKEND = Backend(runs, apply_core, EncodedCore.decode)
