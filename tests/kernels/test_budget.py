import itertools
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.groups import fused, gqa, mha, unfolding

from lestd_kernels.errors import LestdError
from lestd_kernels.formats.shared_tucker import CORE_NAME, SharedTucker
from lestd_kernels.linalg.stage1 import Ranks, hosvd
from lestd_kernels.linalg.stage2 import select_largest
from lestd_kernels.methods import METHODS, MethodArgs
from lestd_kernels.search.budget import (
    GroupShape,
    Limits,
    dense_bytes,
    largest_dense_rank,
    rank_grid,
    require_feasible,
)
from lestd_kernels.search.tucker_ranks import RotatedCore, search_dense, search_sparse
from lestd_kernels.storage.codecs import CODECS
from lestd_kernels.storage.matrix import EncodedCore

CASES = [
    (mha(40, 12, 3), False),
    (gqa(37, 9, 4, 2), False),
    (fused(33, 10, 3), False),
    (mha(40, 12, 3), True),
]


def tensor(shape):
    d, p = shape.layout.width, shape.layout.head_dim
    return unfolding(shape.layout).view(d, shape.types, -1, p)


def rotated(W, bases):
    return torch.einsum("itnj,ia,tr,jb->arnb", W, bases.U1, bases.U3, bases.U2)


def candidates(shape, step):
    grids = rank_grid(shape.layout.width, step), rank_grid(shape.layout.head_dim, step)
    return [Ranks(*r) for r in itertools.product(*grids, range(1, shape.types + 1))]


def exact_energy(core, shape, limits, ranks):
    """Energy of the largest elements of a leading block that fit: no histogram."""
    block = core[: ranks.R1, : ranks.R3, :, : ranks.R2]
    if not limits.allows_flops(shape, ranks):
        return -1.0

    def fits(nnz):
        return shape.stored_bytes(ranks, nnz) <= limits.byte_budget

    parts = [p.contiguous() for p in torch.split(block, list(shape.core_slices), dim=2)]
    if not fits([0] * len(parts)):
        return -1.0
    return sum(
        float(part[mask].double().square().sum())
        for part, mask in zip(parts, select_largest(parts, fits), strict=True)
    )


def test_rank_grid():
    assert rank_grid(20, 8) == [8, 16, 20]
    assert rank_grid(16, 8) == [8, 16]
    assert rank_grid(5, 8) == [5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("layout", "learned"), CASES)
def test_predicted_bytes_are_the_bytes_stored(layout, learned, dtype):
    shape, ranks = GroupShape(layout, learned, dtype.itemsize), Ranks(16, 8, 3 if learned else 1)
    names = [CORE_NAME] if learned else [m.name for m in layout.modules]
    for density in (0.01, 0.3, 1.0):
        cores = {}
        for i, name in enumerate(names):
            matrix = torch.rand(shape.core_shape(ranks, i))
            kept = torch.rand(matrix.shape) < density * (0.2 if i else 1)
            cores[name] = EncodedCore.encode((matrix * kept).to(dtype))
        U3 = torch.ones(4, ranks.R3, dtype=dtype) if learned else None
        stored = SharedTucker(
            layout,
            torch.ones(layout.width, ranks.R1, dtype=dtype),
            torch.ones(layout.head_dim, ranks.R2, dtype=dtype),
            cores,
            U3,
        )
        nnz = [core.nnz for core in cores.values()]
        assert shape.stored_bytes(ranks, nnz) == stored.stored_bytes
        assert sum(core.rows * core.columns for core in cores.values()) == shape.core_elements(
            ranks
        )
        for i, count in enumerate(nnz):
            best = min(fixed + each * count for fixed, each in shape.codec_lines(ranks, i))
            assert best == cores[names[i]].stored_bytes


@pytest.mark.parametrize(("layout", "learned"), CASES)
def test_flops_are_those_of_the_products(layout, learned):
    R1, R2 = 16, 8
    flops = 0
    for side in ("input", "output"):
        slices = sum(len(m.slices) for m in layout.modules if m.basis_side == side)
        # One token: (1, d) @ U1, then per slice (1, R1) @ M and (1, R2) @ U2^T, or the reverse.
        flops += layout.width * R1 + slices * (R1 * R2 + R2 * layout.head_dim)
    assert GroupShape(layout, learned, 2).flops_per_token(Ranks(R1, R2, 1)) == flops


