"""Tensor formats against tensorly: stacks of matrices, TD-MoE, tensor trains, Tucker per head."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorly
import torch
from support.groups import fused, gqa, mha
from support.groups import unfolding as random_unfolding
from tensorly.decomposition import partial_tucker
from torch import Tensor

from lestd_kernels.errors import LestdError
from lestd_kernels.linalg.metric import Root
from lestd_kernels.methods import METHODS, Group, MethodArgs
from lestd_kernels.methods.common.base import ACTIVATION, NORM, WEIGHT, Decomposed
from lestd_kernels.methods.tt import balanced_modes, stack_of, train_modes
from lestd_kernels.search.tucker_stack import (
    StackFactors,
    StackRanks,
    best_ranks,
    fit_core,
    full_bases,
    leading_energies,
    project,
    refine,
    search_grid,
)
from lestd_kernels.tensorize import GroupLayout, ModuleLayout, fold_weights, unfold_weights

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def random_stack(*shape: int, seed: int = 0) -> Tensor:
    """A stack whose spectra decay along every mode."""
    generator = torch.Generator().manual_seed(seed)
    T = torch.randn(shape, generator=generator)
    for mode, size in enumerate(shape):
        decay = torch.arange(1, size + 1) ** -0.7
        T = T * decay.view([-1 if m == mode else 1 for m in range(3)])
    for mode, size in enumerate(shape):
        Q = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
        T = torch.tensordot(T, Q, dims=([mode], [0])).movedim(-1, mode)
    return T.contiguous()


def expand(core: Tensor, factors: StackFactors) -> Tensor:
    mixed = core if factors.P is None else torch.einsum("nr,rab->nab", factors.P, core)
    return factors.U @ mixed @ factors.V.T


def relative(T: Tensor, T_hat: Tensor) -> float:
    return float((T - T_hat).norm() / T.norm())


@pytest.mark.parametrize("shape", [(5, 12, 9), (3, 7, 20), (4, 30, 3), (1, 6, 5)])
@pytest.mark.parametrize("compress", [False, True])
def test_a_stack_is_decomposed_as_tensorly_does(shape: tuple[int, ...], compress: bool) -> None:
    T = random_stack(*shape)
    n, a, b = shape
    ranks = StackRanks(max(1, n - 2) if compress else n, min(4, a, n * b), min(3, b))
    bases = full_bases(T, compress)
    for basis in (bases.U, bases.V):
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5, rtol=0)
    factors = refine(T, bases, ranks, 1e-9, 200)
    found = expand(project(T, factors), factors)
    modes = [0, 1, 2] if compress else [1, 2]
    tensorly.set_backend("numpy")
    exact = T.double().numpy()
    (core, others), _ = partial_tucker(
        exact, [ranks[m] for m in modes], modes, tol=1e-10, n_iter_max=200
    )
    expected = tensorly.tenalg.multi_mode_dot(core, others, modes)
    error = np.linalg.norm(exact - expected) / np.linalg.norm(exact)
    assert relative(T, found) == pytest.approx(error, rel=1e-3)
    start = bases.leading(ranks)
    assert relative(T, found) <= relative(T, expand(project(T, start), start)) + 1e-6


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.7, 3.0])
def test_the_ranks_are_the_best_that_fit(compress: bool, share: float) -> None:
    T = random_stack(4, 9, 7)
    grid, bases = search_grid(T.shape, compress), full_bases(T, compress)

    def stored(ranks: StackRanks) -> int:
        Rn, Ra, Rb = ranks
        return 9 * Ra + 7 * Rb + Rn * Ra * Rb + (4 * Rn if compress else 0)

    budget = int(share * T.numel())
    found = best_ranks(leading_energies(T, bases, grid), grid, stored, budget)
    every = {
        ranks: relative(T, expand(project(T, leading), leading))
        for ranks in map(StackRanks, *zip(*_all_ranks(compress), strict=True))
        if stored(ranks) <= budget
        for leading in [bases.leading(ranks)]
    }
    assert found is not None
    assert every[found] == pytest.approx(min(every.values()), abs=1e-5)
    assert best_ranks(leading_energies(T, bases, grid), grid, stored, 16) is None


def _all_ranks(compress: bool) -> list[tuple[int, int, int]]:
    return list(itertools.product(range(1 if compress else 4, 5), range(1, 10), range(1, 8)))


def test_a_core_is_fitted_to_factors_that_are_not_orthonormal() -> None:
    T = random_stack(4, 9, 7)
    generator = torch.Generator().manual_seed(2)
    U, V, P = (torch.randn(m, r, generator=generator) for m, r in ((9, 3), (7, 4), (4, 2)))
    core = fit_core(T, StackFactors(U, V, P)).double().numpy()
    design = np.kron(np.kron(P.numpy(), U.numpy()), V.numpy()).astype(np.float64)
    expected = np.linalg.lstsq(design, T.double().numpy().reshape(-1), rcond=None)[0]
    np.testing.assert_allclose(core.reshape(-1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 12, 37, 64, 704, 11008, 4099])
def test_modes_are_balanced(n: int) -> None:
    modes = balanced_modes(n)
    assert np.prod(modes) == n
    assert list(modes) == sorted(modes)
    best = min(
        max(a, b, n // a // b)
        for a in range(1, n + 1)
        if n % a == 0
        for b in range(1, n // a + 1)
        if n // a % b == 0
    )
    assert max(modes) <= 1.5 * best
    if n == 704:
        assert modes == (8, 8, 11)


def tt_matrix_by_numpy(W: Tensor, ranks: tuple[int, int]) -> np.ndarray:
    """TT-SVD of the reshaped matrix (Oseledets, algorithm 1); W ``(in, out)``."""
    a, b = train_modes(*W.shape)
    (m1, m2, m3), (r1, r2) = [x * y for x, y in zip(a, b, strict=True)], ranks
    tensor = W.double().numpy().reshape(*a, *b).transpose(0, 3, 1, 4, 2, 5)
    U1, S, V = np.linalg.svd(tensor.reshape(m1, m2 * m3), full_matrices=False)
    rest = (S[:r1, None] * V[:r1]).reshape(r1 * m2, m3)
    U2, S, V = np.linalg.svd(rest, full_matrices=False)
    rest = (U2[:, :r2] * S[:r2] @ V[:r2]).reshape(r1, m2 * m3)
    full = (U1[:, :r1] @ rest).reshape([m for pair in zip(a, b, strict=True) for m in pair])
    return full.transpose(0, 2, 4, 1, 3, 5).reshape(W.shape)  # type: ignore[no-any-return]


def ffn(d: int, f: int) -> GroupLayout:
    return GroupLayout(
        d,
        f,
        (
            ModuleLayout("fc1", "input", (("up", 0),)),
            ModuleLayout("fc2", "output", (("down", 0),), "hidden"),
        ),
    )


@pytest.mark.parametrize("shape", [(24, 60), (16, 35), (12, 13)])
@pytest.mark.parametrize("keep", [0.7, 0.3])
def test_a_train_is_the_tt_svd(shape: tuple[int, int], keep: float) -> None:
    layout = ffn(*shape)
    budget = int(keep * layout.elements * 4)
    done = METHODS["tt"].decompose(random_unfolding(layout), layout, budget, FP32, MethodArgs())
    W = fold_weights(random_unfolding(layout), layout)
    dense = done.decomposition.to_dense()
    for name, chain in done.decomposition.modules.items():
        rows = W[name].T
        (a1, a2, a3), (b1, b2, b3) = train_modes(*rows.shape)
        r1, r2 = chain.own[0].columns // b1, chain.own[2].rows // a3
        expected = tt_matrix_by_numpy(rows, (r1, r2))
        np.testing.assert_allclose(dense[name].T, expected, atol=1e-4 * float(rows.abs().max()))
        assert chain.own[1].rows == r1 * a2
        assert sum(own.stored_bytes for own in chain.own) <= budget // 2 + 1
        one_more = 4 * max(a1 * b1 + a2 * b2 * r2, a3 * b3 + a2 * b2 * r1)
        assert sum(own.stored_bytes for own in chain.own) > budget // 2 - one_more


def test_a_matrix_is_its_stack_again() -> None:
    W = torch.arange(24 * 30.0).view(24, 30)
    modes = train_modes(24, 30)
    (a1, a2, a3), (b1, b2, b3) = modes
    again = stack_of(W, modes).reshape(a2, b2, a1, b1, a3, b3).permute(2, 0, 4, 3, 1, 5)
    assert torch.equal(again.reshape(W.shape), W)


def test_a_train_in_the_metric_of_the_norm_stores_the_inverse_scaling() -> None:
    layout = ffn(24, 60)
    gamma = torch.linspace(0.05, 4, 24)
    budget = int(0.5 * layout.elements * 2)
    done = METHODS["tt"].decompose(
        random_unfolding(layout),
        layout,
        budget,
        BF16,
        MethodArgs(metric=NORM),
        (),
        {"fc1": gamma.square()},
    )
    plain = METHODS["tt"].decompose(random_unfolding(layout), layout, budget, BF16, MethodArgs())
    own = done.decomposition.modules["fc1"].own
    assert (own[0].rows, own[0].columns, len(own)) == (24, 1, 4)
    assert done.decomposition.stored_bytes <= budget
    W = fold_weights(random_unfolding(layout), layout)["fc1"].T
    errors = [
        float((gamma[:, None] * (W - d.decomposition.to_dense()["fc1"].T)).norm())
        for d in (done, plain)
    ]
    assert errors[0] < errors[1]


def experts(d: int, f: int, count: int) -> GroupLayout:
    return GroupLayout(
        d,
        f,
        tuple(
            ModuleLayout(
                f"expert_{e}.{p}_proj",
                "output" if p == "down" else "input",
                ((p, e),),
                f"{'hidden' if p == 'down' else 'in'}_{e}",
            )
            for e in range(count)
            for p in ("gate", "up", "down")
        ),
    )


def grams_of(layout: GroupLayout) -> dict[str, Tensor]:
    grams = {}
    for i, module in enumerate(layout.modules):
        expert = module.slices[0][1]
        rows = layout.weight_shape(module)[1]
        generator = torch.Generator().manual_seed(7 if module.basis_side == "input" else 100 + i)
        X = torch.randn(60 * (expert + 1), rows, generator=generator)
        X = X @ torch.randn(rows, rows, generator=generator)
        grams[module.name] = X.T @ X
    return grams


def stacks(layout: GroupLayout, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """projection -> ``(experts, in, out)``."""
    found: dict[str, list[Tensor]] = {}
    for module in layout.modules:
        found.setdefault(module.slices[0][0], []).append(weights[module.name].T)
    return {name: torch.stack(matrices) for name, matrices in found.items()}


def moe(layout: GroupLayout, keep: float, dtype: torch.dtype = FP32, **more: object) -> Decomposed:
    args = MethodArgs(**more)  # type: ignore[arg-type]
    metrics = grams_of(layout) if args.metric == ACTIVATION else {}
    budget = int(keep * layout.elements * dtype.itemsize)
    W = random_unfolding(layout)
    return METHODS["td_moe"].decompose(W, layout, budget, dtype, args, (), metrics)


@pytest.mark.parametrize("mode", ["preserve", "compress"])
@pytest.mark.parametrize("keep", [0.6, 0.25])
def test_td_moe_is_the_partial_tucker_of_tensorly(mode: str, keep: float) -> None:
    layout = experts(18, 11, 5)
    done = moe(layout, keep, td_moe_mode=mode)
    ranks = done.decomposition.ranks
    found = stacks(layout, done.decomposition.to_dense())
    tensorly.set_backend("numpy")
    for name, T in stacks(layout, fold_weights(random_unfolding(layout), layout)).items():
        modes = [1, 2] if mode == "preserve" else [0, 1, 2]
        chosen = [ranks[f"{name}_R1"], ranks[f"{name}_R2"]]
        if mode == "compress":
            chosen.insert(0, ranks[f"{name}_experts"])
        exact = T.double().numpy()
        (core, factors), _ = partial_tucker(exact, chosen, modes, tol=1e-10, n_iter_max=200)
        expected = tensorly.tenalg.multi_mode_dot(core, factors, modes)
        error = np.linalg.norm(exact - expected) / np.linalg.norm(exact)
        assert relative(T, found[name]) == pytest.approx(error, rel=2e-3)


@pytest.mark.parametrize("mode", ["preserve", "compress"])
@pytest.mark.parametrize("whitening", ["none", "input", "output", "both"])
@pytest.mark.parametrize(("dtype", "bits"), [(BF16, 16), (FP16, 16), (BF16, 8), (BF16, 4)])
def test_td_moe_stays_within_its_bytes(
    mode: str, whitening: str, dtype: torch.dtype, bits: int
) -> None:
    layout = experts(19, 13, 4)
    more = {"td_moe_mode": mode, "whitening": whitening, "metric": ACTIVATION}
    done = moe(layout, 0.4, dtype, value_bits=bits, factor_bits=bits, **more)
    budget = int(0.4 * layout.elements * 2)
    stored = done.decomposition
    assert stored.stored_bytes <= budget
    # Of a small tensor one rank is many bytes.
    assert stored.stored_bytes > 0.85 * budget
    W = fold_weights(random_unfolding(layout), layout)
    dense = stored.to_dense()
    grams = grams_of(layout)
    error = sum(
        float(((W[k] - dense[k]).double() @ grams[k].double() * (W[k] - dense[k])).sum()) for k in W
    )
    assert done.metric_squared_error == pytest.approx(error, rel=1e-3)
    entry = stored.describe("mlp.experts")
    again = type(stored).from_named_tensors(entry, stored.named_tensors("mlp.experts"))
    for name, matrix in again.to_dense().items():
        assert torch.equal(matrix, dense[name])


def test_whitening_the_inputs_minimizes_the_error_of_the_outputs() -> None:
    """With one Gram matrix for all experts the whitened decomposition is the best in it."""
    layout = experts(18, 11, 3)
    X = torch.randn(90, 18, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -2, 18)
    grams = grams_of(layout)
    for module in layout.modules:
        if module.basis_side == "input":
            grams[module.name] = X.T @ X
    args = MethodArgs(metric=ACTIVATION, whitening="input")
    budget = int(0.5 * layout.elements * 4)
    done = METHODS["td_moe"].decompose(
        random_unfolding(layout), layout, budget, FP32, args, (), grams
    )
    ranks = done.decomposition.ranks
    S = Root.of_gram(X.T @ X).factor
    assert S is not None
    W = stacks(layout, fold_weights(random_unfolding(layout), layout))["up"]
    found = stacks(layout, done.decomposition.to_dense())["up"]
    white = (S.T @ W).double().numpy()
    tensorly.set_backend("numpy")
    (core, factors), _ = partial_tucker(
        white, [ranks["up_R1"], ranks["up_R2"]], [1, 2], tol=1e-10, n_iter_max=200
    )
    expected = white - tensorly.tenalg.multi_mode_dot(core, factors, [1, 2])
    error = (S.T @ (W - found)).norm()
    assert float(error) == pytest.approx(float(np.linalg.norm(expected)), rel=2e-3)


def test_td_moe_refuses_what_has_no_experts() -> None:
    for layout in (mha(12, 4, 3), ffn(12, 20)):
        with pytest.raises(LestdError, match="use scope experts"):
            METHODS["td_moe"].least_bytes(layout, BF16, MethodArgs())


HEADS = {
    "mha": mha(48, 12, 4),
    "odd": mha(37, 7, 3),
    "gqa": gqa(40, 16, 6, 2),
    "mqa": gqa(40, 8, 4, 1),
    "fused": fused(44, 11, 4),
    "type after type": GroupLayout(
        20,
        5,
        (
            ModuleLayout("qkv", "input", tuple((t, i) for t in "qkv" for i in range(3))),
            ModuleLayout("dense", "output", tuple(("o", i) for i in range(3))),
        ),
    ),
}


@pytest.mark.parametrize("name", list(HEADS))
@pytest.mark.parametrize("keep", [0.7, 0.35])
def test_every_head_is_the_partial_tucker_of_tensorly(name: str, keep: float) -> None:
    layout = HEADS[name]
    args = MethodArgs(hooi_tol=1e-9, hooi_max_iter=100)
    budget = int(keep * layout.elements * 4)
    W = random_unfolding(layout)
    done = METHODS["per_head_tucker"].decompose(W.clone(), layout, budget, FP32, args)
    ranks = done.decomposition.ranks
    found = unfold_weights(done.decomposition.to_dense(), layout)
    units = sum(t == "k" for t, _ in layout.slices)
    queries = sum(t == "q" for t, _ in layout.slices) // units
    tensorly.set_backend("numpy")
    d, p = layout.width, layout.head_dim
    per_unit = len(layout.slices) // units
    step = (d + ranks["R2"] * per_unit) * units * 4
    assert budget - step < done.decomposition.stored_bytes <= budget
    for unit in range(units):
        mine = [
            s
            for s, (t, i) in enumerate(layout.slices)
            if (i // queries if t in "qo" else i) == unit
        ]
        T = W.view(d, -1, p)[:, mine]
        T_hat = found.view(d, -1, p)[:, mine]
        exact = T.double().numpy()
        (core, factors), _ = partial_tucker(
            exact, [ranks["R1"], ranks["R2"]], [0, 2], tol=1e-10, n_iter_max=200
        )
        expected = tensorly.tenalg.multi_mode_dot(core, factors, [0, 2])
        error = np.linalg.norm(exact - expected) / np.linalg.norm(exact)
        assert relative(T, T_hat) == pytest.approx(error, rel=2e-3)


@pytest.mark.parametrize("name", list(HEADS))
@pytest.mark.parametrize(("dtype", "bits"), [(BF16, 16), (FP16, 8), (BF16, 4)])
def test_heads_stay_within_their_bytes(name: str, dtype: torch.dtype, bits: int) -> None:
    layout = HEADS[name]
    args = MethodArgs(value_bits=bits, factor_bits=bits)
    budget = int(0.3 * layout.elements * 2)
    done = METHODS["per_head_tucker"].decompose(
        random_unfolding(layout), layout, budget, dtype, args
    )
    assert done.decomposition.stored_bytes <= budget
    entry = done.decomposition.describe("self_attn")
    again = type(done.decomposition).from_named_tensors(
        entry, done.decomposition.named_tensors("self_attn")
    )
    for key, matrix in again.to_dense().items():
        assert torch.equal(matrix, done.decomposition.to_dense()[key])


@pytest.mark.filterwarnings("error")
def test_heads_of_rank_one_need_no_more_ranks_than_they_have() -> None:
    layout = mha(64, 8, 2)
    generator = torch.Generator().manual_seed(3)
    u, v = torch.randn(64, 1, generator=generator), torch.randn(1, 8, generator=generator)
    W = (u @ v).repeat(1, len(layout.slices))
    done = METHODS["per_head_tucker"].decompose(
        W.clone(), layout, int(0.1 * layout.elements * 4), FP32, MethodArgs()
    )
    R1, R2 = done.decomposition.ranks.values()
    assert R1 <= 4 * R2
    assert R2 <= 4 * R1
    assert done.relative_error < 1e-5


def test_heads_in_no_order_and_other_blocks_are_refused() -> None:
    mixed = GroupLayout(
        20,
        5,
        (
            ModuleLayout("qkv", "input", tuple((t, i) for t in "qkv" for i in (2, 0, 1))),
            ModuleLayout("dense", "output", tuple(("o", i) for i in range(3))),
        ),
    )
    with pytest.raises(LestdError, match="in order"):
        METHODS["per_head_tucker"].least_bytes(mixed, BF16, MethodArgs())
    with pytest.raises(LestdError, match="use scope attention"):
        METHODS["per_head_tucker"].least_bytes(ffn(12, 20), BF16, MethodArgs())


@pytest.mark.parametrize("method", ["tt", "td_moe", "per_head_tucker"])
def test_what_is_too_small_is_refused_and_the_least_is_not(method: str) -> None:
    layout = experts(9, 7, 3) if method == "td_moe" else mha(12, 4, 3)
    least = METHODS[method].least_bytes(layout, BF16, MethodArgs())
    done = METHODS[method].decompose(random_unfolding(layout), layout, least, BF16, MethodArgs())
    assert done.decomposition.stored_bytes <= least
    with pytest.raises(LestdError, match="raise keep"):
        METHODS[method].bounds(layout, least - 1, BF16, MethodArgs())


@pytest.mark.parametrize("method", ["tt", "td_moe", "per_head_tucker"])
def test_a_curve_tells_the_errors_of_its_budgets(method: str) -> None:
    layout = experts(19, 13, 4) if method == "td_moe" else mha(24, 8, 3)
    budgets = [int(share * layout.elements * 4) for share in (0.3, 0.5, 0.8)]
    prepared = METHODS[method].prepare(Group(random_unfolding(layout), layout, FP32, MethodArgs()))
    done = METHODS[method].encode(prepared, budgets[1], budgets, reuse=True)
    for point, budget in zip(done.curve, budgets, strict=True):
        alone = METHODS[method].encode(prepared, budget, reuse=True)
        assert point.squared_error == pytest.approx(alone.metric_squared_error, rel=0.05)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("method", ["tt", "td_moe", "per_head_tucker"])
def test_weights_of_any_scale(method: str, scale: float) -> None:
    layout = experts(9, 7, 3) if method == "td_moe" else mha(12, 4, 3)
    budget = int(0.6 * layout.elements * 2)
    W = random_unfolding(layout) * scale
    done = METHODS[method].decompose(W.clone(), layout, budget, BF16, MethodArgs())
    assert (done.relative_error < 1) if scale else (done.relative_error == 0)


def test_hosvd_is_tucker_without_sweeps() -> None:
    layout = mha(48, 12, 4)
    budget = int(0.3 * layout.elements * 4)
    # So steep that both modes are truncated.
    W = random_unfolding(layout).view(48, -1, 12) * torch.logspace(0, -2, 12)
    W = W.flatten(1).contiguous()
    found = {
        name: METHODS[name].decompose(W.clone(), layout, budget, FP32, MethodArgs(rank_step=4))
        for name in ("hosvd", "tucker")
    }
    stored = found["hosvd"].decomposition
    R1, R2 = stored.ranks["R1"], stored.ranks["R2"]
    assert stored.ranks == found["tucker"].decomposition.ranks
    assert (found["hosvd"].hooi_iterations, R2 < 12) == (0, True)
    W = W.double()
    T = W.view(48, -1, 12)
    U1 = np.linalg.svd(W.numpy(), full_matrices=False)[0][:, :R1]
    U2 = np.linalg.svd(T.permute(2, 0, 1).reshape(12, -1).numpy(), full_matrices=False)[0][:, :R2]
    tensorly.set_backend("numpy")
    core = tensorly.tenalg.multi_mode_dot(T.numpy(), [U1.T, U2.T], [0, 2])
    expected = tensorly.tenalg.multi_mode_dot(core, [U1, U2], [0, 2]).reshape(W.shape)
    dense = unfold_weights(stored.to_dense(), layout)
    np.testing.assert_allclose(dense, expected, atol=1e-4)
    assert found["tucker"].squared_error <= found["hosvd"].squared_error * (1 + 1e-6)
    energy = float(np.square(core).sum())
    assert found["hosvd"].squared_energy_stage1 == pytest.approx(energy, rel=1e-4)


def test_the_metrics_that_formats_know() -> None:
    known = {name: METHODS[name].metrics for name in ("tt", "td_moe", "per_head_tucker")}
    assert known == {
        "tt": (WEIGHT, NORM),
        "td_moe": (WEIGHT, ACTIVATION),
        "per_head_tucker": (WEIGHT,),
    }
