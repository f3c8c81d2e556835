import json
from dataclasses import replace

import numpy as np
import pytest
import tensorly as tl
import torch
from support.groups import fused, gqa, mha

from lestd_kernels.formats.shared_tucker import CORE_NAME, SharedTucker, module_types
from lestd_kernels.storage.codecs import CODECS
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.tensorize import PROJECTIONS, ModuleLayout


def sparse(*shape, density=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    return values * (torch.rand(*shape, generator=generator) < density)


def identity_tucker(layout, R1, R2, dtype):
    cores = {
        m.name: EncodedCore.encode(sparse(R1, len(m.slices) * R2, seed=i).to(dtype))
        for i, m in enumerate(layout.modules)
    }
    U1, U2 = torch.randn(layout.width, R1).to(dtype), torch.randn(layout.head_dim, R2).to(dtype)
    return SharedTucker(layout, U1, U2, cores)


def learned_tucker(layout, R1, R2, R3, dtype):
    h = len(layout.slices) // 4
    core = EncodedCore.encode(sparse(R1, R3 * h * R2).to(dtype))
    U1, U2 = torch.randn(layout.width, R1).to(dtype), torch.randn(layout.head_dim, R2).to(dtype)
    return SharedTucker(layout, U1, U2, {CORE_NAME: core}, torch.randn(4, R3).to(dtype))


def numpy64(tensor):
    return tensor.double().numpy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", [mha(11, 5, 3), gqa(8, 3, 4, 2), fused(7, 4, 3)])
def test_identity_reconstructs_every_slice(layout, dtype):
    stored = identity_tucker(layout, 6, 3, dtype)
    W = stored.reconstruct().view(layout.width, -1, layout.head_dim)
    assert W.dtype == torch.float32
    s = 0
    for module in layout.modules:
        core = stored.cores[module.name].decode()
        for j in range(len(module.slices)):
            M = core[:, 3 * j : 3 * j + 3]
            expected = numpy64(stored.U1) @ numpy64(M) @ numpy64(stored.U2).T
            np.testing.assert_allclose(W[:, s].numpy(), expected, rtol=1e-4, atol=1e-4)
            s += 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", [mha(11, 5, 3), fused(7, 4, 3)])
@pytest.mark.parametrize("R3", [1, 3, 4])
def test_learned_reconstructs_tensorlys_tucker(layout, R3, dtype):
    stored = learned_tucker(layout, 6, 3, R3, dtype)
    h = len(layout.slices) // 4
    G = numpy64(stored.cores[CORE_NAME].decode()).reshape(6, R3, h, 3)
    factors = [numpy64(stored.U1), numpy64(stored.U3), np.eye(h), numpy64(stored.U2)]
    expected = tl.tucker_to_tensor((G, factors))
    W = stored.reconstruct().view(layout.width, -1, layout.head_dim).numpy()
    for s, (projection, head) in enumerate(layout.slices):
        slice_ = expected[:, PROJECTIONS.index(projection), head]
        np.testing.assert_allclose(W[:, s], slice_, rtol=1e-4, atol=1e-4)


def test_dense_weights_are_oriented_as_linear_holds_them():
    stored = identity_tucker(gqa(8, 3, 4, 2), 6, 3, torch.float32)
    x, dense = torch.randn(5, 8), stored.to_dense()
    M = stored.cores["k_proj"].decode()[:, 3:]
    keys = torch.nn.functional.linear(x, dense["k_proj"])[:, 3:]
    torch.testing.assert_close(keys, x @ stored.U1 @ M @ stored.U2.T)
    a = torch.randn(5, 12)
    out = torch.nn.functional.linear(a, dense["o_proj"])
    cores = stored.cores["o_proj"].decode().view(6, 4, 3)
    heads = a.view(5, 4, 3)
    expected = sum(heads[:, i] @ stored.U2 @ cores[:, i].T for i in range(4)) @ stored.U1.T
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_named_tensors_are_all_that_is_stored(dtype):
    layout = mha(11, 5, 3)
    for stored, matrices in (
        (identity_tucker(layout, 6, 3, dtype), 2),
        (learned_tucker(layout, 6, 3, 2, dtype), 2),
    ):
        tensors = stored.named_tensors("model.layers.0.self_attn")
        assert stored.stored_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
        assert all(name.startswith("model.layers.0.self_attn.") for name in tensors)
        assert all(t.is_contiguous() for t in tensors.values())
        # Only the factors are matrices: a loader that does not know the format must stop.
        assert sum(t.ndim == 2 for t in tensors.values()) == matrices
        for module in layout.modules:
            assert tensors[f"model.layers.0.self_attn.{module.name}.weight"].ndim == 1
        assert stored.nnz == sum(int(c.decode().count_nonzero()) for c in stored.cores.values())
        json.dumps(stored.describe("model.layers.0.self_attn"))
    assert "lestd_u1.weight" in stored.named_tensors("")
    assert stored.ranks == {"R1": 6, "R2": 3, "R3": 2}


def test_the_description_decodes_the_tensors():
    """All that a loader has is the description and the tensors by name."""
    stored = identity_tucker(gqa(8, 3, 4, 2), 6, 3, torch.float32)
    description, tensors = stored.describe("block"), stored.named_tensors("block")
    assert description["ranks"] == {"R1": 6, "R2": 3}
    assert description["value_type"] == "float32"
    for name, entry in description["modules"].items():
        parts = {
            key.removeprefix(f"block.{name}."): tensor
            for key, tensor in tensors.items()
            if key.startswith(f"block.{name}.")
        }
        parts["values"] = parts.pop("weight")
        core = CODECS[entry["codec"]].decode(parts, 6, entry["slices"] * 3)
        assert torch.equal(core, stored.cores[name].decode())
        assert entry["nnz"] == int(core.count_nonzero())


def round_trip(stored):
    """What a reader makes of the tensors and the entry, which is JSON on its way."""
    entry = json.loads(json.dumps(stored.describe("model.block")))
    tensors = stored.named_tensors("model.block")
    return SharedTucker.from_named_tensors(entry, tensors | {"other": torch.ones(1)})


def recode(core, codec):
    matrix = core.decode()
    return EncodedCore(codec, core.rows, core.columns, core.nnz, CODECS[codec].encode(matrix))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("layout", "R3"),
    [
        (mha(11, 5, 3), None),
        (gqa(8, 3, 4, 2), None),
        (gqa(9, 4, 6, 1), None),
        (fused(7, 4, 3), None),
        (mha(11, 5, 3), 2),
        (mha(5, 3, 1), 4),
        (fused(7, 4, 3), 3),
        (fused(7, 4, 3), 1),
    ],
)
def test_named_tensors_and_entry_give_the_group_back(layout, R3, dtype, codec):
    make = identity_tucker if R3 is None else learned_tucker
    ranks = (6, 3) if R3 is None else (6, 3, R3)
    stored = make(layout, *ranks, dtype)
    stored = replace(stored, cores={n: recode(c, codec) for n, c in stored.cores.items()})
    again = round_trip(stored)
    assert again.describe("model.block") == stored.describe("model.block")
    expected, found = (g.named_tensors("model.block") for g in (stored, again))
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    weights = again.to_dense()
    assert weights.keys() == stored.to_dense().keys()
    assert all(torch.equal(w, weights[name]) for name, w in stored.to_dense().items())
    assert (again.nnz, again.stored_bytes) == (stored.nnz, stored.stored_bytes)
    if R3 is not None:
        assert again.layout == layout


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("R3", [None, 2])
def test_the_stored_specs_are_those_of_the_tensors(codec, R3):
    layout = gqa(8, 3, 4, 2) if R3 is None else mha(8, 3, 4)
    make = identity_tucker if R3 is None else learned_tucker
    stored = make(layout, *((5, 2) if R3 is None else (5, 2, R3)), torch.bfloat16)
    stored = replace(stored, cores={n: recode(c, codec) for n, c in stored.cores.items()})
    specs = SharedTucker.stored_specs(stored.describe("block"))
    tensors = stored.named_tensors("block")
    assert specs.keys() == tensors.keys()
    for name, (shape, dtype) in specs.items():
        assert tuple(tensors[name].shape) == shape
        assert tensors[name].dtype == (dtype or torch.bfloat16)
    assert next(iter(specs)) == "block.lestd_u1.weight"


