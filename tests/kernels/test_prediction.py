"""Predicted errors and bytes against numpy, brute force, and the methods themselves."""

import itertools
import math

import numpy as np
import pytest
import torch
from support.groups import fused, gqa, mha, unfolding
from support.weights import feed_forward, normal

from lestd_kernels.audit.prediction import Prediction, predict
from lestd_kernels.audit.rotation import rotate
from lestd_kernels.audit.rounding import rounded
from lestd_kernels.methods import METHODS, MethodArgs
from lestd_kernels.storage.codecs import CODECS
from lestd_kernels.tensorize import GroupLayout

KEEPS = (0.8, 0.6, 0.4, 0.2)
LAYOUTS = {
    "mha": mha(48, 16, 3),
    "gqa": gqa(64, 16, 4, 2),
    "fused": fused(48, 8, 5),
    "ffn": feed_forward(40, 72, 1),
    "experts": feed_forward(48, 24, 3),
}
SCALE = 37.0


@pytest.fixture(params=LAYOUTS, scope="module")
def layout(request: pytest.FixtureRequest) -> GroupLayout:
    return LAYOUTS[request.param]


@pytest.fixture(scope="module")
def predicted(layout: GroupLayout) -> tuple[list[Prediction], list[float]]:
    rotated = rotate(unfolding(layout) * SCALE, layout, torch.bfloat16)
    return predict(rotated, KEEPS)


def of(found: list[Prediction], method: str) -> dict[float, Prediction]:
    return {one.keep: one for one in found if one.method == method}


def modules(layout: GroupLayout) -> list[np.ndarray]:
    W = (unfolding(layout) * SCALE).double().numpy()
    return [W[:, layout.columns(module)] for module in layout.modules]


def dense_bytes(layout: GroupLayout) -> int:
    return 2 * layout.elements


def test_nothing_is_above_its_keep_and_every_method_is_there(predicted, layout) -> None:
    found, optimum = predicted
    assert len(optimum) == len(KEEPS)
    assert all(0 < one.stored_keep <= one.keep for one in found)
    methods = [*dict.fromkeys(one.method.split()[0] for one in found)]
    assert methods == ["svd", "tucker", "lestd", "magnitude", "rtn"]
    for method in ("svd", "lestd", "magnitude"):
        for name in (method, f"{method} 8-bit", f"{method} 4-bit"):
            assert {*of(found, name)} >= {0.8, 0.6, 0.4}
        errors = [one.relative_error for one in of(found, method).values()]
        assert errors == sorted(errors)


def test_svd_is_the_best_that_its_ranks_allow(predicted, layout) -> None:
    """By numpy's SVD: the pairs that are worth most, relative to their module, one by one."""
    spectra = [np.linalg.svd(W, compute_uv=False) ** 2 for W in modules(layout)]
    norms = [float(squares.sum()) for squares in spectra]
    sides = [sum(W.shape) for W in modules(layout)]
    for keep, one in of(predicted[0], "svd").items():
        ranks, spent = [0] * len(spectra), 0
        order = sorted(
            (-squares[r] / norm / side, m, r)
            for m, (squares, norm, side) in enumerate(zip(spectra, norms, sides, strict=True))
            for r in range(len(squares))
        )
        for _, m, _ in order:
            if spent + 2 * sides[m] > int(keep * dense_bytes(layout)):
                break
            spent += 2 * sides[m]
            ranks[m] += 1
        error = sum(s[r:].sum() for s, r in zip(spectra, ranks, strict=True)) / sum(norms)
        assert one.relative_error == pytest.approx(math.sqrt(error), rel=1e-3)
        assert one.stored_keep == pytest.approx(spent / dense_bytes(layout))
        assert one.ranks == (min(ranks), max(ranks))
        left = max(
            math.sqrt(s[r] / s[0]) for s, r in zip(spectra, ranks, strict=True) if r < len(s)
        )
        assert one.operator_error == pytest.approx(left, rel=2e-3)


def test_the_operator_optimum_is_that_of_brute_force() -> None:
    layout = mha(10, 3, 2)
    W = unfolding(layout)
    _, [found] = predict(rotate(W.clone(), layout, torch.bfloat16), [0.6])
    spectra = [
        np.linalg.svd(W[:, layout.columns(m)].double().numpy(), compute_uv=False)
        for m in layout.modules
    ]
    best = math.inf
    for ranks in itertools.product(range(7), repeat=4):
        if sum(ranks) * (10 + 6) * 2 <= int(0.6 * dense_bytes(layout)):
            left = [s[r] / s[0] if r < 6 else 0.0 for s, r in zip(spectra, ranks, strict=True)]
            best = min(best, max(left))
    assert found == pytest.approx(best, rel=1e-3)


