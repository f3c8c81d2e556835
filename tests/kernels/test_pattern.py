"""The pattern 2:4: selection against brute force, exact error and bytes, the command, the backend.

Brute force here groups, sorts and counts element by element, with no code of the package.
"""

import itertools
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cli import digest_tree, lestd
from support.families import save_tiny
from support.groups import fused, gqa, mha, unfolding
from support.methods import budget_of, decompose
from support.put_back import all_tensors, put_back
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass as to_cutlass,
)
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lestd_kernels.backends import BACKENDS, choose, semi_structured
from lestd_kernels.backends.cache import Kept
from lestd_kernels.errors import LestdError
from lestd_kernels.formats.shared_tucker import SharedTucker
from lestd_kernels.linalg.stage1 import Factors, Ranks, hosvd
from lestd_kernels.methods import METHODS, MethodArgs
from lestd_kernels.search.budget import GroupShape, Limits, rank_grid
from lestd_kernels.search.tucker_ranks import RotatedCore
from lestd_kernels.search.two_of_four import most_kept, search_two_of_four, spread, two_of_four
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.tensorize import unfold_weights

LAYOUTS = {
    "mha": mha(48, 12, 4),
    "odd": mha(37, 7, 3),
    "gqa": gqa(40, 16, 6, 2),
    "fused": fused(44, 11, 4),
}


def best_two(row: list[float]) -> list[bool]:
    """Which elements of one line stay: in each four the two largest, the first on ties."""
    chosen = [False] * len(row)
    for first in range(0, len(row), 4):
        group = range(first, min(first + 4, len(row)))
        for i in sorted(group, key=lambda i: (-abs(row[i]), i))[:2]:
            chosen[i] = row[i] != 0
    return chosen


def brute_force(matrix: Tensor, dim: int) -> Tensor:
    lines = matrix.T if dim == 0 else matrix
    mask = torch.tensor([best_two(line) for line in lines.tolist()])
    return mask.T if dim == 0 else mask


