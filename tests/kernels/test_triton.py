"""The Triton kernels equal the dense product: on a GPU, or else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support.blocks import Block, layout
from support.families import random_tucker, save_pair
from support.products import DEVICES, DTYPES, assert_is_product, encode, sparse
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lestd_kernels import LestdError, set_backend
from lestd_kernels.backends import BACKENDS, apply_core, choose, expand, triton_bitmask
from lestd_kernels.storage.matrix import EncodedCore

# One element; whole tiles; one row; one column; rows and a tile that begin within a byte.
SHAPES = [(1, 1), (17, 512), (1, 300), (50, 1), (18, 261)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    pytest.importorskip("triton", reason="needs Triton, which the extra 'dev' installs on Linux")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton interprets nothing here: what it runs, it runs on the GPU")
    assert triton_bitmask.is_available(request.param)
    return request.param


def check(M: Tensor, tokens: int, transposed: bool) -> None:
    core, matrix = encode(M, "bitmask"), M.T if transposed else M
    x = torch.randn(tokens, matrix.shape[0], device=M.device).to(M.dtype)
    assert BACKENDS["triton"].runs(x, core)
    # The interpreter does not round to bfloat16, it truncates.
    units = 1 if M.device.type == "cpu" and M.dtype == torch.bfloat16 else 0.5
    assert_is_product(BACKENDS["triton"].apply_core(x, core, transposed), x, matrix, units)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_token(device, shape, dtype, transposed):
    check(sparse(*shape, 0.4, dtype).to(device), 1, transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [2, 16, 17])
def test_several_tokens(device, tokens, dtype, transposed):
    check(sparse(18, 261, 0.4, dtype).to(device), tokens, transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_densities(device, density, transposed):
    M = sparse(19, 70, density, torch.float16).to(device)
    check(M, 1, transposed)
    check(M, 3, transposed)
    assert torch.equal(BACKENDS["triton"].expand(encode(M, "bitmask")), M)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanding(device, dtype):
    for shape in SHAPES:
        M = sparse(*shape, 0.4, dtype).to(device)
        assert torch.equal(expand(encode(M, "bitmask"), "triton"), M)


@pytest.mark.parametrize("programs", [1, 4, 100])
@pytest.mark.parametrize("transposed", [False, True])
def test_sums_of_parts(device, transposed, programs, monkeypatch):
    monkeypatch.setattr(triton_bitmask, "_PROGRAMS", programs)
    M = sparse(40, 300, 0.4, torch.float16).to(device)
    check(M, 1, transposed)
    check(M, 2, transposed)


def test_shapes_of_x_and_its_strides(device):
    M = sparse(18, 40, 0.4, torch.float32).to(device)
    core = encode(M, "bitmask")
    for shape in ((18,), (1, 18), (1, 1, 18), (2, 3, 18)):
        x = torch.randn(*shape, device=device)
        found = apply_core(x, core, False, "triton")
        assert found.shape == (*shape[:-1], 40)
        assert_close(found, x @ M)
    strided = torch.randn(1, 36, device=device)[:, ::2]
    assert_close(apply_core(strided, core, False, "triton"), strided @ M)


def test_the_wide_table_of_starts(device):
    M = sparse(20, 300, 0.4, torch.float16).to(device)
    tensors = encode(M, "bitmask").tensors
    values, mask = tensors["values"], tensors["mask"]
    starts = torch.ops.lestd.triton_starts(values, mask, 20, 300)
    assert starts.dtype == torch.int32
    inside = torch.cat(
        [M[:, :256].count_nonzero(1)[:, None], M[:, 256:].count_nonzero(1)[:, None]], 1
    )
    assert torch.equal(starts[1:], inside.flatten().cumsum(0).to(torch.int32))
    found = torch.ops.lestd.triton_expand(values, mask, starts.to(torch.int64), 20, 300)
    assert torch.equal(found, M)


def test_what_is_kept_is_small_and_follows_the_mask(device):
    M = sparse(64, 512, 0.4, torch.float16).to(device)
    core, x = encode(M, "bitmask"), torch.randn(1, 64, device=device).half()
    kept = triton_bitmask._kept_starts
    starts = kept(core)
    assert kept(core) is starts
    assert starts.nbytes < 0.025 * core.stored_bytes
    core.tensors["mask"].copy_(encode(M.flip(1), "bitmask").tensors["mask"])
    core.tensors["values"].copy_(encode(M.flip(1), "bitmask").tensors["values"])
    assert_is_product(apply_core(x, core, False, "triton"), x, M.flip(1))
    triton_bitmask.release(core.tensors["values"])
    assert kept(core) is not starts


def test_a_mask_that_tells_of_other_values_is_refused_and_never_followed(device):
    good = encode(sparse(20, 300, 0.5, torch.float16).to(device), "bitmask")
    mask = torch.full_like(good.tensors["mask"], 255)
    values = good.tensors["values"]
    bad = EncodedCore("bitmask", 20, 300, good.nnz, {"values": values, "mask": mask})
    with pytest.raises(LestdError, match="marks more or fewer elements than"):
        apply_core(torch.ones(1, 20, device=device).half(), bad, False, "triton")
    starts = torch.ops.lestd.triton_starts(values, mask, 20, 300)
    found = torch.ops.lestd.triton_expand(values, mask, starts, 20, 300)
    whole = values.numel() // 8 * 8
    assert torch.equal(found.reshape(-1)[:256], values[:256])
    assert int(found.count_nonzero()) <= whole


def test_on_cpu_it_is_never_chosen_and_leaves_other_codecs_to_eager(device):
    M, x = sparse(33, 40, 0.5, torch.float32).to(device), torch.randn(1, 33, device=device)
    packed = encode(M, "bitmask")
    assert (choose(x, packed, False) == "triton") == (device == "cuda")
    assert choose(x.requires_grad_(), packed, False) == "eager"
    for codec in ("dense", "csr"):
        assert not BACKENDS["triton"].runs(x.detach(), encode(M, codec))


def test_without_triton_there_is_no_such_backend_and_no_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not triton_bitmask._works.__wrapped__("cpu")


@pytest.mark.gpu
def test_on_a_gpu_it_is_chosen_for_any_number_of_tokens():
    core = encode(sparse(33, 40, 0.5, torch.bfloat16).cuda(), "bitmask")
    for tokens in (1, 16, 512):
        assert choose(torch.randn(tokens, 33, device="cuda").bfloat16(), core, False) == "triton"
    assert torch.equal(expand(core, None), core.decode())


@pytest.mark.gpu
def test_a_core_of_more_than_two_billion_elements():
    rows, columns = 2**16 + 1, 2**15 + 8
    mask = torch.zeros(rows * columns // 8, dtype=torch.uint8, device="cuda")
    mask[-2:] = 255
    values = torch.arange(1.0, 17.0, device="cuda").half()
    core = EncodedCore("bitmask", rows, columns, 16, {"values": values, "mask": mask})
    for tokens in (1, 2):
        x = torch.zeros(tokens, rows, device="cuda").half()
        x[:, -1] = 1
        found = apply_core(x, core, False, "triton")
        assert torch.equal(found[:, -16:], values.expand(tokens, -1))
        assert int(found.count_nonzero()) == 16 * tokens
        x = torch.ones(tokens, columns, device="cuda").half()
        found = apply_core(x, core, True, "triton")
        assert torch.equal(found[:, -1], values.sum().expand(tokens))
        assert int(found.count_nonzero()) == tokens
    assert torch.equal(BACKENDS["triton"].expand(core)[-1, -16:], values)


@pytest.mark.parametrize(("family", "mode"), [("llama", "identity"), ("opt", "learned")])
def test_a_whole_model_gives_the_same_logits(device, family, mode, tmp_path):
    directory, dense = save_pair(family, mode, "bitmask", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(directory).to(device)
    inputs = torch.arange(5, device=device)[None]
    with torch.no_grad():
        expected = dense.to(device)(inputs).logits
        set_backend(model, "triton")
        assert_close(model(inputs).logits, expected, rtol=1e-4, atol=1e-4)
        found = [model(inputs[:, :1]).logits for _ in range(2)]
        assert_close(found[0], expected[:, :1], rtol=1e-4, atol=1e-4)
        assert torch.equal(*found)


def test_compiles_without_a_graph_break(device):
    block = Block(random_tucker(layout(), "identity", "bitmask")).to(device)
    set_backend(block, "triton")
    x = torch.randn(1, 20, device=device)
    calls: list[str] = []

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> torch.fx.GraphModule:
        calls.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        compiled = torch.compile(block, backend=backend, fullgraph=True)
        assert_close(compiled(x), block(x))
    assert sum("triton_apply" in call for call in calls) >= 4


def test_the_operators_are_well_formed(device):
    tensors = encode(sparse(9, 20, 0.5, torch.float32).to(device), "bitmask").tensors
    packed = (tensors["values"], tensors["mask"])
    ops = torch.ops.lestd
    torch.library.opcheck(ops.triton_starts.default, (*packed, 9, 20))
    starts = ops.triton_starts(*packed, 9, 20)
    torch.library.opcheck(ops.triton_expand.default, (*packed, starts, 9, 20))
    x = torch.randn(1, 9, device=device)
    torch.library.opcheck(ops.triton_apply.default, (x, *packed, starts, 9, 20, False))


_COMPILE = """
import warnings
warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lestd_kernels.backends import triton_kernels as kernels

def build(kernel, capability, value, **constants):
    pointers = {"values": value, "x": value, "out": value, "M": value, "mask": "u8"}
    pointers |= {"starts": "i32", "counts": "i32", "sums": "fp32"}
    signature = {
        name: "constexpr" if name in constants else
        "*" + pointers[name] if name in pointers else "i32"
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    print(kernel.__name__, capability, value, len(made.asm["cubin"]) > 0)

for capability, value in ((75, "fp16"), (80, "bf16"), (90, "bf16"), (90, "fp32"), (100, "bf16")):
    for kernel in (kernels.count, kernels.expand, kernels.add):
        build(kernel, capability, value)
    for transposed in (False, True):
        for one in (True, False)[: 1 if value == "fp32" else 2]:
            build(kernels.apply, capability, value, TRANSPOSED=transposed, ONE_TOKEN=one)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_that_are_not_there(tmp_path):
    pytest.importorskip("triton")
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", _COMPILE], capture_output=True, text=True, env=environment
    )
    lines = run.stdout.splitlines()
    assert run.returncode == 0, run.stderr
    assert len(lines) == 33
    assert all(line.endswith("True") for line in lines)
