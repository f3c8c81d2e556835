"""A block of a compressed model, read from disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.exports import narrow_pair
from tensorly.tucker_tensor import TuckerTensor

from lestd_kernels.errors import LestdError
from orchestrator.model.reader import open_compressed


def test_a_block_opens_in_tensorly(tmp_path: Path) -> None:
    model = open_compressed(narrow_pair(tmp_path, torch.bfloat16))
    block = model.groups[1].entry["path"]
    opened, dense = model.open_block(block), model.groups[1].to_dense()
    assert {f"{block}.{name}.weight" for name in opened} == dense.keys()
    q = opened["q_proj"].form
    assert isinstance(q, TuckerTensor)
    core, (U1, _, U2) = q
    W = torch.einsum("arb,da,pb->rpd", core, U1, U2).flatten(0, 1)
    torch.testing.assert_close(W, dense[f"{block}.q_proj.weight"], rtol=1e-4, atol=1e-5)
    with pytest.raises(LestdError, match=r"no compressed block 'layers\.9'; it has .*self_attn"):
        model.open_block("layers.9")
