"""The compressed modules alone: arithmetic, sharing of U1, copies, compilation."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from contextlib import suppress

import pytest
import torch
from support.blocks import Block, layout
from support.families import random_tucker
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lestd_kernels.modules.registry import set_backend
from lestd_kernels.modules.shared_tucker_linear import (
    Factor,
)
from lestd_kernels.storage.codecs import CODECS

MODES = ["identity", "learned"]


def applications(factor: Factor) -> list[Tensor]:
    """Inputs that `factor` is applied to from now on."""
    inputs: list[Tensor] = []
    factor.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    return inputs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(20, 6, 3, 11, 5), (7, 5, 1, 7, 1), (16, 8, 4, 3, 8)])
def test_modules_equal_the_dense_reconstruction(mode, codec, bias, sizes):
    width, head_dim, heads, *ranks = sizes
    if mode == "learned" and ranks[1] == 1:
        ranks[1] = 2
    group = random_tucker(layout(width, head_dim, heads), mode, codec, ranks=tuple(ranks))
    block = Block(group, bias)
    for name, weight in group.to_dense().items():
        module = block.get_submodule(name)
        for shape in ((), (4,), (2, 3), (2, 1, 3), (0, 5)):
            x = torch.randn(*shape, weight.shape[1])
            expected = nn.functional.linear(x, weight, module.bias)
            assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_core_without_a_value_gives_the_bias(mode):
    block = Block(random_tucker(layout(), mode, "csr", density=0.0))
    assert torch.equal(block.q_proj(torch.randn(2, 20)), block.q_proj.bias.expand(2, -1))


@pytest.mark.parametrize("mode", MODES)
def test_autocast_gives_the_dtype_that_a_linear_module_gives(mode):
    block = Block(random_tucker(layout(), mode, "bitmask"))
    x = torch.randn(2, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = block.q_proj(x), nn.Linear(20, 24)(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert_close(found.float(), block.q_proj(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("codec", CODECS)
def test_no_tensor_as_large_as_the_weight_is_made(codec):
    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.largest = max(self.largest, out.numel())
            return out

    block = Block(random_tucker(layout(64, 32, 4), "identity", codec, ranks=(9, 5)))
    set_backend(block, "eager")
    with torch.no_grad(), Sizes() as sizes:
        block(torch.randn(2, 64))
    assert 9 * 4 * 5 <= sizes.largest < 64 * 4 * 32 / 4


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_u1_is_applied_once_per_block_and_input(context):
    block = Block(random_tucker(layout(), "identity", "bitmask"))
    alone = [block.get_submodule(f"{p}_proj") for p in "qkv"]
    inputs = applications(block.lestd_u1)
    with context():
        first, second = torch.randn(2, 20), torch.randn(2, 20)
        expected = block.o_proj(alone[0](first) + alone[1](first) * alone[2](first))
        inputs.clear()
        assert torch.equal(block(first), expected)
        block(second)
    assert [x.shape[-1] for x in inputs] == [20, 17, 20, 17]
    assert inputs[0] is first
    assert inputs[2] is second


def test_input_changed_in_place_between_two_readers_is_multiplied_anew():
    class Changing(Block):
        def forward(self, x: Tensor) -> Tensor:
            q = self.q_proj(x)
            x.mul_(2)
            return q - self.q_proj(x)

    block = Changing(random_tucker(layout(), "identity", "dense"), bias=False)
    x = torch.randn(2, 20)
    with torch.no_grad():
        expected = -block.q_proj(x)
        assert_close(block(x), expected)


def test_no_activation_outlives_the_forward_even_after_an_error():
    class Failing(Block):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            assert seen[-1]() is not None, "the product should be kept for the next reader"
            raise RuntimeError("stop")

    seen: list[weakref.ref[Tensor]] = []
    group = random_tucker(layout(), "identity", "dense")
    for block in (Block(group), Failing(group)):
        block.lestd_u1.register_forward_hook(
            lambda module, args, out: (
                seen.extend([weakref.ref(args[0]), weakref.ref(out)])
                if args[0].shape[-1] == 20
                else None
            )
        )
        with torch.no_grad(), suppress(RuntimeError):
            block(torch.randn(2, 20))
    gc.collect()
    assert [tensor() for tensor in seen] == [None] * 4


def test_backward_between_calls_with_the_same_input():
    """Outside of a block nothing is shared, so a freed autograd graph is never met again."""
    block = Block(random_tucker(layout(), "identity", "bitmask"))
    x = torch.randn(2, 20, requires_grad=True)
    for name in ("q_proj", "q_proj", "k_proj"):
        block.get_submodule(name)(x).sum().backward()
    block(x).sum().backward()
    block(x).sum().backward()


def test_a_forward_in_another_thread_leaves_the_products_of_this_one_alone():
    other = Block(random_tucker(layout(), "identity", "bitmask"))

    class Interrupted(Block):
        def forward(self, x: Tensor) -> Tensor:
            self.q_proj(x)
            thread = threading.Thread(target=other, args=(x,))
            thread.start()
            thread.join()
            return self.k_proj(x)

    block = Interrupted(random_tucker(layout(), "identity", "bitmask"))
    inputs = applications(block.lestd_u1)
    block(torch.randn(2, 20))
    assert len(inputs) == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_use_their_own_factors(mode, how):
    block = Block(random_tucker(layout(), mode, "csr"))
    x = torch.randn(2, 20)
    expected = block(x)
    if how == "deepcopy":
        twin = copy.deepcopy(block)
    else:
        buffer = io.BytesIO()
        torch.save(block, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.lestd_u1.weight.zero_()
    assert torch.equal(block(x), expected)
    assert torch.equal(twin.q_proj(x), twin.q_proj.bias.expand(2, -1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("codec", CODECS)
def test_gradients_equal_those_of_the_dense_reconstruction(mode, codec):
    group = random_tucker(layout(), mode, codec)
    block = Block(group, bias=False)
    W = {name: weight.requires_grad_() for name, weight in group.to_dense().items()}
    x = torch.randn(3, 20, requires_grad=True)
    block(x).square().sum().backward()
    found, x.grad = x.grad, None
    q, k, v = (nn.functional.linear(x, W[f"{p}_proj"]) for p in "qkv")
    nn.functional.linear(q + k * v, W["o_proj"]).square().sum().backward()
    assert_close(found, x.grad, rtol=1e-4, atol=1e-3)
    if mode == "identity":  # dL/dM = U1^T (dL/dW_s) U2 at the places of the stored values
        core = group.cores["o_proj"]
        dW = W["o_proj"].grad.reshape(20, 3, 8)
        dM = torch.einsum("ar,asb,bc->rsc", group.U1, dW, group.U2).flatten(1)
        places = torch.ones_like(dM, dtype=torch.bool) if codec == "dense" else core.decode() != 0
        assert_close(block.o_proj.weight.grad, dM[places], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("codec", CODECS)
def test_compiles_without_a_graph_break_and_still_applies_u1_once(mode, codec):
    block = Block(random_tucker(layout(), mode, codec))
    graphs = []

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    x = torch.randn(2, 20)
    set_backend(block, "eager")
    model = nn.Sequential(block)
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        assert torch.equal(compiled(x), block(x))
    matmuls = [node for node in graphs[0].graph.nodes if "matmul" in str(node.target)]
    # U1 of the input; for q, k, v the core and U2; for o: U2, the core, U1.
    assert len(matmuls) == 1 + 3 * 2 + 3


def test_the_first_forward_of_a_thread_may_be_a_compiled_one():
    block = Block(random_tucker(layout(), "identity", "bitmask"))
    set_backend(block, "eager")
    x = torch.randn(2, 20)
    found = []

    def compile_and_run() -> None:
        with torch.no_grad():
            found.append(torch.compile(block, backend="eager", fullgraph=True)(x))

    thread = threading.Thread(target=compile_and_run)
    thread.start()
    thread.join()
    with torch.no_grad():
        assert torch.equal(found[0], block(x))


def test_projections_compiled_one_by_one_are_compiled_once_and_give_only_their_output():
    block = Block(random_tucker(layout(), "identity", "bitmask"))
    x = torch.randn(2, 20)
    graphs = []

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        expected = block(x)
        for name in ("q_proj", "k_proj", "v_proj"):
            block.get_submodule(name).compile(backend=backend, fullgraph=True)
        for _ in range(3):
            assert torch.equal(block(x.clone()), expected)
    assert [len(graph.graph.output_node().args[0]) for graph in graphs] == [1, 1, 1]