def test_shared_factors_are_read_where_the_entry_says():
    first, second = (identity_tucker(mha(8, 3, 2), 5, 2, torch.float32) for _ in range(2))
    entry = second.describe("b")
    entry["factors"] = first.describe("a")["factors"]
    tensors = first.named_tensors("a") | second.named_tensors("b")
    del tensors["b.lestd_u1.weight"], tensors["b.lestd_u2.weight"]
    assert SharedTucker.stored_specs(entry).keys() <= tensors.keys()
    found = SharedTucker.from_named_tensors(entry, tensors)
    expected = replace(second, U1=first.U1, U2=first.U2)
    assert torch.equal(found.reconstruct(), expected.reconstruct())
    with pytest.raises(KeyError, match=r"a\.lestd_u2"):
        SharedTucker.from_named_tensors(
            entry, second.named_tensors("b") | {"a.lestd_u1.weight": first.U1}
        )


@pytest.mark.parametrize(
    "slices",
    [
        (("q", 1), ("q", 0)),
        (("q", 0), ("q", 1), ("k", 0), ("k", 1)),
        (("q", 0), ("k", 0), ("q", 1)),
    ],
)
def test_irregular_modules_have_no_types(slices):
    with pytest.raises(ValueError, match="not regular"):
        module_types(ModuleLayout("m", "input", slices))


def test_types_of_a_fused_module():
    assert module_types(fused(8, 2, 3).modules[0]) == (0, 1, 2)
    assert module_types(fused(8, 2, 3).modules[1]) == (3,)
