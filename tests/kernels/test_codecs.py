import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lestd_kernels.backends import apply_core
from lestd_kernels.storage.bitmasks import count_bits, pack_bits, unpack_bits
from lestd_kernels.storage.codecs import CODECS, cheapest_codec
from lestd_kernels.storage.matrix import EncodedCore

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def sparse_matrix(rows, columns, density, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(rows, columns, generator=generator) + 0.5
    values *= torch.rand(rows, columns, generator=generator).sub(0.5).sign()
    return (values * (torch.rand(rows, columns, generator=generator) < density)).to(dtype)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(list(CODECS)),
    rows=st.integers(1, 17),
    columns=st.integers(1, 23),
    density=st.sampled_from([0.0, 0.03, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 5),
)
def test_round_trip_and_exact_bytes(name, rows, columns, density, dtype, seed):
    codec = CODECS[name]
    matrix = sparse_matrix(rows, columns, density, dtype, seed)
    nnz = int((matrix != 0).sum())
    tensors = codec.encode(matrix)
    assert torch.equal(codec.decode(tensors, rows, columns), matrix)
    assert tensors["values"].dtype == dtype
    specs = codec.tensor_specs(rows, columns, nnz)
    assert specs.keys() == tensors.keys()
    for key, (shape, spec_dtype) in specs.items():
        assert tensors[key].shape == shape
        assert tensors[key].dtype == (spec_dtype or dtype)
    stored = sum(t.numel() * t.element_size() for t in tensors.values())
    assert codec.stored_bytes(rows, columns, nnz, dtype.itemsize) == stored


@settings(deadline=None, max_examples=20)
@given(st.lists(st.booleans(), max_size=40))
def test_bits_are_packed_as_numpy_packs_them(flags):
    packed = pack_bits(torch.tensor(flags, dtype=torch.bool))
    expected = np.packbits(np.array(flags, dtype=bool), bitorder="little")
    assert packed.tolist() == expected.tolist()
    assert unpack_bits(packed, len(flags)).tolist() == flags


@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 511, 9 * 2**20 + 3])
def test_bits_are_counted(count, density):
    flags = torch.rand(count) < density
    packed = pack_bits(flags)
    assert count_bits(packed, count) == int(flags.sum())
    if count % 8:  # a bit behind the last one does not count
        packed[-1] |= 128
        assert count_bits(packed, count) == int(flags.sum())


@pytest.mark.parametrize("density", [0.0, 0.1, 0.7])
def test_csr_is_torchs_csr(density):
    matrix = sparse_matrix(13, 29, density)
    tensors, oracle = CODECS["csr"].encode(matrix), matrix.to_sparse_csr()
    assert tensors["row_pointers"].tolist() == oracle.crow_indices().tolist()
    assert tensors["columns"].tolist() == oracle.col_indices().tolist()
    assert tensors["values"].tolist() == oracle.values().tolist()


@pytest.mark.parametrize(
    ("columns", "dtype"), [(65_535, torch.uint16), (65_536, torch.uint16), (65_537, torch.int32)]
)
def test_csr_column_indices_widen_above_65536_columns(columns, dtype):
    matrix = torch.zeros(2, columns)
    matrix[0, 0] = matrix[1, 40_000] = matrix[1, -1] = 1.5
    tensors = CODECS["csr"].encode(matrix)
    assert tensors["columns"].dtype == dtype
    assert torch.equal(CODECS["csr"].decode(tensors, 2, columns), matrix)


@pytest.mark.parametrize(
    ("density", "expected"), [(0.99, "dense"), (0.5, "bitmask"), (0.08, "bitmask"), (0.04, "csr")]
)
def test_the_cheapest_codec_changes_near_one_sixteenth(density, expected):
    nnz = int(density * 256 * 4096)
    codec = cheapest_codec(256, 4096, nnz, 2)
    assert codec.name == expected
    sizes = {c.name: c.stored_bytes(256, 4096, nnz, 2) for c in CODECS.values()}
    assert sizes[codec.name] == min(sizes.values())


def test_a_tie_goes_to_the_first_codec():
    # One element of two bytes: dense takes 2; so would nothing else, but 16 elements of which
    # 15 are kept take 32 bytes both dense and as a bitmask.
    assert CODECS["dense"].stored_bytes(4, 4, 15, 2) == CODECS["bitmask"].stored_bytes(4, 4, 15, 2)
    assert cheapest_codec(4, 4, 15, 2).name == "dense"


@pytest.mark.parametrize("pointer", [10**9, -(10**9), 0])
@pytest.mark.parametrize("at", [5, 33])
@pytest.mark.parametrize("backend", ["eager", "csr"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_damaged_row_pointers_are_refused_and_not_followed(backend, at, pointer, tokens):
    tensors = CODECS["csr"].encode(torch.ones(33, 40))
    tensors["row_pointers"][at] = pointer
    core = EncodedCore("csr", 33, 40, 33 * 40, tensors)
    with pytest.raises(RuntimeError, match=r"allocated size|crow_indices"):
        apply_core(torch.randn(tokens, 33), core, False, backend)
