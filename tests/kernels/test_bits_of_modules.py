"""Bits of each module of its own, where the metric says what an error of a module costs."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from support.groups import gqa
from support.groups import unfolding as random_unfolding
from torch import Tensor

from lestd_kernels.formats.chain import Chain
from lestd_kernels.methods import METHODS, MethodArgs
from lestd_kernels.methods.common.base import ACTIVATION, LOSS, Decomposed
from lestd_kernels.methods.common.outliers import side_bytes
from lestd_kernels.methods.common.quantizing import best_shares
from lestd_kernels.storage.few_bits import QUANTIZED_BITS, values_bytes
from lestd_kernels.tensorize import GroupLayout

BF16 = torch.bfloat16
GQA = gqa(64, 16, 8, 2)
GQA = replace(GQA, modules=(*GQA.modules[:3], replace(GQA.modules[3], reads="heads")))
METHOD = METHODS["gptq"]


def metrics_of(layout: GroupLayout, weights: dict[str, float]) -> dict[str, Tensor]:
    """Metrics of the loss; an error of some modules counts so many times as much."""
    found = {}
    for i, module in enumerate(layout.modules):
        generator = torch.Generator().manual_seed(i)
        for side, width in zip(("", ".output"), layout.weight_shape(module)[::-1], strict=True):
            X = torch.randn(4 * width, width, generator=generator)
            G = X.T @ X / len(X)
            found[module.name + side] = G * weights.get(module.name, 1.0) if side else G
    return found


def decompose(
    args: MethodArgs, budget: int, weights: dict[str, float], budgets: tuple[int, ...] = ()
) -> Decomposed:
    metrics = metrics_of(GQA, weights)
    if args.metric == ACTIVATION:
        metrics = {name: G for name, G in metrics.items() if not name.endswith(".output")}
    return METHOD.decompose(random_unfolding(GQA), GQA, budget, BF16, args, budgets, metrics)


def bits_of(done: Decomposed) -> dict[str, int]:
    assert isinstance(done.decomposition, Chain)
    return {name: chain.own[0].value_bits for name, chain in done.decomposition.modules.items()}


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_those_of_the_least_error(seed: int) -> None:
    chance = random.Random(seed)
    choices = {
        name: [(chance.randrange(1, 9), chance.random()) for _ in range(chance.randrange(1, 4))]
        for name in "abcde"[: chance.randrange(1, 6)]
    }
    shares = best_shares(choices)
    every = list(itertools.product(*choices.values()))
    fewest = min(sum(size for size, _ in way) for way in every)
    with pytest.raises(ValueError, match=f"need {fewest} together"):
        shares(fewest - 1)
    for budget in range(fewest, 45):
        found = shares(budget)
        assert sum(found.values()) <= budget
        least = min(sum(e for _, e in way) for way in every if sum(s for s, _ in way) <= budget)
        mine = [
            min(error for size, error in own if size == found[name])
            for name, own in choices.items()
        ]
        assert sum(mine) == pytest.approx(least)


def test_bits_go_where_errors_count() -> None:
    weights = {"q_proj": 0.01, "v_proj": 100.0}
    even = decompose(MethodArgs(metric=LOSS, value_bits=3), 10**6, weights)
    budget = even.decomposition.stored_bytes
    done = decompose(MethodArgs(metric=LOSS), budget, weights)
    bits = bits_of(done)
    assert done.decomposition.stored_bytes <= budget
    assert bits["v_proj"] > bits["o_proj"] >= bits["q_proj"] == 2
    assert done.metric_squared_error < even.metric_squared_error / 2


def test_without_what_errors_cost_all_have_the_same() -> None:
    weights = {"v_proj": 100.0}
    budget = GQA.elements * 3 // 7
    for args in (
        MethodArgs(metric=ACTIVATION),
        MethodArgs(metric=LOSS, value_bits=3),
        MethodArgs(metric=LOSS, scale_groups="inputs"),
    ):
        assert set(bits_of(decompose(args, budget, weights)).values()) == {3}


def test_a_curve_is_looked_at_wherever_something_else_is_stored() -> None:
    args, weights = MethodArgs(metric=LOSS), {"q_proj": 0.1, "v_proj": 10.0}
    sizes = METHOD.jumps(GQA, BF16, args)
    own = [
        [values_bytes(math.prod(GQA.weight_shape(module)), bits, 2) for bits in QUANTIZED_BITS]
        for module in GQA.modules
    ]
    assert sizes == tuple(sorted({sum(way) for way in itertools.product(*own)}))
    budgets = tuple(one for one in sizes if one >= METHOD.least_bytes(GQA, BF16, args))
    done = decompose(args, budgets[len(budgets) // 2], weights, budgets)
    errors = [point.squared_error for point in done.curve]
    assert all(later <= error * 1.05 for error, later in itertools.pairwise(errors))
    for i in (0, len(budgets) // 3, len(budgets) - 1):
        stored = decompose(args, budgets[i], weights)
        assert stored.decomposition.stored_bytes <= budgets[i]
        assert stored.metric_squared_error == pytest.approx(errors[i], rel=0.25)


def test_what_no_token_reaches_has_bits_where_there_is_room() -> None:
    args, metrics = MethodArgs(metric=LOSS), metrics_of(GQA, {})
    for unreached in (("k_proj",), tuple(module.name for module in GQA.modules)):
        zero = {name: torch.zeros_like(metrics[name]) for name in unreached}
        for keep, bits in ((0.53, 8), (0.143, 2)):
            W, budget = random_unfolding(GQA), int(keep * 2 * GQA.elements)
            done = METHOD.decompose(W, GQA, budget, BF16, args, (), metrics | zero)
            assert set(bits_of(done).values()) == {bits}


def test_outliers_take_their_bytes_beside_those_sizes() -> None:
    args = MethodArgs(metric=LOSS, keep_outliers=0.01)
    taken = side_bytes(GQA, BF16, 0.01)
    sizes = METHOD.jumps(GQA, BF16, MethodArgs(metric=LOSS))
    assert METHOD.jumps(GQA, BF16, args) == tuple(size + taken for size in sizes)
    done = decompose(args, sizes[-1] + taken, {})
    assert done.decomposition.stored_bytes == sizes[-1] + taken
