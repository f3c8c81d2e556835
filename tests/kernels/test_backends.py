"""Every backend equals the specification; the rule, the kernel's build, and what is kept."""

from __future__ import annotations

import copy
import gc
import shutil
import subprocess
import sys
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.blocks import Block, layout
from support.families import random_tucker, save_pair
from support.products import DEVICES, DTYPES, assert_is_product, encode, sparse
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils.cpp_extension import get_default_build_root
from transformers import AutoModelForCausalLM

from lestd_kernels import LestdError, set_backend
from lestd_kernels.backends import BACKENDS, apply_core, bitmask, choose, dense_core
from lestd_kernels.modules.shared_tucker_linear import CompressedLinear
from lestd_kernels.storage.codecs import CODECS

SHAPES = [(1, 1), (17, 21), (5, 9), (33, 77), (130, 403), (7, 64), (3, 1000), (257, 2)]
CODECS_OF = {
    "eager": ("dense", "bitmask", "csr"),
    "dense_core": ("bitmask", "csr"),
    "csr": ("csr",),
    "bitmask": ("dense", "bitmask"),
}
# The kernels of "triton" are tested in tests/kernels/test_triton.py: on CPU, interpreted, they
# take long.
CASES = [("cpu", backend, codec) for backend, codecs in CODECS_OF.items() for codec in codecs] + [
    pytest.param("cuda", backend, codec, marks=pytest.mark.gpu)
    for backend in ("eager", "dense_core")
    for codec in CODECS_OF[backend]
]


@pytest.fixture(scope="module")
def kernel() -> list[str]:
    """Paths of the kernel that this CPU has."""
    if not bitmask.is_available():
        pytest.skip("no C++ compiler or no ninja")
    paths: list[str] = torch.ops.lestd.bitmask_paths()
    return paths


@pytest.mark.parametrize(("device", "backend", "codec"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.04, 0.5, 1.0])
def test_backends_multiply_by_the_core_and_its_transpose(
    device, backend, codec, dtype, density, kernel
):
    for rows, columns in SHAPES:
        M = sparse(rows, columns, density, dtype).to(device)
        core = encode(M, codec)
        assert torch.equal(BACKENDS[backend].expand(core), M)
        for matrix, transposed in ((M, False), (M.T, True)):
            for shape in ((), (1,), (2, 3), (2, 1, 5), (21,), (70,)):
                x = torch.randn(*shape, matrix.shape[0]).to(dtype).to(device)
                assert BACKENDS[backend].runs(x, core)
                assert_is_product(BACKENDS[backend].apply_core(x, core, transposed), x, matrix)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 140),
    density=st.floats(0, 1),
    tokens=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_every_path_of_the_kernel_equals_the_dense_product(
    kernel, rows, columns, density, tokens, dtype, transposed, seed
):
    M = sparse(rows, columns, density, dtype, seed)
    packed = encode(M, "bitmask").tensors
    values, mask = packed["values"], packed["mask"]
    matrix = M.T if transposed else M
    x = torch.randn(tokens, matrix.shape[0]).to(dtype)
    call, tiled = torch.ops.lestd.bitmask_apply, torch.ops.lestd.bitmask_matmul
    for path in kernel:
        assert torch.equal(torch.ops.lestd.bitmask_expand(values, mask, rows, columns, path), M)
        for product in (call, tiled):
            for stored in ((values, mask), (M.reshape(-1), None)):
                found = product(x, *stored, rows, columns, transposed, path)
                assert_is_product(found, x, matrix)
                if product is tiled:
                    wide = product(x.float(), *stored, rows, columns, transposed, path)
                    assert_is_product(wide, x.float(), matrix.float())


@pytest.mark.parametrize("transposed", [False, True])
def test_a_core_of_several_tiles(transposed, kernel):
    """Sums so long that a tile has its least width, 32, and the last one is narrower."""
    M = sparse(*((70, 66001) if transposed else (66001, 70)), 0.3, torch.float32)
    x = torch.randn(3, 66001)
    packed = encode(M, "bitmask").tensors
    for path in kernel:
        found = torch.ops.lestd.bitmask_matmul(
            x, packed["values"], packed["mask"], *M.shape, transposed, path
        )
        assert_is_product(found, x, M.T if transposed else M)


