"""Explained energies, spectra, entries and operator norms against numpy, and on known weights."""

import math

import numpy as np
import pytest
import torch
from support.groups import fused, gqa, mha, orthonormal
from support.weights import feed_forward, normal

from lestd_kernels.audit.diagnostics import (
    OUTLIER_SIGMAS,
    effective_rank,
    entries,
    evenly,
    explained_energy,
    left_subspace,
    rank_at,
    rank_choices,
    sampled_experts,
    unit_gram,
    units,
)
from lestd_kernels.linalg.operator_norm import operator_norm
from lestd_kernels.tensorize import GroupLayout

# Which columns belong to which head, by a weight that says so.


@pytest.mark.parametrize("layout", [mha(12, 4, 3), gqa(12, 4, 6, 2), fused(12, 4, 3)])
def test_a_unit_has_the_slices_of_its_head(layout: GroupLayout) -> None:
    shared = min(sum(t == "k" for t, _ in layout.slices), 6)
    counts = {t: sum(name == t for name, _ in layout.slices) for t in "qkvo"}
    marked = torch.cat(
        [torch.full((12, 4), head * shared // counts[t]) for t, head in layout.slices], dim=1
    )
    found = units(layout)
    assert [unit.name for unit in found] == [f"head {i}" for i in range(shared)]
    for i, unit in enumerate(found):
        assert (unit.of(marked) == i).all()
    assert sum(unit.of(marked).shape[1] for unit in found) == marked.shape[1]


def test_experts_and_blocks_of_a_feed_forward_group() -> None:
    layout = feed_forward(6, 20, 5)
    marked = torch.arange(300).expand(6, 300)
    found = units(layout)
    assert [unit.name for unit in found] == [f"expert {e}" for e in range(5)]
    assert found[3].of(marked)[0].tolist() == list(range(180, 240))
    found = units(feed_forward(6, 20, 1))
    assert [unit.name for unit in found] == [f"block {b}" for b in range(8)]
    columns = torch.cat([unit.of(marked[:, :60])[0] for unit in found])
    assert sorted(columns.tolist()) == list(range(60))
    # The same hidden units of gate, up and down.
    hidden = found[2].of(marked[:, :60])[0].reshape(3, -1) % 20
    assert (hidden == hidden[0]).all()


def test_of_many_experts_some_are_sampled() -> None:
    layout = feed_forward(4, 6, 100)
    sampled = sampled_experts(layout)
    names = [unit.name for unit in units(sampled)]
    assert len(names) == 32
    assert (names[0], names[1], names[-1]) == ("expert 0", "expert 3", "expert 99")
    assert {module.name for module in sampled.modules} == {
        f"expert_{name.split()[1]}.{part}" for name in names for part in ("gate", "up", "down")
    }
    for few in (feed_forward(4, 6, 32), mha(64, 1, 64), gqa(12, 4, 6, 2)):
        assert sampled_experts(few) == few


def test_units_are_chosen_evenly() -> None:
    assert evenly(5, 8) == [0, 1, 2, 3, 4]
    assert evenly(9, 5) == [0, 2, 4, 6, 8]
    assert evenly(80, 4) == [0, 26, 53, 79]
    assert evenly(7, 1) == [0]


@pytest.mark.parametrize(("m", "w"), [(40, 16), (16, 40), (17, 17), (9, 1), (1, 9)])
def test_the_left_subspace_is_that_of_numpy(m: int, w: int) -> None:
    matrix = normal(m, w)
    squares, U = left_subspace(matrix)
    left, singular, _ = np.linalg.svd(matrix.numpy(), full_matrices=False)
    assert squares.numpy() == pytest.approx(singular**2, rel=1e-4, abs=1e-5)
    assert (U.T @ U).numpy() == pytest.approx(np.eye(min(m, w)), abs=1e-5)
    assert (U @ U.T).numpy() == pytest.approx(left @ left.T, abs=1e-4)


@pytest.mark.parametrize("tall", [True, False])
def test_directions_that_are_not_there_are_left_out(tall: bool) -> None:
    matrix = normal(30, 4) @ normal(4, 12 if tall else 60, seed=1)
    squares, U = left_subspace(matrix)
    assert len(squares) == U.shape[1] == 4
    assert (U @ (U.T @ matrix)).numpy() == pytest.approx(matrix.numpy(), abs=1e-4)
    assert left_subspace(torch.zeros(5, 3))[1].shape == (5, 0)


# Explained energy.


def test_identical_orthogonal_and_random_subspaces() -> None:
    d, R = 64, 8
    basis = orthonormal(d, 3 * R)
    alike = [basis[:, :R] @ normal(R, 20, seed=i) for i in range(3)]
    [found] = explained_energy(alike, [R])
    assert found.energy.numpy() == pytest.approx(np.ones((3, 3)), abs=1e-5)
    assert found.pairs()["margin"] == pytest.approx(1, abs=1e-5)

    apart = [basis[:, i * R : (i + 1) * R] @ normal(R, 20, seed=i) for i in range(3)]
    [found] = explained_energy(apart, [R])
    assert found.energy.numpy() == pytest.approx(np.eye(3), abs=1e-5)
    assert found.pairs()["mean"] == pytest.approx(0, abs=1e-6)
    assert found.pairs()["margin"] == pytest.approx(-(R / d) / (1 - R / d), abs=1e-5)

    many = [normal(d, 32, seed=10 + i) for i in range(12)]
    [found] = explained_energy(many, [R])
    assert found.pairs()["mean"] == pytest.approx(R / d, rel=0.03)
    assert found.pairs()["baseline"] == R / d
    assert abs(found.pairs()["margin"]) < 0.03


def test_explained_energy_is_that_of_numpy() -> None:
    matrices = [normal(24, 10, seed=i) * torch.arange(1, 25)[:, None] ** -0.5 for i in range(3)]
    matrices.append(normal(24, 40, seed=9))
    shares, fixed = explained_energy(matrices, [0.9, 5])
    for found in (shares, fixed):
        for i, matrix in enumerate(matrices):
            left, singular, _ = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
            sums = np.cumsum(singular**2) / np.sum(singular**2)
            rank = 5 if found is fixed else int(np.argmax(sums >= 0.9)) + 1
            assert found.ranks[i] == rank
            assert found.baseline[i] == rank / 24
            for j, other in enumerate(matrices):
                own = np.linalg.svd(other.double().numpy(), compute_uv=False) ** 2
                norm = np.linalg.norm(other.double()) ** 2
                explained = np.linalg.norm(left[:, :rank].T @ other.double().numpy()) ** 2
                assert float(found.energy[i, j]) == pytest.approx(explained / norm, rel=1e-5)
                best = own[:rank].sum() / norm
                assert float(found.optimum[i, j]) == pytest.approx(best, rel=1e-5)
    off = ~np.eye(4, dtype=bool)
    energy, optimum = fixed.energy.numpy()[off], fixed.optimum.numpy()[off]
    pairs = fixed.pairs()
    assert (pairs["mean"], pairs["least"]) == pytest.approx((energy.mean(), energy.min()))
    margin = (energy.mean() - 5 / 24) / (optimum.mean() - 5 / 24)
    assert pairs["margin"] == pytest.approx(margin)


def test_a_unit_of_zeros_and_a_single_unit() -> None:
    [found] = explained_energy([torch.zeros(6, 4), normal(6, 4), normal(6, 4, seed=1)], [2])
    assert found.ranks == (0, 2, 2)
    assert found.energy[:, 0].isnan().all()
    assert found.energy[0, 1] == 0
    assert not math.isnan(found.pairs()["mean"])
    [found] = explained_energy([normal(6, 4)], [2])
    assert math.isnan(found.pairs()["margin"])


def test_ranks_to_compare_at() -> None:
    assert rank_choices(256, 32) == (0.9, 16, 32)
    assert rank_choices(192, 192) == (0.9, 24, 48)
    assert rank_choices(4, 2) == (0.9, 1, 2)


# Spectra.


def test_effective_rank_is_that_of_roy_and_vetterli() -> None:
    values = np.array([3.0, 2.0, 0.5, 0.0])
    shares = values[:3] / values.sum()
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert effective_rank(torch.tensor(values**2)) == pytest.approx(expected)
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([4.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0


def test_rank_at_a_share_of_the_energy() -> None:
    squares = torch.tensor([5.0, 3.0, 1.0, 1.0])
    found = [rank_at(squares, share) for share in (0.1, 0.5, 0.51, 0.8, 0.9, 0.99, 1.0)]
    assert found == [1, 1, 2, 2, 3, 4, 4]
    assert rank_at(torch.zeros(3), 0.9) == 0


@pytest.mark.parametrize("layout", [mha(12, 4, 3), gqa(12, 4, 6, 2), feed_forward(7, 5, 4)])
def test_the_gram_matrix_of_the_units(layout: GroupLayout) -> None:
    unfolding = normal(layout.width, len(layout.slices) * layout.head_dim)
    members = units(layout)
    flat = np.stack([unit.of(unfolding).numpy().ravel() for unit in members]).astype(float)
    assert unit_gram(unfolding, members).numpy() == pytest.approx(flat @ flat.T, rel=1e-5)


# Entries.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kurtosis_and_outliers(dtype: torch.dtype) -> None:
    weight = (normal(200, 300) + 0.3).to(dtype)
    weight[17, 250], weight[3, 4], weight[199, 299] = -40.0, 25.0, 30.0
    found = entries(weight, "w")
    values = weight.double().numpy()
    centered = values - values.mean()
    kurtosis = (centered**4).mean() / (centered**2).mean() ** 2
    assert found.kurtosis == pytest.approx(kurtosis)
    assert found.outliers == int((np.abs(centered) > OUTLIER_SIGMAS * values.std()).sum()) == 3
    named = [(one.tensor, one.row, one.column, one.value) for one in found.largest]
    assert named == [("w", 17, 250, -40.0), ("w", 199, 299, 30.0), ("w", 3, 4, 25.0)]
    sigmas = abs(centered[17, 250]) / values.std()
    assert found.largest[0].sigmas == pytest.approx(sigmas)


def test_kurtosis_of_known_distributions() -> None:
    assert entries(normal(1200, 1500), "w").kurtosis == pytest.approx(3, rel=0.01)
    uniform = torch.rand(1000, 1000, generator=torch.Generator().manual_seed(0))
    assert entries(uniform, "w").kurtosis == pytest.approx(1.8, rel=0.01)
    assert entries(normal(1200, 1500), "w").outliers == 0
    assert math.isnan(entries(torch.full((4, 4), 2.0), "w").kurtosis)


def test_only_the_first_few_outliers_are_named() -> None:
    weight = torch.zeros(1100, 1000)  # More than a chunk.
    weight[::100] = torch.arange(1, 12)[:, None].float() * (torch.arange(1000) == 7)
    found = entries(weight, "w")
    assert [(one.row, one.column) for one in found.largest] == [
        (100 * i, 7) for i in range(10, 2, -1)
    ]


# Operator norms.


@pytest.mark.parametrize(
    ("m", "n"), [(30, 20), (20, 30), (1, 5), (5, 1), (48, 48), (200, 170), (130, 500)]
)
def test_the_operator_norm_is_that_of_numpy(m: int, n: int) -> None:
    matrix = normal(m, n, seed=m)
    expected = np.linalg.norm(matrix.numpy(), 2)
    assert operator_norm(matrix) == pytest.approx(expected, rel=1e-3)
    assert operator_norm(matrix) <= expected * (1 + 1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_operator_norm_of_low_rank_and_of_any_scale(scale: float) -> None:
    matrix = orthonormal(90, 2) @ torch.diag(torch.tensor([5.0, 3.0])) @ orthonormal(60, 2).T
    assert operator_norm(matrix * scale) == pytest.approx(5 * scale, rel=1e-5)
    assert operator_norm(torch.zeros(4, 3)) == 0
    assert operator_norm(torch.eye(100)) == pytest.approx(1)
