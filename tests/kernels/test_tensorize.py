import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.groups import fused, gqa, mha

from lestd_kernels.tensorize import fold_weights, unfold_weights

LAYOUTS = [mha(12, 3, 4), gqa(10, 4, 4, 2), gqa(7, 5, 3, 1), fused(9, 2, 3)]


def recognizable(layout):
    """Weights whose element says which projection, head, row and column of its slice it is."""
    slices = {}
    for s, (projection, head) in enumerate(layout.slices):
        row = torch.arange(layout.width)[:, None]
        column = torch.arange(layout.head_dim)
        slices[projection, head] = 10_000.0 * s + 100 * row + column
    weights = {}
    for module in layout.modules:
        side_by_side = torch.cat([slices[s] for s in module.slices], dim=1)
        weights[module.name] = side_by_side.T if module.basis_side == "input" else side_by_side
    return slices, weights


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_slice_lies_where_its_head_is(layout):
    slices, weights = recognizable(layout)
    W = unfold_weights(weights, layout).view(layout.width, -1, layout.head_dim)
    for s, name in enumerate(layout.slices):
        assert torch.equal(W[:, s], slices[name])


def test_heads_own_rows_of_q_and_columns_of_o():
    # A square weight: splitting the wrong axis would not fail by its shape.
    layout = mha(6, 3, 2)
    x, a = torch.randn(5, 6), torch.randn(5, 6)
    weights = {module.name: torch.randn(6, 6) for module in layout.modules}
    W = unfold_weights(weights, layout).view(6, 8, 3)
    queries = torch.nn.functional.linear(x, weights["q_proj"]).view(5, 2, 3)
    for head in range(2):
        torch.testing.assert_close(x @ W[:, head], queries[:, head])
    heads = a.view(5, 2, 3)
    out = sum(heads[:, head] @ W[:, 6 + head].T for head in range(2))
    torch.testing.assert_close(out, torch.nn.functional.linear(a, weights["o_proj"]))


@settings(deadline=None, max_examples=25)
@given(
    d=st.integers(1, 9),
    p=st.integers(1, 5),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_fold_inverts_unfold(d, p, heads, dtype):
    layout = gqa(d, p, *heads)
    weights = {m.name: torch.randn(layout.weight_shape(m)).to(dtype) for m in layout.modules}
    unfolding = unfold_weights(weights, layout)
    assert unfolding.shape == (d, len(layout.slices) * p)
    assert unfolding.dtype == torch.float32
    assert unfolding.numel() == layout.elements == sum(w.numel() for w in weights.values())
    folded = fold_weights(unfolding, layout)
    assert folded.keys() == weights.keys()
    for name, weight in weights.items():
        assert folded[name].is_contiguous()
        assert torch.equal(folded[name], weight.float())


def test_a_weight_of_another_shape_is_refused():
    layout = gqa(10, 4, 4, 2)
    weights = {m.name: torch.zeros(layout.weight_shape(m)) for m in layout.modules}
    weights["k_proj"] = torch.zeros(16, 10)
    with pytest.raises(
        ValueError, match=r"k_proj\.weight has shape \(16, 10\), expected \(8, 10\)"
    ):
        unfold_weights(weights, layout)
