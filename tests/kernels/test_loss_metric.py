"""The metric loss, whose errors are nats: every method against the dense Kronecker product."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.groups import gqa
from torch import Tensor

from lestd_kernels.errors import LestdError
from lestd_kernels.linalg.error_feedback import inverse_factor
from lestd_kernels.linalg.low_rank import Bits, fit_pair, spectrum
from lestd_kernels.linalg.metric import Metric, Root, Roots, apply_metric, diagonal_of
from lestd_kernels.linalg.support_fit import fit_on_support
from lestd_kernels.linalg.two_sided_feedback import output_factor, round_both_ways
from lestd_kernels.methods import METHODS, MethodArgs, auto, watersic
from lestd_kernels.methods.common import coded_matrix
from lestd_kernels.methods.common.base import ACTIVATION, LOSS, Chosen, Decomposed, Group
from lestd_kernels.methods.common.coded_matrix import RoundedMatrix, SteppedMatrix
from lestd_kernels.methods.common.foresight import costs_of
from lestd_kernels.tensorize import GroupLayout, ModuleLayout

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FFN = GroupLayout(
    21,
    34,
    (
        *(ModuleLayout(f"{t}_proj", "input", ((t, 0),)) for t in ("gate", "up")),
        ModuleLayout("down_proj", "output", (("down", 0),), "hidden"),
    ),
)
GQA = gqa(23, 5, 6, 2)
GQA = replace(GQA, modules=(*GQA.modules[:3], replace(GQA.modules[3], reads="heads")))
EXPERTS = GroupLayout(
    16,
    10,
    tuple(
        ModuleLayout(f"expert_{e}.{t}", side, ((t, e),), f"{reads}_{e}")
        for e in range(3)
        for t, side, reads in (
            ("gate", "input", "in"),
            ("up", "input", "in"),
            ("down", "output", "hidden"),
        )
    ),
)
LAYOUTS = {"gqa": GQA, "ffn": FFN, "experts": EXPERTS}
FORMS = ("full", "head", "diagonal", "none")


def gram(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(3 * width, width, generator=generator)
    X = X @ torch.randn(width, width, generator=generator) / width**0.5
    return X.T @ X / len(X)


def in_form(B: Tensor, form: str, blocks: int) -> Tensor:
    """B ``(n, n)`` as it is, its diagonal blocks, or its diagonal."""
    if form == "head":
        size = len(B) // blocks
        return torch.stack([B[i : i + size, i : i + size] for i in range(0, len(B), size)])
    return B if form == "full" else B.diagonal().clone()


def dense(G: Tensor | None, width: int) -> Tensor:
    """A metric's side as a matrix, float64."""
    if G is None:
        return torch.eye(width, dtype=torch.float64)
    return torch.block_diag(*(G if G.dim() == 3 else [G.diag() if G.dim() == 1 else G])).double()


def metrics_of(layout: GroupLayout, form: str) -> dict[str, Tensor]:
    found = {}
    for i, module in enumerate(layout.modules):
        out, width = layout.weight_shape(module)
        found[module.name] = gram(width, sum(map(ord, module.reads)))
        if form != "none":
            # Modules' losses differ by much, and those of their outputs.
            sizes = torch.arange(1, out + 1).roll(7 * i).sqrt()
            B = gram(out, 10 + i) * torch.outer(sizes, sizes) * 10.0 ** (i - 2)
            found[f"{module.name}.output"] = in_form(
                B, form, len(module.slices) if module.basis_side == "input" else 1
            )
    for name in found:
        if name.startswith("expert_2"):
            found[name].zero_()  # No token chose it.
    return found


