"""The worker that decomposes: from a shard's tensors to a payload and a result."""

import math
from pathlib import Path

import pytest
import torch
from support.tasks import LAYOUT, task

from lestd_kernels.errors import LestdError
from orchestrator.execution.executor import WorkerSpec
from orchestrator.execution.serial import SerialExecutor
from workers.contracts import Failure, Result
from workers.decompose import DecomposeWorker


def run(directory: Path, scale: float = 1.0) -> Result | Failure:
    directory.mkdir()
    return DecomposeWorker(str(directory)).run(task(directory / "shard.safetensors", scale))


@pytest.mark.parametrize("exponent", [70, -100])
def test_weights_of_any_magnitude_have_a_result(tmp_path: Path, exponent: int) -> None:
    plain = run(tmp_path / "plain")
    scaled = run(tmp_path / "scaled", 2.0**exponent)
    assert isinstance(plain, Result)
    assert isinstance(scaled, Result)
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-9)
    assert scaled.squared_norm == pytest.approx(plain.squared_norm * 4.0**exponent, rel=1e-9, abs=0)
    assert (scaled.ranks, scaled.nnz) == (plain.ranks, plain.nnz)


def test_weights_too_large_for_the_factorization_are_refused_by_name(tmp_path: Path) -> None:
    failure = run(tmp_path / "run", 3.4e38)
    assert isinstance(failure, Failure)
    assert failure.error_type == "LestdError"
    assert failure.message.startswith("block: the core of ")


def test_a_result_says_how_long_every_stage_took_and_on_what(tmp_path: Path) -> None:
    result = run(tmp_path / "run")
    assert isinstance(result, Result)
    assert set(result.seconds) == {"read", "stage1", "rank_search", "stage2", "error", "write"}
    assert all(seconds > 0 for seconds in result.seconds.values())
    assert result.device.startswith("cpu ")
    assert result.device.endswith(torch.backends.cpu.get_cpu_capability())
    heads = [(s.projection, s.head) for s in result.slices]
    assert heads == list(LAYOUT.slices)
    assert math.fsum(s.squared_norm for s in result.slices) == pytest.approx(result.squared_norm)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_one_sentence(tmp_path: Path) -> None:
    item = task(tmp_path / "shard.safetensors", 1.0)
    spec = WorkerSpec(DecomposeWorker, {"payload_dir": str(tmp_path), "device": "cuda"})
    with pytest.raises(LestdError, match=r"sees no GPU; use --device cpu"):
        list(SerialExecutor().map(spec, [item]))
