"""An error that ranks and bits do not explain is said; one that they explain never is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli import Finished, lestd
from support.families import save_tiny
from support.low_rank import layout_of, metrics_of
from torch import Tensor

from lestd_kernels.linalg import low_rank
from lestd_kernels.methods import METHODS
from lestd_kernels.methods.common.base import ACTIVATION, LOSS
from lestd_kernels.storage import few_bits as packing
from orchestrator.config.run import RunConfig
from orchestrator.manifest.result_rows import is_far
from orchestrator.planning.plan import make_plan
from orchestrator.source.checkpoint import resolve_source
from workers.checkpoint.tensors import read_header
from workers.contracts import Result, Task
from workers.decompose import DecomposeWorker

# Of values, of factors, and the share of bytes that is kept.
BITS = ((16, 16, 0.6), (16, 16, 0.3), (8, 8, 0.9), (4, 4, 0.3), (3, 8, 0.9), (2, 8, 0.3))


def few_bits(method: str) -> tuple[tuple[int, int, float], ...]:
    return BITS[:2] if method in ("tucker", "hosvd", "watersic") else BITS


def run(directory: Path, task: Task) -> Result | None:
    outcome = DecomposeWorker(str(directory)).run(task)
    return outcome if isinstance(outcome, Result) else None


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama-gqa", torch.bfloat16), ("mixtral", torch.float16), ("llama-gqa", torch.float32)],
)
def test_no_ordinary_block_is_far(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = resolve_source(str(save_tiny(family, tmp_path / "model", dtype)))
    scopes = ("attention", "experts" if family == "mixtral" else "ffn")
    tasks = {}
    for scope in scopes:
        config = RunConfig(keep=0.5, scope=scope, method="svd", rank_step=4)
        tasks[scope] = make_plan(source, config).tasks[0].task
    for name, method in METHODS.items():
        if method.metrics[0] in (ACTIVATION, LOSS) or (family, name) == ("llama-gqa", "td_moe"):
            continue
        task = tasks["experts" if name == "td_moe" else "attention"]
        for value_bits, factor_bits, keep in few_bits(name):
            args = task.method_args | {"value_bits": value_bits, "factor_bits": factor_bits}
            budget = int(task.dense_bytes * keep)
            result = run(tmp_path, replace(task, method=name, method_args=args, byte_budget=budget))
            assert result is not None
            assert result.most_expected_squared_error is not None
            assert not is_far(vars(result)), (name, value_bits, keep)


@pytest.fixture
def calibrated(tmp_path: Path) -> Task:
    """A block of random weights and the activations of its inputs, as workers read them."""
    layout = layout_of("gqa")
    generator = torch.Generator().manual_seed(0)
    weights = {
        module.name: 0.1 * torch.randn(*layout.weight_shape(module), generator=generator).bfloat16()
        for module in layout.modules
    }
    save_file(weights, tmp_path / "weights.safetensors")
    grams = {}
    for name, one in metrics_of(layout, ACTIVATION).items():
        module, _, statistic = name.partition(".")
        reads = next(m.reads for m in layout.modules if m.name == module)
        grams[f"{reads}.{statistic}".rstrip(".")] = one
    save_file(grams, tmp_path / "grams.safetensors")
    return Task(
        task_id="task",
        layer=0,
        block="block",
        tensor_prefix="block",
        tensors=read_header(tmp_path / "weights.safetensors"),
        layout=layout,
        method="",
        method_args={"metric": ACTIVATION, "rank_step": 4},
        byte_budget=int(1.2 * layout.elements),
        value_dtype="bfloat16",
        predicted_memory_bytes=0,
        metric_tensors=read_header(tmp_path / "grams.safetensors"),
    )


CALIBRATED = [m for m in METHODS if ACTIVATION in METHODS[m].metrics and m != "td_moe"]


@pytest.mark.parametrize("method", CALIBRATED)
def test_no_calibrated_block_is_far(method: str, calibrated: Task, tmp_path: Path) -> None:
    for value_bits, factor_bits, _ in few_bits(method):
        args = calibrated.method_args | {"value_bits": value_bits, "factor_bits": factor_bits}
        result = run(tmp_path, replace(calibrated, method=method, method_args=args))
        assert result is not None
        known = result.most_expected_squared_error is not None
        assert known == (method not in ("asvd", "lestd"))
        assert not is_far(vars(result))


def test_the_fewest_bits_of_the_modules_count(calibrated: Task, tmp_path: Path) -> None:
    """A byte below the size of 8 bits one module has 4."""
    sizes = (ref.shape[0] * ref.shape[1] for ref in calibrated.tensors.values())
    budget = sum(packing.values_bytes(size, 8, 2) for size in sizes) - 1
    more = {"method_args": {}, "metric_tensors": {}, "byte_budget": budget}
    result = run(tmp_path, replace(calibrated, method="rtn", **more))
    assert result is not None
    assert {one["own"][0]["value_bits"] for one in result.format["modules"].values()} == {4, 8}
    assert result.value_bits == 4
    assert not is_far(vars(result))


def lost_scales(stored: Any) -> Any:
    """`packing.quantize` as if scales below float16's normal numbers became zeros."""

    def quantize(*args: Any, **more: Any) -> tuple[Tensor, Tensor, int]:
        codes, scales, exponent = stored(*args, **more)
        return codes, torch.zeros_like(scales) if exponent else scales, 0

    return quantize


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("method", ["rtn", "magnitude", "lestd", "svd"])
def test_lost_scales_are_far(
    method: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(keep=0.6, method=method, value_bits=bits, factor_bits=8)
    source = resolve_source(str(save_tiny("llama", tmp_path / "model", torch.float16)))
    for shard in (tmp_path / "model").glob("*.safetensors"):
        save_file({n: t / 4096 for n, t in load_file(shard).items()}, shard, {"format": "pt"})
    task = make_plan(source, config).tasks[0].task
    sound = run(tmp_path, task)
    monkeypatch.setattr("lestd_kernels.storage.matrix.quantize", lost_scales(packing.quantize))
    broken = run(tmp_path, task)
    assert sound is not None
    assert broken is not None
    assert (is_far(vars(sound)), is_far(vars(broken))) == (False, True)
    assert broken.relative_error > 0.9


def test_a_broken_factor_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny("llama", tmp_path / "model")

    def compress(name: str, *more: str) -> Finished:
        options = ("--keep", 0.5, "--method", "svd", "--executor", "serial", *more)
        return lestd("compress", model, "--out", tmp_path / name, *options)

    sound = compress("sound", "--json")
    assert json.loads(sound.out)["far_from_expected"] == []
    assert "far more" not in sound.err
    fit = low_rank.least_squares
    monkeypatch.setattr(low_rank, "least_squares", lambda A, X: fit(A, X).flip(0))
    broken = compress("broken", "--json")
    groups = [f"model.layers.{layer}.self_attn" for layer in range(2)]
    assert json.loads(broken.out)["far_from_expected"] == groups
    assert broken.err.count(", far more than its ranks and bits explain, ") == 2
    again = compress("broken")
    said = f"2 of 2 blocks have an error far beyond what their ranks and bits explain: {groups[0]}"
    assert said in again.err
    rows = json.loads(lestd("status", tmp_path / "broken", "--json").out)["layers"]
    assert [is_far(row) for row in rows] == [True, True]
    assert lestd("status", tmp_path / "broken").out.count("far") == 2
