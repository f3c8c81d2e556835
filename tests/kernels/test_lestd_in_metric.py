"""LeSTD in a metric and in few bits, against plain numpy and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.groups import gqa, mha
from torch import Tensor

from lestd_kernels.errors import LestdError
from lestd_kernels.linalg.metric import Root, feedback_root, mean_diagonal, regularized
from lestd_kernels.methods import METHODS, MethodArgs
from lestd_kernels.methods.common.base import Decomposed
from lestd_kernels.methods.common.one_sided_basis import SidedGroup, readers_of
from lestd_kernels.search.basis_rank import SidedShape, search_rank
from lestd_kernels.tensorize import GroupLayout, ModuleLayout, unfold_weights

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LESTD = METHODS["lestd"]


def ffn(d: int, f: int) -> GroupLayout:
    modules = [ModuleLayout(f"{t}_proj", "input", ((t, 0),)) for t in ("gate", "up")]
    down = ModuleLayout("down_proj", "output", (("down", 0),), "hidden")
    return GroupLayout(d, f, (*modules, down))


def experts(d: int, f: int, count: int) -> GroupLayout:
    modules = []
    for e in range(count):
        for t in ("gate", "up"):
            modules.append(ModuleLayout(f"expert_{e}.{t}", "input", ((t, e),), f"in_{e}"))
        modules.append(ModuleLayout(f"expert_{e}.down", "output", (("down", e),), f"hidden_{e}"))
    return GroupLayout(d, f, tuple(modules))


LAYOUTS = {
    "mha": mha(48, 12, 4),
    "gqa": gqa(37, 9, 6, 2),
    "ffn": ffn(40, 77),
    "experts": experts(24, 19, 3),
}


def weights_of(layout: GroupLayout, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(layout.width, layout.elements // layout.width) * 0.1


def grams_of(layout: GroupLayout, samples: int = 300, seed: int = 1) -> dict[str, Tensor]:
    """Of correlated inputs with a few large channels, one Gram matrix per input."""
    torch.manual_seed(seed)
    found: dict[tuple[str, int], Tensor] = {}
    for module in layout.modules:
        width = layout.weight_shape(module)[1]
        if (module.reads, width) not in found:
            X = torch.randn(samples, width) @ torch.randn(width, width) / width**0.5
            X[:, 0] *= 8
            found[module.reads, width] = X.T @ X
    return {m.name: found[m.reads, layout.weight_shape(m)[1]] for m in layout.modules}


def decompose(layout: GroupLayout, keep: float, dtype: torch.dtype = BF16, **args) -> Decomposed:
    metrics = args.pop("metrics", None)
    W = args.pop("W", None)
    W = weights_of(layout) if W is None else W
    budget = int(keep * layout.elements * dtype.itemsize)
    return LESTD.decompose(W.clone(), layout, budget, dtype, MethodArgs(**args), metrics=metrics)


@pytest.mark.parametrize("shape", [(), (6,), (6, 6)])
def test_roots_are_roots(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    X = torch.randn(20, 6)
    gram = torch.zeros(6, 6) if shape == () else X.T @ X
    gram = gram.diagonal().clone() if shape == (6,) else gram
    C = regularized(gram, mean_diagonal([gram]))
    dense = C.diag() if C.dim() == 1 else C
    if shape == ():
        assert torch.equal(dense, torch.eye(6))
    else:
        full = (X.T @ X).diagonal().diag() if shape == (6,) else X.T @ X
        expected = full / full.diagonal().mean() + 1e-3 * torch.eye(6)
        torch.testing.assert_close(dense, expected)
    root, R = Root.of(C), feedback_root(C)
    S_dense, R_dense = (one.diag() if one.dim() == 1 else one for one in (root.factor, R))
    torch.testing.assert_close(S_dense @ S_dense.T, dense)
    torch.testing.assert_close(R_dense @ R_dense.T, dense)
    assert torch.equal(R_dense, R_dense.triu())
    W = torch.randn(6, 4)
    torch.testing.assert_close(root.apply(W), S_dense.T @ W)
    torch.testing.assert_close(root.solve(root.apply(W)), W)


def test_a_metric_that_rounding_made_indefinite_has_a_root() -> None:
    v = torch.linspace(1, 2, 50)
    C = torch.outer(v, v) - 1e-5 * torch.eye(50)
    S = Root.of(C).factor
    torch.testing.assert_close(S @ S.T, C, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("bits", [(16, 16), (8, 4), (4, 3), (8, 2)])
@pytest.mark.parametrize("keep", [0.6, 0.3, 0.12])
def test_the_budget_is_kept_and_errors_are_those_of_what_is_stored(
    name: str, bits: tuple[int, int], keep: float
) -> None:
    layout = LAYOUTS[name]
    W, metrics = weights_of(layout), grams_of(layout)
    factor_bits, value_bits = bits
    done = decompose(
        layout,
        keep,
        metric="activation",
        metrics=metrics,
        factor_bits=factor_bits,
        value_bits=value_bits,
        rank_step=4,
    )
    stored, budget = done.decomposition, int(keep * layout.elements * 2)
    tensors = stored.named_tensors("block")
    assert stored.stored_bytes <= budget
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == stored.stored_bytes
    full = all(core.codec == "dense" for core in stored.own_matrices)
    some_dense = any(core.codec == "dense" for core in stored.own_matrices)
    if not some_dense:
        assert stored.stored_bytes > 0.99 * budget - 64
    elif not full:
        assert stored.stored_bytes > 0.5 * budget
    limits = LESTD.bounds(
        layout,
        budget,
        BF16,
        MethodArgs(
            metric="activation", factor_bits=factor_bits, value_bits=value_bits, rank_step=4
        ),
    )
    assert stored.ranks.get("R1", 0) <= limits.max_R1
    assert stored.nnz <= limits.max_nnz
    assert stored.stored_bytes <= limits.max_bytes <= budget

    dense = stored.to_dense()
    residual = (W - unfold_weights(dense, layout)).double()
    assert done.squared_error == pytest.approx(float(residual.square().sum()), rel=1e-4)
    error = 0.0
    for module in layout.modules:
        D = residual[:, layout.columns(module)]
        D = (D if module.basis_side == "input" else D.T).numpy()
        error += float(np.sum(D * (metrics[module.name].double().numpy() @ D)))
    assert done.metric_squared_error == pytest.approx(error, rel=1e-4)


def reference_cores(W: np.ndarray, C: np.ndarray, R: int) -> float:
    """Least ``tr(D^T C D)`` of any matrix of rank R, by a singular value decomposition."""
    S = np.linalg.cholesky(C)
    values = np.linalg.svd(S.T @ W, compute_uv=False)
    return float(np.sum(values[R:] ** 2))


@pytest.mark.parametrize("rank_first", [True, False])
@pytest.mark.parametrize("R", [3, 8, 14])
def test_dense_cores_are_the_whitened_optimum(rank_first: bool, R: int) -> None:
    torch.manual_seed(2)
    rows, columns = (16, 22) if rank_first else (22, 16)
    W, X = torch.randn(rows, columns), torch.randn(90, rows) @ torch.randn(rows, rows)
    readers, unit = readers_of({"m": W}, {"m": "in"}, {"m": X.T @ X})
    other = columns if rank_first else rows
    shape = SidedShape(16, (other,), rank_first, 1, 4, 16, 16)
    group = SidedGroup(readers, shape, unit)
    A, [core], _ = group.encode(R, 10**6, FP32)
    W_hat = A.decode() @ core.decode() if rank_first else core.decode() @ A.decode().T
    D = (W - W_hat).double().numpy()
    C = readers[0].C.double().numpy()
    best = reference_cores(W.double().numpy(), C, R)
    assert float(np.sum(D * (C @ D))) == pytest.approx(best, rel=1e-3)
    [(found, expected)] = group.search([R], [10**6])
    assert found == R
    if rank_first:
        assert expected == pytest.approx(best * unit, rel=1e-3)


def test_the_refit_never_raises_the_error_of_the_stored_factor() -> None:
    torch.manual_seed(3)
    W, X = torch.randn(24, 30), torch.randn(100, 24) @ torch.randn(24, 24)
    readers, unit = readers_of({"m": W}, {"m": "in"}, {"m": X.T @ X})
    C = readers[0].C.double()
    for bits in (8, 4, 2):
        shape = SidedShape(24, (30,), True, 1, 4, 16, bits)
        A, [core], _ = SidedGroup(readers, shape, unit).encode(12, 10**6, FP32)
        F, M = A.decode().double(), core.decode().double()

        def error(M: Tensor, F: Tensor = F) -> float:
            D = W.double() - F @ M
            return float((D * (C @ D)).sum())

        torch.manual_seed(bits)
        assert all(
            error(M) <= error(M + 1e-2 * torch.randn_like(M) * M.abs().mean()) for _ in range(20)
        )
        # The core of the exact factor, taken over unchanged.
        exact = SidedGroup(readers, SidedShape(24, (30,), True, 1, 4, 16, 16), unit)
        [unfitted] = exact.encode(12, 10**6, FP32).cores
        assert error(M) <= error(unfitted.decode().double())


def test_the_search_finds_the_best_rank_by_brute_force() -> None:
    torch.manual_seed(4)
    for value_bits, factor_bits in ((16, 16), (4, 4), (8, 4)):
        losses = [
            (torch.randn(16, n) * torch.arange(1, 17)[:, None] ** -0.8).square() for n in (9, 30)
        ]
        left_out = sum(loss.double().sum(dim=1) for loss in losses)
        shape = SidedShape(16, (9, 30), True, 1, 2, value_bits, factor_bits)
        grid = [2, 4, 6, 8, 10, 12, 14, 16]
        budgets = [150, 250, 400, 700, 2000]

        def error(R: int, budget: int, shape: SidedShape = shape, losses=losses) -> float:
            block = torch.cat([loss[:R].flatten() for loss in losses])
            core = torch.cat([torch.full((R * loss.shape[1],), i) for i, loss in enumerate(losses)])
            order = block.argsort(descending=True)
            best, kept = float("inf"), [0, 0]
            total = float(sum(loss.sum() for loss in losses))
            for k in range(len(order) + 1):
                if k:
                    kept[int(core[order[k - 1]])] += 1
                if shape.stored_bytes(R, kept) <= budget:
                    best = total - float(block[order[:k]].sum())
            return best

        found = search_rank(losses, left_out, shape, grid, budgets)
        for budget, (R, expected) in zip(budgets, found, strict=True):
            best = min(error(R, budget) for R in grid if shape.factor_bytes(R) < budget)
            assert error(R, budget) == pytest.approx(best, rel=0.03, abs=1e-3)
            # Of so few values groups and codes are seldom full.
            assert expected == pytest.approx(best, rel=0.1, abs=0.02)


@pytest.mark.parametrize("name", LAYOUTS)
def test_inputs_that_never_came_are_taken_as_they_are(name: str) -> None:
    layout = LAYOUTS[name]
    metrics = grams_of(layout)
    last = layout.modules[-1].name
    metrics[last] = torch.zeros_like(metrics[last])
    for gram in metrics.values():
        gram[3] = 0
        gram[:, 3] = 0
    done = decompose(
        layout, 0.5, metric="activation", metrics=metrics, factor_bits=8, value_bits=8, rank_step=4
    )
    assert done.relative_error < 1
    silent = [s for s in done.slices if s.projection in ("o", "down")]
    assert all(s.relative_error < 0.9 for s in silent)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("metric", ["weight", "norm", "activation"])
def test_results_are_the_same_twice_and_scale_with_the_weights(
    dtype: torch.dtype, metric: str
) -> None:
    layout = LAYOUTS["ffn"]
    metrics = grams_of(layout)
    if metric == "weight":
        metrics = {}
    elif metric == "norm":
        metrics = {n: g.diagonal().clone() for n, g in metrics.items() if n != "down_proj"}
    W = weights_of(layout)
    args = {"metric": metric, "metrics": metrics, "value_bits": 4, "factor_bits": 8}
    first, again, large = (
        decompose(layout, 0.25, dtype, W=weight, rank_step=8, **args) for weight in (W, W, 4 * W)
    )
    one, two, other = (d.decomposition.named_tensors("b") for d in (first, again, large))
    assert one.keys() == two.keys() == other.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert first.metric_squared_error * 16 == pytest.approx(large.metric_squared_error, rel=1e-3)


def test_the_metric_lowers_the_error_in_it() -> None:
    for layout in LAYOUTS.values():
        metrics, W = grams_of(layout), weights_of(layout)
        for keep, bits in ((0.5, 16), (0.2, 8)):
            errors = {}
            for metric in ("activation", "weight"):
                args = MethodArgs(metric=metric, value_bits=bits, factor_bits=8, rank_step=4)
                budget = int(keep * layout.elements * 2)
                used = metrics if metric == "activation" else {}
                done = LESTD.decompose(W.clone(), layout, budget, BF16, args, metrics=used)
                dense, error = done.decomposition.to_dense(), 0.0
                for module in layout.modules:
                    D = W[:, layout.columns(module)]
                    D = (D if module.basis_side == "input" else D.T) - dense[module.name].T
                    error += float((D * (metrics[module.name] @ D)).sum())
                errors[metric] = error
            assert errors["activation"] < 0.95 * errors["weight"]


def test_the_curve_is_what_the_budgets_give() -> None:
    layout = LAYOUTS["mha"]
    W, metrics = weights_of(layout), grams_of(layout)
    args = MethodArgs(metric="activation", value_bits=8, factor_bits=8, rank_step=4)
    budgets = [int(keep * layout.elements * 2) for keep in (0.15, 0.25, 0.35)]
    curve = LESTD.decompose(W.clone(), layout, budgets[1], BF16, args, budgets, metrics).curve
    assert [point.byte_budget for point in curve] == budgets
    for point in curve:
        done = LESTD.decompose(W.clone(), layout, point.byte_budget, BF16, args, metrics=metrics)
        assert point.squared_error == pytest.approx(done.metric_squared_error, rel=0.35)
    errors = [point.squared_error for point in curve]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_basis_that_costs_more_than_it_saves_is_left_out(side: str) -> None:
    torch.manual_seed(5)
    X = torch.randn(64, 24)
    metric = X.T @ X
    noise, of_low_rank = torch.randn(24, 40), torch.randn(24, 2) @ torch.randn(2, 40)
    layout = (
        GroupLayout(24, 40, (ModuleLayout("up", "input", (("up", 0),)),))
        if side == "input"
        else GroupLayout(40, 24, (ModuleLayout("down", "output", (("down", 0),)),))
    )
    args = MethodArgs(metric="activation", value_bits=8, factor_bits=8, rank_step=4)
    [module] = layout.modules
    for W, keep, stored_whole in ((noise, 0.6, True), (of_low_rank, 0.3, False)):
        unfolding = W if side == "input" else W.T.contiguous()
        budget = int(keep * W.numel() * 2)
        done = LESTD.decompose(
            unfolding.clone(), layout, budget, BF16, args, metrics={module.name: metric}
        )
        chain = done.decomposition.modules[module.name]
        assert (len(chain.ops) == 1) is stored_whole
        assert (not done.decomposition.shared) is stored_whole
        if stored_whole:
            D = (W - done.decomposition.module_weight(module.name)).double()
            # Every weight is stored, within half a step of a grid of 256 levels.
            assert chain.own[0].nnz == W.numel()
            assert done.decomposition.stored_bytes <= budget
            assert float(D.abs().max()) < 2 * float(W.abs().max()) / 255


def test_without_activations_nothing_is_pruned_outside_of_a_basis() -> None:
    torch.manual_seed(6)
    layout = GroupLayout(24, 40, (ModuleLayout("up", "input", (("up", 0),)),))
    W = torch.randn(24, 40)
    for keep, stored_whole in ((0.6, True), (0.5, False)):
        args = MethodArgs(value_bits=8, factor_bits=8, rank_step=4)
        done = LESTD.decompose(W.clone(), layout, int(keep * W.numel() * 2), BF16, args)
        assert (not done.decomposition.shared) is stored_whole


@pytest.mark.parametrize(
    ("option", "value"),
    [("stage2", "prune-refit"), ("pattern", "2:4"), ("type_mode", "learned")],
)
def test_what_the_metric_does_not_know_is_refused(option: str, value: str) -> None:
    with pytest.raises(LestdError, match=option):
        decompose(LAYOUTS["mha"], 0.5, value_bits=8, **{option: value})


def test_budgets_and_arithmetic_have_bounds() -> None:
    layout = LAYOUTS["ffn"]
    args = MethodArgs(value_bits=4, factor_bits=4, rank_step=4)
    least = LESTD.least_bytes(layout, BF16, args)
    done = LESTD.decompose(weights_of(layout), layout, least, BF16, args)
    assert done.decomposition.stored_bytes <= least
    with pytest.raises(LestdError, match="byte budget"):
        LESTD.bounds(layout, least - 2000, BF16, args)
    assert not decompose(layout, 0.5, value_bits=4, factor_bits=4).decomposition.shared  # All fit.
    free = decompose(layout, 0.2, value_bits=4, factor_bits=4, rank_step=4)
    bound = decompose(layout, 0.2, value_bits=4, factor_bits=4, rank_step=4, max_flops=0.5)
    d, f = layout.width, layout.head_dim
    R = bound.decomposition.ranks
    assert R["R1"] * (d + 2 * f) <= 0.5 * 2 * d * f < free.decomposition.ranks["R1"] * (d + 2 * f)
    assert R["R1_output"] * (d + f) <= 0.5 * d * f
    with pytest.raises(LestdError, match="max_flops"):
        decompose(layout, 0.5, value_bits=4, max_flops=0.01)


def test_experts_that_read_the_same_share_its_metric() -> None:
    # Else each would hold a root of its own, as large as the basis squared.
    weights = {f"{e}.gate_proj": torch.randn(6, 4) for e in range(3)}
    reads = {name: f"in_{name}" for name in weights}
    one = torch.rand(6) + 0.5
    readers, _ = readers_of(weights, reads, dict.fromkeys(weights, one))
    assert len({id(reader.C) for reader in readers}) == 1
    apart, _ = readers_of(weights, reads, {name: one.clone() for name in weights})
    assert all(torch.equal(a.C, b.C) for a, b in zip(apart, readers, strict=True))
