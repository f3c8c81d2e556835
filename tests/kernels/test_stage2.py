import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.groups import orthonormal

from lestd_kernels.linalg.stage1 import Factors
from lestd_kernels.linalg.stage2 import (
    fit_cores,
    gram_factors,
    one_shot,
    prune_refit,
    refit,
    select_largest,
)


def at_most(count):
    return lambda nnz: sum(nnz) <= count


def brute_force(cores, fits):
    """Masks of the longest prefix of all elements, by (-|g|, position), that fits."""
    flat = [(-abs(g), c, i) for c, core in enumerate(cores) for i, g in enumerate(core.flatten())]
    masks = [torch.zeros(core.numel(), dtype=torch.bool) for core in cores]
    nnz = [0] * len(cores)
    for g, c, i in sorted((float(g), c, i) for g, c, i in flat):
        nnz[c] += 1
        if g == 0 or not fits(nnz):
            break
        masks[c][i] = True
    return [mask.view_as(core) for mask, core in zip(masks, cores, strict=True)]


def problem(T=1, R3=1, sizes=(3, 2), d=11, p=5, R1=6, R2=4, dtype=torch.float32, noise=0.0):
    """W (d, T, n, p), factors as stored, and the unconstrained cores, one per size."""
    generator = torch.Generator().manual_seed(R1 + R3)
    W = torch.randn(d, T, sum(sizes), p, generator=generator)
    factors = []
    for seed, (rows, rank) in enumerate(((d, R1), (p, R2), (T, R3))):
        U = orthonormal(rows, rank, seed) if rows > 1 else torch.ones(1, 1)
        factors.append((U + noise * torch.randn(U.shape, generator=generator)).to(dtype))
    stored = Factors(*factors)
    targets = fit_cores(W, stored, sizes)
    return W, stored, targets


def squared_error(W, factors, cores):
    U1, U2, U3 = (U.double() for U in (factors.U1, factors.U2, factors.U3))
    core = torch.cat(list(cores), dim=2).double()
    return float(
        (W.double() - torch.einsum("arnb,ia,tr,jb->itnj", core, U1, U3, U2)).square().sum()
    )


def design_matrix(factors, shape):
    """Columns: vec of the rank-one term of every core element."""
    U1, U2, U3 = (U.double().numpy() for U in (factors.U1, factors.U2, factors.U3))
    return np.einsum("ia,tr,nm,jb->itnjarmb", U1, U3, np.eye(shape[2]), U2).reshape(
        -1, math.prod(shape)
    )


values = st.sampled_from([0.0, 1.0, -1.0, 1.0000001, 0.5, -3e-39, 2e-45, 7.25, -1e30, 1e-6])


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.lists(values, min_size=1, max_size=12), min_size=1, max_size=3),
    st.integers(0, 30),
    st.sampled_from([1, 3]),
)
def test_selection_is_brute_force_top_k(elements, budget, weight):
    cores = [torch.tensor(core) for core in elements]

    def fits(nnz):  # the first core's elements cost more
        return sum(nnz) + (weight - 1) * nnz[0] <= budget

    for mask, expected in zip(select_largest(cores, fits), brute_force(cores, fits), strict=True):
        assert mask.tolist() == expected.tolist()


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 2345, 3000, 3001])
def test_selection_of_random_values_keeps_exactly_k(count):
    generator = torch.Generator().manual_seed(count)
    cores = [torch.randn(n, generator=generator) for n in (1000, 2000)]
    masks = select_largest(cores, at_most(count))
    assert sum(int(mask.sum()) for mask in masks) == min(count, 3000)
    flat, kept = torch.cat(cores).abs(), torch.cat(masks)
    expected = set(flat.argsort(descending=True)[:count].tolist())
    assert set(kept.nonzero().view(-1).tolist()) == expected


def test_ties_are_kept_in_position_order():
    cores = [torch.tensor([[2.0, -1.0], [1.0, 0.0]]), torch.tensor([[1.0, -1.0], [3.0, 1.0]])]
    first, second = select_largest(cores, at_most(5))
    assert first.tolist() == [[True, True], [True, False]]
    assert second.tolist() == [[True, False], [True, False]]


@pytest.mark.parametrize("sparsity", [0.2, 0.7, 0.95])
def test_importance_measured_on_the_residual_gives_the_same_support(sparsity):
    """Imp(g) = (E_{g=0} - E) / E, computed literally by rebuilding the tensor without g."""
    W, factors, targets = problem()
    error = squared_error(W, factors, targets)
    importance = [torch.zeros_like(core) for core in targets]
    for c, core in enumerate(targets):
        for i in range(core.numel()):
            without = [core.clone() for core in targets]
            without[c].view(-1)[i] = 0
            raised = squared_error(W, factors, without) - error
            importance[c].view(-1)[i] = raised / error
            assert raised == pytest.approx(float(core.view(-1)[i]) ** 2, rel=1e-3, abs=1e-5)
    total = sum(core.numel() for core in targets)
    keep = round((1 - sparsity) * total)
    kept = one_shot(targets, at_most(keep), gram_factors(factors))
    threshold = torch.cat([i.view(-1) for i in importance]).sort(descending=True).values[keep - 1]
    for core, imp in zip(kept, importance, strict=True):
        assert torch.equal(core != 0, imp >= threshold)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0])