@pytest.mark.parametrize("max_flops", [None, 0.6])
@pytest.mark.parametrize("keep", [0.8, 0.5, 0.3, 0.12])
@pytest.mark.parametrize(("layout", "learned"), CASES)
def test_sparse_search_finds_the_best_of_an_exact_scan(layout, learned, keep, max_flops):
    shape = GroupShape(layout, learned, 2)
    limits = Limits(int(keep * layout.elements * 2), max_flops, 4)
    W = tensor(shape)
    bases = hosvd(W)
    core = rotated(W, bases)
    exact = {r: exact_energy(core, shape, limits, r) for r in candidates(shape, 4)}
    [found] = (
        point.ranks
        for point in search_sparse(RotatedCore(W, bases, shape.core_slices), shape, [limits])
    )
    assert exact[found] >= max(exact.values()) * (1 - 1e-3)
    assert len({round(e, 3) for e in exact.values()}) > 5  # the choice was not empty


@pytest.mark.parametrize("max_flops", [None, 0.6])
@pytest.mark.parametrize(("layout", "learned"), CASES)
def test_one_scan_gives_every_budget_its_ranks_and_error(layout, learned, max_flops):
    shape = GroupShape(layout, learned, 2)
    dense = layout.elements * 2
    limits = [Limits(int(keep * dense), max_flops, 4) for keep in (0.1, 0.12, 0.3, 0.5, 0.8, 1.1)]
    W = tensor(shape)
    bases = hosvd(W)
    core = rotated(W, bases)
    norm = float(W.double().square().sum())
    points = search_sparse(RotatedCore(W, bases, shape.core_slices), shape, limits)
    for point, one in zip(points, limits, strict=True):
        assert [point] == search_sparse(RotatedCore(W, bases, shape.core_slices), shape, [one])
        error = norm - exact_energy(core, shape, one, point.ranks)
        # To float32's last digits of the norm, where little is left.
        assert point.squared_error == pytest.approx(error, rel=2e-3, abs=1e-6 * norm)


@pytest.mark.parametrize("keep", [0.9, 0.6, 0.4, 0.2, 0.1, 0.025])
def test_a_long_grid_is_searched_in_two_rounds(keep):
    """131 values of R1: every fourth one first, and the last, which is none of these."""
    shape, limits = GroupShape(mha(131, 4, 3), False, 2), Limits(int(keep * 131 * 48 * 2), None, 1)
    W = tensor(shape)
    bases = hosvd(W)
    core = rotated(W, bases)
    exact = {r: exact_energy(core, shape, limits, r) for r in candidates(shape, 1)}
    found, thorough = search_sparse(
        RotatedCore(W, bases, shape.core_slices), shape, [limits, limits]
    )
    for point in (found, thorough):
        assert exact[point.ranks] >= max(exact.values()) * (1 - 1e-3)
    # A curve's points are looked for among all values.
    assert thorough.squared_error <= found.squared_error


@pytest.mark.parametrize("max_flops", [None, 0.5])
@pytest.mark.parametrize("keep", [0.8, 0.3, 0.1])
@pytest.mark.parametrize(("layout", "learned"), CASES)
def test_dense_search_finds_the_best_of_an_exact_scan(layout, learned, keep, max_flops):
    shape = GroupShape(layout, learned, 2)
    limits = Limits(int(keep * layout.elements * 2), max_flops, 4)
    W = tensor(shape)
    bases = hosvd(W)
    squares = rotated(W, bases).double().square()
    R1s, R2s = range(1, layout.width + 1), rank_grid(layout.head_dim, 4)
    best = 0.0
    for ranks in itertools.starmap(Ranks, itertools.product(R1s, R2s, range(1, shape.types + 1))):
        if dense_bytes(shape, ranks) <= limits.byte_budget and limits.allows_flops(shape, ranks):
            best = max(best, float(squares[: ranks.R1, : ranks.R3, :, : ranks.R2].sum()))
    [found] = (
        point.ranks
        for point in search_dense(RotatedCore(W, bases, shape.core_slices), shape, [limits])
    )
    assert dense_bytes(shape, found) <= limits.byte_budget
    assert limits.allows_flops(shape, found)
    energy = float(squares[: found.R1, : found.R3, :, : found.R2].sum())
    assert energy == pytest.approx(best, rel=1e-6)


