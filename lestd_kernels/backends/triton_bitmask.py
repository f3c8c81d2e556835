"""Cores stay packed and are expanded in registers: few tokens then read fewer bytes. NVIDIA GPUs.

"Load sparse, compute dense": Flash-LLM (arXiv 2309.10285), SpInfer (EuroSys 2025) and MACKO-SpMV
(arXiv 2511.13061). The kernels are in `triton_kernels`, imported on first use, since PyTorch for
CPU comes without Triton. With ``TRITON_INTERPRET=1`` set before Triton is imported they run on CPU
tensors too, slowly, for tests.

What must be read for one token is the floor of its time: with d the density of the core,

    rows x columns x (d x value bytes + 1/8 mask + 1/64 starts) bytes, over the GPU's bandwidth.

Starts say where the values of each row begin in each 256 columns. They are counted from the mask
once and kept beside the core (`Kept`): 4 bytes for 256 elements (8 bytes from 2^31 values on),
1.7 % of a core of 16-bit values at density 0.4, and at most 2 % from density 0.33 on. A graph
of torch.compile counts them in every call, which reads the mask once more: what is kept cannot be
found from inside a graph.

Sums are in float32 and do not depend on what else the GPU does: partial sums are written down and
added in a fixed order.
"""

from __future__ import annotations

import os
import warnings
from functools import cache

import torch
from torch import Tensor

from lestd_kernels.backends.base import Backend, is_plain, token_count
from lestd_kernels.backends.cache import Kept
from lestd_kernels.errors import LestdError
from lestd_kernels.storage.matrix import EncodedCore

DEVICE = "cuda"
_VALUE_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS, _TILE = 16, 256  # of a block, as in triton_kernels
_PROGRAMS = 4 * 132  # what an H100 holds at a time; fixed, so that sums are the same on every GPU
_CAPABILITY = (7, 5)  # Turing, the first that a test compiles the kernels for


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _starts_dtype(values: Tensor) -> torch.dtype:
    return torch.int32 if values.numel() < 2**31 - 2 * _TILE else torch.int64


def _count_starts(values: Tensor, mask: Tensor, rows: int, columns: int) -> Tensor:
    """Where the values of each row begin in each tile, row by row, and last where they end."""
    from lestd_kernels.backends import triton_kernels

    tiles = _cdiv(columns, _TILE)
    counts = mask.new_empty(rows * tiles, dtype=torch.int32)
    with torch.cuda.device_of(mask):  # type: ignore[no-untyped-call]
        triton_kernels.count[(_cdiv(rows, _ROWS) * tiles,)](mask, counts, rows, columns)
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    # One more than there are values tells of a damaged mask; the kernels then read no further.
    return starts.clamp_(max=values.numel() + 1).to(_starts_dtype(values))


def _expand(values: Tensor, mask: Tensor, starts: Tensor, rows: int, columns: int) -> Tensor:
    from lestd_kernels.backends import triton_kernels

    M = values.new_empty(rows, columns)
    grid = (_cdiv(rows, _ROWS) * _cdiv(columns, _TILE),)
    with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
        triton_kernels.expand[grid](values, mask, starts, M, rows, columns, values.numel())
    return M