@pytest.mark.parametrize(("T", "R3"), [(1, 1), (4, 4), (4, 2)])
@pytest.mark.parametrize("keep", [0, 1, 17, 60])
def test_prune_refit_equals_one_shot_for_orthonormal_factors(alpha, T, R3, keep):
    _, factors, targets = problem(T, R3)
    grams = gram_factors(factors)
    ours = prune_refit(targets, at_most(keep), grams, alpha)
    oracle = one_shot(targets, at_most(keep), grams)
    assert sum(int(core.count_nonzero()) for core in ours) == keep
    for a, b in zip(ours, oracle, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_prune_refit_agrees_with_one_shot_for_rounded_factors(alpha):
    W, factors, targets = problem(4, 3, dtype=torch.bfloat16)
    grams = gram_factors(factors)
    errors = [
        squared_error(W, factors, cores)
        for cores in (
            prune_refit(targets, at_most(40), grams, alpha),
            one_shot(targets, at_most(40), grams),
        )
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


@pytest.mark.parametrize("keep", [5, 60, 100])
def test_the_residual_is_the_energy_not_kept(keep):
    W, factors, targets = problem()
    cores = one_shot(targets, at_most(keep), gram_factors(factors))
    energy = sum(float(core.double().square().sum()) for core in cores)
    expected = float(W.double().square().sum()) - energy
    assert squared_error(W, factors, cores) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("T", "R3"), [(1, 1), (4, 2), (4, 1)])
@pytest.mark.parametrize(
    ("dtype", "noise"), [(torch.float32, 0.0), (torch.bfloat16, 0.0), (torch.float32, 0.1)]
)
def test_refit_solves_the_least_squares_problem(T, R3, dtype, noise):
    W, factors, targets = problem(T, R3, dtype=dtype, noise=noise)
    masks = select_largest(targets, at_most(40))
    start = [core * mask for core, mask in zip(targets, masks, strict=True)]
    cores = refit(targets, masks, targets, gram_factors(factors))
    for core, mask in zip(cores, masks, strict=True):
        assert bool((core[~mask] == 0).all())

    A = design_matrix(factors, torch.cat(targets, dim=2).shape)
    support = torch.cat(masks, dim=2).view(-1).numpy()
    b = W.double().numpy().reshape(-1)
    best = np.linalg.lstsq(A[:, support], b)[0]
    optimum = np.sum((b - A[:, support] @ best) ** 2)
    error, before = squared_error(W, factors, cores), squared_error(W, factors, start)
    assert error <= before * (1 + 1e-9)
    assert error <= optimum * (1 + 1e-6)
    if noise:  # far from orthonormal: the refit has something to gain
        assert before - optimum > 1e-4 * optimum


def test_refit_in_parts_equals_refit_at_once(monkeypatch):
    _, factors, targets = problem(4, 2, sizes=(7, 3), noise=0.02)
    masks = select_largest(targets, at_most(40))
    whole = refit(targets, masks, targets, gram_factors(factors))
    monkeypatch.setattr("lestd_kernels.linalg.stage2._CHUNK_ELEMENTS", 100)
    parts = refit(targets, masks, targets, gram_factors(factors))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("T", "R3"), [(1, 1), (4, 3)])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_dense_core_is_the_least_squares_core(T, R3, noise):
    W, factors, targets = problem(T, R3, noise=noise)
    core = torch.cat(targets, dim=2)
    A, b = design_matrix(factors, core.shape), W.double().numpy().reshape(-1)
    np.testing.assert_allclose(core.reshape(-1).numpy(), np.linalg.lstsq(A, b)[0], atol=1e-4)


def test_errors_grow_as_elements_go():
    W, factors, targets = problem(dtype=torch.bfloat16)
    grams = gram_factors(factors)
    errors = [
        squared_error(W, factors, one_shot(targets, at_most(k), grams)) for k in (120, 90, 50, 9, 0)
    ]
    assert all(a < b for a, b in pairwise(errors))
    assert errors[-1] == pytest.approx(float(W.double().square().sum()))


@pytest.mark.parametrize("exponent", [70, -70, -100, -140])
def test_refit_of_values_whose_squares_leave_float32(exponent):
    """Gains as much as at an ordinary scale; and where values themselves underflow, no harm."""
    W, factors, targets = problem(noise=0.1)
    grams, masks = gram_factors(factors), select_largest(targets, at_most(40))
    ordinary = refit(targets, masks, targets, grams)
    scaled = [core * 2.0**exponent for core in targets]
    cores = [core.double() / 2.0**exponent for core in refit(scaled, masks, scaled, grams)]
    if exponent > -140:
        for ours, expected in zip(cores, ordinary, strict=True):
            torch.testing.assert_close(ours.float(), expected, rtol=1e-4, atol=1e-5)
    start = [core * mask for core, mask in zip(targets, masks, strict=True)]
    assert squared_error(W, factors, cores) <= squared_error(W, factors, start) * (1 + 1e-2)
    assert all(bool(core.isfinite().all()) for core in cores)