def shared_core(layout: GroupLayout) -> tuple[np.ndarray, bool]:
    """The group in the coordinates of its HOSVD, by numpy: ``(d, S, p)``."""
    W = np.concatenate(modules(layout), axis=1)
    cube = W.reshape(len(W), -1, layout.head_dim)
    U1 = np.linalg.svd(W)[0]
    core = np.einsum("dr,dsp->rsp", U1, cube)
    whole = layout.slices[0][0] == "q"
    if whole:
        flat = cube.transpose(2, 0, 1).reshape(layout.head_dim, -1)
        core = core @ np.linalg.svd(flat, full_matrices=False)[0]
    return core, whole


@pytest.mark.parametrize("method", ["tucker", "lestd"])
def test_shared_bases_leave_what_their_blocks_leave(predicted, layout, method) -> None:
    core, whole = shared_core(layout)
    found = of(predicted[0], method)
    assert {*found} >= {0.8, 0.6, 0.4}
    for keep, one in found.items():
        R1, R2 = one.ranks
        p2 = R2 if whole else layout.head_dim
        rest = core.copy()
        block = rest[:R1, :, :p2]
        budget = int(keep * dense_bytes(layout))
        width = layout.width * R1 + (layout.head_dim if whole else R2) * R2
        if method == "tucker":
            assert 2 * (width + block.size) <= budget
            block[:] = 0
        else:
            # As many of the largest as are stored in the cheapest codecs.
            cores = [len(m.slices) * p2 for m in layout.modules]
            cores = cores if whole else [sum(cores)]
            ends = np.cumsum([0, *cores])
            flat = block.reshape(R1, -1)
            order = np.argsort(-np.abs(flat), axis=None, kind="stable")
            owner = np.searchsorted(ends, order % flat.shape[1], side="right") - 1

            def stored(k: int, owner: np.ndarray = owner, cores=cores, R1=R1, width=width) -> int:
                counts = np.bincount(owner[:k], minlength=len(cores))
                return 2 * width + sum(
                    min(c.stored_bytes(R1, n, int(k), 2) for c in CODECS.values())
                    for n, k in zip(cores, counts, strict=True)
                )

            low, high = 0, flat.size
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if stored(middle) <= budget else (low, middle - 1)
            assert one.stored_keep == pytest.approx(stored(low) / dense_bytes(layout), rel=1e-4)
            flat[np.unravel_index(order[:low], flat.shape)] = 0
            block[:] = flat.reshape(block.shape)
        expected = math.sqrt((rest**2).sum() / (core**2).sum())
        assert one.relative_error == pytest.approx(expected, rel=2e-3, abs=1e-4)
        ratios, column = [], 0
        for W, module in zip(modules(layout), layout.modules, strict=True):
            count = len(module.slices)
            part = rest[:, column : column + count].reshape(len(rest), -1)
            ratios.append(np.linalg.norm(part, 2) / np.linalg.norm(W, 2))
            column += count
        assert one.operator_error == pytest.approx(max(ratios), rel=5e-3, abs=1e-4)


SLOW_CASES = [
    *itertools.product(("tucker",), ("gqa", "fused")),
    *itertools.product(("lestd",), ("mha", "fused")),
    *itertools.product(("svd",), ("mha", "gqa", "ffn", "experts")),
]


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *(("tucker", "mha"), ("lestd", "gqa"), ("svd", "fused")),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES),
    ],
)
def test_the_method_itself_reaches_what_was_predicted(method: str, name: str) -> None:
    layout = LAYOUTS[name]
    W = unfolding(layout) * SCALE
    found, _ = predict(rotate(W.clone(), layout, torch.bfloat16), KEEPS)
    for keep, one in of(found, method).items():
        budget = int(keep * dense_bytes(layout))
        args = MethodArgs()
        done = METHODS[method].decompose(W.clone(), layout, budget, torch.bfloat16, args)
        assert done.relative_error == pytest.approx(one.relative_error, rel=0.03)


