"""Curves of error against bytes, and the budgets that follow from them."""

from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.groups import fused, gqa, mha, unfolding

from lestd_kernels.errors import LestdError
from lestd_kernels.methods import METHODS, MethodArgs
from orchestrator.planning.allocation import (
    allocate,
    better_than_uniform,
    cheapest_within,
    curve_budgets,
    lower_hull,
    predicted_error,
)

CASES = [
    ("lestd", MethodArgs(rank_step=4), mha(40, 12, 3)),
    ("lestd", MethodArgs(rank_step=4, max_flops=0.7), gqa(37, 9, 4, 2)),
    ("lestd", MethodArgs(rank_step=4, type_mode="learned"), mha(40, 12, 3)),
    ("lestd", MethodArgs(rank_step=4, pattern="2:4"), fused(33, 10, 3)),
    ("tucker", MethodArgs(rank_step=4), gqa(37, 9, 4, 2)),
    ("tucker", MethodArgs(rank_step=4, type_mode="learned"), mha(40, 12, 3)),
]


@pytest.mark.parametrize(("name", "args", "layout"), CASES)
def test_a_curve_is_what_decomposing_at_each_budget_gives(name, args, layout):
    method, dtype, dense = METHODS[name], torch.float32, layout.elements * 4
    least = method.least_bytes(layout, dtype, args)
    budgets = curve_budgets(least, int(0.4 * dense), dense)[::3]
    W = 0.02 * unfolding(layout)
    here = budgets[len(budgets) // 2]
    found = method.decompose(W.clone(), layout, here, dtype, args, budgets)
    alone = method.decompose(W.clone(), layout, here, dtype, args)
    assert found.squared_error == alone.squared_error
    assert alone.curve == ()
    assert [point.byte_budget for point in found.curve] == list(budgets)
    refined = 0
    for point in found.curve:
        real = method.decompose(W.clone(), layout, point.byte_budget, dtype, args)
        ranks = real.decomposition.ranks
        assert ranks == {rank: r for rank, r in point.ranks._asdict().items() if rank in ranks}
        assert real.squared_error <= point.squared_error * 1.004
        # HOOI refines what two truncated modes leave; without it the prediction is exact.
        refined += real.hooi_iterations > 0
        lowest = 0.9 if real.hooi_iterations else 0.997
        assert real.squared_error >= point.squared_error * lowest
    assert refined < len(budgets)


def test_the_least_bytes_are_the_least_that_are_feasible():
    for name, args, layout in CASES:
        if args.max_flops is not None:  # May refuse whatever the bytes.
            continue
        method = METHODS[name]
        least = method.least_bytes(layout, torch.bfloat16, args)
        assert method.bounds(layout, least, torch.bfloat16, args).max_nnz > 0
        with pytest.raises(LestdError, match="smallest ranks"):
            method.bounds(layout, least - 1, torch.bfloat16, args)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 10**9), st.integers(0, 10**10), st.integers(0, 10**11))
def test_budgets_of_a_curve(least, more, still_more):
    uniform, most = least + more, least + more + still_more
    budgets = curve_budgets(least, uniform, most)
    assert list(budgets) == sorted(set(budgets))
    assert (budgets[0], budgets[-1]) == (least, most)
    assert uniform in budgets
    assert len(budgets) <= 33


def test_a_hull_is_convex_and_below_its_curve():
    curve = [(1, 9.0), (2, 8.5), (3, 4.0), (4, 3.9), (6, 1.0), (7, 1.0), (8, 1.5)]
    assert lower_hull(curve) == [(1, 9), (3, 4), (6, 1)]
    assert lower_hull([(5, 2.0)]) == [(5, 2)]
    assert lower_hull([(5, 2.0), (6, 3.0)]) == [(5, 2)]
    # Points in one line are one segment.
    assert lower_hull([(0, 3.0), (1, 2.0), (2, 1.0)]) == [(0, 3), (2, 1)]


@st.composite
def small_curves(draw):
    curves = []
    for _ in range(draw(st.integers(1, 3))):
        sizes = sorted(draw(st.sets(st.integers(0, 9), min_size=1, max_size=5)))
        errors = draw(st.lists(st.integers(0, 20), min_size=len(sizes), max_size=len(sizes)))
        curves.append([(s, float(e)) for s, e in zip(sizes, sorted(errors)[::-1], strict=True)])
    weights = [Fraction(draw(st.integers(0, 3)), 2) for _ in curves]
    return curves, weights


def least_error(curves, weights, total):
    """The least weighted error of all whole budgets, on the hulls."""
    best = {0: Fraction(0)}
    for curve, weight in zip(curves, weights, strict=True):
        hull = lower_hull(curve)
        following = {}
        for spent, error in best.items():
            for size in range(curve[0][0], curve[-1][0] + 1):
                if spent + size <= total:
                    value = error + weight * predicted_error(hull, size)
                    following[spent + size] = min(value, following.get(spent + size, value))
        best = following
    return min(best.values())


@settings(deadline=None, max_examples=150)
@given(small_curves(), st.integers(0, 12))
def test_no_budgets_have_less_error_on_the_hulls(drawn, spare):
    curves, weights = drawn
    total = sum(curve[0][0] for curve in curves) + spare
    budgets = allocate(curves, weights, total)
    assert sum(budgets) <= total
    hulls = [lower_hull(curve) for curve in curves]
    for budget, curve in zip(budgets, curves, strict=True):
        assert curve[0][0] <= budget <= curve[-1][0]
    # All is spent, or nothing is left to gain.
    assert sum(budgets) == total or budgets == [hull[-1][0] for hull in hulls]
    error = sum(
        weight * predicted_error(hull, budget)
        for weight, hull, budget in zip(weights, hulls, budgets, strict=True)
    )
    assert error == least_error(curves, weights, total)