def test_largest_dense_rank_is_the_last_that_fits():
    shape = GroupShape(mha(40, 12, 3), False, 2)
    limits = Limits(2000, None, 4)
    R1 = largest_dense_rank(shape, limits, 8, 1)
    assert dense_bytes(shape, Ranks(R1, 8, 1)) <= 2000 < dense_bytes(shape, Ranks(R1 + 1, 8, 1))
    assert largest_dense_rank(shape, Limits(10, None, 4), 8, 1) == 0
    assert largest_dense_rank(shape, Limits(10**9, None, 4), 8, 1) == 40


def test_a_zero_tensor_gets_ranks():
    shape = GroupShape(mha(16, 4, 2), False, 2)
    W = torch.zeros(16, 1, 8, 4)
    limits = Limits(1000, None, 4)
    for search in (search_sparse, search_dense):
        [ranks] = (
            point.ranks
            for point in search(RotatedCore(W, hosvd(W), shape.core_slices), shape, [limits])
        )
        assert min(ranks) > 0
        assert shape.stored_bytes(ranks, [0] * 4) <= 1000


def test_infeasible_limits_are_refused():
    shape, smallest = GroupShape(mha(40, 12, 3), False, 2), Ranks(8, 8, 1)
    require_feasible(shape, Limits(1000, 1.0, 8), smallest, 1000)
    with pytest.raises(LestdError, match=r"999 bytes.*R1=8, R2=8.*1,000 bytes; raise keep"):
        require_feasible(shape, Limits(999, None, 8), smallest, 1000)
    with pytest.raises(LestdError, match=r"max_flops is 0\.1.*raise max_flops"):
        require_feasible(shape, Limits(1000, 0.1, 8), smallest, 1000)


@cache
def core_bytes(rows, columns, value_bytes):
    """Bytes of a core by its number of non-zeros, each in its cheapest codec."""
    return np.array(
        [
            min(codec.stored_bytes(rows, columns, nnz, value_bytes) for codec in CODECS.values())
            for nnz in range(rows * columns + 1)
        ]
    )


@settings(deadline=None, max_examples=60)
@given(st.floats(0.01, 1.2), st.sampled_from([torch.bfloat16, torch.float32]), st.booleans())
def test_the_bound_of_the_non_zeros_is_that_of_an_exhaustive_search(keep, dtype, wide):
    layout = fused(9, 3, 16) if wide else fused(12, 5, 2)  # wide: csr is cheapest somewhere
    shape, args = GroupShape(layout, False, dtype.itemsize), MethodArgs(rank_step=4)
    limits = Limits(int(keep * layout.elements * dtype.itemsize), None, 4)
    most = 0
    for ranks in candidates(shape, 4):
        first, second = (core_bytes(*shape.core_shape(ranks, c), dtype.itemsize) for c in (0, 1))
        stored = shape.factor_bytes(ranks) + first[:, None] + second
        nnz = np.add.outer(np.arange(len(first)), np.arange(len(second)))
        most = max(most, int(np.where(stored <= limits.byte_budget, nnz, 0).max()))
    try:
        bounds = METHODS["lestd"].bounds(layout, limits.byte_budget, dtype, args)
    except LestdError:
        assert most == 0
    else:
        assert bounds.max_nnz == most > 0


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([gqa(37, 9, 4, 2), mha(40, 12, 3), fused(33, 10, 3)]),
    st.floats(0.08, 0.9),
    st.lists(st.floats(-4, 0), min_size=4, max_size=4),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.sampled_from(["lestd", "tucker"]),
)
def test_no_decomposition_exceeds_its_bounds(layout, keep, exponents, dtype, method):
    """Projections of unequal magnitude have unequally dense cores, in different codecs."""
    scales = dict(zip("qkvo", exponents, strict=True))
    factors = torch.tensor([10 ** scales[projection] for projection, _ in layout.slices])
    W = unfolding(layout).view(layout.width, -1, layout.head_dim) * factors[:, None]
    budget, args = int(keep * layout.elements * dtype.itemsize), MethodArgs(rank_step=4)
    bounds = METHODS[method].bounds(layout, budget, dtype, args)
    stored = METHODS[method].decompose(W.flatten(1), layout, budget, dtype, args).decomposition
    assert stored.nnz <= bounds.max_nnz
    assert stored.ranks["R1"] <= bounds.max_R1
    assert stored.ranks["R2"] <= bounds.max_R2
    assert stored.stored_bytes <= budget
