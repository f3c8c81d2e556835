"""Linear modules that are a chain of packed matrices; the dense weight is never rebuilt.

Shapes: W (in, out) of the module, row-vector convention, see lestd_kernels.formats.chain. Few-bit
values stay packed in memory; a product unpacks one matrix at a time.

Reference: LeSTD (ICLR 2026), section "Inference in the compressed domain", for the general form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lestd_kernels import backends
from lestd_kernels.formats.ops import Mix, Multiply, Op, Permute, apply_dense, apply_permute
from lestd_kernels.modules.coded_numbers import CodedNumbers
from lestd_kernels.modules.shared_tucker_linear import PackedModule, shared_product
from lestd_kernels.storage.codecs import UNSTRUCTURED
from lestd_kernels.storage.few_bits import FULL_BITS
from lestd_kernels.storage.matrix import RANS, EncodedCore, disk_name, packed_specs


class PackedMatrix(PackedModule):
    """A stored matrix ``(rows, columns)``; its tensors have their names on disk.

    Args:
        entry: as `lestd_kernels.formats.chain.describe_matrix` wrote it.
        dtype: of values or scales.
        device: where the tensors are made (uninitialized, to be loaded).
    """

    def __init__(
        self, entry: dict[str, Any], dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        # Not `columns`, which a csr matrix calls a tensor of its own.
        self.sizes = int(entry["rows"]), int(entry["columns"])
        self.codec, self.nnz = str(entry["codec"]), int(entry["nnz"])
        self.value_bits = int(entry.get("value_bits", FULL_BITS))
        self.pattern = str(entry.get("pattern", UNSTRUCTURED))
        self.exponent = int(entry.get("exponent", 0))
        self.with_zero = bool(entry.get("with_zero", False))
        self.backend: str | None = None
        self.numbers: CodedNumbers | None = None
        if self.codec == RANS:
            self.numbers = CodedNumbers(*self.sizes, int(entry["bytes"]), device)
        for name, (shape, index_dtype) in self._specs().items():
            if index_dtype is None:
                values = torch.empty(shape, dtype=dtype, device=device)
                # Scales are not trained: the codes below them are fixed.
                trained = self.value_bits == FULL_BITS
                self.weight = nn.Parameter(values, requires_grad=trained)
            else:
                self.register_buffer(name, torch.empty(shape, dtype=index_dtype, device=device))

    def _specs(self) -> dict[str, Any]:
        specs = packed_specs(self.codec, *self.sizes, self.nnz, self.value_bits)
        specs.pop("stream", None)  # Which `numbers` holds.
        return specs

    def packed(self) -> EncodedCore:
        """The matrix as it is stored; of a coded one the scales."""
        tensors = {name: getattr(self, disk_name(name)) for name in self._specs()}
        return EncodedCore(
            self.codec,
            *self.sizes,
            self.nnz,
            tensors,
            self.pattern,
            self.value_bits,
            self.exponent,
            with_zero=self.with_zero,
        )

    def multiply(self, x: Tensor, op: Multiply) -> Tensor:
        """``x (..., blocks rows) -> (..., blocks columns)``."""
        if self.numbers is not None:
            return self._multiply_numbers(x, op, self.numbers)
        core = self.packed().unpacked()
        if op.distinct:
            return apply_dense(x, op, backends.expand(core, self.backend))
        blocks = x if op.blocks == 1 else x.reshape(*x.shape[:-1], op.blocks, -1)
        product = backends.apply_core(blocks, core, op.transposed, self.backend)
        return product if op.blocks == 1 else product.flatten(-2)

    def _multiply_numbers(self, x: Tensor, op: Multiply, numbers: CodedNumbers) -> Tensor:
        r, c = self.packed().scales()
        if op.distinct:
            return apply_dense(x, op, r[:, None] * numbers.integers().to(r.dtype) * c)
        before, after = (c, r) if op.transposed else (r, c)
        blocks = x if op.blocks == 1 else x.reshape(*x.shape[:-1], op.blocks, -1)
        product: Tensor = numbers(blocks * before, op.transposed, r.dtype, self.backend) * after
        return product if op.blocks == 1 else product.flatten(-2)

    def forward(self, x: Tensor, op: Multiply | None = None) -> Tensor:
        """`multiply`, by a call, as hooks that bring weights in when a module is called need it."""
        return self.multiply(x, op or Multiply(0))

    def extra_repr(self) -> str:
        """Sizes and packing, for ``print(model)``."""
        return f"{self.sizes}, {self.codec}, bits={self.value_bits}, nnz={self.nnz}"


class ChainLinear(PackedMatrix):
    """A linear module that is a chain of matrices.

    It holds its first own matrix itself, so that ``weight`` is 1-D; the others are ``m1``, ...,
    and ``side``. Shared matrices are not submodules of this one: each stands once in the block.

    Args:
        entry: the module's entry, as `Chain.describe` wrote it.
        in_features: width of the input.
        out_features: width of the output.
        shared: the matrices that the block's modules share, by name.
        bias: whether the module adds a bias.
        dtype: dtype of values, scales and bias.
        device: where the tensors are made (uninitialized, to be loaded).
    """

    def __init__(
        self,
        entry: dict[str, Any],
        in_features: int,
        out_features: int,
        ops: tuple[Op, ...],
        shared: dict[str, PackedMatrix],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        first, *others = entry["own"]
        super().__init__(first, dtype, device)
        self.in_features, self.out_features, self.ops = in_features, out_features, ops
        self._own = 1 + len(others)
        for index, other in enumerate(others, start=1):
            self.add_module(f"m{index}", PackedMatrix(other, dtype, device))
        self.side = PackedMatrix(entry["side"], dtype, device) if "side" in entry else None
        # A tuple, since nn.Module registers modules only where they are attributes themselves.
        self._shared = tuple(shared.items())
        self.bias = (
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        )

    def _shared_matrix(self, op: Op) -> PackedMatrix | None:
        """The matrix of an op that multiplies the whole last dimension by a shared one."""
        whole = isinstance(op, Multiply) and isinstance(op.matrix, str) and op.blocks == 1
        return dict(self._shared)[str(op.matrix)] if whole else None  # type: ignore[union-attr]

    @property
    def first_factor(self) -> nn.Module | None:
        """The matrix that `enter` applies, which other modules may share; None where there is none.

        A side matrix reads the input itself.
        """
        return None if self.side is not None else self._shared_matrix(self.ops[0])

    @property
    def last_factor(self) -> nn.Module | None:
        """The matrix that `leave` applies, which other modules may share; None where there is none.

        What a side matrix adds is added after it.
        """
        return None if self.side is not None else self._shared_matrix(self.ops[-1])

    def enter(self, x: Tensor) -> Tensor:
        """The product with `first_factor`."""
        return self._apply_op(x, self.ops[0], first=True)

    def leave(self, z: Tensor) -> Tensor:
        """The product with `last_factor`."""
        return self._apply_op(z, self.ops[-1], first=False)

    def _apply_op(self, x: Tensor, op: Op, first: bool) -> Tensor:
        if isinstance(op, Permute):
            return apply_permute(x, op)
        if isinstance(op, Mix):
            own = self if op.weights == 0 else self.get_submodule(f"m{op.weights}")
            assert isinstance(own, PackedMatrix)
            weights = own.packed().decode()
            mixture: Tensor = dict(self._shared)[op.matrices](weights)
            return x @ mixture.view(op.rows, -1).to(x.dtype)
        if isinstance(op.matrix, str):
            matrix = dict(self._shared)[op.matrix]
            if first and op.blocks == 1 and not op.transposed:
                return shared_product(matrix, x)
            return matrix(x, op)  # type: ignore[no-any-return]
        if op.matrix == 0:
            return self.multiply(x, op)
        return self.get_submodule(f"m{op.matrix}")(x, op)  # type: ignore[no-any-return]

    def forward(
        self,
        x: Tensor,
        op: Multiply | None = None,
        entered: bool = False,
        leaving: bool = True,
    ) -> Tensor:
        """``x (..., in_features) -> (..., out_features)``, in the dtype of the operands.

        Args:
            x: the input, or what `enter` has made of it.
            op: not used; that of a `PackedMatrix`.
            entered: whether `enter` was applied.
            leaving: whether to apply `leave`, and to add the bias after it.
        """
        out = x
        for position, one in enumerate(self.ops if leaving else self.ops[:-1]):
            if position > 0 or not entered:
                out = self._apply_op(out, one, first=position == 0)
        if not leaving:
            return out
        if self.side is not None:
            out = out + self.side(x)
        # Under autocast `out` is narrower than the bias; the sum keeps its dtype, as nn.Linear's.
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        """Sizes and packing, for ``print(model)``."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {super().extra_repr()}"