def test_ties_go_to_the_first_group():
    curve, one = [(0, 8.0), (4, 4.0), (8, 2.0)], Fraction(1)
    assert allocate([curve] * 3, [one] * 3, 10) == [4, 4, 2]
    assert allocate([curve] * 3, [one] * 3, 12) == [4, 4, 4]
    assert allocate([curve] * 3, [one, one, 2 * one], 4) == [0, 0, 4]


def test_too_few_bytes_are_refused():
    with pytest.raises(ValueError, match="5 bytes for curves that begin at 6 bytes"):
        allocate([[(3, 1.0), (4, 0.0)]] * 2, [Fraction(1)] * 2, 5)
    assert allocate([[(3, 1.0), (4, 0.0)]] * 2, [Fraction(1)] * 2, 6) == [3, 3]


def test_an_error_between_points_is_interpolated_on_the_curve_itself():
    curve = [(0, 8.0), (4, 7.0), (8, 0.0)]
    assert [predicted_error(curve, b) for b in (0, 2, 4, 6, 8)] == [8, 7.5, 7, 3.5, 0]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(st.floats(0.1, 3), st.floats(1e-3, 1e3), st.integers(50, 900)),
        min_size=1,
        max_size=6,
    )
)
def test_neither_sum_is_above_that_of_uniform_budgets(groups):
    curves = [
        [(b, norm * 2 ** (-decay * b / 300)) for b in curve_budgets(40, uniform, 1000)]
        for decay, norm, uniform in groups
    ]
    norms = [norm for _, norm, _ in groups]
    uniform = [budget for *_, budget in groups]
    budgets = better_than_uniform(curves, norms, uniform)
    if len(groups) == 1:
        assert budgets is None
    if budgets is None:
        return
    assert sum(budgets) <= sum(uniform)
    for weights in ([1.0] * len(norms), [1 / norm for norm in norms]):
        better, before = (
            sum(
                float(predicted_error(curve, b)) * weight
                for curve, b, weight in zip(curves, chosen, weights, strict=True)
            )
            for chosen in (budgets, uniform)
        )
        assert better < before


def test_groups_of_different_spectra_exchange_bytes():
    uniform, n = 400, 4
    decays = [0.2, 1.0, 3.0, 1.0]
    curves = [
        [(b, 2.0 ** (-decay * b / 100)) for b in curve_budgets(40, uniform, 1000)]
        for decay in decays
    ]
    budgets = better_than_uniform(curves, [1.0] * n, [uniform] * n)
    assert budgets is not None
    assert sum(budgets) == n * uniform
    # A group whose error falls fast has little left to gain.
    assert budgets[2] < uniform
    same = [curves[1]] * n
    assert better_than_uniform(same, [1.0] * n, [uniform] * n) is None
    assert better_than_uniform([[(1, 0.0), (2, 0.0)]] * 2, [0.0] * 2, [1, 2]) is None


def test_nats_are_added_up_as_they_are():
    """The best of all choices of points on convex curves, by trying every one."""
    grids = [(10, 20, 30, 40)] * 3
    errors = [(9.0, 5.0, 2.0, 1.0), (0.9, 0.5, 0.2, 0.1), (90.0, 30.0, 10.0, 5.0)]
    curves = [list(zip(*pair, strict=True)) for pair in zip(grids, errors, strict=True)]
    uniform = [20, 20, 20]
    budgets = better_than_uniform(curves, None, uniform)
    best = min(
        (sum(error for _, error in chosen), [size for size, _ in chosen])
        for chosen in product(*curves)
        if sum(size for size, _ in chosen) <= sum(uniform)
    )
    assert budgets == best[1] == [10, 10, 40]
    # By relative errors the second counts like the others.
    assert better_than_uniform(curves, [9.0, 0.9, 90.0], uniform) != budgets


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), min_size=2, max_size=4),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 60),
)
def test_bytes_and_errors_are_the_best_of_all_choices_of_points(steps, spare):
    """Any curves; on the hulls nothing that was tried one by one is better."""
    curves = []
    for group in steps:
        size, error, curve = 0, 100, []
        for more, less in group:
            size, error = size + more, error - less
            curve.append((size, float(error)))
        curves.append(curve)

    def on_hulls(budgets):
        hulls = [[(b, float(e)) for b, e in lower_hull(curve)] for curve in curves]
        return sum(predicted_error(hull, b) for hull, b in zip(hulls, budgets, strict=True))

    choices = [
        (sum(size for size, _ in chosen), sum(error for _, error in chosen))
        for chosen in product(*curves)
    ]
    total = min(size for size, _ in choices) + spare
    budgets = allocate(curves, [Fraction(1)] * len(curves), total)
    assert sum(budgets) <= total
    assert on_hulls(budgets) <= min(error for size, error in choices if size <= total)

    limit = max(error for _, error in choices) - spare
    cheapest = cheapest_within(curves, Fraction(limit))
    within = [size for size, error in choices if error <= limit]
    assert (cheapest is None) == (not within)
    if cheapest is not None:
        assert on_hulls(cheapest) <= limit
        # The last byte of a segment that is not whole may be one too many.
        assert sum(cheapest) < min(within) + 1
