"""Every decoder family that Transformers has: compressed, loaded elsewhere, and computing alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.compressing import compress
from support.every_family import check_heads, save_any
from support.fresh_logits import logits_and_tokens

from lestd_kernels.errors import LestdError
from orchestrator.architectures.coverage import coverage, decoder_families
from orchestrator.config.run import RunConfig
from orchestrator.model.export import export_dense
from orchestrator.planning.plan import make_plan
from orchestrator.source.checkpoint import resolve_source
from workers.host.loading import load_model

NOT_SEEN = {
    "bitnet": "a norm stands between heads and output",
    "kosmos-2": "a norm stands between heads and output",
    "cpmant": "it puts a prompt of its own before the tokens",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", decoder_families())
def test_a_compressed_model_computes_as_its_dense_export(family: str, tmp_path: Path) -> None:
    known = coverage(family)
    if known is None:
        pytest.skip("has an encoder")
    if known.known == "untried":
        pytest.skip(known.why[0])
    dense = save_any(family, tmp_path / "dense")
    if known.known == "refused":
        source = resolve_source(str(dense))
        with pytest.raises(LestdError):
            make_plan(source, RunConfig(keep=0.6))
        return
    runs = [("all", "svd")]
    if known.attention:
        runs.append(("attention", "lestd"))
        source = resolve_source(str(dense))
        group = source.architecture.groups(source.config, source.index, "attention")[0]
        if family not in NOT_SEEN:
            check_heads(load_model(str(dense), "float32", "cpu"), group)
    models = []
    for scope, method in runs:
        options = ("--scope", scope, "--method", method, "--keep", 0.6)
        out = compress(dense, tmp_path / scope, *options)
        export_dense(out, tmp_path / f"{scope}-dense", torch.float32)
        models += [out, tmp_path / f"{scope}-dense"]
    original, *found = logits_and_tokens(tmp_path / "found.safetensors", dense, *models)
    for (logits, tokens), (expected, expected_tokens) in zip(found[::2], found[1::2], strict=True):
        most = 1e-3 * float(expected.abs().max())
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=most)
        assert torch.equal(tokens, expected_tokens)
        assert not torch.allclose(logits, original[0])
