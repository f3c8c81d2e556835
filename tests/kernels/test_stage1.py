import numpy as np
import pytest
import tensorly as tl
import torch
from support.groups import mha, orthonormal, unfolding
from tensorly.decomposition import partial_tucker

from lestd_kernels.linalg.stage1 import Ranks, hooi, hosvd, leading_eigenvectors, squared_sum

TOL, MAX_ITER = 1e-6, 25


def tensor(d, T, n, p, seed=0):
    """(d, T, n, p) with decaying spectra along every compressed mode."""
    W = unfolding(mha(d, p, n), seed).view(d, 4, n, p)
    mix = orthonormal(4, 4, seed + 1) * torch.tensor([1.0, 0.7, 0.4, 0.2])
    W = torch.einsum("atnb,tr->arnb", W, mix)
    return W[:, :T].contiguous()


def orthonormality_error(U):
    return float((U.T.double() @ U.double() - torch.eye(U.shape[1])).abs().max())


def core_of(W, U):
    return torch.einsum("itnj,ia,tr,jb->arnb", W, U.U1, U.U3, U.U2)


def reconstruct(W, U):
    return torch.einsum("arnb,ia,tr,jb->itnj", core_of(W, U), U.U1, U.U3, U.U2)


def test_eigenvectors_are_ordered_and_signed():
    A = torch.randn(9, 40)
    values, vectors = leading_eigenvectors(A @ A.T)
    expected = np.linalg.svd(A.numpy())
    np.testing.assert_allclose(values.sqrt().numpy(), expected.S, rtol=1e-4)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    assert bool((largest > 0).all())
    np.testing.assert_allclose(vectors.abs().numpy(), np.abs(expected.U), atol=1e-4)


def test_large_eigenproblems_are_solved_in_float32_and_well_enough():
    """Their leading subspaces hold what the exact ones hold, and they are orthonormal."""
    W = tensor(1100, 1, 9, 8)
    flat = W.flatten(1)
    bases, exact = hosvd(W), torch.linalg.eigh(flat.double() @ flat.T.double())[0].flip(0)
    assert orthonormality_error(bases.U1) < 1e-4
    captured = (bases.U1.T.double() @ flat.double()).square().sum(1).cumsum(0)
    torch.testing.assert_close(captured, exact.clamp(min=0).cumsum(0), rtol=1e-5, atol=0)


def test_the_first_of_equal_entries_is_made_positive():
    # Eigenvectors of [[1, -1], [-1, 1]]: (1, -1) and (1, 1), both over sqrt 2.
    _, vectors = leading_eigenvectors(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    torch.testing.assert_close(vectors, torch.tensor([[1.0, 1.0], [-1.0, 1.0]]) / 2**0.5)


@pytest.mark.parametrize("shape", [(13, 1, 5, 7), (10, 4, 3, 6)])
def test_hosvd_matches_svd_of_the_unfoldings(shape):
    W = tensor(*shape)
    bases = hosvd(W)
    for U, mode in ((bases.U1, 0), (bases.U3, 1), (bases.U2, 3)):
        assert orthonormality_error(U) < 1e-5
        flat = tl.unfold(W.numpy(), mode)
        left, singular, _ = np.linalg.svd(flat.astype(np.float64), full_matrices=False)
        energy = np.linalg.norm(U.numpy().T.astype(np.float64) @ flat, axis=1)
        np.testing.assert_allclose(energy, singular, rtol=1e-4)
        alignment = np.abs((left * U.numpy()).sum(axis=0))
        np.testing.assert_allclose(alignment, 1, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "ranks"),
    [
        ((13, 1, 12, 7), Ranks(5, 3, 1)),
        ((31, 1, 10, 9), Ranks(8, 8, 1)),
        ((17, 1, 1, 19), Ranks(3, 11, 1)),
        ((24, 1, 20, 8), Ranks(24, 5, 1)),
        ((24, 1, 20, 8), Ranks(9, 8, 1)),
        ((21, 4, 5, 7), Ranks(6, 3, 2)),
        ((15, 4, 3, 5), Ranks(7, 5, 3)),
        ((16, 4, 2, 6), Ranks(16, 6, 1)),
        ((10, 4, 3, 6), Ranks(1, 1, 1)),
    ],
)
def test_hooi_reaches_tensorlys_error(shape, ranks):
    W = tensor(*shape, seed=sum(shape))
    stage1 = hooi(W, hosvd(W), ranks, TOL, MAX_ITER)
    W64 = W.double().numpy()
    (core, factors), _ = partial_tucker(
        W64, rank=[ranks.R1, ranks.R3, ranks.R2], modes=[0, 1, 3], n_iter_max=200, tol=1e-10
    )
    oracle = np.linalg.norm(W64 - tl.tenalg.multi_mode_dot(core, factors, modes=[0, 1, 3]))
    ours = np.linalg.norm(W64 - reconstruct(W, stage1.factors).double().numpy())
    assert ours <= oracle * (1 + 1e-4)


