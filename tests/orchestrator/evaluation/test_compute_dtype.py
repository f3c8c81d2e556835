"""The compute dtype of `auto`: never one that the CPU emulates, and said wherever it counts."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLE
from support.cli import lestd
from support.families import save_tiny

from lestd_kernels.backends.cpu import emulated
from orchestrator.evaluation import model as evaluation
from orchestrator.manifest.manifest import Manifest
from workers.evaluation.perplexity import EvalWorker
from workers.host import loading
from workers.host.loading import auto_dtype

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# What Linux calls the instructions, of x86 and of ARM.
NATIVE = {
    BF16: {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"},
    FP16: {"avx512_fp16", "avx_ne_convert"},
}


@pytest.mark.skipif("ONEDNN_MAX_CPU_ISA" in os.environ, reason="oneDNN may not use all it has")
def test_what_is_emulated_is_what_the_cpu_has_no_instructions_for() -> None:
    found = re.search(r"(?m)^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text())
    assert found is not None
    flags = set(found[1].split())
    for dtype, names in NATIVE.items():
        assert emulated(dtype) == (not flags & names)
    assert not emulated(FP32)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is x86")
def test_a_cpu_of_avx2_emulates_both() -> None:
    """Whatever this one has: oneDNN can be kept from using it."""
    code = (
        "import torch; from lestd_kernels.backends.cpu import emulated\n"
        "print(emulated(torch.bfloat16), emulated(torch.float16), emulated(torch.float32))"
    )
    limited = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    run = subprocess.run([sys.executable, "-c", code], env=limited, capture_output=True, text=True)
    assert run.stdout == "True True False\n", run.stderr


@pytest.mark.parametrize("stated", [True, False], ids=["by config.json", "by the tensors"])
@pytest.mark.parametrize("stored", [BF16, FP16, FP32], ids=str)
def test_auto_is_never_emulated(
    stored: torch.dtype, stated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(save_tiny("llama", tmp_path, stored))
    if not stated:
        config = json.loads((tmp_path / "config.json").read_text())
        del config["dtype"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert not emulated(auto_dtype(model, "cpu")[0])
    assert EvalWorker(model)._model.dtype == auto_dtype(model, "cpu")[0]
    for slow in ((), (BF16,), (BF16, FP16)):
        monkeypatch.setattr(loading, "emulated", slow.__contains__)
        assert auto_dtype(model, "cpu") == (FP32 if stored in slow else stored, stored)
        assert auto_dtype(model, "cuda") == (stored, stored)


def test_the_choice_is_said_and_kept_and_pieces_of_two_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(EXAMPLE / "model", tmp_path / "model"))
    text = tmp_path / "text.txt"
    text.write_bytes((EXAMPLE / "wikitext-2-test.txt").read_bytes()[:2000])
    evaluate = ("evaluate", model, "--text", text, "--window", 64, "--max-windows", 2)
    serial = ("--executor", "serial")
    found = {}
    for expected, slow in (("bfloat16", ()), ("float32", (BF16,))):
        evaluation._say_other.cache_clear()
        monkeypatch.setattr(loading, "emulated", slow.__contains__)
        result = lestd(*evaluate, *serial, "--json")
        [found[expected]] = json.loads(result.out)["models"]
        assert found[expected]["dtype"] == expected
        assert result.err.count("this CPU only emulates bfloat16") == len(slow)
        shown = lestd(*evaluate, *serial)
        assert f"2 windows of 64, 128 tokens, {expected}" in shown.out
        [asked] = json.loads(lestd(*evaluate, *serial, "--json", "--dtype", expected).out)["models"]
        assert asked == found[expected], "asked for by its name it is the same evaluation"
    ids = {one["evaluation_id"]: dtype for dtype, one in found.items()}
    rows = Manifest(tmp_path / "model.eval").evaluations().to_pylist()
    assert {(row["evaluation_id"], row["dtype"]) for row in rows} == set(ids.items())
    assert len(ids) == 2
    assert found["bfloat16"]["nll"] != found["float32"]["nll"]
