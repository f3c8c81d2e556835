"""Linear modules that compute in the compressed domain; the dense weight is never rebuilt.

Shapes: d model width, p head width, S slices of the module, R1 R2 R3 ranks, T_m types of module m.
Row-vector convention, y = x W, and slice s of the module is ``W_s ~ U1 M_s U2^T``:

    basis_side "input" (Q, K, V)    x (.., d)    -> ((x U1) M -> (.., S, R2)) U2^T -> (.., S p)
    basis_side "output" (O)         x (.., S, p) -> ((x U2) -> (.., S R2)) M^T U1^T -> (.., d)

U1 and U2 are modules of their own beside the projections (`Factor`), and are applied by calling
them: offload hooks, which bring a module's weights in when it is called, then work for them too.

Reference: LeSTD (ICLR 2026), section "Inference in the compressed domain".
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lestd_kernels import backends
from lestd_kernels.formats.shared_tucker import mix_types
from lestd_kernels.storage.codecs import CODECS, UNSTRUCTURED, TensorSpec
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.tensorize import BasisSide


class Factor(nn.Module):
    """One factor matrix, ``weight (rows, rank)``."""

    def __init__(
        self, rows: int, rank: int, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, rank, dtype=dtype, device=device))
        self.backend: str | None = None

    def forward(self, x: Tensor, transposed: bool = False) -> Tensor:
        """``x @ U`` for x ``(..., rows)``, or with `transposed` ``x @ U.T`` for ``(..., rank)``."""
        rows, rank = self.weight.shape
        values = {"values": self.weight.reshape(-1)}
        core = EncodedCore("dense", rows, rank, rows * rank, values)
        return backends.apply_core(x, core, transposed, self.backend)

    def extra_repr(self) -> str:
        """Rows and rank, for ``print(model)``."""
        return f"{self.weight.shape[0]}, rank={self.weight.shape[1]}"


class _Scope(threading.local):
    """Products ``x U1`` of the block that this thread is in; None outside of a block."""

    def __init__(self) -> None:
        self.products: dict[nn.Module, tuple[Tensor, tuple[int, bool], Tensor]] | None = None
        self.traced = False


_scope = _Scope()


def _open_scope(block: nn.Module, args: tuple[Any, ...]) -> None:
    _scope.products, _scope.traced = {}, torch.compiler.is_compiling()


def _close_scope(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    _scope.products = None


def share_products(block: nn.Module) -> None:
    """Apply a factor once per input in each forward of `block`, however many modules read it.

    Q, K and V get the same tensor, so U1 is applied once, under torch.compile too (inductor does
    not merge equal products by itself). Bounding the life of a product by the block's forward
    keeps no activation alive afterwards, error or not, and no autograd graph for a forward that
    comes after its backward.
    """
    block.register_forward_pre_hook(_open_scope)
    block.register_forward_hook(_close_scope, always_call=True)


def shared_product(factor: nn.Module, x: Tensor) -> Tensor:
    """``factor(x)``, taken from the open scope where the same tensor was multiplied before."""
    traced = torch.compiler.is_compiling()
    # A module compiled by itself inside an eager block leaves the block's products alone: they
    # would become outputs and inputs of its graph, which CUDA graphs overwrite between calls.
    if _scope.products is None or _scope.traced != traced:
        return factor(x)  # type: ignore[no-any-return]
    # An in-place change of x between two readers shows in its version, where it has one.
    version = 0 if traced or x.is_inference() else x._version
    state = (version, torch.is_grad_enabled())
    entry = _scope.products.get(factor)
    if entry is not None and entry[0] is x and entry[1] == state:
        return entry[2]
    product: Tensor = factor(x)
    _scope.products[factor] = (x, state, product)
    return product


@dataclass(frozen=True)
class CoreSpec:
    """A packed core before its tensors are known; see `EncodedCore`."""

    codec: str
    rows: int
    columns: int
    nnz: int
    pattern: str = UNSTRUCTURED

    @property
    def tensor_specs(self) -> dict[str, TensorSpec]:
        """Name, shape and dtype of each tensor, as the codec calls them."""
        return CODECS[self.codec].tensor_specs(self.rows, self.columns, self.nnz)


def _register_core(
    module: nn.Module, spec: CoreSpec, dtype: torch.dtype, device: torch.device | str | None
) -> None:
    """Give `module` the tensors of a packed core under their names on disk."""
    for name, (shape, index_dtype) in spec.tensor_specs.items():
        if index_dtype is None:
            values = torch.empty(shape, dtype=dtype, device=device)
            module.register_parameter("weight", nn.Parameter(values))
        else:
            module.register_buffer(name, torch.empty(shape, dtype=index_dtype, device=device))


def packed_core(module: nn.Module, spec: CoreSpec) -> EncodedCore:
    """The core of a module, from the tensors that `_register_core` has given it."""
    tensors = {
        name: getattr(module, "weight" if name == "values" else name) for name in spec.tensor_specs
    }
    return EncodedCore(spec.codec, spec.rows, spec.columns, spec.nnz, tensors, spec.pattern)


class PackedModule(nn.Module):
    """A module with packed tensors, which pickle and Ray can take.

    PyTorch has no pickled form for the storage of 16-bit column indices: they travel as signed.
    """

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_buffers": _viewed(self._buffers, torch.uint16, torch.int16)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        buffers = _viewed(state["_buffers"], torch.int16, torch.uint16)
        super().__setstate__(state | {"_buffers": buffers})  # type: ignore[no-untyped-call]


def _viewed(
    buffers: dict[str, Tensor | None], dtype: torch.dtype, other: torch.dtype
) -> dict[str, Tensor | None]:
    return {
        name: buffer.view(other) if buffer is not None and buffer.dtype == dtype else buffer
        for name, buffer in buffers.items()
    }


class SharedCore(PackedModule):
    """The core of a group with a learned type mode, G ``(R1, R3 h R2)``, packed."""

    def __init__(
        self, spec: CoreSpec, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.backend: str | None = None
        _register_core(self, spec, dtype, device)

    def forward(self) -> Tensor:
        """G ``(R1, R3 h R2)``, dense."""
        return backends.expand(packed_core(self, self.spec), self.backend)

    def extra_repr(self) -> str:
        """The packed core, for ``print(model)``."""
        return f"{self.spec}"


class CompressedLinear(PackedModule):
    """A linear module whose slices share U1 and U2.

    ``weight`` is 1-D: the values of the module's own packed core, or, where the core is a
    `SharedCore`, the module's rows of U3 ``(T_m R3)``. The factors and the shared core are not
    submodules of this one: each stands once in the model, beside the projections.

    Args:
        in_features: width of the input: d, or S p where U1 stands on the output side.
        out_features: width of the output.
        basis_side: side of the module that U1 stands on.
        slices: S.
        factors: U1 and U2.
        core: the module's own core ``(R1, S R2)``, or the core that the group shares.
        types: number of types T_m that the module holds; read only with a shared core.
        bias: whether the module adds a bias.
        dtype: dtype of values and bias.
        device: where the tensors are made (uninitialized, to be loaded).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        basis_side: BasisSide,
        slices: int,
        factors: tuple[Factor, Factor],
        core: CoreSpec | SharedCore,
        types: int = 1,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.basis_side, self.slices, self.types = basis_side, slices, types
        self.backend: str | None = None
        # A tuple, since nn.Module registers modules only where they are attributes themselves.
        self._shared: tuple[Factor, Factor, SharedCore | None]
        if isinstance(core, SharedCore):
            self.spec = None
            self._shared = (*factors, core)
            R2 = factors[1].weight.shape[1]
            R3 = core.spec.columns * types // (slices * R2)
            self.weight = nn.Parameter(torch.empty(types * R3, dtype=dtype, device=device))
        else:
            self.spec = core
            self._shared = (*factors, None)
            _register_core(self, core, dtype, device)
        self.bias = (
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        )

    def _core(self) -> EncodedCore:
        """M ``(R1, S R2)`` of this module, packed."""
        if self.spec is not None:
            return packed_core(self, self.spec)
        _, U2, shared_core = self._shared
        assert shared_core is not None
        M = mix_types(shared_core(), self.weight.reshape(self.types, -1), U2.weight.shape[1])
        rows, columns = M.shape
        return EncodedCore("dense", rows, columns, M.numel(), {"values": M.reshape(-1)})

    @property
    def first_factor(self) -> nn.Module | None:
        """The factor that `enter` applies, U1; None where it stands on the other side."""
        return self._shared[0] if self.basis_side == "input" else None

    @property
    def last_factor(self) -> nn.Module | None:
        """The factor that `leave` applies, U1; None where it stands on the other side."""
        return self._shared[0] if self.basis_side == "output" else None

    def enter(self, x: Tensor) -> Tensor:
        """``x U1``, the product with `first_factor`."""
        return shared_product(self._shared[0], x)

    def leave(self, z: Tensor) -> Tensor:
        """``z U1^T``, the product with `last_factor`."""
        return self._shared[0](z, transposed=True)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, entered: bool = False, leaving: bool = True) -> Tensor:
        """``x (..., in_features) -> (..., out_features)``, in the dtype of the operands.

        Args:
            x: the input, or what `enter` has made of it.
            entered: whether `enter` was applied.
            leaving: whether to apply `leave`, and to add the bias after it.
        """
        U2 = self._shared[1]
        p, R2 = U2.weight.shape
        out: Tensor
        if self.basis_side == "input":
            Y = x if entered else self.enter(x)
            Z = backends.apply_core(Y, self._core(), False, self.backend)
            Z = Z.reshape(*x.shape[:-1], self.slices, R2)
            out = U2(Z, transposed=True).flatten(-2)
        else:
            Z = U2(x.reshape(*x.shape[:-1], self.slices, p)).flatten(-2)
            out = backends.apply_core(Z, self._core(), True, self.backend)
            if not leaving:
                return out
            out = self.leave(out)
        # Under autocast `out` is narrower than the bias; the sum keeps its dtype, as nn.Linear's.
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        """Sizes and packing, for ``print(model)``."""
        core = f"types={self.types}" if self.spec is None else f"{self.spec}"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, slices={self.slices}, bias={self.bias is not None}, {core}"