@pytest.mark.parametrize("ranks", [Ranks(5, 3, 1), Ranks(13, 3, 1), Ranks(13, 7, 1)])
def test_the_residual_is_what_the_core_does_not_hold(ranks):
    W = tensor(13, 1, 12, 7)
    stage1 = hooi(W, hosvd(W), ranks, TOL, MAX_ITER)
    for U in (stage1.factors.U1, stage1.factors.U2):
        assert orthonormality_error(U) < 1e-5
    residual = squared_sum(W - reconstruct(W, stage1.factors))
    assert stage1.squared_energy == pytest.approx(squared_sum(core_of(W, stage1.factors)), rel=1e-6)
    assert residual == pytest.approx(squared_sum(W) - stage1.squared_energy, rel=1e-3, abs=1e-4)


def test_no_sweep_where_the_hosvd_is_optimal():
    W = tensor(15, 4, 3, 5)
    bases = hosvd(W)
    for ranks in (Ranks(7, 5, 4), Ranks(15, 2, 4), Ranks(15, 5, 3), Ranks(15, 5, 4)):
        assert hooi(W, bases, ranks, TOL, MAX_ITER).iterations == 0
    assert hooi(W, bases, Ranks(7, 2, 4), TOL, MAX_ITER).iterations > 0


def test_sweeps_are_limited_and_only_gain():
    W = tensor(21, 4, 5, 7)
    bases, ranks = hosvd(W), Ranks(6, 3, 2)
    energies = [squared_sum(core_of(W, bases.leading(ranks)))]
    for max_iter in (1, 2, 5):
        stage1 = hooi(W, bases, ranks, 0.0, max_iter)
        assert stage1.iterations == max_iter
        energies.append(stage1.squared_energy)
    assert energies[1] > energies[0]
    assert energies == pytest.approx(sorted(energies), rel=1e-6)


def test_the_same_input_gives_the_same_bits():
    W = tensor(21, 4, 5, 7)
    runs = [hooi(W, hosvd(W), Ranks(6, 3, 2), TOL, MAX_ITER) for _ in range(2)]
    assert runs[0].squared_energy == runs[1].squared_energy
    assert torch.equal(runs[0].factors.U1, runs[1].factors.U1)


def test_a_zero_tensor_has_a_basis():
    W = torch.zeros(9, 1, 4, 5)
    stage1 = hooi(W, hosvd(W), Ranks(3, 2, 1), TOL, MAX_ITER)
    assert stage1.squared_energy == 0
    assert orthonormality_error(stage1.factors.U1) < 1e-6


def test_squared_sums_are_accumulated_in_float64():
    # float32 has no number between 2^26 and 2^26 + 8.
    assert squared_sum(torch.tensor([8192.0, 1.0])) == pytest.approx(2**26 + 1, rel=1e-12)
    W = torch.randn(3, 1 << 20)
    assert squared_sum(W) == pytest.approx(float(W.double().square().sum()), rel=1e-12)
