"""What opens in tensorly reconstructs to the weights that the format computes with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tensorly
import torch
from support.groups import gqa
from support.groups import unfolding as random_unfolding
from support.low_rank import FFN
from tensorly.tt_matrix import TTMatrix
from tensorly.tucker_tensor import TuckerTensor
from torch import Tensor

from lestd_kernels.formats.as_tensorly import Opened, open_modules
from lestd_kernels.methods import METHODS, MethodArgs
from lestd_kernels.tensorize import GroupLayout, ModuleLayout

ATTENTION = gqa(40, 8, 4, 2)
TYPE_AFTER_TYPE = GroupLayout(
    20,
    5,
    (
        ModuleLayout("qkv", "input", tuple((t, i) for t in "qkv" for i in range(3))),
        ModuleLayout("dense", "output", tuple(("o", i) for i in range(3))),
    ),
)
EXPERTS = GroupLayout(
    12,
    10,
    tuple(ModuleLayout(f"experts.{e}.up", "input", (("up", e),)) for e in range(3))
    + tuple(ModuleLayout(f"experts.{e}.down", "output", (("down", e),)) for e in range(3)),
)
CASES = {
    "shared basis": ("lestd", ATTENTION, {"rank_step": 4}),
    "fused": ("tucker", TYPE_AFTER_TYPE, {}),
    "with outliers": ("lestd", ATTENTION, {"rank_step": 4, "keep_outliers": 0.01}),
    "few bits": ("lestd", ATTENTION, {"value_bits": 4, "factor_bits": 8}),
    "feed-forward": ("lestd", FFN, {}),
    "per head": ("per_head_tucker", ATTENTION, {}),
    "per head, fused": ("per_head_tucker", TYPE_AFTER_TYPE, {}),
    "train": ("tt", FFN, {}),
    "train in the norm": ("tt", FFN, {"metric": "norm"}),
    "experts": ("td_moe", EXPERTS, {}),
    "mixed experts": ("td_moe", EXPERTS, {"td_moe_mode": "compress"}),
    "pair": ("svd", ATTENTION, {}),
    "pruned, outliers": ("magnitude", FFN, {"keep_outliers": 0.01}),
}


@pytest.fixture(autouse=True)
def pytorch() -> Iterator[None]:
    tensorly.set_backend("pytorch")
    yield
    tensorly.set_backend("numpy")


def weight_of(opened: Opened, module: ModuleLayout) -> Tensor:
    """W ``(in, out)`` by tensorly's own reconstruction."""
    form = opened.form
    if isinstance(form, TTMatrix):
        W = form.to_matrix()
    elif isinstance(form, TuckerTensor):
        W = form.to_tensor().flatten(1)
        W = W if module.basis_side == "input" else W.T
    elif isinstance(form[0], TuckerTensor):
        slices = torch.stack([one.to_tensor() for one in form], dim=1)
        if len({projection for projection, _ in module.slices}) > 1:  # Type after type.
            slices = slices.transpose(1, 2)
        W = slices.flatten(1) if module.basis_side == "input" else slices.flatten(1).T
    else:
        W = torch.linalg.multi_dot(form) if len(form) > 1 else form[0]
    W = W if opened.scale is None else opened.scale[:, None] * W
    return W if opened.side is None else W + opened.side


@pytest.mark.parametrize("case", CASES)
def test_a_module_is_what_its_parts_make(case: str) -> None:
    method, layout, options = CASES[case]
    args = MethodArgs(**options)
    metrics = {"fc1": torch.linspace(0.1, 4, layout.width)} if args.metric == "norm" else {}
    W, budget = random_unfolding(layout), int(0.5 * layout.elements * 2)
    done = METHODS[method].decompose(W, layout, budget, torch.bfloat16, args, metrics=metrics)
    stored = done.decomposition
    dense, opened = stored.to_dense(), open_modules(stored)
    assert opened.keys() == dense.keys()
    for module in layout.modules:
        found = weight_of(opened[module.name], module)
        torch.testing.assert_close(found.T, dense[module.name], rtol=1e-4, atol=1e-5)
    kinds = {type(one.form) for one in opened.values()}
    expected = {"tt": {TTMatrix}, "tucker": {TuckerTensor}}.get(method)
    assert expected is None or kinds == expected
    assert ("outliers" in case) == all(one.side is not None for one in opened.values())
    assert tensorly.get_backend() == "pytorch"
