"""Several byte budgets of one group: prepared once, encoded to the same bytes as alone."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.groups import fused, gqa, mha, unfolding
from support.paths import ROOT, TESTS

from lestd_kernels.errors import LestdError
from lestd_kernels.methods import METHODS, Group, MethodArgs
from lestd_kernels.tensorize import fold_weights
from workers.checkpoint.tensors import read_header
from workers.contracts import Bundle, BundleResult, CurveTask, Failure, Result, Task
from workers.decompose import DecomposeWorker

KEEPS = (0.9, 0.2, 0.6, 0.4)
CASES = {
    "lestd": ("lestd", gqa(40, 16, 6, 2), {}),
    "tucker": ("tucker", mha(48, 12, 4), {}),
    "learned": ("lestd", fused(44, 11, 4), {"type_mode": "learned"}),
    "2:4": ("lestd", mha(48, 12, 4), {"pattern": "2:4"}),
    "max_flops": ("lestd", mha(48, 12, 4), {"max_flops": 0.7}),
    "prune-refit": ("lestd", mha(37, 7, 3), {"stage2": "prune-refit"}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_group_prepared_once_has_the_bytes_of_each_budget_alone(case, dtype):
    method, layout, changes = CASES[case]
    method, args = METHODS[method], MethodArgs(rank_step=4, **changes)
    budgets = [int(keep * layout.elements * dtype.itemsize) for keep in KEEPS]
    prepared = method.prepare(Group(unfolding(layout), layout, dtype, args))
    for budget in budgets:
        shared = method.encode(prepared, budget, budgets, reuse=budget != budgets[-1])
        alone = method.decompose(unfolding(layout), layout, budget, dtype, args, budgets)
        tensors = shared.decomposition.named_tensors("")
        expected = alone.decomposition.named_tensors("")
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
        assert shared == replace(alone, decomposition=shared.decomposition, seconds=shared.seconds)
    with pytest.raises(ValueError, match="used up"):
        method.encode(prepared, budgets[0])


MEASURE = """
import sys, torch
from pathlib import Path
from support.groups import fused, mha
from lestd_kernels.methods import METHODS, Group, MethodArgs
from workers.host.devices import return_freed_memory
return_freed_memory()
def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

layout, args = {layout}(1024, 128, 16), MethodArgs(type_mode="{type_mode}")
W = torch.randn(1024, 128 * 64)
torch.linalg.eigh(torch.eye(8).double())
W[:8] @ W[:8].T
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
method = METHODS["{method}"]
prepared = method.prepare(Group(W, layout, torch.bfloat16, args))
for keep in (0.8, 0.6, 0.8):
    method.encode(prepared, int(keep * W.numel() * 2), reuse=True)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("method", "type_mode", "layout"),
    [
        ("lestd", "identity", "mha"),
        pytest.param("lestd", "learned", "fused", marks=pytest.mark.slow),
    ],
)
def test_the_predicted_memory_bounds_that_of_several_budgets(method, type_mode, layout):
    code = MEASURE.format(method=method, type_mode=type_mode, layout=layout)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{TESTS}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    group = {"mha": mha, "fused": fused}[layout](1024, 128, 16)
    budget = int(0.8 * group.elements * 2)
    bounds = METHODS[method].bounds(group, budget, torch.bfloat16, MethodArgs(type_mode=type_mode))
    assert json.loads(done.stdout) <= bounds.workspace_bytes + bounds.reuse_bytes


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A group of float32 weights, at three budgets and as a curve."""
    layout, shard = mha(40, 12, 3), tmp_path / "shard.safetensors"
    weights = fold_weights(unfolding(layout), layout)
    save_file({f"{name}.weight": weight for name, weight in weights.items()}, shard)
    refs = read_header(shard)
    task = Task(
        task_id="",
        layer=0,
        block="block",
        tensor_prefix="block",
        tensors={m.name: refs[f"{m.name}.weight"] for m in layout.modules},
        layout=layout,
        method="lestd",
        method_args={},
        byte_budget=0,
        value_dtype="float32",
        predicted_memory_bytes=0,
    )
    budgets = [int(keep * layout.elements * 4) for keep in (0.7, 0.3, 0.5)]
    tasks = [replace(task, task_id=f"task{b}", byte_budget=b) for b in budgets]
    curve = CurveTask(**vars(tasks[0]) | {"task_id": "curve"}, curve_budgets=tuple(sorted(budgets)))
    directories = [tmp_path / str(number) for number in range(4)]
    for directory in directories:
        directory.mkdir()
    return Bundle((*tasks, curve), tuple(map(str, directories)))


def test_a_bundle_has_the_payloads_and_results_of_its_tasks(bundle: Bundle, tmp_path: Path) -> None:
    done = DecomposeWorker(str(tmp_path)).run(bundle)
    assert isinstance(done, BundleResult)
    apart = tmp_path / "apart"
    apart.mkdir()
    worker = DecomposeWorker(str(apart))
    for task, directory, found in zip(
        bundle.tasks, bundle.payload_dirs, done.outcomes, strict=True
    ):
        alone = worker.run(task)
        same = {
            name: getattr(found, name) for name in ("seconds", "started_at", "peak_memory_bytes")
        }
        assert found == replace(alone, **same)
        assert found.seconds.keys() == alone.seconds.keys()
        if isinstance(found, Result):
            payload = Path(directory) / found.payload
            assert payload.read_bytes() == (apart / alone.payload).read_bytes()
            assert [p.name for p in Path(directory).iterdir()] == [found.payload]
    assert list(Path(bundle.payload_dirs[3]).iterdir()) == []


def test_a_budget_that_fails_leaves_the_others(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, bad = METHODS["lestd"], bundle.tasks[1].byte_budget

    def encode(prepared, byte_budget, curve_budgets, *, reuse):
        if byte_budget == bad:
            raise LestdError("too much")
        return method.encode(prepared, byte_budget, curve_budgets, reuse=reuse)

    monkeypatch.setitem(METHODS, "lestd", replace(method, encode=encode))
    done = DecomposeWorker(str(tmp_path)).run(bundle)
    assert isinstance(done, BundleResult)
    kinds = [type(outcome) for outcome in done.outcomes]
    assert kinds[:3] == [Result, Failure, Result]
    assert done.outcomes[1].task_id == bundle.tasks[1].task_id
    assert done.outcomes[1].message == "block: too much"


def test_a_bundle_whose_weights_are_damaged_fails_as_a_whole(
    bundle: Bundle, tmp_path: Path
) -> None:
    shard = tmp_path / "shard.safetensors"
    tensors = load_file(shard)
    tensors["k_proj.weight"][1, 2] = torch.inf
    save_file(tensors, shard)
    failure = DecomposeWorker(str(tmp_path)).run(bundle)
    assert isinstance(failure, Failure)
    assert (failure.task_id, failure.kind) == (bundle.task_id, "application")
    assert "k_proj.weight" in failure.message
