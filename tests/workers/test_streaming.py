"""One group is read and one written while another is decomposed: order, bytes and memory."""

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import BinaryIO

import psutil
import pytest
from safetensors.torch import load_file, save_file
from support.cli import start_lestd
from support.paths import ROOT
from support.tasks import task

from lestd_kernels.errors import LestdError
from lestd_kernels.methods import METHODS
from orchestrator.compression.pipeline import compress_model
from orchestrator.config.run import RunConfig
from orchestrator.execution.ray.executor import RayExecutor
from orchestrator.execution.serial import SerialExecutor
from orchestrator.manifest.manifest import Manifest
from orchestrator.source.checkpoint import resolve_source
from workers import decompose
from workers.contracts import Failure, Result, Task
from workers.decompose import STATIONS, DecomposeWorker
from workers.storage.files import atomic_write

sys.path.append(str(ROOT / "benchmarks"))

from make_checkpoint import make_checkpoint, make_config

SECONDS = 60
"""Until something that has to happen counts as not happening."""


def tasks(directory: Path, count: int) -> list[Task]:
    """Tasks of different weights, told apart by their budgets as well as by their names."""
    made = []
    for i in range(count):
        one = task(directory / f"{i}.safetensors", scale=i + 1)
        budget = one.byte_budget + 64 * i
        made.append(replace(one, task_id=f"task{i}", block=f"block{i}", byte_budget=budget))
    return made


def spoil(path: Path) -> None:
    tensors = load_file(path)
    tensors["o_proj.weight"][3, 4] = float("nan")
    save_file(tensors, path)


def before(monkeypatch: pytest.MonkeyPatch, hooks: dict[int, Callable[[], object]]) -> None:
    """Have something done at the start of the decomposition of a task, given its budget."""
    method = METHODS["lestd"]

    def hooked(prepared, byte_budget, curve_budgets, *, reuse):
        hooks.get(byte_budget, lambda: None)()
        return method.encode(prepared, byte_budget, curve_budgets, reuse=reuse)

    monkeypatch.setitem(METHODS, "lestd", replace(method, encode=hooked))


def test_reading_and_writing_go_on_beside_a_decomposition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, bad, second, third = made = tasks(tmp_path, 4)
    alone = [DecomposeWorker(str(tmp_path)).run(one) for one in (first, second, third)]
    spoil(tmp_path / "1.safetensors")
    begun, go_on, second_begun = Event(), Event(), Event()
    futures = []

    def hold() -> None:
        begun.set()
        assert go_on.wait(SECONDS)

    def write_beside_the_second(path: Path, write: Callable[[BinaryIO], object]) -> None:
        assert second_begun.wait(SECONDS)
        atomic_write(path, write)

    def let_the_first_be_written() -> None:
        second_begun.set()
        futures[0].result(SECONDS)

    before(monkeypatch, {first.byte_budget: hold, second.byte_budget: let_the_first_be_written})
    monkeypatch.setattr(decompose, "atomic_write", write_beside_the_second)
    (tmp_path / "payloads").mkdir()
    worker = DecomposeWorker(str(tmp_path / "payloads"))
    with ThreadPoolExecutor(len(made)) as pool:
        futures.append(pool.submit(worker.run, first))
        assert begun.wait(SECONDS)
        # Read beside the first one's decomposition; its failure has its own name.
        failure = worker.run(bad)
        assert isinstance(failure, Failure)
        assert failure.task_id == bad.task_id
        assert "o_proj.weight" in failure.message
        assert not futures[0].done()
        # Only one is read ahead: the third is not there yet, and nobody misses it.
        futures.append(pool.submit(worker.run, second))
        away = (tmp_path / "3.safetensors").rename(tmp_path / "away")
        futures.append(pool.submit(worker.run, third))
        time.sleep(0.2)
        away.rename(tmp_path / "3.safetensors")
        go_on.set()
        # The first is written while the second is decomposed, which waits for the payload.
        results = [future.result(SECONDS) for future in futures]
    assert all(isinstance(result, Result) for result in results), results
    assert [r.sha256 for r in results] == [r.sha256 for r in alone]
    assert {p.name for p in (tmp_path / "payloads").iterdir()} == {r.payload for r in results}


