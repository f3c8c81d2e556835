"""How a packed core is multiplied: one file per backend, one line in `BACKENDS`.

Every backend agrees with `eager`, the specification, and is used where it can run (`Backend.runs`);
where it cannot, `eager` is. `choose` holds the rule for those whom nobody asked for one by name;
benchmarks/backends.py is what it rests on.

    backend      cores               where        reads per token
    eager        any                 anywhere     the packed core, and M, written and read
    dense_core   bitmask, csr        anywhere     M; on demand only, since M stays in memory
    csr          csr                 CPU, MKL     the packed core
    bitmask      bitmask, dense      CPU          the packed core
    triton       bitmask             NVIDIA GPUs  the packed core, and starts, which stay in memory
    2:4          pattern 2:4         CUDA sm80+   a packed copy, which stays in memory
"""

from __future__ import annotations

from torch import Tensor

from lestd_kernels.backends import (
    bitmask,
    csr,
    dense_core,
    eager,
    semi_structured,
    triton_bitmask,
)
from lestd_kernels.backends.base import Backend, token_count
from lestd_kernels.storage.matrix import EncodedCore

BACKENDS: dict[str, Backend] = {
    "eager": eager.BACKEND,
    "dense_core": dense_core.BACKEND,
    "csr": csr.BACKEND,
    "bitmask": bitmask.BACKEND,
    "triton": triton_bitmask.BACKEND,
    "2:4": semi_structured.BACKEND,
}

# PyTorch's products with a 16-bit matrix read a dense core, or factor, more slowly than the kernel
# does for so few tokens.
_FEW_TOKENS_DENSE, _FEW_TOKENS_DENSE_TRANSPOSED = 4, 2
# Beyond, expanding a csr core is no slower than MKL's sparse product, which transposes it for x M.
_FEW_TOKENS_CSR, _FEW_TOKENS_CSR_TRANSPOSED = 8, 64
# Fewer are bound by bytes, not by arithmetic. Not measured on a GPU yet.
_FEW_TOKENS_SEMI_STRUCTURED = 16


def _packed(x: Tensor) -> str:
    """Name of the backend that keeps bitmask cores packed where x is."""
    return "triton" if x.device.type == triton_bitmask.DEVICE else "bitmask"


def choose(x: Tensor, core: EncodedCore, transposed: bool) -> str:
    """Name of the fastest backend for this product that does not keep M in memory.

    - 2:4 cores on CUDA: the sparse tensor cores, for more than a few tokens.
    - ``bitmask`` cores: the kernel of the device, for any number of tokens (it expands M in a
      fraction of the time that `eager` takes). On GPUs that is a design, not yet a measurement.
    - ``csr`` cores on CPU: `torch.sparse` for few tokens, else `eager`.
    - ``dense`` cores on CPU: the kernel for few tokens in 16 bits, else `eager`.
    - Both for any number of tokens in a dtype that this CPU has no arithmetic for: they multiply in
      float32, and `eager` does not.
    """
    if semi_structured.runs(x, core) and token_count(x) > _FEW_TOKENS_SEMI_STRUCTURED:
        return "2:4"
    if core.codec == "bitmask" and BACKENDS[_packed(x)].runs(x, core):
        return _packed(x)
    few = _FEW_TOKENS_CSR_TRANSPOSED if transposed else _FEW_TOKENS_CSR
    wide = x.device.type == "cpu" and bitmask.widens(x.dtype)
    if core.codec == "csr" and csr.runs(x, core) and (token_count(x) <= few or wide):
        return "csr"
    few = _FEW_TOKENS_DENSE_TRANSPOSED if transposed else _FEW_TOKENS_DENSE
    if (
        core.codec == "dense"
        and x.dtype.itemsize == 2
        and (token_count(x) <= few or wide)
        and bitmask.runs(x, core)
        and (bitmask.path() != "portable" or wide)
    ):
        return "bitmask"
    return "eager"


def apply_core(x: Tensor, core: EncodedCore, transposed: bool, backend: str | None) -> Tensor:
    """``x @ M``, or with `transposed` ``x @ M.T``, by `backend`, or by the one that is chosen."""
    if backend is None:
        used = BACKENDS[choose(x, core, transposed)]
    else:
        used = BACKENDS[backend if BACKENDS[backend].runs(x, core) else "eager"]
    return used.apply_core(x, core, transposed)


def expand(core: EncodedCore, backend: str | None) -> Tensor:
    """M ``(rows, columns)``, dense, by `backend`, or by the fastest that does not keep it."""
    values = core.tensors["values"]
    used = BACKENDS[backend or (_packed(values) if core.codec == "bitmask" else "eager")]
    return (used if used.runs(values, core) else BACKENDS["eager"]).expand(core)


def release(values: Tensor) -> None:
    """Drop what backends keep for the core whose values these are."""
    dense_core.expand.release(values)
    triton_bitmask.release(values)
    semi_structured.release(values)
