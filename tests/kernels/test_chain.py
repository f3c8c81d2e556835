"""Chains of packed matrices: their bytes, their names, their products, against plain matrices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lestd_kernels.formats.chain import Chain, ModuleChain, describe_matrix
from lestd_kernels.formats.ops import Mix, Multiply, Permute, op_of
from lestd_kernels.methods import MethodArgs
from lestd_kernels.methods.common.per_module import module_method, split_budget
from lestd_kernels.modules.chain_linear import ChainLinear, PackedMatrix
from lestd_kernels.storage.few_bits import (
    GROUP,
    code_bytes,
    dequantize,
    pack_codes,
    quantize,
    unpack_codes,
    values_bytes,
)
from lestd_kernels.storage.matrix import EncodedCore, stored_core
from lestd_kernels.tensorize import GroupLayout, ModuleLayout

BF16 = torch.bfloat16


def packed(matrix: Tensor, bits: int = 16, codec: str | None = None) -> EncodedCore:
    return EncodedCore.quantized(matrix, bits, torch.float32, codec=codec)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("count", [0, 1, 7, 64, 65, 1003])
def test_codes_are_packed_without_loss(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8)
    stored = pack_codes(codes, bits)
    assert len(stored) == code_bytes(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack_codes(stored, count, bits), codes)
    bit_string = "".join(format(c, f"0{bits}b")[::-1] for c in codes.tolist())
    expected = [int(bit_string[i : i + 8][::-1], 2) for i in range(0, len(bit_string), 8)]
    assert stored.tolist() == expected


@pytest.mark.parametrize("has_zero", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_every_value_goes_to_the_nearest_level(
    bits: int, dtype: torch.dtype, has_zero: bool
) -> None:
    torch.manual_seed(bits)
    values = torch.randn(200) * torch.logspace(-3, 2, 200)
    values[64:128] = 0
    codes, scales, exponent = quantize(values, bits, dtype, has_zero=has_zero)
    assert exponent == 0
    stored_bytes = codes.numel() + scales.numel() * dtype.itemsize
    assert stored_bytes == values_bytes(200, bits, dtype.itemsize)
    found = dequantize(codes, scales, 200, bits, has_zero)
    assert found.dtype == dtype
    assert torch.equal(found[64:128], torch.zeros(64, dtype=dtype))
    offset = 2 ** (bits - 1) if has_zero else (2**bits - 1) / 2
    for first in range(0, 200, GROUP):
        scale = float(scales[first // GROUP])
        grid = [(code - offset) * scale for code in range(2**bits)]
        group = values[first : first + GROUP].tolist()
        largest = max(group, key=abs)
        outer = grid[0] if has_zero else max(grid)
        assert outer == pytest.approx(largest if has_zero else abs(largest), rel=2**-8)
        for value, stored in zip(group, found[first : first + GROUP].tolist(), strict=True):
            nearest = min(abs(value - level) for level in grid)
            # The stored value is itself rounded to the dtype.
            assert abs(value - stored) <= nearest + abs(stored) * torch.finfo(dtype).eps + 1e-30


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("codec", ["dense", "bitmask"])
def test_small_weights_lose_no_more_than_large_ones_in_float16(codec: str, bits: int) -> None:
    """Their scales are below its normal numbers, down to the zeros of a group that is nothing."""
    torch.manual_seed(bits)
    large = torch.randn(20, 70)
    large[5:7] = 0 if codec == "dense" else 2.0**-5
    size = EncodedCore.quantized(large, bits, BF16, codec=codec).stored_bytes
    errors, codes = [], []
    for matrix in (large, large * 2.0**-9, large * 2.0**-15):
        stored = EncodedCore.quantized(matrix, bits, torch.float16, codec=codec)
        assert stored.stored_bytes == size
        entry = describe_matrix(stored)
        tensors = stored.named_tensors("m")
        again = stored_core("m", entry, 20, 70, tensors).decode()
        module = PackedMatrix(entry, torch.float16)
        module.load_state_dict({name.removeprefix("m."): t for name, t in tensors.items()})
        assert torch.equal(module.packed().decode(), again)
        assert torch.equal(stored.decode(), again)
        errors.append(float((again.float() - matrix).norm() / matrix.norm()))
        codes.append(stored.tensors["codes"])
    assert "exponent" in entry
    assert torch.equal(codes[0], codes[1])
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    assert errors[2] < errors[0] + 1e-3  # Values are numbers of float16 that are not normal.


def test_positions_of_kept_zeros_are_stored() -> None:
    matrix = torch.tensor([[0.0, 5.0, 0.0], [0.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, False], [False, True, False]])
    for bits in (16, 4, 3):
        core = EncodedCore.quantized(matrix, bits, torch.float32, codec="bitmask", mask=mask)
        assert core.nnz == 3
        core.check()
        assert torch.equal(core.decode() != 0, mask if bits == 3 else matrix != 0)


def layout(*modules: ModuleLayout, width: int = 12, head_dim: int = 5) -> GroupLayout:
    return GroupLayout(width, head_dim, modules)


Q_PROJ = ModuleLayout("q_proj", "input", (("q", 0), ("q", 1)))
O_PROJ = ModuleLayout("o_proj", "output", (("o", 0), ("o", 1)), "heads")


def tt_matrix() -> tuple[ModuleChain, Tensor]:
    """A TT matrix of modes (3 x 2) by (4 x 5) and what it stands for, summed by brute force."""
    G1 = torch.randn(3, 2, 2)  # m1 3, n1 2, r 2
    G2 = torch.randn(2, 4, 5)  # r 2, m2 4, n2 5
    W = torch.einsum("mnr,rab->manb", G1, G2).reshape(12, 10)
    second = G2.permute(1, 0, 2).reshape(4, 10)  # m2 -> (r, n2)
    first = G1.permute(0, 2, 1).reshape(6, 2)  # (m1, r) -> n1
    ops = (
        Multiply(0, blocks=3),  # (m1, r, n2)
        Permute((3, 2, 5), (2, 0, 1)),  # (n2, m1, r)
        Multiply(1, blocks=5),  # (n2, n1)
        Permute((5, 2), (1, 0)),
    )
    return ModuleChain(ops, (packed(second), packed(first))), W


def example() -> tuple[Chain, dict[str, Tensor]]:
    """A chain per kind of op, and the dense weights ``(in, out)``."""
    torch.manual_seed(0)
    U1 = torch.randn(12, 4)
    M = torch.randn(4, 10) * (torch.rand(4, 10) < 0.5)
    side = torch.zeros(12, 10)
    side[3, 7], side[11, 0] = 2.5, -1.0
    k, tt = tt_matrix()
    heads = torch.randn(2, 5, 3)
    down = torch.randn(6, 12)
    many, pair, wide = torch.randn(2, 12, 10), torch.randn(2, 5, 3), torch.randn(12, 12)
    modules = {
        "q_proj": ModuleChain((Multiply("lestd_u1"), Multiply(0)), (packed(M),), packed(side)),
        "k_proj": k,
        "o_proj": ModuleChain(
            (Multiply(0, blocks=2, distinct=True), Multiply(1)),
            (packed(heads.reshape(10, 3)), packed(down)),
        ),
        "mixed": ModuleChain((Mix(0, "lestd_many", 12),), (packed(torch.tensor([[2.0, -0.5]])),)),
        "shared": ModuleChain(
            (Multiply(0), Multiply("lestd_pair", True, 4, distinct=True, each=2)),
            (packed(wide),),
        ),
        "v_proj": ModuleChain(
            (Multiply(0, transposed=True),), (packed((U1 @ M).T.contiguous(), 8),)
        ),
    }
    weights = {
        "q_proj": U1 @ M + side,
        "k_proj": tt,
        "o_proj": torch.block_diag(*heads) @ down,
        "mixed": 2 * many[0] - 0.5 * many[1],
        "shared": wide @ torch.block_diag(*(pair[i].T for i in (0, 0, 1, 1))),
        "v_proj": modules["v_proj"].own[0].decode().T,
    }
    of_q = (replace(Q_PROJ, name=name) for name in ("k_proj", "v_proj", "mixed"))
    of_four = replace(Q_PROJ, name="shared", slices=tuple(("q", i) for i in range(4)))
    together = {"lestd_u1": U1, "lestd_many": many.flatten(1), "lestd_pair": pair.flatten(0, 1)}
    shared = {name: packed(matrix) for name, matrix in together.items()}
    group = layout(Q_PROJ, O_PROJ, *of_q, of_four)
    return Chain(group, shared, modules, {"R1": 4}, torch.float32), weights


def test_a_chain_is_the_product_of_its_matrices() -> None:
    chain, weights = example()
    for name, W in weights.items():
        assert_close(chain.module_weight(name), W)
        assert_close(chain.to_dense()[name], W.T)


def test_what_is_stored_is_read_back() -> None:
    chain, weights = example()
    block = "model.layers.0.self_attn"
    entry, tensors = chain.describe(block), chain.named_tensors(block)
    specs = Chain.stored_specs(entry)
    assert specs.keys() == tensors.keys()
    for name, (shape, dtype) in specs.items():
        assert tensors[name].shape == shape
        assert tensors[name].dtype == (dtype or torch.float32)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == chain.stored_bytes
    again = Chain.from_named_tensors(entry, tensors)
    again.check()
    assert again.describe(block) == entry
    for name, W in weights.items():
        assert_close(again.module_weight(name), W)
        assert tensors[f"{block}.{name}.weight"].dim() == 1


def linear(chain: Chain, name: str, bias: bool) -> ChainLinear:
    entry = chain.describe("x")
    shared = {}
    for key, matrix in entry["shared"].items():
        shared[key] = PackedMatrix(matrix, torch.float32)
        _load(shared[key], chain.shared[key].named_tensors("x"))
    module = entry["modules"][name]
    W = chain.module_weight(name)
    ops = tuple(op_of(op) for op in module["ops"])
    built = ChainLinear(module, *W.shape, ops, shared, bias=bias, dtype=torch.float32)
    tensors = Chain(chain.layout, {}, {name: chain.modules[name]}, {}, torch.float32)
    _load(built, {k.replace(f".{name}", "", 1): v for k, v in tensors.named_tensors("x").items()})
    return built


def _load(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    state = {name.removeprefix("x."): tensor for name, tensor in tensors.items()}
    if isinstance(module, ChainLinear) and module.bias is not None:
        state["bias"] = torch.arange(module.out_features).float()
    module.load_state_dict(state)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "o_proj", "v_proj", "mixed", "shared"])
def test_the_module_multiplies_by_the_dense_weight(name: str, bias: bool) -> None:
    chain, weights = example()
    module = linear(chain, name, bias)
    x = torch.randn(2, 3, module.in_features)
    expected = x @ weights[name]
    if bias:
        expected = expected + torch.arange(module.out_features).float()
    assert_close(module(x), expected)
    x.requires_grad_()
    module(x).sum().backward()
    assert_close(x.grad, weights[name].sum(dim=1).expand(2, 3, -1))


def _store_whole(
    W: Tensor, metric: Tensor | None, budget: int, dtype: torch.dtype, args: MethodArgs
) -> tuple[ModuleChain, float]:
    """Magnitude pruning to half of the elements, where they fit."""
    cut = W.abs().median()
    core = EncodedCore.quantized(W * (W.abs() > cut), args.value_bits, dtype)
    lost = float((W * (W.abs() <= cut)).square().sum())
    return ModuleChain((Multiply(0),), (core,)), lost


def _least(rows: int, columns: int, value_bytes: int, args: MethodArgs) -> int:
    return rows * columns * value_bytes // 2 + rows * columns // 8 + 1


@pytest.mark.parametrize("metric", [None, "diagonal", "gram"])
def test_errors_of_modules_are_those_of_numpy(metric: str | None) -> None:
    torch.manual_seed(1)
    group = layout(Q_PROJ, replace(Q_PROJ, name="k_proj", slices=(("k", 0),)), O_PROJ)
    unfolding = torch.randn(12, 25)
    X = torch.randn(40, 12)
    G = X.T @ X
    metrics = {} if metric is None else {"q_proj": G if metric == "gram" else G.diagonal()}
    method = module_method("halves", _store_whole, _least)
    least = method.least_bytes(group, BF16, MethodArgs())
    done = method.decompose(
        unfolding.clone(), group, least, BF16, MethodArgs(), (least, 2 * least), metrics
    )
    dense = done.decomposition.to_dense()
    W = {"q_proj": unfolding[:, :10], "k_proj": unfolding[:, 10:15], "o_proj": unfolding[:, 15:].T}
    errors = {name: (W[name] - dense[name].T).double() for name in W}
    assert done.squared_error == pytest.approx(
        sum(float(e.square().sum()) for e in errors.values())
    )
    assert done.squared_norm == pytest.approx(float(unfolding.double().square().sum()))
    S = {name: torch.eye(len(W[name])).double() for name in W}
    if metric == "gram":
        S["q_proj"] = X.double()
    elif metric == "diagonal":
        S["q_proj"] = G.diagonal().double().sqrt().diag()
    expected = sum(float((S[name] @ errors[name]).square().sum()) for name in W)
    assert done.metric_squared_error == pytest.approx(expected)
    heads = errors["o_proj"].reshape(2, 5, 12).square().sum(dim=(1, 2))
    norms = W["o_proj"].double().reshape(2, 5, 12).square().sum(dim=(1, 2))
    found = [s.relative_error**2 for s in done.slices if s.projection == "o"]
    assert found == pytest.approx((heads / norms).tolist())
    assert [point.byte_budget for point in done.curve] == [least, 2 * least]
    assert sum(split_budget(group, 1003).values()) == 1003
