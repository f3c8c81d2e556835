"""SVD, SVD-LLM, ASVD and LASER against numpy, brute force and their own definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.groups import unfolding as random_unfolding
from support.low_rank import BF16, FP16, FP32, LAYOUTS, decompose, inputs, layout_of, metrics_of
from torch import Tensor

from lestd_kernels.errors import LestdError
from lestd_kernels.linalg.low_rank import Bits, common_slope, fit_pair, pair_bytes, spectrum
from lestd_kernels.linalg.metric import Root, Roots
from lestd_kernels.methods import METHODS, Group, MethodArgs
from lestd_kernels.methods.common.base import ACTIVATION, LOSS, NORM, WEIGHT
from lestd_kernels.tensorize import GroupLayout, ModuleLayout, fold_weights

PLAIN = Roots(Root(None))


def metric_matrix(gram: Tensor) -> np.ndarray:
    C = gram.double().numpy()
    return C / C.diagonal().mean() + 1e-3 * np.eye(len(C))


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (17, 17), (1, 9), (9, 1)])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_a_pair_is_the_truncated_svd_of_numpy(shape: tuple[int, int], rank: int) -> None:
    rank = min(rank, *shape)
    W = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    found = spectrum(W, PLAIN)
    pair = fit_pair(W, PLAIN, found, rank, FP32, Bits())
    U, s, Vt = np.linalg.svd(W.double().numpy(), full_matrices=False)
    expected = (U[:, :rank] * s[:rank]) @ Vt[:rank]
    np.testing.assert_allclose(
        pair.left.decode().T @ pair.right.decode(), expected, atol=2e-5 * s[0]
    )
    np.testing.assert_allclose(found.energies, s**2 / (s**2).sum(), atol=1e-6)
    assert pair.left.stored_bytes + pair.right.stored_bytes == pair_bytes(*shape, rank, 4, Bits())


def whitened_optimum(W: np.ndarray, C: np.ndarray, rank: int) -> float:
    """Least ``tr((W - A B)^T C (W - A B))`` by alternating least squares, to convergence."""
    A = np.random.default_rng(0).standard_normal((len(W), rank))
    error = np.inf
    for _ in range(20_000):
        B = np.linalg.solve(A.T @ C @ A, A.T @ C @ W)
        A = np.linalg.lstsq(B.T, W.T, rcond=None)[0].T
        residual = W - A @ B
        previous, error = error, float((residual * (C @ residual)).sum())
        if previous - error < 1e-12 * error:
            break
    return error


@pytest.mark.parametrize("shape", [(12, 18), (18, 12)])
@pytest.mark.parametrize("rank", [2, 5])
def test_svd_llm_reaches_the_optimum_that_brute_force_finds(
    shape: tuple[int, int], rank: int
) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    X = inputs(shape[0])
    roots = Roots(Root.of_gram(X.T @ X))
    pair = fit_pair(W, roots, spectrum(W, roots), rank, FP32, Bits())
    residual = (W - pair.left.decode().T @ pair.right.decode()).double().numpy()
    C = metric_matrix(X.T @ X)
    error = float((residual * (C @ residual)).sum())
    optimum = whitened_optimum(W.double().numpy(), C, rank)
    assert error == pytest.approx(optimum, rel=1e-4)
    U, s, Vt = np.linalg.svd(W.double().numpy(), full_matrices=False)
    plain = W.double().numpy() - (U[:, :rank] * s[:rank]) @ Vt[:rank]
    assert error < 0.95 * float((plain * (C @ plain)).sum())


def test_the_ranks_of_a_group_are_those_that_trying_all_finds() -> None:
    energies = [[0.5, 0.3, 0.1, 0.05, 0.05], [0.9, 0.06, 0.03, 0.01], [0.4, 0.3, 0.2, 0.1]]
    costs = (7, 5, 5)
    sizes = [lambda r, c=c: r * c for c in costs]  # type: ignore[misc]
    for budget in range(17, 80):
        ranks = common_slope(energies, sizes, budget)
        assert all(1 <= r <= len(e) for r, e in zip(ranks, energies, strict=True))
        stored = sum(r * c for r, c in zip(ranks, costs, strict=True))
        kept = sum(sum(e[:r]) for e, r in zip(energies, ranks, strict=True))
        full = all(r == len(e) for r, e in zip(ranks, energies, strict=True))
        assert budget - 7 < stored <= budget or full
        best = max(
            sum(e[a] for e, b in zip(energies, (i, j, k), strict=True) for a in range(b))
            for i in range(1, 6)
            for j in range(1, 5)
            for k in range(1, 5)
            if i * 7 + j * 5 + k * 5 <= stored
        )
        # The steps of a greedy search are the optimum at the bytes that they use, or just below.
        assert kept >= best - 0.1


@pytest.mark.parametrize("method", ["svd", "svd_llm", "asvd", "laser"])
@pytest.mark.parametrize("name", list(LAYOUTS))
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_the_budget_is_used_and_errors_are_those_of_what_is_stored(
    method: str, name: str, dtype: torch.dtype
) -> None:
    layout = layout_of(name)
    step = max(sum(layout.weight_shape(m)) for m in layout.modules) * dtype.itemsize
    for keep in (0.7, 0.3):
        done = decompose(method, layout, keep, dtype)
        budget = int(keep * layout.elements * dtype.itemsize)
        stored = done.decomposition
        assert budget - step < stored.stored_bytes <= budget
        on_disk = stored.named_tensors("x").values()
        assert sum(t.numel() * t.element_size() for t in on_disk) == stored.stored_bytes
        W = fold_weights(random_unfolding(layout), layout)
        dense = stored.to_dense()
        error = sum(float((W[k] - dense[k]).double().square().sum()) for k in W)
        assert done.squared_error == pytest.approx(error, rel=1e-4)
        assert 0 < done.relative_error < 1


@pytest.mark.parametrize("method", ["svd", "svd_llm", "asvd"])
@pytest.mark.parametrize(("value_bits", "factor_bits"), [(8, 8), (4, 4), (4, 8), (16, 4)])
def test_fewer_bits_mean_larger_ranks_in_the_same_bytes(
    method: str, value_bits: int, factor_bits: int
) -> None:
    layout = layout_of("mha")
    whole = decompose(method, layout, 0.25, BF16)
    few = decompose(method, layout, 0.25, BF16, value_bits=value_bits, factor_bits=factor_bits)
    budget = int(0.25 * layout.elements * 2)
    assert few.decomposition.stored_bytes <= budget
    assert few.decomposition.stored_bytes > budget - 2 * 96
    assert few.decomposition.ranks["most"] > whole.decomposition.ranks["most"]


def test_values_are_fitted_to_the_factor_as_it_is_stored() -> None:
    X = inputs(64)
    W = torch.randn(64, 96, generator=torch.Generator().manual_seed(5))
    roots = Roots(Root.of_gram(X.T @ X))
    pair = fit_pair(W, roots, spectrum(W, roots), 16, BF16, Bits(factor=4))
    A = pair.left.decode().double().T.numpy()
    S = np.linalg.cholesky(metric_matrix(X.T @ X)).T
    expected = np.linalg.lstsq(S @ A, S @ W.double().numpy(), rcond=None)[0]
    np.testing.assert_allclose(pair.right.decode().double(), expected, rtol=1e-2, atol=2e-2)


def test_a_norm_scales_rows_and_asvd_scales_them_by_mean_activations() -> None:
    layout = layout_of("ffn")
    for method, metric in (("svd", NORM), ("asvd", ACTIVATION)):
        metrics = metrics_of(layout, metric)
        done = decompose(method, layout, 0.5, FP32, metric=metric)
        W = fold_weights(random_unfolding(layout), layout)["up_proj"].T.double().numpy()
        found = done.decomposition.to_dense()["up_proj"].T.numpy()
        rank = done.decomposition.modules["up_proj"].own[0].rows
        if method == "svd":
            squares = metrics["up_proj"].double()
        else:
            squares = metrics["up_proj.mean_abs"].double()
        scale = (squares / squares.mean() + 1e-3).sqrt().numpy()[:, None]
        U, s, Vt = np.linalg.svd(scale * W, full_matrices=False)
        expected = (U[:, :rank] * s[:rank]) @ Vt[:rank] / scale
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("keep", [0.95, 0.6, 0.3, 0.05])
def test_laser_cuts_the_matrices_that_lose_least_and_leaves_the_others(keep: float) -> None:
    layout = layout_of("mha")
    done = decompose("laser", layout, keep)
    W = fold_weights(random_unfolding(layout), layout)
    small = -(-48 // 20)
    lost = {}
    for name, matrix in W.items():
        s = np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
        lost[name] = s[small:].sum() / s.sum()
    order = sorted(W, key=lambda name: lost[name])
    chains = done.decomposition.modules
    dense = done.decomposition.to_dense()
    whole = [len(chains[name].own) == 1 for name in order]
    assert whole == sorted(whole)
    for name, left in zip(order, whole, strict=True):
        assert torch.equal(dense[name], W[name]) == left
    cut = [name for name in order if len(chains[name].own) == 2]
    ranks = [chains[name].own[0].rows for name in cut]
    if keep > 0.1:
        assert ranks[:-1] == [small] * (len(cut) - 1)
        assert ranks[-1] >= small
    else:
        assert max(ranks) <= small + 1


@pytest.mark.parametrize("method", ["svd", "svd_llm", "laser"])
def test_what_is_too_small_is_refused_and_the_least_is_not(method: str) -> None:
    layout, metric = layout_of("odd"), METHODS[method].metrics[0]
    args = MethodArgs(metric=metric)
    least = METHODS[method].least_bytes(layout, BF16, args)
    metrics = metrics_of(layout, metric)
    done = METHODS[method].decompose(
        random_unfolding(layout), layout, least, BF16, args, (), metrics
    )
    assert done.decomposition.stored_bytes == least
    with pytest.raises(LestdError, match="raise keep"):
        METHODS[method].bounds(layout, least - 1, BF16, args)


OF_CORES = {"type_mode": "learned", "pattern": "2:4", "stage2": "prune-refit", "max_flops": 0.5}


@pytest.mark.parametrize("option", list(OF_CORES))
@pytest.mark.parametrize("method", ["svd", "svd_llm", "asvd", "laser", "tt", "per_head_tucker"])
def test_options_of_sparse_cores_are_refused(method: str, option: str) -> None:
    args = MethodArgs(**{option: OF_CORES[option]})  # type: ignore[arg-type]
    with pytest.raises(LestdError, match=f"{method}.* {option}"):
        METHODS[method].bounds(layout_of("mha"), 10_000, BF16, args)


@pytest.mark.parametrize("method", ["svd", "svd_llm", "asvd", "laser"])
def test_a_curve_tells_the_errors_of_its_budgets(method: str) -> None:
    layout = layout_of("gqa")
    metric = METHODS[method].metrics[0]
    args, metrics = MethodArgs(metric=metric), metrics_of(layout, metric)
    whole = layout.elements * 4
    budgets = [int(share * whole) for share in (0.2, 0.4, 0.7)]
    group = Group(random_unfolding(layout), layout, FP32, args, metrics)
    prepared = METHODS[method].prepare(group)
    done = METHODS[method].encode(prepared, budgets[1], budgets, reuse=True)
    for point, budget in zip(done.curve, budgets, strict=True):
        alone = METHODS[method].encode(prepared, budget, reuse=True)
        assert point.squared_error == pytest.approx(alone.metric_squared_error, rel=0.02)
    assert done.curve[0].squared_error > done.curve[2].squared_error


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("method", ["svd", "svd_llm", "laser"])
def test_weights_of_any_scale_and_inputs_that_never_came(method: str, scale: float) -> None:
    layout = layout_of("odd")
    metrics = {name: torch.zeros_like(G) for name, G in metrics_of(layout, ACTIVATION).items()}
    args = MethodArgs(metric=METHODS[method].metrics[0])
    W = random_unfolding(layout) * scale
    budget = int(0.5 * layout.elements * 2)
    done = METHODS[method].decompose(W.clone(), layout, budget, BF16, args, (), metrics)
    assert done.decomposition.stored_bytes <= budget
    assert (done.relative_error < 1) if scale else (done.relative_error == 0)


def test_an_expert_counts_as_often_as_tokens_came_to_it() -> None:
    modules = tuple(
        ModuleLayout(f"expert_{e}.{p}", "output" if p == "down" else "input", ((p, e),), f"{p}{e}")
        for e in range(3)
        for p in ("gate", "up", "down")
    )
    layout = GroupLayout(16, 20, modules)
    share = {0: 100.0, 1: 1.0, 2: 0.0}
    metrics = {
        m.name: torch.eye(layout.weight_shape(m)[1]) * share[m.slices[0][1]] for m in modules
    }
    args = MethodArgs(metric=ACTIVATION)
    done = METHODS["svd_llm"].decompose(
        random_unfolding(layout), layout, layout.elements, BF16, args, (), metrics
    )
    ranks = {name: chain.own[0].rows for name, chain in done.decomposition.modules.items()}
    for p in ("gate", "up", "down"):
        assert ranks[f"expert_0.{p}"] > ranks[f"expert_1.{p}"] >= ranks[f"expert_2.{p}"] >= 1


def test_plain_weights_need_no_calibration() -> None:
    assert METHODS["svd"].metrics == METHODS["laser"].metrics == (WEIGHT, NORM)
    assert METHODS["svd_llm"].metrics == (ACTIVATION, LOSS)
    assert METHODS["asvd"].metrics == (ACTIVATION,)