def contraction(layout, name: str) -> int:
    return 0 if {m.name: m for m in layout.modules}[name].basis_side == "input" else 1


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 11),
    columns=st.integers(1, 11),
    dim=st.sampled_from([0, 1]),
    levels=st.sampled_from([1, 2, 100]),  # few levels: many ties and zeros
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_selection_equals_brute_force(rows, columns, dim, levels, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randint(-levels, levels + 1, (rows, columns), generator=generator).to(dtype)
    mask = two_of_four(matrix, dim)
    assert torch.equal(mask, brute_force(matrix, dim))
    assert int(mask.sum()) <= most_kept(matrix.shape[dim]) * matrix.shape[1 - dim]


@pytest.mark.parametrize("dim", [0, 1])
def test_selection_in_several_parts(dim):
    matrix = torch.randn(1030, 2051)
    mask = two_of_four(matrix, dim)
    lines = (matrix.T if dim == 0 else matrix).abs()
    kept_there = mask.T if dim == 0 else mask
    whole = lines.shape[1] // 4 * 4
    groups, chosen = (t[:, :whole].unflatten(1, (-1, 4)) for t in (lines, kept_there))
    assert bool((chosen.sum(-1) == 2).all())
    smallest_in = groups.masked_fill(~chosen, torch.inf).amin(-1)
    assert bool((smallest_in >= groups.masked_fill(chosen, 0).amax(-1)).all())
    assert bool((kept_there[:, whole:].sum(1) == min(lines.shape[1] - whole, 2)).all())


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 7, 8, 24, 37])
def test_spreading_deals_the_directions_to_the_groups(rank):
    eye = torch.eye(rank)
    order = spread(Factors(eye, eye, torch.eye(1))).U1.argmax(0).tolist()
    assert sorted(order) == list(range(rank))
    if rank % 4 == 0:
        for first in range(0, rank, 4):
            quarters = [4 * i // rank for i in order[first : first + 4]]
            assert quarters == [0, 1, 2, 3]
            assert sum(order[first : first + 4]) == 2 * (rank - 1)  # equally strong


@pytest.mark.parametrize("max_flops", [None, 0.6])
@pytest.mark.parametrize("keep", [0.9, 0.6, 0.3, 0.12])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_search_finds_the_best_of_an_exhaustive_one(layout, keep, max_flops):
    """Over all ranks of the grid, the energy of a selection that is made and summed up here."""
    shape = GroupShape(layout, False, 2, "2:4")
    limits = Limits(int(keep * layout.elements * 2), max_flops, 4)
    W = unfolding(layout).view(layout.width, 1, -1, layout.head_dim)
    bases = hosvd(W)
    energies = {}
    grids = rank_grid(layout.width, 4), rank_grid(layout.head_dim, 4)
    for ranks in (Ranks(R1, R2, 1) for R1, R2 in itertools.product(*grids)):
        nnz, energy, first = [], 0.0, 0
        basis = spread(bases.leading(ranks))
        core = torch.einsum("inj,ia,jb->anb", W[:, 0], basis.U1, basis.U2)
        for module in layout.modules:
            M = core[:, first : first + len(module.slices)].flatten(1)
            first += len(module.slices)
            mask = two_of_four(M, contraction(layout, module.name))
            nnz.append(int(mask.sum()))
            energy += float(M[mask].double().square().sum())
        fits = shape.stored_bytes(ranks, nnz) <= limits.byte_budget
        energies[ranks] = energy if fits and limits.allows_flops(shape, ranks) else -1.0
    [found] = (
        point.ranks
        for point in search_two_of_four(RotatedCore(W, bases, shape.core_slices), shape, [limits])
    )
    assert energies[found] == pytest.approx(max(energies.values()), rel=1e-4)
    assert min(energies.values()) < energies[found]


@pytest.mark.parametrize("rank_step", [4, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("keep", [1.2, 0.6, 0.25])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_cores_have_the_pattern_and_every_figure_is_true(layout, keep, dtype, rank_step):
    W, budget = unfolding(layout), budget_of(layout, keep, dtype)
    args = MethodArgs(pattern="2:4", rank_step=rank_step)
    done = decompose("lestd", layout, keep, dtype, pattern="2:4", rank_step=rank_step)
    stored, bounds = done.decomposition, METHODS["lestd"].bounds(layout, budget, dtype, args)

    expected_nnz = 0
    for name, core in stored.cores.items():
        M, dim = core.decode(), contraction(layout, name)
        assert bool((M != 0).logical_and(~brute_force(M, dim)).any()) is False
        length = M.shape[dim]
        expected = (length // 4 * 2 + min(length % 4, 2)) * M.shape[1 - dim]
        assert core.nnz == expected
        assert core.pattern == "2:4"
        expected_nnz += expected
    assert stored.nnz == expected_nnz <= bounds.max_nnz
    assert stored.stored_bytes <= bounds.max_bytes <= budget
    assert stored.ranks["R1"] <= bounds.max_R1
    assert stored.ranks["R2"] <= bounds.max_R2
    if keep == 1.2:  # more than full rank takes: the plan says so
        assert stored.ranks == {"R1": layout.width, "R2": layout.head_dim}
        assert stored.stored_bytes == bounds.max_bytes < budget

    residual = (W - unfold_weights(stored.to_dense(), layout)).double()
    assert done.squared_error == pytest.approx(float(residual.square().sum()), rel=1e-5)
    assert done.squared_norm == pytest.approx(float(W.double().square().sum()), rel=1e-9)
    if dtype == torch.float32:  # orthonormal factors: the residual is the energy not kept
        lost = done.squared_norm - done.squared_energy_stage2
        assert done.squared_error == pytest.approx(lost, rel=1e-3)


def test_spread_directions_lose_less_but_a_free_choice_loses_least():
    layout, W = LAYOUTS["mha"], unfolding(LAYOUTS["mha"]).view(48, 1, 16, 12)
    bases = hosvd(W)
    lost = []
    for basis in (bases, spread(bases)):
        M = torch.einsum("inj,ia,jb->anb", W[:, 0, :12], basis.U1, basis.U2).flatten(1)
        lost.append(float(M[~two_of_four(M, 0)].square().sum()))
    assert lost[1] < 0.8 * lost[0]
    errors = [decompose("lestd", layout, 0.6, pattern=p) for p in ("unstructured", "2:4")]
    assert errors[0].relative_error < errors[1].relative_error


def test_the_smallest_budget_works_and_a_byte_less_is_refused():
    layout, args = LAYOUTS["odd"], MethodArgs(pattern="2:4", rank_step=3)
    shape = GroupShape(layout, False, 2, "2:4")
    # q, k, v: of 3 rows 2 in 9 columns; o: of 9 columns 5 in 3 rows. Bitmask: 27 bits.
    least = shape.factor_bytes(Ranks(3, 3, 1)) + 3 * (18 * 2 + 4) + 15 * 2 + 4
    bounds, run = METHODS["lestd"].bounds, METHODS["lestd"].decompose
    stored = run(unfolding(layout), layout, least, torch.bfloat16, args).decomposition
    assert stored.stored_bytes == least == bounds(layout, least, torch.bfloat16, args).max_bytes
    for call in (
        lambda: bounds(layout, least - 1, torch.bfloat16, args),
        lambda: run(unfolding(layout), layout, least - 1, torch.bfloat16, args),
    ):
        with pytest.raises(LestdError, match=f"smallest ranks.*take {least:,} bytes; raise keep"):
            call()


def test_zeros_are_not_kept_and_the_bytes_are_fewer():
    layout = LAYOUTS["mha"]
    W = unfolding(layout)
    W[:, : 12 * 4] = 0  # the whole of q
    done = decompose("lestd", layout, 0.6, W=W, pattern="2:4")
    q = done.decomposition.cores["q_proj"]
    assert q.nnz == 0
    assert q.decode().count_nonzero() == 0
    zero = decompose("lestd", layout, 0.6, W=torch.zeros_like(W), pattern="2:4")
    assert zero.decomposition.nnz == zero.relative_error == 0


def test_the_same_input_gives_the_same_bytes_and_arithmetic_can_be_limited():
    layout = LAYOUTS["gqa"]
    first, second = (
        decompose("lestd", layout, 0.7, pattern="2:4").decomposition.named_tensors("")
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    limited = decompose("lestd", layout, 0.7, pattern="2:4", max_flops=0.5).decomposition
    ranks, shape = Ranks(*limited.ranks.values(), 1), GroupShape(layout, False, 2)
    assert shape.flops_per_token(ranks) <= 0.5 * layout.dense_flops_per_token
    with pytest.raises(LestdError, match=r"max_flops is 0\.001"):
        decompose("lestd", layout, 0.7, pattern="2:4", max_flops=0.001)


def test_the_entry_carries_the_pattern_and_gives_the_group_back():
    stored = decompose("lestd", LAYOUTS["fused"], 0.6, pattern="2:4").decomposition
    entry = json.loads(json.dumps(stored.describe("layer.attn")))
    assert [m["pattern"] for m in entry["modules"].values()] == ["2:4", "2:4"]
    tensors = stored.named_tensors("layer.attn")
    assert {n: t.shape for n, t in tensors.items()} == {
        name: spec[0] for name, spec in SharedTucker.stored_specs(entry).items()
    }
    again = SharedTucker.from_named_tensors(entry, tensors)
    assert {core.pattern for core in again.cores.values()} == {"2:4"}
    assert again.describe("layer.attn") == entry
    plain = decompose("lestd", LAYOUTS["fused"], 0.6).decomposition.describe("layer.attn")
    assert "pattern" not in json.dumps(plain)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt_neox", "qwen3"])
def test_from_the_command_to_the_logits(family: str, tmp_path: Path) -> None:
    source, out = save_tiny(family, tmp_path / "source"), tmp_path / "out"
    options = ("--keep", 0.7, "--pattern", "2:4")
    planned = json.loads(lestd("plan", source, *options, "--json").out)
    done = lestd("compress", source, "--out", out, "--executor", "serial", *options)
    assert done.code == 0, done.err
    assert lestd("verify", out).code == 0
    assert "pattern 2:4" in (out / "README.md").read_text()

    rows = pq.read_table(out / "manifest" / "groups.parquet").to_pylist()
    for layer, row in zip(planned["layers"], rows, strict=True):
        assert layer["task_id"] == row["task_id"]
        assert layer["pattern"] == row["pattern"] == "2:4"
        assert row["stored_bytes"] <= layer["max_bytes"] <= layer["byte_budget"]
        assert row["nnz"] <= layer["max_nnz"]
        assert 0.5 <= row["density"] < 0.6  # tails
    assert planned["total"]["max_bytes"] == sum(p["max_bytes"] for p in planned["layers"])

    reference, replaced = put_back(source, out)
    compressed = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.randint(3, 90, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, actual = reference(ids).logits, compressed(ids).logits
    assert (expected - actual).abs().max() <= 2e-5 * expected.abs().max()
    assert lestd("export", out, "--dense", tmp_path / "dense").code == 0
    exported = all_tensors(tmp_path / "dense")
    for name, W in replaced.items():
        assert_close(exported[name].double(), W, rtol=1e-5, atol=1e-6)
    compressed.save_pretrained(tmp_path / "saved")
    config, again = (json.loads((d / "config.json").read_text()) for d in (out, tmp_path / "saved"))
    assert again["quantization_config"]["groups"] == config["quantization_config"]["groups"]


def test_unstructured_is_the_default_and_writes_what_it_says(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    trees = []
    for name, options in (("a", ()), ("b", ("--pattern", "unstructured"))):
        out = tmp_path / name
        run = lestd(
            "compress", source, "--keep", 0.6, "--out", out, "--executor", "serial", *options
        )
        assert run.code == 0, run.err
        trees.append(digest_tree(out))
        assert "pattern" not in (out / "config.json").read_text()
    assert trees[0] == trees[1]


@pytest.mark.parametrize(
    ("settings_of_run", "words"),
    [
        ("type_mode: learned", ("pattern '2:4' needs type_mode 'identity', found 'learned'",)),
        ("method: tucker", ("pattern '2:4' needs method 'lestd', found 'tucker'",)),
        ("stage2: prune-refit", ("pattern '2:4' needs stage2 'one-shot', found 'prune-refit'",)),
        ("pattern: 2:4", ("run.yaml: pattern", "without quotes", 'pattern: "2:4"')),
        ("pattern: 1:4", ("run.yaml: pattern", "'2:4'")),
        ("keep: 0.01", ("smallest ranks", "raise keep")),
    ],
)
def test_what_does_not_go_with_it_is_refused_in_one_sentence(settings_of_run, words, tmp_path):
    source, config = save_tiny("llama", tmp_path / "source"), tmp_path / "run.yaml"
    lines = {"keep": "keep: 0.5", "pattern": 'pattern: "2:4"'}
    lines[settings_of_run.partition(":")[0]] = settings_of_run
    config.write_text("\n".join(lines.values()))
    refused = lestd("plan", source, "--config", config)
    assert refused.code == 2
    assert len(refused.err.strip().splitlines()) == 1
    assert all(word in refused.err for word in words), refused.err


# -- the backend: what of it runs without a GPU, and the rest -----------------------------------


def two_four_core(rows: int, columns: int, transposed: bool, dtype: torch.dtype) -> EncodedCore:
    M = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
    M = M * two_of_four(M, 1 if transposed else 0)
    return EncodedCore.encode(M, "2:4")


CORES = [(1, 1), (2, 9), (17, 21), (64, 32), (130, 403), (192, 256)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "columns"), CORES)
def test_the_padded_weight_survives_pytorchs_format(rows, columns, transposed, dtype):
    core = two_four_core(rows, columns, transposed, dtype)
    weight = semi_structured.padded_weight(core, transposed)
    M = core.decode() if transposed else core.decode().T
    assert torch.equal(weight[: M.shape[0], : M.shape[1]], M)
    assert weight.count_nonzero() == core.nnz
    packed, meta = to_cutlass(weight)
    tensor = SparseSemiStructuredTensorCUTLASS(weight.shape, packed, meta, None, None, None)
    assert torch.equal(tensor.to_dense(), weight)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "columns"), CORES)
def test_products_are_padded_and_cut(rows, columns, transposed, monkeypatch):
    """All of the backend but the format itself, which needs a GPU."""
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight)
    core = two_four_core(rows, columns, transposed, torch.float16)
    x = torch.randn(2, 3, columns if transposed else rows).half()
    found = BACKENDS["2:4"].apply_core(x, core, transposed)
    assert_close(found, BACKENDS["eager"].apply_core(x, core, transposed), rtol=2e-3, atol=2e-3)
    semi_structured.release(core.tensors["values"])


def test_a_core_without_the_pattern_is_refused():
    M = torch.ones(8, 4, dtype=torch.bfloat16)
    with pytest.raises(LestdError, match=r"core \(8 x 4\) .* hold 4 non-zeros, expected at most 2"):
        semi_structured.padded_weight(EncodedCore.encode(M, "2:4"), False)


def test_without_a_gpu_the_other_backends_do_the_work():
    core = two_four_core(64, 32, False, torch.bfloat16)
    x = torch.randn(128, 64).bfloat16()
    assert not BACKENDS["2:4"].runs(x, core)
    assert choose(x, core, False) != "2:4"


def test_what_is_kept_of_a_core_is_made_anew_once_it_was_written_to():
    core, made = two_four_core(8, 4, False, torch.float32), []

    def compute(core: EncodedCore) -> Tensor:
        made.append(core)
        return core.decode()

    kept = Kept(compute)
    assert kept(core) is kept(core)
    assert len(made) == 1
    core.tensors["values"].mul_(2)
    assert torch.equal(kept(core), core.decode())
    kept.release(core.tensors["values"])
    kept(core)
    assert len(made) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "columns"), CORES)
def test_on_a_gpu_it_equals_eager(rows, columns, transposed, dtype):
    packed = two_four_core(rows, columns, transposed, dtype)
    tensors = {name: tensor.cuda() for name, tensor in packed.tensors.items()}
    core = EncodedCore(packed.codec, rows, columns, packed.nnz, tensors, "2:4")
    for shape in ((), (1,), (5, 7), (512,)):
        x = torch.randn(*shape, columns if transposed else rows).to("cuda", dtype)
        if not BACKENDS["2:4"].runs(x, core):
            pytest.skip("no sparse tensor cores, or no cuSPARSELt")
        found = BACKENDS["2:4"].apply_core(x, core, transposed)
        exact = BACKENDS["eager"].apply_core(x, core, transposed)
        assert_close(found, exact, rtol=2e-2, atol=2e-2)
    assert choose(x, core, transposed) == "2:4"
    assert choose(x[:1], core, transposed) != "2:4"