def random_weights(layout: GroupLayout) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    shape = (layout.width, layout.elements // layout.width)
    return torch.randn(shape, generator=generator) * 0.1


def decompose(
    method: str, layout: GroupLayout, keep: float, form: str, dtype: torch.dtype, **more: object
) -> Decomposed:
    args = MethodArgs(**({"metric": LOSS} | more))  # type: ignore[arg-type]
    budget = int(keep * layout.elements * dtype.itemsize)
    W = random_weights(layout)
    return METHODS[method].decompose(
        W, layout, budget, dtype, args, [budget // 2, budget], metrics_of(layout, form)
    )


def measured(done: Decomposed, layout: GroupLayout, form: str) -> float:
    """``vec(D)^T (A (x) B) vec(D)`` over the modules, float64."""
    metrics, total = metrics_of(layout, form), 0.0
    found, column = done.decomposition.to_dense(), 0
    for module in layout.modules:
        stop = column + len(module.slices) * layout.head_dim
        W = random_weights(layout)[:, column:stop].double()
        column = stop
        D = (W if module.basis_side == "input" else W.T) - found[module.name].double().T
        A = dense(metrics[module.name], D.shape[0])
        B = dense(metrics.get(f"{module.name}.output"), D.shape[1])
        vec = D.reshape(-1)
        total += float(vec @ torch.kron(A, B) @ vec)
    return total


@pytest.mark.parametrize("form", ["full", "head", "diagonal"])
def test_the_forms_of_a_metric_are_those_of_the_matrix_that_they_stand_for(form: str) -> None:
    G = in_form(gram(12, 0), form, 3)
    G_dense = dense(G, 12).float()
    X = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(apply_metric(G, X), G_dense @ X)
    torch.testing.assert_close(diagonal_of(G), G_dense.diagonal())
    root, full = Root.of_gram(G), Root.of_gram(G_dense)
    torch.testing.assert_close(root.apply(X), full.apply(X), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(root.solve(root.apply(X)), X, rtol=1e-4, atol=1e-4)
    A = gram(5, 3)
    exact = torch.trace(A.double() @ X.T.double() @ G_dense.double() @ X.double())
    assert Metric(A, G).squares(X.T) == pytest.approx(float(exact), rel=1e-5)
    V = output_factor(G)
    if form == "head":
        assert V is not None
        expected = inverse_factor(torch.stack([dense(b, 4).float() for b in G]))
        torch.testing.assert_close(V, expected)
    assert (V is None) == (form == "diagonal")


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6)])
def test_a_pair_is_the_best_in_the_kronecker_product(shape: tuple[int, int]) -> None:
    """Against alternating least squares with the dense metric, from several starts."""
    generator = torch.Generator().manual_seed(2)
    W = torch.randn(shape, generator=generator)
    metric = Metric(gram(shape[0], 1), gram(shape[1], 2))
    roots = Roots(Root.of_gram(metric.input), Root.of_gram(metric.output))
    found = spectrum(W, roots, metric)
    pair = fit_pair(W, roots, found, 2, FP32, Bits(), metric)
    error = metric.squares(W - pair.left.decode().T @ pair.right.decode())
    assert float(found.energies[2:].sum()) == pytest.approx(error, rel=1e-4)
    assert float(found.energies.sum()) == pytest.approx(metric.squares(W), rel=1e-5)
    kron = torch.kron(metric.input.double(), metric.output.double()).numpy()
    root = np.linalg.cholesky(kron).T
    w, best = W.double().numpy(), np.inf
    for seed in range(4):
        P = np.random.default_rng(seed).normal(size=(shape[0], 2))
        for _ in range(60):
            design = root @ np.kron(P, np.eye(shape[1]))
            Q = np.linalg.lstsq(design, root @ w.reshape(-1), rcond=None)[0].reshape(2, -1)
            design = root @ np.kron(np.eye(shape[0]), Q.T)
            P = np.linalg.lstsq(design, root @ w.reshape(-1), rcond=None)[0].reshape(-1, 2)
        best = min(best, float(np.square(root @ (w - P @ Q).reshape(-1)).sum()))
    # The regularized metric is not quite the metric.
    assert best * (1 - 1e-6) <= error <= best * 1.01


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("form", ["full", "head"])
def test_feedback_along_both_sides_lowers_the_error(form: str, bits: int) -> None:
    errors = {"nearest": 0.0, "inputs": 0.0, "both": 0.0}
    for seed in range(4):
        W = torch.randn(24, 70, generator=torch.Generator().manual_seed(seed))
        A, B = gram(24, 20 + seed), in_form(gram(70, 40 + seed), form, 7)
        metric, U = Metric(A, B), inverse_factor(A)
        for name, factors in {
            "nearest": (torch.ones(24), None),
            "inputs": (U, None),
            "both": (U, output_factor(B)),
        }.items():
            rounded, _ = round_both_ways(W, *factors, bits, BF16)
            errors[name] += metric.squares(W - rounded)
    assert errors["both"] < errors["inputs"] < errors["nearest"]


