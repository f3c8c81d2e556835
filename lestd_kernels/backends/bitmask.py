"""Cores stay packed and are expanded in registers: few tokens then read fewer bytes. CPU.

More tokens multiply tiles of M that are expanded one after the other and stay in the cache. M never
exists as a whole.

The kernel is C++ (`*.cpp`, `*.h`; with it what packs and decodes coded numbers), compiled on first
use with PyTorch's own tooling, several files at a time, and cached where PyTorch caches extensions
(``TORCH_EXTENSIONS_DIR``). It needs a C++ compiler and ninja; where there is none, or compiling
fails, one warning says so and `eager` does the work.

Results do not depend on the number of threads. Where the CPU has no arithmetic for 16-bit values,
they are multiplied in float32, tile by tile.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sysconfig
import tempfile
import threading
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lestd_kernels.backends.base import Backend, is_plain, token_count
from lestd_kernels.backends.cpu import emulated
from lestd_kernels.storage.matrix import EncodedCore

_NAME = "lestd_bitmask"
_HEADERS = sorted(Path(__file__).parent.glob("*.h"))
_SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))  # the one that takes longest is first
# GCC would keep the pointers to several rows in one vector register, and take them out again.
_FLAGS = ["-O3", "-fopenmp", "-fno-tree-slp-vectorize"]
_VALUE_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_loading = threading.Lock()


def _library_path() -> Path:
    """Path of the compiled kernel: one for each source, PyTorch and architecture.

    It has every path of the architecture, whatever CPU compiles it: others may share the cache.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch_extensions"
    code = [file.read_text(encoding="utf-8") for file in (*_HEADERS, *_SOURCES)]
    what = "\n".join([*code, *_FLAGS, torch.__version__])
    digest = hashlib.sha256(what.encode()).hexdigest()[:16]
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", default))
    return root / f"{_NAME}-{platform.machine()}-{digest}" / f"{_NAME}.so"


def _build(library: Path) -> None:
    """Compile and load the kernel, and leave it at `library`, where it appears complete."""
    from torch.utils.cpp_extension import load

    # The ninja of this environment is found even where the environment is not activated.
    if shutil.which("ninja") is None:
        os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        load(
            _NAME,
            [*map(str, _SOURCES)],
            extra_cflags=_FLAGS,
            extra_ldflags=["-fopenmp"],
            build_directory=scratch,
            is_python_module=False,
        )
        (Path(scratch) / library.name).replace(library)


def _load() -> None:
    import fcntl  # not on Windows, where a model must load all the same

    library = _library_path()
    library.parent.mkdir(parents=True, exist_ok=True)
    # A link there is another's: what it leads to is not written.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(os.open(library.parent / "lock", flags, 0o666), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed, or the process ends
        if library.exists():
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
        else:
            _build(library)


@cache
def _load_once() -> bool:
    try:
        _load()
    except Exception as error:  # whatever a compiler, a linker or a file system can say
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"lestd: the kernel for packed cores could not be compiled or loaded ({reason}); "
            "products take the plain PyTorch path, which is slow for one token, and coded numbers "
            "that of numpy. Install a C++ "
            f"compiler and ninja, delete {_NAME}-* from PyTorch's cache of extensions if another "
            "system built it, or trade memory for speed with "
            "lestd_kernels.set_backend(model, 'dense_core').",
            stacklevel=2,
        )
        return False
    torch.library.register_fake("lestd::bitmask_apply", _fake_apply)
    torch.library.register_fake("lestd::bitmask_matmul", _fake_apply)
    torch.library.register_fake("lestd::bitmask_expand", _fake_expand)
    return True


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_available() -> bool:
    """Whether the kernel is there; compiles it (some seconds) where it was not yet."""
    with _loading:
        return _load_once()


@cache
def _fastest_path() -> str:
    fastest: str = torch.ops.lestd.bitmask_paths()[0]
    return fastest


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def path() -> str:
    """The fastest path of the kernel that this CPU has.

    ``avx512`` (with VBMI2: Ice Lake, Zen 4 and later), ``avx2``, ``neon``, or ``portable``.
    ``ATEN_CPU_CAPABILITY`` bounds it, as it bounds PyTorch's own vectors.
    """
    return _fastest_path()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def widens(dtype: torch.dtype) -> bool:
    """Whether products of many tokens in `dtype` are computed in float32 here."""
    return emulated(dtype)


def _fake_apply(
    x: Tensor,
    values: Tensor,
    mask: Tensor | None,
    rows: int,
    columns: int,
    transposed: bool,
    path: str,
) -> Tensor:
    return x.new_empty(x.shape[0], rows if transposed else columns)


def _fake_expand(values: Tensor, mask: Tensor, rows: int, columns: int, path: str) -> Tensor:
    return values.new_empty(rows, columns)


def runs(x: Tensor, core: EncodedCore) -> bool:
    """For cores stored as bitmask or dense, on CPU, outside of autograd and autocast."""
    values = core.tensors["values"]
    return (
        core.codec in ("bitmask", "dense")
        and x.device.type == "cpu"
        and values.dtype in _VALUE_TYPES
        and x.numel() > 0
        and is_plain(x, core)
        and is_available()
    )


def few_tokens(core: EncodedCore, transposed: bool) -> int:
    """Up to how many tokens the packed product beats expanding M tile by tile.

    Measured with benchmarks/backends.py: each token adds arithmetic in float32 here, and next to
    nothing to the dense product where the CPU multiplies 16-bit numbers itself. Tiles for
    ``x @ M.T`` are whole rows, which are quicker to expand.
    """
    if path() != "avx512":
        return 2 if path() == "portable" else 8
    few = 32 if core.tensors["values"].dtype == torch.float32 else 16
    return few // 2 if transposed else few


def expand(core: EncodedCore) -> Tensor:
    """M ``(rows, columns)``."""
    if core.codec == "dense":
        return core.decode()
    values, mask = core.tensors["values"], core.tensors["mask"]
    M: Tensor = torch.ops.lestd.bitmask_expand(values, mask, core.rows, core.columns, path())
    return M


def apply_core(x: Tensor, core: EncodedCore, transposed: bool) -> Tensor:
    """``x @ M``, or with `transposed` ``x @ M.T``."""
    values, mask = core.tensors["values"], core.tensors.get("mask")
    many = token_count(x) > few_tokens(core, transposed)
    wide = many and widens(x.dtype)
    if many and mask is None and not wide:
        M = core.decode()
        return x @ (M.T if transposed else M)
    product = torch.ops.lestd.bitmask_matmul if many else torch.ops.lestd.bitmask_apply
    tokens = x.reshape(-1, x.shape[-1])
    tokens = tokens.float() if wide else tokens
    out: Tensor = product(tokens, values, mask, core.rows, core.columns, transposed, path())
    return out.to(x.dtype).reshape(*x.shape[:-1], out.shape[-1])


BACKEND = Backend(runs, apply_core, expand)
