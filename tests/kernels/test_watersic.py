"""Whole numbers on a common step: rounding, scales, bytes on disk and in memory."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from support.groups import mha, unfolding
from support.low_rank import LAYOUTS, decompose, layout_of, metrics_of
from torch import Tensor

from lestd_kernels.backends import packing
from lestd_kernels.errors import LestdError
from lestd_kernels.formats.kinds import Decomposition
from lestd_kernels.formats.ops import Multiply
from lestd_kernels.linalg.common_step import fit_scales, whole_numbers
from lestd_kernels.linalg.error_feedback import inverse_factor
from lestd_kernels.linalg.metric import Metric
from lestd_kernels.linalg.two_sided_feedback import output_factor
from lestd_kernels.methods import METHODS, MethodArgs
from lestd_kernels.methods.common.coded_matrix import SteppedMatrix, rounded
from lestd_kernels.modules.chain_linear import PackedMatrix
from lestd_kernels.modules.coded_numbers import decode_all
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.storage.packed_integers import PLAIN, PackedIntegers

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def gram(n: int, seed: int) -> Tensor:
    X = torch.randn(3 * n, n, generator=torch.Generator().manual_seed(seed))
    return X.T @ X / n + torch.eye(n)


def one_by_one(W: Tensor, A: Tensor, B: Tensor, steps: Tensor) -> Tensor:
    """Round element after element, and let the rest make up for each by least squares."""
    damped = [M / M.diagonal().mean() + 0.01 * torch.eye(len(M)) for M in (A.double(), B.double())]
    H = torch.kron(*damped)
    rest, steps = W.double().reshape(-1).clone(), steps.double().reshape(-1)
    Z = torch.zeros_like(rest)
    for k in range(len(rest)):
        Z[k] = (rest[k] / steps[k]).round()
        error = rest[k] - Z[k] * steps[k]
        if k + 1 < len(rest):
            # Least x^T H x with x_k = error and x_later free: H_ll x_l = -H_lk error.
            later = torch.linalg.solve(H[k + 1 :, k + 1 :], H[k + 1 :, k])
            rest[k + 1 :] += later * error
    return Z.view_as(W)


@pytest.mark.parametrize("sides", ["inputs", "both"])
def test_feedback_is_the_least_squares_of_the_kronecker_product(sides: str) -> None:
    W = torch.randn(2, 37, 6, generator=torch.Generator().manual_seed(0))
    A = torch.stack([gram(37, 1), gram(37, 3)])
    B = torch.stack([gram(6, 2), gram(6, 4)]) if sides == "both" else torch.eye(6).expand(2, 6, 6)
    r, c = torch.linspace(0.5, 1, 74).view(2, 37), torch.linspace(0.7, 0.4, 12).view(2, 6)
    V = torch.stack([output_factor(one) for one in B]) if sides == "both" else None
    found = whole_numbers(W, inverse_factor(A), r, c, FP32, V)
    for i in range(2):
        expected = one_by_one(W[i], A[i], B[i], r[i, :, None] * c[i])
        assert (found[i] == expected).float().mean() > 0.99


@pytest.mark.parametrize("form", ["heads", "full"])
def test_an_error_of_one_step_costs_the_same_everywhere(form: str) -> None:
    # Heads, or blocks of 64 outputs, of sizes that differ by far.
    sizes, width = (100.0, 0.01, 1.0), 5 if form == "heads" else 64
    blocks = [size * gram(width, i) for i, size in enumerate(sizes)]
    A, B = gram(7, 9), torch.stack(blocks) if form == "heads" else torch.block_diag(*blocks)
    W = torch.randn(7, 3 * width, generator=torch.Generator().manual_seed(0))
    damping = 0.05
    found = SteppedMatrix.of(W, Metric(A, B), damping, FP32)
    costs = []
    for M in (A, torch.block_diag(*blocks)):
        damped = M.double().numpy() / float(M.diagonal().mean()) + damping * np.eye(len(M))
        # What is left of an element's square once all after it make up for its error.
        costs.append([1 / np.linalg.inv(damped[i:, i:])[0, 0] for i in range(len(M))])
    each = np.outer(*costs) * np.square(np.outer(found.r.numpy(), found.c.numpy()))
    np.testing.assert_allclose(each, each[0, 0], rtol=1e-4)


@pytest.mark.parametrize("sides", ["none", "inputs", "both"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_a_weight_beyond_all_others_has_a_number_too(dtype: torch.dtype, sides: str) -> None:
    """As in the feed-forward of a real model, where one may be thousands of times the others."""
    W = torch.randn(70, 24, generator=torch.Generator().manual_seed(0))
    W[3, 5] = -3000.0
    A, B = (gram(70, 1) if sides != "none" else None), (gram(24, 2) if sides == "both" else None)
    matrix = SteppedMatrix.of(W, Metric(A, B), 0.01, dtype)
    step = 1 / 62 / float(matrix.r.mean() * matrix.c.mean())
    [found] = rounded([matrix], step)
    [stored] = EncodedCore.coded([(found.Z, found.scales)], 8, dtype)  # It is within the coder.
    left, others = stored.decode().float() - W, W.clone()
    assert left[3, 5].abs() / 3000 < 2**-7
    others[3, 5] = 0
    # All of it, that of the one in the 8 bits of bfloat16 too, beside the others alone.
    assert matrix.metric.squares(left) < 0.05 * matrix.metric.squares(others)
    if sides == "none":
        left[3] = 0
        assert left.square().mean().sqrt() < 0.02


@pytest.mark.parametrize("form", ["gram", "diagonal", "none"])
def test_scales_are_the_least_squares_of_the_metric(form: str) -> None:
    W = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    Z = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)).mul(2).round()
    Z[3] = 0
    r, c = torch.full((8,), 0.4), torch.full((5,), 1.2)
    metric = {
        "gram": Metric(gram(8, 1), gram(5, 2)),
        "diagonal": Metric(gram(8, 1).diagonal(), gram(5, 2).diagonal()),
        "none": Metric(None, None),
    }[form]
    fitted_r, fitted_c = fit_scales(W, Z, r, c, metric)
    # Each side against lstsq on the design matrix, whitened by the root of the Kronecker product.
    sides = [
        torch.eye(n) if M is None else torch.diag(M) if M.dim() == 1 else M
        for M, n in ((metric.input, 8), (metric.output, 5))
    ]
    root = np.linalg.cholesky(torch.kron(*sides).double().numpy()).T
    for rows, fitted in ((True, fitted_r), (False, fitted_c)):
        Y = Z * c if rows else fitted_r[:, None] * Z
        design = torch.stack(
            [
                (torch.diag(one) @ Y if rows else Y @ torch.diag(one)).reshape(-1)
                for one in torch.eye(8 if rows else 5)
            ],
            dim=1,
        )
        solved = np.linalg.lstsq(
            root @ design.double().numpy(), root @ W.double().reshape(-1).numpy(), rcond=None
        )[0]
        there = (Y != 0).any(dim=1 if rows else 0).numpy()
        assert np.allclose(fitted.numpy()[there], solved[there], rtol=1e-3, atol=1e-4)
    assert fitted_r[3] == pytest.approx(0.4)


@pytest.mark.parametrize(("keep", "dtype"), [(0.2, BF16), (0.4, FP16), (0.11, FP32)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_any_budget_is_met(name: str, keep: float, dtype: torch.dtype) -> None:
    layout = layout_of(name)
    done = decompose("watersic", layout, keep, dtype, metric="activation")
    budget = int(keep * layout.elements * dtype.itemsize)
    stored = done.decomposition
    found = sum(t.numel() * t.element_size() for t in stored.named_tensors("").values())
    assert found == stored.stored_bytes
    # A small matrix has few numbers, and a byte is a large share of it.
    assert 0.995 * budget - 8 <= found <= budget
    assert done.expected_squared_error is not None
    assert done.metric_squared_error < 1.5 * done.expected_squared_error
    again = decompose("watersic", layout, keep, dtype, metric="activation").decomposition
    for key, tensor in stored.named_tensors("").items():
        assert torch.equal(tensor, again.named_tensors("")[key])


@pytest.mark.parametrize(
    ("coding", "keep"), [("fixed", 0.1), ("fixed", 0.2), ("fixed", 0.4), ("entropy", 0.2)]
)
def test_a_budget_may_count_bytes_in_memory(coding: str, keep: float) -> None:
    layout = mha(256, 32, 8)
    name = "watersic" if coding == "fixed" else "lestd"

    def stored() -> Decomposition:
        options = {"metric": "weight", "size": "memory", "coding": coding}
        return decompose(name, layout, keep, BF16, **options).decomposition

    budget, found = int(keep * layout.elements * 2), stored()
    # Of a matrix of which the first number lies beside the others, the ends of all rows do, too.
    assert 0.995 * budget - 4 * 257 <= found.memory_bytes <= budget
    assert found.stored_bytes < found.memory_bytes
    again = stored().named_tensors("")
    assert all(torch.equal(one, again[key]) for key, one in found.named_tensors("").items())


def test_bytes_in_memory_are_those_on_disk_where_nothing_is_coded() -> None:
    layout = layout_of("gqa")
    on_disk, in_memory = (
        decompose("svd", layout, 0.3, BF16, metric="weight", size=size).decomposition
        for size in ("disk", "memory")
    )
    assert on_disk.memory_bytes == on_disk.stored_bytes == in_memory.stored_bytes
    args = MethodArgs(metric="weight", size="memory")
    with pytest.raises(LestdError, match=r"zeros have a bit each; raise keep, or .*size: disk"):
        METHODS["watersic"].bounds(layout, layout.elements // 8, BF16, args)


def test_it_ends_at_8_bits_and_begins_at_zeros() -> None:
    layout = layout_of("gqa")
    done = decompose("watersic", layout, 0.9, BF16, metric="weight")
    scales = sum(sum(layout.weight_shape(module)) for module in layout.modules)
    # Small matrices have large tables, too.
    assert 7.5 < 8 * (done.decomposition.stored_bytes - 1.1 * scales) / layout.elements < 9.8
    assert done.relative_error < 0.01
    args = MethodArgs(metric="weight")
    least = METHODS["watersic"].least_bytes(layout, BF16, args)
    keep = least / layout.elements / 2 + 1e-4
    smallest = decompose("watersic", layout, keep, BF16, metric="weight").decomposition
    assert smallest.nnz <= 0.02 * layout.elements
    with pytest.raises(LestdError, match="needs at least"):
        METHODS["watersic"].bounds(layout, least - 1, BF16, args)
    with pytest.raises(LestdError, match="supports only value_bits 16"):
        METHODS["watersic"].least_bytes(layout, BF16, MethodArgs(value_bits=4))


@pytest.mark.parametrize("metric", ["weight", "activation"])
def test_curves_say_what_other_budgets_cost(metric: str) -> None:
    layout = layout_of("mha")
    args = MethodArgs(metric=metric)
    budgets = [int(keep * layout.elements * 2) for keep in (0.15, 0.25, 0.4)]
    metrics = metrics_of(layout, metric)
    curve = (
        METHODS["watersic"]
        .decompose(unfolding(layout), layout, budgets[1], BF16, args, budgets, metrics)
        .curve
    )
    for point in curve:
        one = METHODS["watersic"].decompose(
            unfolding(layout), layout, point.byte_budget, BF16, args, (), metrics
        )
        ratio = math.log2(point.squared_error / one.metric_squared_error)
        assert (
            abs(ratio) < 0.4
        )  # An eighth of a bit of each number, and what fitting scales brings.


def numbers(scale: float, outliers: int = 0, zeros: bool = False) -> Tensor:
    Z = torch.randn(64, 72, generator=torch.Generator().manual_seed(4)).mul(scale).round()
    Z.view(-1)[:outliers] = torch.linspace(-9000, 9000, outliers).round()
    return torch.zeros_like(Z) if zeros else Z


PACKED = {
    "bits of 8": numbers(30),
    "bits of 4": numbers(1.8),
    "bits of 2": numbers(0.3),
    "outliers": numbers(0.6, outliers=9),
    "zeros": numbers(1, zeros=True),
}


@pytest.mark.parametrize("name", PACKED)
def test_numbers_in_memory_are_those_on_disk(name: str) -> None:
    Z = PACKED[name].to(torch.int16)
    packed = PackedIntegers.pack(Z)
    assert torch.equal(packed.integers(), Z)
    r, c = torch.linspace(0.01, 0.02, 64), torch.linspace(1, 2, 72)
    [stored] = EncodedCore.coded([(Z, torch.cat((r, c)))], 8, BF16)
    entry = {"rows": 64, "columns": 72} | stored.describe()
    assert entry["packed_bytes"] == packed.packed_bytes
    matrix = PackedMatrix(entry, BF16)
    tensors = stored.named_tensors("w")
    matrix.load_state_dict({name.removeprefix("w."): one for name, one in tensors.items()})
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    expected = x.float() @ stored.decode().float()
    before = matrix(x, Multiply(0))
    assert matrix.numbers is not None
    decode_all([("w", matrix.numbers)])
    in_memory = [*matrix.parameters(), *matrix.buffers()]
    assert sum(t.numel() * t.element_size() for t in in_memory) == stored.memory_bytes
    after = matrix(x, Multiply(0))
    assert torch.equal(before, after)
    scale = expected.abs().max() + 1e-6
    assert (after.float() - expected).abs().max() < 0.02 * scale
    saved = matrix.state_dict()
    assert saved.keys() == {name.removeprefix("w.") for name in tensors}
    assert torch.equal(saved["numbers.stream"], stored.tensors["stream"])
    matrix.load_state_dict(saved)
    assert torch.equal(matrix(x, Multiply(0)), after)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 72), (37, 211)])
def test_compiled_packing_is_that_of_pytorch(shape: tuple[int, int]) -> None:
    packer = packing.compiled()
    if packer is None:
        pytest.skip("needs a C++ compiler")
    generator = torch.Generator().manual_seed(6)
    for scale in (0, 0.1, 0.3, 0.6, 1, 1.8, 4, 30, 900):
        Z = torch.randn(shape, generator=generator).mul(scale).round().to(torch.int16)
        Z.view(-1)[::97] = -32767
        found, plain = PackedIntegers.pack(Z, packer), PackedIntegers.pack(Z)
        assert torch.equal(found.integers(), Z)
        assert packer.counts(Z.view(-1), (8, 4, 3, 2)) == PLAIN.counts(Z.view(-1), (8, 4, 3, 2))
        assert (found.codec, found.bits, found.count) == (plain.codec, plain.bits, plain.count)
        assert found.tensors.keys() == plain.tensors.keys()
        for name, tensor in found.tensors.items():
            assert tensor.dtype == plain.tensors[name].dtype
            assert torch.equal(tensor, plain.tensors[name])
        for bits, masked in itertools.product((8, 4, 3, 2), (False, True)):
            both = (by.pack(Z.view(-1), bits, masked) for by in (packer, PLAIN))
            codes, expected = ([torch.as_tensor(one) for one in each] for each in both)
            assert all(map(torch.equal, codes, expected))


def test_few_bits_take_few_bytes_in_memory() -> None:
    sizes = {name: PackedIntegers.pack(Z.to(torch.int16)) for name, Z in PACKED.items()}
    assert sizes["bits of 8"].packed_bytes <= 64 * 72
    assert sizes["bits of 4"].packed_bytes <= 64 * 72 / 2 * 1.2
    assert sizes["bits of 2"].packed_bytes <= 64 * 72 / 4
    assert sizes["bits of 2"].codec == "bitmask"