@pytest.mark.parametrize("transposed", [False, True])
def test_so_many_tokens_that_they_are_cut_into_parts(transposed, kernel):
    M = sparse(33, 140, 0.3, torch.float32)
    x = torch.randn(2051, 140 if transposed else 33)
    found = BACKENDS["bitmask"].apply_core(x, encode(M, "bitmask"), transposed)
    assert_is_product(found, x, M.T if transposed else M)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("transposed", [False, True])
def test_values_that_the_cpu_only_emulates_are_multiplied_in_float32(
    codec, transposed, kernel, monkeypatch
):
    monkeypatch.setattr(bitmask, "emulated", lambda dtype: dtype == torch.bfloat16)
    M = sparse(33, 140, 0.04 if codec == "csr" else 0.4, torch.bfloat16)
    core, x = encode(M, codec), torch.randn(70, 140 if transposed else 33).bfloat16()
    assert choose(x, core, transposed) == ("csr" if codec == "csr" else "bitmask")
    found = apply_core(x, core, transposed, None)
    assert_is_product(found, x, M.T if transposed else M)
    if codec == "bitmask":
        wide = apply_core(x.float(), encode(M.float(), codec), transposed, None)
        assert torch.equal(found, wide.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(150, 333), (700, 31)])
def test_the_kernel_gives_the_same_bits_on_any_number_of_threads(
    rows, columns, dtype, transposed, kernel
):
    """Both products, few tokens and many, on every path; 700 x 31 has one tile of sums."""
    packed = encode(sparse(rows, columns, 0.4, dtype), "bitmask").tensors
    stored = (packed["values"], packed["mask"], rows, columns, transposed)
    x = {n: torch.randn(n, columns if transposed else rows).to(dtype) for n in (3, 70)}
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(
                [
                    product(tokens, *stored, path)
                    for product in (torch.ops.lestd.bitmask_apply, torch.ops.lestd.bitmask_matmul)
                    for tokens in x.values()
                    for path in kernel
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_the_kernel_refuses_a_mask_that_tells_of_other_values(kernel):
    tensors = encode(sparse(9, 20, 0.5, torch.float32), "bitmask").tensors
    with pytest.raises(RuntimeError, match=r"the mask of a core \(9 x 20\) marks \d+ elements"):
        torch.ops.lestd.bitmask_expand(tensors["values"][1:], tensors["mask"], 9, 20, "portable")
    with pytest.raises(RuntimeError, match="one bit per element"):
        torch.ops.lestd.bitmask_expand(tensors["values"], tensors["mask"][1:], 9, 20, "portable")


def test_the_kernel_refuses_a_path_that_this_cpu_has_not(kernel):
    tensors = encode(sparse(9, 20, 0.5, torch.float32), "bitmask").tensors
    with pytest.raises(RuntimeError, match=r"no path avx1024, expected one of .*portable"):
        torch.ops.lestd.bitmask_expand(tensors["values"], tensors["mask"], 9, 20, "avx1024")


def test_the_rule(kernel, monkeypatch):
    monkeypatch.setattr(bitmask, "emulated", lambda dtype: False)
    M = sparse(33, 40, 0.5, torch.bfloat16)
    dense, packed, sparser = (encode(M, codec) for codec in ("dense", "bitmask", "csr"))
    one, many = torch.randn(1, 33).bfloat16(), torch.randn(512, 33).bfloat16()
    assert choose(one, packed, False) == choose(many, packed, False) == "bitmask"
    assert choose(one, sparser, False) == "csr"
    assert choose(many, sparser, False) == "eager"
    assert choose(many, dense, False) == choose(one[:, :0], packed, False) == "eager"
    assert choose(torch.randn(3, 40).bfloat16(), dense, True) == "eager"
    if bitmask.path() != "portable":
        assert choose(one, dense, False) == choose(one @ M, dense, True) == "bitmask"
        assert choose(one.float(), encode(M.float(), "dense"), False) == "eager"


def test_what_autograd_or_autocast_must_see_is_left_to_eager(kernel):
    for codec in ("bitmask", "csr"):
        core = encode(sparse(33, 40, 0.5, torch.float32), codec)
        x = torch.randn(2, 33)
        assert choose(x, core, False) == codec
        assert choose(x.clone().requires_grad_(), core, False) == "eager"
        with torch.no_grad():
            assert choose(x.clone().requires_grad_(), core, False) == codec
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert choose(x, core, False) == "eager"
        assert choose(x.bfloat16(), core, False) == "eager"
        with forward_ad.dual_level():
            assert choose(x, core, False) == "eager"


@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize("codec", CODECS)
def test_tangents_shapes_without_data_and_strides_by_every_backend(backend, codec, kernel):
    M = sparse(33, 40, 0.5, torch.float32)
    core, x, tangent = encode(M, codec), torch.randn(2, 33), torch.randn(2, 33)
    product, found = torch.func.jvp(lambda x: apply_core(x, core, False, backend), (x,), (tangent,))
    assert_close((product, found), (x @ M, tangent @ M))
    on_meta = {name: tensor.to("meta") for name, tensor in core.tensors.items()}
    shape = apply_core(x.to("meta"), replace(core, tensors=on_meta), False, backend).shape
    assert shape == (2, 40)
    strided = {name: torch.stack((t, t), 1)[:, 0] for name, t in core.tensors.items()}
    assert_close(apply_core(x, replace(core, tensors=strided), False, backend), x @ M)


def test_a_forced_backend_that_cannot_run_leaves_the_work_to_eager(kernel):
    M = sparse(33, 40, 0.5, torch.float32)
    x = torch.randn(2, 33, requires_grad=True)
    for name in BACKENDS:
        found = apply_core(x, encode(M, "bitmask"), False, name)
        assert torch.equal(found, x @ M)
        assert found.requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["identity", "learned"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_a_block_gives_the_same_by_every_backend(device, mode, codec, backend, kernel):
    block = Block(random_tucker(layout(), mode, codec)).to(device)
    x = torch.randn(3, 20, device=device)
    with torch.no_grad():
        set_backend(block, "eager")
        expected = block(x)
        set_backend(block, backend)
        assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["identity", "learned"])
def test_copies_casts_and_new_weights_are_seen(backend, mode):
    first, second = (Block(random_tucker(layout(), mode, "csr", seed)) for seed in (1, 2))
    x = torch.randn(3, 20)
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    with torch.no_grad():
        set_backend(first, backend)
        expected = first(x)
        assert first.state_dict().keys() == state.keys()
        twin = copy.deepcopy(first)
        assert torch.equal(twin(x), expected)
        twin.q_proj.weight.zero_()
        assert torch.equal(twin.q_proj(x), twin.q_proj.bias.expand(3, -1))
        assert torch.equal(first(x), expected)
        assert_close(first.double()(x.double()).float(), expected, rtol=1e-4, atol=1e-4)
        second = first.float()
        state["o_proj.bias"].add_(1.0)
        second.load_state_dict(state)
        assert_close(second(x), expected + 1, rtol=1e-4, atol=1e-4)


def test_the_kept_core_goes_with_the_tensor_that_it_came_from():
    block = Block(random_tucker(layout(), "identity", "csr"))
    set_backend(block, "dense_core")
    with torch.no_grad():
        block(torch.randn(1, 20))
        linear = block.q_proj
        M = weakref.ref(dense_core.expand(linear._core()))
        assert M() is dense_core.expand(linear._core()), "M should have been kept"
        linear.weight = torch.nn.Parameter(linear.weight + 1)  # as offloading does
        gc.collect()
        assert M() is None
        assert torch.equal(dense_core.expand(linear._core()), linear._core().decode())
        M = weakref.ref(dense_core.expand(linear._core()))
        set_backend(block, None)
        assert M() is None


def test_an_unknown_backend_is_refused():
    with pytest.raises(LestdError, match="no backend 'fastest', expected eager, dense_core"):
        set_backend(Block(random_tucker(layout(), "identity", "csr")), "fastest")


@pytest.mark.parametrize("codec", ["bitmask", "csr"])
def test_compiles_without_a_graph_break_with_the_chosen_backends(codec, kernel):
    block = Block(random_tucker(layout(), "identity", codec, dtype=torch.bfloat16))
    x = torch.randn(1, 20).bfloat16()
    calls = []

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> torch.fx.GraphModule:
        calls.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        compiled = torch.compile(block, backend=backend, fullgraph=True)
        assert_close(compiled(x), block(x), rtol=0.02, atol=0.02)
    if codec == "bitmask":
        assert sum("bitmask_apply" in call for call in calls) >= 4


def test_the_kernels_operators_are_well_formed(kernel):
    tensors = encode(sparse(9, 20, 0.5, torch.float32), "bitmask").tensors
    packed = (tensors["values"], tensors["mask"], 9, 20)
    torch.library.opcheck(torch.ops.lestd.bitmask_expand.default, (*packed, "portable"))
    for call in (torch.ops.lestd.bitmask_apply.default, torch.ops.lestd.bitmask_matmul.default):
        torch.library.opcheck(call, (torch.randn(2, 9), *packed, False, "portable"))
        torch.library.opcheck(call, (torch.randn(2, 20), *packed, True, "portable"))


@pytest.mark.parametrize("backend", ["bitmask", "dense_core", None])
def test_a_model_whose_weights_come_and_go_gives_the_same_logits(backend, tmp_path, kernel):
    directory, _ = save_pair("llama", "identity", "bitmask", tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(directory)
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    places = dict.fromkeys(names, "cpu") | {f"model.layers.{i}": "disk" for i in range(2)}
    offloaded = AutoModelForCausalLM.from_pretrained(
        directory, device_map=places, offload_folder=tmp_path / "offload"
    )
    inputs = torch.arange(8)[None]
    with torch.no_grad():
        set_backend(whole, "eager")
        expected = whole(inputs).logits
        for model in (whole, offloaded):
            set_backend(model, backend)
            for _ in range(2):
                assert_close(model(inputs).logits, expected, rtol=1e-4, atol=1e-4)
    linear = next(m for m in offloaded.modules() if isinstance(m, CompressedLinear))
    assert linear.weight.device.type == "meta"


def test_saving_after_a_forward_writes_the_same_tensors(tmp_path, kernel):
    directory, _ = save_pair("llama", "identity", "bitmask", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(directory)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for backend in (*BACKENDS, None):
        set_backend(model, backend)
        with torch.no_grad():
            model(torch.arange(4)[None])
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())


_MULTIPLY = """
import sys, warnings, torch
from lestd_kernels.backends import apply_core
from lestd_kernels.storage.matrix import EncodedCore
M = torch.ones(4, 9) * (torch.arange(36).reshape(4, 9) % 2)
core, x = EncodedCore.encode(M), torch.ones(1, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        assert torch.equal(apply_core(x, core, False, None), x @ M)
print(core.codec, "lestd" in dir(torch.ops) and hasattr(torch.ops.lestd, "bitmask_apply"))
print(*[w.message for w in caught if "lestd" in str(w.message)], sep="\\n")
"""


def multiply_elsewhere(tmp_path, before: str = "", **environment: str) -> subprocess.Popen[str]:
    """A process that multiplies by a bitmask core, with an empty cache of extensions."""
    variables = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "HOME": str(tmp_path)} | environment
    return subprocess.Popen(
        [sys.executable, "-c", before + _MULTIPLY],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("before", ["", "import sys; sys.modules['fcntl'] = None  # Windows"])
def test_without_a_compiler_or_file_locks_one_warning_and_eager(tmp_path, before):
    out, errors = multiply_elsewhere(tmp_path, before, PATH=str(tmp_path / "empty")).communicate()
    lines = out.splitlines()
    assert lines[0] == "bitmask False", errors
    assert len(lines) == 2
    assert "could not be compiled or loaded" in lines[1]
    assert not list(tmp_path.rglob("*.so"))


def test_the_kernel_is_kept_where_pytorch_keeps_extensions(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert str(bitmask._library_path().parents[1]) == get_default_build_root()


@pytest.mark.slow
def test_two_processes_that_come_at_once_build_the_kernel_once(tmp_path, kernel):
    path = str.join(":", ("/usr/local/bin", "/usr/bin", "/bin"))
    if shutil.which("c++", path=path) is None or shutil.which("ninja", path=path) is None:
        pytest.skip("no compiler on the default path")
    both = [multiply_elsewhere(tmp_path, PATH=path) for _ in range(2)]
    for process in both:
        out, errors = process.communicate()
        assert out.split() == ["bitmask", "True"], errors
    [library] = tmp_path.rglob("*.so")
    assert sorted(p.name for p in library.parent.iterdir()) == ["lestd_bitmask.so", "lock"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bitmask.is_available()