def _apply(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    starts: Tensor,
    rows: int,
    columns: int,
    transposed: bool,
) -> Tensor:
    from lestd_kernels.backends import triton_kernels

    tokens, width = x.shape[0], rows if transposed else columns
    row_blocks, tiles = _cdiv(rows, _ROWS), _cdiv(columns, _TILE)
    outer, inner = (row_blocks, tiles) if transposed else (tiles, row_blocks)
    blocks_each = _cdiv(inner, max(1, _PROGRAMS // outer))
    splits = _cdiv(inner, blocks_each)
    out = x.new_empty(tokens, width)
    sums = out if splits == 1 else x.new_empty(splits, tokens, width, dtype=torch.float32)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        triton_kernels.apply[(outer, splits)](
            x.contiguous(),
            values,
            mask,
            starts,
            sums,
            tokens,
            rows,
            columns,
            values.numel(),
            blocks_each,
            TRANSPOSED=transposed,
            ONE_TOKEN=tokens == 1,
        )
        if splits > 1:
            size = tokens * width
            triton_kernels.add[(_cdiv(size, _TILE),)](sums, out, splits, size)
    return out


def _fake_count_starts(values: Tensor, mask: Tensor, rows: int, columns: int) -> Tensor:
    return mask.new_empty(rows * _cdiv(columns, _TILE) + 1, dtype=_starts_dtype(values))


def _fake_expand(values: Tensor, mask: Tensor, starts: Tensor, rows: int, columns: int) -> Tensor:
    return values.new_empty(rows, columns)


def _fake_apply(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    starts: Tensor,
    rows: int,
    columns: int,
    transposed: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], rows if transposed else columns)


# Plain registration: a call costs a third of what one of torch.library.custom_op does (2, 8 us).
for _name, _arguments, _implementation, _fake in (
    ("triton_starts", "Tensor values, Tensor mask", _count_starts, _fake_count_starts),
    ("triton_expand", "Tensor values, Tensor mask, Tensor starts", _expand, _fake_expand),
    ("triton_apply", "Tensor x, Tensor values, Tensor mask, Tensor starts", _apply, _fake_apply),
):
    _more = ", bool transposed" if _name == "triton_apply" else ""
    torch.library.define(
        f"lestd::{_name}",
        f"({_arguments}, int rows, int columns{_more}) -> Tensor",
        tags=torch.Tag.pt2_compliant_tag,
    )
    torch.library.impl(f"lestd::{_name}", ("cpu", "cuda"), _implementation)
    torch.library.register_fake(f"lestd::{_name}", _fake)


def _checked_starts(core: EncodedCore) -> Tensor:
    values, mask = core.tensors["values"], core.tensors["mask"]
    starts: Tensor = torch.ops.lestd.triton_starts(values, mask, core.rows, core.columns)
    if int(starts[-1]) != values.numel():
        raise LestdError(
            f"the mask of a core ({core.rows} x {core.columns}) marks more or fewer elements than "
            f"its {values.numel()} values; the model's files are damaged, copy them again"
        )
    return starts


_kept_starts = Kept(_checked_starts)
release = _kept_starts.release


def _starts(core: EncodedCore) -> Tensor:
    if not torch.compiler.is_compiling():
        return _kept_starts(core)
    values, mask = core.tensors["values"], core.tensors["mask"]
    starts: Tensor = torch.ops.lestd.triton_starts(values, mask, core.rows, core.columns)
    return starts


@cache
def _works(device: str) -> bool:
    """Whether a kernel runs on this device; compiles one (a second) where it was not yet."""
    if device.startswith("cuda"):
        if torch.version.cuda is None or torch.cuda.get_device_capability(device) < _CAPABILITY:
            return False
    elif device != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    try:
        bit = torch.ones(1, dtype=torch.uint8, device=device)
        return _count_starts(bit, bit, 1, 1).tolist() == [0, 1]
    except Exception as error:  # whatever Triton, a compiler or a driver can say
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"lestd: Triton cannot compile the kernels for packed cores ({reason}); products take "
            "the plain PyTorch path, which is slow for one token. Install a C compiler, or trade "
            "memory for speed with lestd_kernels.set_backend(model, 'dense_core').",
            stacklevel=2,
        )
        return False


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_available(device: str) -> bool:
    """Whether the kernels run on `device`, e.g. ``"cuda:0"``."""
    return _works(device)


def runs(x: Tensor, core: EncodedCore) -> bool:
    """For cores stored as bitmask, on NVIDIA GPUs from Turing on, outside of autograd, autocast."""
    return (
        core.codec == "bitmask"
        and core.tensors["values"].dtype in _VALUE_TYPES
        and x.numel() > 0
        and is_plain(x, core)
        and is_available(str(x.device))
    )


def few_tokens(values: Tensor) -> int:
    """Up to how many tokens the packed product is used; beyond, M is expanded and multiplied.

    Not yet measured on a GPU. 16 tokens are one tile of the tensor cores, which multiply 16-bit
    numbers only, so that the packed product costs them little more than one token; expanding
    writes and reads all of M besides. `benchmarks/backends.py --device cuda` measures it.
    """
    # Triton's interpreter multiplies the bits of bfloat16 matrices as if they were integers.
    interpreted = values.device.type == "cpu" and values.dtype == torch.bfloat16
    return 1 if values.dtype == torch.float32 or interpreted else 16


def expand(core: EncodedCore) -> Tensor:
    """M ``(rows, columns)``."""
    values, mask = core.tensors["values"], core.tensors["mask"]
    arguments = (values, mask, _starts(core), core.rows, core.columns)
    M: Tensor = torch.ops.lestd.triton_expand(*arguments)
    return M


def apply_core(x: Tensor, core: EncodedCore, transposed: bool) -> Tensor:
    """``x @ M``, or with `transposed` ``x @ M.T``; few tokens without ever expanding M."""
    if token_count(x) > few_tokens(core.tensors["values"]):
        M = expand(core)
        return x @ (M.T if transposed else M)
    out = torch.ops.lestd.triton_apply(
        x.reshape(-1, x.shape[-1]),
        core.tensors["values"],
        core.tensors["mask"],
        _starts(core),
        core.rows,
        core.columns,
        transposed,
    )
    return out.reshape(*x.shape[:-1], out.shape[-1])  # type: ignore[no-any-return]


BACKEND = Backend(runs, apply_core, expand)
