"""Bases and cores coded by their entropy: budgets, what is stored, which rank."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.groups import mha, unfolding
from support.low_rank import decompose, layout_of, metrics_of
from torch import Tensor

from lestd_kernels.errors import LestdError
from lestd_kernels.methods import METHODS, MethodArgs
from lestd_kernels.search.rank_and_step import Point, divide, lower_hull
from lestd_kernels.storage.matrix import EncodedCore

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def in_planes(rank: int) -> Tensor:
    """Weights of `mha(48, 12, 4)` whose heads share a subspace, and some noise."""
    generator = torch.Generator().manual_seed(3)
    W = unfolding(mha(48, 12, 4))
    U = torch.linalg.qr(torch.randn(48, rank, generator=generator))[0]
    return U @ (U.T @ W) + 0.02 * W


def values(matrix: EncodedCore) -> Tensor:
    """By the definition: ``diag(r) Z diag(c)``."""
    r, c = matrix.scales()
    return torch.diag(r.float()) @ matrix.integers().float() @ torch.diag(c.float())


@pytest.mark.parametrize(
    ("name", "metric", "keep", "dtype"),
    [
        ("fused", "weight", 0.2, BF16),
        ("gqa", "activation", 0.3, FP16),
        ("odd", "norm", 0.11, FP32),
        ("ffn", "activation", 0.1, FP32),
    ],
)
def test_any_budget_is_met_and_errors_are_of_what_is_stored(
    name: str, metric: str, keep: float, dtype: torch.dtype
) -> None:
    layout = layout_of(name)
    done = decompose("lestd", layout, keep, dtype, metric=metric, coding="entropy")
    stored, budget = done.decomposition, int(keep * layout.elements * dtype.itemsize)
    tensors = stored.named_tensors("")
    found = sum(t.numel() * t.element_size() for t in tensors.values())
    # A small matrix has few numbers, and a byte is a large share of it.
    assert 0.995 * budget - 24 <= found == stored.stored_bytes <= budget
    again = decompose("lestd", layout, keep, dtype, metric=metric, coding="entropy").decomposition
    for key, tensor in again.named_tensors("").items():
        assert torch.equal(tensor, tensors[key])
    metrics, total = metrics_of(layout, metric), 0.0
    for module in layout.modules:
        block = unfolding(layout)[:, layout.columns(module)]
        D = (block if module.basis_side == "input" else block.T).double()
        D = D - stored.to_dense()[module.name].T
        A = metrics.get(module.name)
        weighted = D if A is None else (torch.diag(A) if A.dim() == 1 else A).double() @ D
        total += float((D * weighted).sum())
    assert done.metric_squared_error == pytest.approx(total, rel=1e-3)


def test_a_basis_is_stored_where_it_pays() -> None:
    layout, W = mha(48, 12, 4), in_planes(5)
    budget = int(0.09 * W.numel() * 2)
    args = MethodArgs(coding="entropy")
    done = METHODS["lestd"].decompose(W, layout, budget, BF16, args)
    plain = METHODS["watersic"].decompose(W, layout, budget, BF16, MethodArgs())
    assert done.relative_error < 0.8 * plain.relative_error
    stored = done.decomposition
    U1 = values(stored.shared["lestd_u1"])
    assert U1.shape == (48, stored.ranks["R1"])
    assert 5 <= stored.ranks["R1"] <= 16
    M = values(stored.modules["q_proj"].own[0])
    assert torch.allclose(stored.to_dense()["q_proj"], (U1 @ M).T, atol=0.02 * float(W.abs().max()))


def test_without_a_basis_it_is_watersic() -> None:
    layout = layout_of("mha")
    own = decompose("lestd", layout, 0.25, FP32, metric="weight", coding="entropy")
    plain = decompose("watersic", layout, 0.25, FP32, metric="weight")
    assert own.decomposition.ranks == {}
    assert own.relative_error == pytest.approx(plain.relative_error, rel=0.05)


@pytest.mark.parametrize("kind", ["zeros", "constant", "outliers", "least"])
def test_odd_weights_are_stored_within_the_least_bytes(kind: str) -> None:
    layout = layout_of("gqa")
    W, args = unfolding(layout), MethodArgs(coding="entropy")
    least = METHODS["lestd"].least_bytes(layout, BF16, args)
    if kind == "outliers":
        W[::7, ::11] *= 300
    elif kind != "least":
        W.fill_(0.0 if kind == "zeros" else 0.3)
    budget = least if kind == "least" else 2 * least
    done = METHODS["lestd"].decompose(W.clone(), layout, budget, BF16, args, [3 * least, 9 * least])
    assert done.decomposition.stored_bytes <= budget
    assert done.relative_error <= (0.1 if kind == "constant" else 1.01)
    assert done.curve[1].squared_error <= done.curve[0].squared_error * (1 + 1e-6)
    with pytest.raises(LestdError, match="raise keep"):
        METHODS["lestd"].bounds(layout, least - 1, BF16, args)


def test_bytes_are_divided_where_errors_are_least() -> None:
    generator = torch.Generator().manual_seed(0)
    hulls = []
    for _ in range(2):
        sizes = torch.randint(10, 900, (9,), generator=generator).tolist()
        errors = torch.rand(9, generator=generator).mul(3).exp().tolist()
        points = [Point(n, e, 0, -float(n)) for n, e in zip(sizes, errors, strict=True)]
        hulls.append(lower_hull(points))
        # Every line between two points lies above the hull.
        for a, b, point in itertools.product(hulls[-1], hulls[-1], points):
            if a.size < point.size < b.size and b == hulls[-1][hulls[-1].index(a) + 1]:
                share = (point.size - a.size) / (b.size - a.size)
                assert point.error >= a.error + share * (b.error - a.error) - 1e-9
    for one, other in itertools.product(*hulls):
        budget = one.size + other.size
        best = min(
            a.error + b.error for a, b in itertools.product(*hulls) if a.size + b.size <= budget
        )
        divided = divide(hulls, budget)
        assert divided.error <= best * (1 + 1e-9)


@pytest.mark.parametrize("option", [{"value_bits": 4}, {"pattern": "2:4"}, {"max_flops": 0.5}])
def test_what_it_has_no_use_for_is_refused(option: dict[str, object]) -> None:
    with pytest.raises(LestdError, match="lestd with coding entropy"):
        decompose("lestd", layout_of("mha"), 0.2, coding="entropy", **option)


@pytest.mark.parametrize("method", ["tucker", "svd", "gptq", "watersic"])
def test_other_methods_refuse_it(method: str) -> None:
    with pytest.raises(LestdError, match="supports only coding"):
        decompose(method, layout_of("mha"), 0.2, coding="entropy")