@pytest.mark.parametrize("method", ["svd_llm", "lestd"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_errors_are_nats_and_those_that_were_expected(name: str, form: str, method: str) -> None:
    layout = LAYOUTS[name]
    done = decompose(method, layout, 0.5, form, FP32)
    assert done.metric_squared_error == pytest.approx(measured(done, layout, form), rel=1e-4)
    assert done.expected_squared_error == pytest.approx(done.metric_squared_error, rel=1e-3)
    half, whole = done.curve
    assert done.metric_squared_norm > done.metric_squared_error > 0
    assert whole.squared_error == pytest.approx(done.metric_squared_error, rel=1e-3)
    assert half.squared_error > whole.squared_error


@pytest.mark.parametrize(("dtype", "bits"), [(BF16, 16), (FP16, 8), (FP32, 4)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_stay_within_the_budget_in_every_dtype(
    name: str, bits: int, dtype: torch.dtype
) -> None:
    layout = LAYOUTS[name]
    for method in ("svd_llm", "lestd", "sparsegpt", "gptq"):
        if method == "gptq" and bits == 16:
            continue  # It is its bits that fit.
        done = decompose(method, layout, 0.7, "head", dtype, value_bits=bits, factor_bits=bits)
        assert done.decomposition.stored_bytes <= int(0.7 * layout.elements * dtype.itemsize)
        assert done.metric_squared_error == pytest.approx(measured(done, layout, "head"), rel=1e-4)


@pytest.mark.parametrize("form", ["full", "head", "diagonal"])
@pytest.mark.parametrize(
    ("method", "bits"),
    [("svd_llm", 16), ("lestd", 16), ("wanda", 16), ("sparsegpt", 16), ("gptq", 4)],
)
def test_the_metric_lowers_the_loss_below_that_of_the_inputs_alone(
    method: str, bits: int, form: str
) -> None:
    done = decompose(method, GQA, 0.3, form, BF16, value_bits=bits)
    metrics = metrics_of(GQA, form)
    inputs = {name: G for name, G in metrics.items() if not name.endswith(".output")}
    budget = int(0.3 * GQA.elements * 2)
    args = MethodArgs(metric=ACTIVATION, value_bits=bits)
    other = METHODS[method].decompose(random_weights(GQA), GQA, budget, BF16, args, metrics=inputs)
    lost, other_lost = measured(done, GQA, form), measured(other, GQA, form)
    # But a diagonal does not change what rounding to a dense matrix feeds back.
    assert lost == other_lost if (method, form) == ("gptq", "diagonal") else lost < other_lost


def test_a_core_on_its_support_is_the_least_squares_of_the_kronecker_product() -> None:
    X = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    metric = Metric(gram(6, 1) + torch.eye(6), gram(7, 2) + torch.eye(7))
    mask = torch.rand(6, 7, generator=torch.Generator().manual_seed(3)) < 0.4
    kron = torch.kron(dense(metric.input, 6), dense(metric.output, 7)).numpy()
    root = np.linalg.cholesky(kron).T
    chosen, x = mask.reshape(-1).numpy(), X.double().numpy().reshape(-1)
    expected = np.zeros(42)
    expected[chosen] = np.linalg.lstsq(root[:, chosen], root @ x, rcond=None)[0]
    found = fit_on_support(X, mask, metric)
    assert torch.equal(found != 0, mask)
    least = float(np.square(root @ (x - expected)).sum())
    assert least * (1 - 1e-5) <= metric.squares(X - found) <= least * 1.001
    assert metric.squares(X - found) < metric.squares(X * ~mask)


@pytest.mark.parametrize("keep", [0.2, 0.4])
def test_auto_keeps_the_best_of_its_candidates(
    keep: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "CANDIDATES", auto.CANDIDATES[2::3])
    small = GroupLayout(16, 5, GQA.modules)
    budget, dense_budget = (int(share * small.elements * 2) for share in (keep, 0.8))
    W, metrics = random_weights(small), metrics_of(small, "head")
    losses = {}
    for method, bits, factor_bits in auto.CANDIDATES:
        args = MethodArgs(metric=LOSS, value_bits=bits, factor_bits=factor_bits)
        if method.least_bytes(small, BF16, args) <= budget:
            one = method.decompose(W.clone(), small, budget, BF16, args, metrics=metrics)
            losses[auto.label(method, bits)] = one.metric_squared_error / 2
    args = MethodArgs(metric=LOSS)
    budgets = [budget, dense_budget]
    done = auto.METHOD.decompose(W, small, budget, BF16, args, budgets, metrics)
    first, second = sorted(losses, key=lambda name: losses[name])[:2]
    assert done.chosen == Chosen(first, losses[first], second, losses[second])
    assert done.metric_squared_error == 2 * losses[first]
    assert done.decomposition.stored_bytes <= budget
    assert done.curve[0].squared_error <= done.metric_squared_error * (1 + 1e-3)
    assert done.curve[1].squared_error < done.curve[0].squared_error
    with pytest.raises(LestdError, match="supports only value_bits 16"):
        auto.METHOD.least_bytes(small, BF16, MethodArgs(metric=LOSS, value_bits=4))


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.8])
@pytest.mark.parametrize("form", ["full", "head", "diagonal"])
@pytest.mark.parametrize("name", ["gqa", "experts"])
def test_a_candidate_stores_half_of_the_error_foreseen_or_more(
    name: str, form: str, keep: float
) -> None:
    # So auto need not store those that are foreseen to have more than twice the least error.
    group = LAYOUTS[name]
    budget, seen = int(keep * group.elements * 2), 0
    metrics = {one: G * 1e-8 for one, G in metrics_of(group, form).items()}
    for method, bits, factor_bits in auto.CANDIDATES:
        args = MethodArgs(metric=LOSS, value_bits=bits, factor_bits=factor_bits)
        if method.foresee is None or method.least_bytes(group, BF16, args) > budget:
            continue
        read = Group(random_weights(group), group, BF16, args, metrics)
        prepared = method.prepare(replace(read, unfolding=read.unfolding.clone()))
        foreseen = method.foresee(prepared, budget, costs_of(read))
        done = method.encode(prepared, budget)
        assert done.metric_squared_error >= foreseen / 2, (method.name, bits)
        seen += 1
    assert seen >= 4


@pytest.mark.parametrize(
    ("method", "keep", "dtype"),
    [
        ("watersic", 0.2, BF16),
        ("watersic", 0.3, BF16),
        ("watersic", 0.3, FP16),
        ("gptq", 0.3, BF16),
    ],
)
@pytest.mark.parametrize("form", ["full", "head", "diagonal"])
def test_what_is_foreseen_at_the_own_budget_is_what_was_stored(
    form: str, method: str, keep: float, dtype: torch.dtype
) -> None:
    # Feedback along the outputs is part of both: auto compares them with one another.
    done = decompose(method, GQA, keep, form, dtype)
    half, own = done.curve
    assert own.squared_error == pytest.approx(done.metric_squared_error, rel=0.01)
    assert half.squared_error > own.squared_error


def test_a_curve_of_some_outputs_is_about_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = gqa(64, 32, 8, 4)
    whole = decompose("watersic", wide, 0.3, "head", BF16).curve
    monkeypatch.setattr(watersic, "_LOOKED_AT", wide.elements // 4)
    some = decompose("watersic", wide, 0.3, "head", BF16).curve
    assert [one.byte_budget for one in some] == [one.byte_budget for one in whole]
    assert some[0] != whole[0]
    for one, other in zip(some, whole, strict=True):
        assert one.squared_error == pytest.approx(other.squared_error, rel=0.15)


def test_a_curve_of_few_outputs_ends_at_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    # What a stream has at its beginning counts once for a module, not once for each share of it:
    # else zeros would seem to take more than they do, and steps would be tried without end.
    wide, looks = gqa(16, 48, 16, 16), []

    def rounded(some: list[SteppedMatrix], step: float) -> list[RoundedMatrix]:
        looks.append(step)
        return coded_matrix.rounded(some, step)

    monkeypatch.setattr(watersic, "_LOOKED_AT", 1)
    monkeypatch.setattr(watersic, "rounded", rounded)
    metrics, args = metrics_of(wide, "diagonal"), MethodArgs(metric=LOSS)
    least, budget = watersic.least_bytes(wide, BF16, args), wide.elements // 4
    method = METHODS["watersic"]
    method.decompose(random_weights(wide), wide, budget, BF16, args, [least, budget], metrics)
    assert len(looks) < 25
