"""A block of compressed projections, and layouts for it."""

from __future__ import annotations

from torch import Tensor, nn

from lestd_kernels.formats.shared_tucker import CORE_NAME, SharedTucker, module_types
from lestd_kernels.modules.shared_tucker_linear import (
    CompressedLinear,
    CoreSpec,
    Factor,
    SharedCore,
    share_products,
)
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.tensorize import GroupLayout, ModuleLayout


def layout(width: int = 20, head_dim: int = 8, heads: int = 3) -> GroupLayout:
    modules = [
        ModuleLayout(f"{p}_proj", "input", tuple((p, i) for i in range(heads))) for p in "qkv"
    ]
    modules.append(ModuleLayout("o_proj", "output", tuple(("o", i) for i in range(heads))))
    return GroupLayout(width, head_dim, tuple(modules))


class Block(nn.Module):
    """An attention block without the softmax: o(q + k v)."""

    def __init__(self, group: SharedTucker, bias: bool = True) -> None:
        super().__init__()
        sizes = group.layout
        dtype = group.U1.dtype
        self.lestd_u1 = Factor(*group.U1.shape, dtype)
        self.lestd_u2 = Factor(*group.U2.shape, dtype)

        def spec(core: EncodedCore) -> CoreSpec:
            return CoreSpec(core.codec, core.rows, core.columns, core.nnz)

        if group.U3 is not None:
            self.lestd_core = SharedCore(spec(group.cores[CORE_NAME]), dtype)
        for module in sizes.modules:
            out_features, in_features = sizes.weight_shape(module)
            linear = CompressedLinear(
                in_features,
                out_features,
                module.basis_side,
                len(module.slices),
                (self.lestd_u1, self.lestd_u2),
                spec(group.cores[module.name]) if group.U3 is None else self.lestd_core,
                types=1 if group.U3 is None else len(module_types(module)),
                bias=bias,
                dtype=dtype,
            )
            if bias:
                nn.init.normal_(linear.bias)
            self.add_module(module.name, linear)
        biases = {name: b for name, b in self.state_dict().items() if name.endswith(".bias")}
        self.load_state_dict(group.named_tensors("") | biases, strict=True)
        share_products(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.q_proj(x) + self.k_proj(x) * self.v_proj(x))
