"""Weights of any magnitude: the same decomposition, scaled, and figures in the weights' units."""

import pytest
import torch
from support.groups import gqa, mha, unfolding

from lestd_kernels.formats.shared_tucker import CORE_NAME
from lestd_kernels.methods import METHODS, MethodArgs
from lestd_kernels.methods.common.shared_basis import scale_to_one

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def decompose(method, layout, W, dtype, **args):
    budget = int(0.4 * layout.elements * dtype.itemsize)
    arguments = MethodArgs(rank_step=4, **args)
    return METHODS[method].decompose(W.clone(), layout, budget, dtype, arguments)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("lestd", {}),
        ("lestd", {"stage2": "prune-refit"}),
        ("lestd", {"type_mode": "learned"}),
        ("tucker", {}),
        ("tucker", {"type_mode": "learned"}),
    ],
)
@pytest.mark.parametrize("exponent", [70, 110, -70, -100])
def test_scaled_weights_have_the_scaled_decomposition(method, args, exponent, dtype):
    layout, scale = mha(40, 12, 3), 2.0**exponent
    W = unfolding(layout)
    plain, scaled = (decompose(method, layout, X, dtype, **args) for X in (W, W * scale))

    assert scaled.decomposition.ranks == plain.decomposition.ranks
    ours, expected = (x.decomposition.named_tensors("") for x in (scaled, plain))
    names = [CORE_NAME] if "type_mode" in args else [module.name for module in layout.modules]
    cores = {f"{name}.weight" for name in names}
    assert cores <= ours.keys() == expected.keys()
    for name, tensor in expected.items():
        if name in cores:
            difference = ours[name].double() / scale - tensor.double()
            # Below 2^-126 a number has fewer bits; elsewhere the scaling is exact.
            assert float(difference.abs().max()) <= (2.0**-133 / scale if exponent < 0 else 0)
        else:
            assert torch.equal(ours[name], tensor)

    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-9)
    assert scaled.hooi_iterations == plain.hooi_iterations
    for figure in (
        "squared_norm",
        "squared_error",
        "squared_energy_stage1",
        "squared_energy_stage2",
    ):
        expected = getattr(plain, figure) * scale**2
        assert getattr(scaled, figure) == pytest.approx(expected, rel=1e-9, abs=0)
    assert scaled.threshold == plain.threshold * scale > 0
    for a, b in zip(scaled.slices, plain.slices, strict=True):
        assert (a.nnz, a.core_bytes) == (b.nnz, b.core_bytes)
        assert a.relative_error == pytest.approx(b.relative_error, rel=1e-9)
        assert a.squared_norm == pytest.approx(b.squared_norm * scale**2, rel=1e-9, abs=0)
        assert a.squared_energy == pytest.approx(b.squared_energy * scale**2, rel=1e-9, abs=0)


@pytest.mark.parametrize("exponent", [0, 100, -100])
def test_figures_in_the_units_of_the_weights_are_those_of_the_reconstruction(exponent):
    layout = gqa(40, 16, 6, 2)
    W = unfolding(layout) * 2.0**exponent
    done = decompose("lestd", layout, W, BF16)
    residual = W.double() - done.decomposition.reconstruct().double()
    error, norm = (float(x.double().square().sum()) for x in (residual, W))
    assert done.squared_error == pytest.approx(error, rel=1e-5, abs=0)
    assert done.squared_norm == pytest.approx(norm, rel=1e-9, abs=0)
    assert done.relative_error == pytest.approx((error / norm) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("factor", [1e-40, 1e-44])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("method", ["lestd", "tucker"])
def test_weights_below_the_normal_numbers_never_fail(method, dtype, factor):
    layout = mha(40, 12, 3)
    W = unfolding(layout) * factor
    done = decompose(method, layout, W, dtype)
    if dtype == FP16:
        assert done.decomposition.nnz == 0
        assert done.relative_error == 1
    elif dtype == FP32 and factor == 1e-40:
        ordinary = decompose(method, layout, unfolding(layout), dtype).relative_error
        assert done.relative_error == pytest.approx(ordinary, abs=0.01)
    else:
        assert 0 < done.relative_error <= 1


def test_a_projection_far_smaller_than_the_others_is_refitted():
    """Squares of its core underflow in float32 where the other cores are all kept."""
    layout = mha(40, 12, 3)
    factors, cores = (40 * 40 + 12 * 12) * 2, int(0.9 * layout.elements) * 2
    runs = []
    for exponent in (-30, -75):
        W = unfolding(layout)
        W[:, 36:72] *= 2.0**exponent
        runs.append(
            METHODS["lestd"].decompose(W, layout, factors + cores, BF16, MethodArgs(rank_step=4))
        )
    moderate, tiny = runs
    counts = [core.nnz for core in tiny.decomposition.cores.values()]
    assert counts == [1440, counts[1], 1440, 1440]
    assert 0 < counts[1] < 1440
    for a, b in zip(tiny.slices, moderate.slices, strict=True):
        assert a.relative_error == pytest.approx(b.relative_error, rel=1e-4)


@pytest.mark.parametrize("largest", [1.0, 1.99, 2.0, 3e38, 1.2e-38, 0.0])
def test_the_scale_is_a_power_of_two(largest):
    W = torch.tensor([[0.3, -1.0], [0.0, 0.7]]) * largest
    scaled = W.clone()
    scale = scale_to_one(scaled)
    assert torch.equal(scaled.double() * scale, W.double())
    if 1e-37 < largest < 1e38:
        assert 1 <= float(scaled.abs().max()) < 2
    else:
        assert float(scaled.abs().max()) < 4
    assert torch.tensor(scale).log2() == round(float(torch.tensor(scale).log2()))
