"""Compressions in the metric of activations: when these are found, and who gets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from activations import oracle
from torch import Tensor

from lestd_kernels.errors import LestdError
from lestd_kernels.methods import METHODS, MethodArgs
from lestd_kernels.tensorize import GroupLayout
from orchestrator.config import RunConfig
from orchestrator.executor import Listener, SerialExecutor, WorkerSpec
from orchestrator.grams import blocks_of
from orchestrator.pipeline import compress_model
from orchestrator.source import resolve_source
from orchestrator.sweep import compress_keeps
from orchestrator.texts import read_samples


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The metrics that a method was given, which takes no notice of them."""
    plain = METHODS["lestd"]
    given: list[dict[str, Tensor]] = []

    def unaware(args: MethodArgs) -> MethodArgs:
        return replace(args, metric="weight")

    def look(
        unfolding: Tensor, layout: GroupLayout, dtype: torch.dtype, args: MethodArgs, metrics: Any
    ) -> Any:
        given.append(dict(metrics))
        return plain.prepare(unfolding, layout, dtype, unaware(args), {})

    def without_metric(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: function(*arguments[:-1], unaware(arguments[-1]))

    monkeypatch.setitem(
        METHODS,
        "lestd",
        replace(
            plain,
            prepare=look,
            bounds=without_metric(plain.bounds),
            least_bytes=without_metric(plain.least_bytes),
            metrics=("weight", "activation"),
        ),
    )
    return given


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_method_gets_the_activations_of_its_modules(
    allocation: str,
    tiny_llama: Path,
    wikitext: Path,
    tmp_path: Path,
    seen: list[dict[str, Tensor]],
) -> None:
    config = RunConfig(
        keep=0.5, calibrate_on=str(wikitext), samples=3, sample_tokens=20, allocation=allocation
    )
    source, out, run_dir = resolve_source(str(tiny_llama)), tmp_path / "out", tmp_path / "run"
    passes: list[str] = []
    arguments: Any = (source, config, SerialExecutor(), out, run_dir)
    outcome = compress_model(*arguments, on_start=lambda name, *_: passes.append(name))
    assert outcome.complete
    middle = ["curves"] if allocation == "global" else []
    assert passes == ["calibrate", *middle, "compress", "assemble"]

    blocks = blocks_of(planned.task for planned in outcome.plan.tasks)
    assert [block.widths for block in blocks] == [{"in": 256, "heads": 256}] * 4
    samples = read_samples(source, str(wikitext), 3, 20)
    expected = oracle(source, blocks, samples)
    modules = {"q_proj": "in", "k_proj": "in", "v_proj": "in", "o_proj": "heads"}
    assert len(seen) == 4 * (1 + len(middle))
    for layer, metrics in enumerate(seen[:4]):
        wanted = {
            module + suffix: expected[f"model.layers.{layer}.self_attn.{reads}{suffix}"]
            for module, reads in modules.items()
            for suffix in ("", ".mean_abs", ".max_abs")
        }
        assert metrics.keys() == wanted.keys()
        for name, metric in metrics.items():
            torch.testing.assert_close(metric.double(), wanted[name].double(), rtol=1e-3, atol=1e-3)

    assert compress_model(*arguments).skipped == 4
    assert len(seen) == 4 * (1 + len(middle))
    wikitext_of_another = tmp_path / "other.txt"
    wikitext_of_another.write_text(wikitext.read_text(encoding="utf-8")[1:], encoding="utf-8")
    other = config.model_copy(update={"calibrate_on": str(wikitext_of_another)})
    with pytest.raises(LestdError, match=r"differs in: config\.calibrate_on"):
        compress_model(source, other, SerialExecutor(), out, run_dir)
    with pytest.raises(LestdError, match=r"calibration .*differs in: text_sha256"):
        compress_model(
            source,
            other,
            SerialExecutor(),
            tmp_path / "out2",
            tmp_path / "run2",
            calibration=run_dir / "calibration",
        )


@pytest.mark.usefixtures("seen")
def test_runs_share_a_calibration(tiny_llama: Path, wikitext: Path, tmp_path: Path) -> None:
    source, passes = resolve_source(str(tiny_llama)), []
    for keep in (0.5, 0.6):
        config = RunConfig(keep=keep, calibrate_on=str(wikitext), samples=2, sample_tokens=20)
        compress_model(
            source,
            config,
            SerialExecutor(),
            tmp_path / f"{keep}",
            tmp_path / f"{keep}.run",
            calibration=tmp_path / "calibration",
            on_start=lambda name, *_: passes.append(name),
        )
    assert passes == ["calibrate", "compress", "assemble", "compress", "assemble"]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_sweep_calibrates_once(
    fresh: bool,
    tiny_llama: Path,
    wikitext: Path,
    tmp_path: Path,
    seen: list[dict[str, Tensor]],
) -> None:
    source = resolve_source(str(tiny_llama))
    common: dict[str, Any] = {"calibrate_on": str(wikitext), "samples": 2, "sample_tokens": 20}
    configs = {keep: RunConfig(keep=keep, **common) for keep in (0.5, 0.6)}
    executor = CountingExecutor()
    compress_keeps(source, configs, executor, tmp_path)
    assert executor.workers == ["CalibrationWorker", "DecomposeWorker"]
    assert len(seen) == 4
    assert all("q_proj" in metrics for metrics in seen)
    assert not [*tmp_path.glob("keep-*.run/calibration")]

    compress_keeps(source, configs, executor, tmp_path, fresh=fresh)
    assert executor.workers[2:] == executor.workers[:2] * fresh


class CountingExecutor(SerialExecutor):
    """Remembers which workers it was asked for."""

    def __init__(self) -> None:
        self.workers: list[str] = []

    def map(
        self, spec: WorkerSpec, items: Sequence[Any], on_event: Listener | None = None
    ) -> Iterator[Any]:
        self.workers.append(spec.cls.__name__)
        return super().map(spec, items, on_event)