@pytest.mark.slow
def test_sampled_experts_stand_for_all() -> None:
    """Half of the experts, each with its share of the basis, as all of them."""
    layout, some = feed_forward(48, 24, 8), feed_forward(48, 24, 4)
    W = unfolding(layout)
    whole, _ = predict(rotate(W.clone(), layout, torch.bfloat16), KEEPS)
    half, _ = predict(rotate(W[:, :288].clone(), some, torch.bfloat16, 0.5), KEEPS)
    paid, _ = predict(rotate(W[:, :288].clone(), some, torch.bfloat16), KEEPS)
    for method in ("tucker", "lestd"):
        for keep, one in of(whole, method).items():
            sampled, alone = (of(found, method)[keep].relative_error for found in (half, paid))
            assert sampled == pytest.approx(one.relative_error, rel=0.06)
            assert alone > one.relative_error


def test_magnitude_keeps_the_largest(predicted, layout) -> None:
    for keep, one in of(predicted[0], "magnitude").items():
        error, ratios = 0.0, []
        for W, module in zip(modules(layout), layout.modules, strict=True):
            budget = int(keep * dense_bytes(layout)) * len(module.slices) / len(layout.slices)
            # A bit for each weight, and the values; at these densities nothing is cheaper.
            count = int(budget - -(-W.size // 8)) // 2
            squares = np.sort(W.ravel() ** 2)[::-1]
            error += squares[count:].sum()
            small = np.where(squares[count - 1] > W**2, W, 0)
            ratios.append(np.linalg.norm(small, 2) / np.linalg.norm(W, 2))
        norm = sum((W**2).sum() for W in modules(layout))
        assert one.relative_error == pytest.approx(math.sqrt(error / norm), rel=2e-3)
        assert one.operator_error == pytest.approx(max(ratios), rel=1e-2)


@pytest.mark.parametrize(("keep", "bits"), [(0.8, 8), (0.4, 4), (0.25, 3), (0.2, 2), (0.1, None)])
def test_rtn_is_as_a_plain_loop_rounds(keep: float, bits: int | None) -> None:
    layout = mha(32, 8, 4)
    W = unfolding(layout)
    found, _ = predict(rotate(W.clone(), layout, torch.bfloat16), [keep])
    found = [one for one in found if one.method.startswith("rtn")]
    if bits is None:
        assert not found
        return
    [one] = found
    assert one.method == f"rtn {bits}-bit"
    error = 0.0
    for module in layout.modules:
        weight = W[:, layout.columns(module)]
        weight = weight if module.basis_side == "input" else weight.T
        for group in weight.reshape(-1).split(64):
            # Levels on both sides of 0, and the largest value is the outermost.
            largest = group[group.abs().argmax()]
            grid = (torch.arange(2**bits) - 2 ** (bits - 1)) * -largest / 2 ** (bits - 1)
            nearest = grid[(group[:, None] - grid).abs().argmin(dim=1)].bfloat16().float()
            error += float((group - nearest).double().square().sum())
    expected = math.sqrt(error) / float(W.double().norm())
    # Scales are rounded to 16 bits, which this loop does not do.
    assert one.relative_error == pytest.approx(expected, rel=0.01)
    assert one.stored_keep == pytest.approx(bits / 16 + 1 / 64)


@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_cost_what_rounding_costs(predicted, layout, bits: int) -> None:
    found = predicted[0]
    whole = [W.size for W in modules(layout)]
    values = normal(1 << 16)
    noise = float((values - rounded(values, bits, True)).norm() / values.norm())
    dense = of(found, f"magnitude {bits}-bit")[0.8]
    # All weights are kept, in no more than their bits and scales.
    assert dense.stored_keep == pytest.approx(bits / 16 + 1 / 64, rel=0.02)
    assert dense.relative_error == pytest.approx(noise, rel=0.35)
    assert of(found, f"lestd {bits}-bit")[0.8].relative_error < 3 * noise
    assert sum(whole) == layout.elements


def test_keeps_that_are_too_small_have_no_prediction() -> None:
    layout = mha(16, 8, 2)
    found, optimum = predict(rotate(unfolding(layout), layout, torch.bfloat16), [0.005])
    assert found == []
    assert optimum == [1.0]


def test_weights_of_zero_and_of_any_scale() -> None:
    layout = gqa(32, 8, 4, 2)
    W = unfolding(layout)
    plain, _ = predict(rotate(W.clone(), layout, torch.float32), KEEPS)
    tiny, _ = predict(rotate(W * 2.0**-40, layout, torch.float32), KEEPS)
    assert plain == tiny
    nothing, optimum = predict(rotate(torch.zeros_like(W), layout, torch.float32), KEEPS)
    assert all(one.relative_error == 0 for one in nothing)
    assert optimum == [0.0] * 4