@pytest.mark.parametrize("place", ["read", "decompose", "write"])
def test_a_failure_anywhere_names_its_task_and_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    payloads = tmp_path / "payloads"
    made = tasks(tmp_path, 6)
    bad = made[2]
    if place == "read":
        os.truncate(tmp_path / "2.safetensors", 1000)
    if place == "decompose":
        before(monkeypatch, {bad.byte_budget: lambda: 1 / 0})
    if place == "write":  # Every task of this one; what the next ones need comes too late for it.
        made = [bad]
    payloads.mkdir()
    worker = DecomposeWorker(str(payloads))
    if place == "write":
        payloads.rmdir()
    with ThreadPoolExecutor(STATIONS) as pool:
        outcomes = list(pool.map(worker.run, made))
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    assert [failure.task_id for failure in failures] == [bad.task_id]
    words = {"read": "2.safetensors", "decompose": "block2: Zero", "write": "block2: FileNotFound"}
    assert words[place] in failures[0].message
    payloads.mkdir(exist_ok=True)
    assert isinstance(worker.run(made[0] if place != "write" else bad), Result)


@pytest.mark.parametrize(
    ("need", "gpu", "share"), [(5, 80, 1 / 4), (30, 80, 1 / 2), (50, 80, 1.0), (79, 80, 1.0)]
)
def test_small_groups_share_a_gpu(
    monkeypatch: pytest.MonkeyPatch, need: int, gpu: int, share: float
) -> None:
    executor = RayExecutor()
    monkeypatch.setattr(executor, "has_cuda", lambda: True)
    monkeypatch.setattr(executor, "_smallest_gpu_bytes", lambda: gpu * 2**30)
    assert executor._gpu_share(need * 2**30) == share
    assert executor._gpu_share(None) == 1


def test_a_group_larger_than_any_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = RayExecutor()
    monkeypatch.setattr(executor, "has_cuda", lambda: True)
    monkeypatch.setattr(executor, "_smallest_gpu_bytes", lambda: 80 * 2**30)
    with pytest.raises(LestdError, match=r"needs about 81\.00 GiB of GPU memory.*80\.00 GiB"):
        executor._gpu_share(81 * 2**30)


def test_a_worker_that_would_exceed_its_memory_is_not_started(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = psutil.virtual_memory()._replace(available=600 * 2**20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    source, out = resolve_source(str(tiny_llama)), tmp_path / "out"
    with pytest.raises(LestdError, match=r"worker needs about .* 600\.00 MiB are free"):
        compress_model(source, RunConfig(keep=0.5), SerialExecutor(), out, tmp_path / "run")
    assert not out.exists()
    assert not (tmp_path / "run" / "payloads").exists()


def high_water(process: int) -> int:
    """Largest resident set of a process so far; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_that_of_the_plan_however_large_the_model(tmp_path: Path) -> None:
    """The driver and the worker of a run on a checkpoint larger than each of them may become."""
    changes = {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "head_dim": 64,
        "intermediate_size": 12288,
        "vocab_size": 100_000,
    }
    model, out = tmp_path / "model", tmp_path / "out"
    size = make_checkpoint(make_config("tiny", 12, **changes), model, threads=2)
    # pyarrow imports pandas where it is installed, as it is for these tests only; it takes 50 MB.
    without_pandas = tmp_path / "without_pandas"
    without_pandas.mkdir()
    (without_pandas / "pandas.py").write_text("raise ImportError('not installed')")
    path = os.pathsep.join(filter(None, (str(without_pandas), os.environ.get("PYTHONPATH"))))
    process = start_lestd(
        *("compress", model, "--out", out, "--keep", 0.4, "--workers", 1),
        env=os.environ | {"PYTHONPATH": path},
    )
    driver = 0
    while process.poll() is None:
        driver = max(driver, high_water(process.pid))
        time.sleep(0.01)
    assert process.returncode == 0, process.communicate()
    bound = json.loads((tmp_path / "out.run" / "plan.json").read_text())["total"]
    rows = Manifest(tmp_path / "out.run" / "manifest").groups().to_pylist()
    rows.sort(key=lambda row: row["started_at"])
    peaks = [row["peak_memory_bytes"] for row in rows]
    assert max(peaks) <= bound["worker_memory_bytes"] < size
    # 106 MB of it are torch._dynamo, which transformers imports with the first config.
    assert driver < 640e6 < size
    # Nothing of a task is kept: two groups in float32 are 18 MiB.
    assert max(peaks[6:]) <= max(peaks[:6]) + 18 * 2**20
