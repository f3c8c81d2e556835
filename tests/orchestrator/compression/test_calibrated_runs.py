"""Compressions in the metric of activations: when these are found, and who gets them."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.activations import oracle
from support.cli import digest_tree, lestd, run_lestd, start_lestd
from torch import Tensor
from transformers import AutoModelForCausalLM

from lestd_kernels.errors import LestdError
from lestd_kernels.methods import METHODS, Group, MethodArgs
from orchestrator.compression.pipeline import compress_model
from orchestrator.config.run import RunConfig
from orchestrator.execution.executor import Listener, WorkerSpec
from orchestrator.execution.serial import SerialExecutor
from orchestrator.experiments.engine import compress_all
from orchestrator.experiments.variants import Contender
from orchestrator.manifest import Manifest
from orchestrator.planning.calibration_costs import blocks_of
from orchestrator.source.checkpoint import resolve_source
from orchestrator.source.texts import read_samples
from workers import decompose
from workers.contracts import Task


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The metrics that a method was given, which takes no notice of them."""
    plain = METHODS["lestd"]
    given: list[dict[str, Tensor]] = []

    def unaware(args: MethodArgs) -> MethodArgs:
        return replace(args, metric="weight")

    def look(group: Group) -> Any:
        given.append(dict(group.metrics))
        return plain.prepare(replace(group, args=unaware(group.args), metrics={}))

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
    whole = (256, 256)
    assert [block.grams for block in blocks] == [{"in": whole, "heads": whole}] * 4
    samples = read_samples(source, str(wikitext), 3, 20)
    expected = oracle(source, blocks, samples)
    modules = {"q_proj": "in", "k_proj": "in", "v_proj": "in", "o_proj": "heads"}
    assert len(seen) == 4 * (1 + len(middle))

    def distance(metrics: dict[str, Tensor], layer: int) -> float:
        gram = expected[f"model.layers.{layer}.self_attn.in"]
        return float(torch.linalg.matrix_norm(metrics["q_proj"].double() - gram.double()))

    # Weights are read ahead, so one task may overtake another.
    found = {min(range(4), key=partial(distance, metrics)): metrics for metrics in seen[:4]}
    assert found.keys() == {0, 1, 2, 3}
    for layer, metrics in found.items():
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


def test_a_method_gets_the_blocks_of_a_wide_inputs_gram(
    tiny_llama: Path, wikitext: Path, tmp_path: Path, seen: list[dict[str, Tensor]]
) -> None:
    config = RunConfig(
        keep=0.5,
        calibrate_on=str(wikitext),
        samples=2,
        sample_tokens=20,
        include="1",
        gram_width=100,
    )
    source = resolve_source(str(tiny_llama))
    run = (tmp_path / "out", tmp_path / "run")
    outcome = compress_model(source, config, SerialExecutor(), *run)
    blocks = blocks_of([planned.task for planned in outcome.plan.tasks], 100)
    assert blocks[0].grams == {"in": (4, 64, 64), "heads": (4, 64, 64)}
    samples = read_samples(source, str(wikitext), 2, 20)
    whole = oracle(source, blocks, samples)["model.layers.1.self_attn.heads"]
    inside = torch.block_diag(*(torch.ones(64, 64),) * 4)
    torch.testing.assert_close(
        seen[0]["o_proj"].double(), whole.double() * inside, rtol=1e-3, atol=1e-3
    )


def test_large_metrics_are_not_read_beside_those_of_the_group_before(
    tiny_llama: Path, wikitext: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve_source(str(tiny_llama))
    config = RunConfig(keep=0.5, calibrate_on=str(wikitext), samples=2, sample_tokens=20)
    read = decompose.read_metrics
    known: list[weakref.ref[Tensor]] = []
    beside: list[int] = []

    def watched(task: Task) -> dict[str, Tensor]:
        beside.append(sum(one() is not None for one in known))
        found = read(task)
        assert sum(4 * one.numel() for one in {id(m): m for m in found.values()}.values()) == (
            decompose.metric_bytes(task)
        )
        known.extend(map(weakref.ref, found.values()))
        return found

    monkeypatch.setattr(decompose, "read_metrics", watched)
    payloads = []
    for name, most in (("ahead", decompose.MOST_READ_AHEAD), ("in turn", 0)):
        monkeypatch.setattr(decompose, "MOST_READ_AHEAD", most)
        run = tmp_path / name
        given = {"calibration": tmp_path / "calibration"}
        compress_model(source, config, SerialExecutor(), run / "out", run / "run", **given)
        payloads.append(sorted(path.name for path in (run / "run" / "payloads").iterdir()))
    assert beside[4:] == [0] * 4
    assert payloads[0] == payloads[1]


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
    sizes = {Contender("", {}): configs}
    executor = CountingExecutor()
    compress_all(source, sizes, executor, tmp_path)
    assert executor.workers == ["CalibrationWorker", "DecomposeWorker"]
    assert len(seen) == 4
    assert all("q_proj" in metrics for metrics in seen)
    assert not [*tmp_path.glob("keep-*.run/calibration")]

    compress_all(source, sizes, executor, tmp_path, fresh=fresh)
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


@pytest.mark.slow
def test_a_killed_driver_changes_no_byte(tiny_llama: Path, wikitext: Path, tmp_path: Path) -> None:
    command: list[object] = ["compress", tiny_llama, "--keep", 0.5, "--method", "svd_llm"]
    command += ["--calibrate-on", wikitext, "--scope", "all", "--executor", "serial"]
    assert run_lestd(*command, "--out", tmp_path / "whole").code == 0
    out = tmp_path / "killed"
    pieces = tmp_path / "killed.run" / "calibration" / "pieces"
    for layer in (1, 3):
        process = start_lestd(*command, "--out", out)
        while process.poll() is None and not [*pieces.glob(f"layer-{layer:05d}*.grams")]:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert [*pieces.iterdir()]
    finished = run_lestd(*command, "--out", out)
    assert finished.code == 0, finished.err
    assert digest_tree(out) == digest_tree(tmp_path / "whole")
    calibrations = [
        digest_tree(tmp_path / f"{name}.run/calibration") for name in ("killed", "whole")
    ]
    assert calibrations[0] == calibrations[1]
    assert len(calibrations[0]) == 1 + 2 * 4


def test_calibration_on_the_command_line(tiny_llama: Path, wikitext: Path, tmp_path: Path) -> None:
    command: list[object] = ["compress", tiny_llama, "--keep", 0.5, "--method", "svd_llm"]
    command += ["--samples", 2, "--sample-tokens", 16, "--executor", "serial"]
    command += ["--calibration", tmp_path / "calibration", "--out"]
    refused = lestd(*command, tmp_path / "none")
    assert refused.code == 2
    assert "give it with calibrate_on (--calibrate-on TEXT)" in " ".join(refused.err.split())
    first = lestd(*command, tmp_path / "one", "--calibrate-on", wikitext)
    assert first.code == 0, first.err
    assert "layer 3, sums" in first.err
    assert "layer 3, samples" not in first.err
    second = lestd(*command, tmp_path / "two", "--calibrate-on", wikitext)
    assert "calibrate" not in second.err
    assert digest_tree(tmp_path / "one") == digest_tree(tmp_path / "two")
    assert not (tmp_path / "one.run" / "calibration").exists()
    short = tmp_path / "short.txt"
    short.write_text("too short")
    refused = lestd(*command, tmp_path / "three", "--calibrate-on", short, "--fresh")
    assert refused.code == 2
    assert "2 samples of 16 take 32; give a longer text" in " ".join(refused.err.split())


def test_bytes_go_where_the_expected_loss_falls_most(
    tiny_llama: Path, wikitext: Path, tmp_path: Path
) -> None:
    source, rows = resolve_source(str(tiny_llama)), {}
    for allocation in (None, "uniform"):
        config = RunConfig(
            keep=0.3,
            method="svd_llm",
            metric="loss",
            allocation=allocation,
            calibrate_on=str(wikitext),
            samples=8,
            sample_tokens=64,
        )
        out = tmp_path / f"{allocation}"
        compress_model(
            source,
            config,
            SerialExecutor(),
            out,
            tmp_path / f"{allocation}.run",
            calibration=tmp_path / "calibration",
        )
        manifest = Manifest(out / "manifest")
        rows[allocation] = manifest.groups().to_pylist()
        [run] = manifest.runs().to_pylist()
        assert run["allocation"] == (allocation or "global")
        assert "nats per token" in (out / "README.md").read_text(encoding="utf-8")
    budgets, losses = (
        {name: sum(row[column] for row in found) for name, found in rows.items()}
        for column in ("byte_budget", "expected_loss")
    )
    assert budgets[None] <= budgets["uniform"]
    assert 0 < losses[None] < losses["uniform"]
    assert len({row["byte_budget"] for row in rows[None]}) > 1
    for row in rows[None]:
        assert row["expected_loss"] == row["metric_squared_error"] / 2


@pytest.mark.slow
def test_auto_keeps_the_candidate_of_least_expected_loss(
    tiny_llama: Path, wikitext: Path, tmp_path: Path
) -> None:
    source, losses = resolve_source(str(tiny_llama)), {}
    for method, bits in (("auto", 16), ("lestd", 4), ("svd_llm", 4), ("gptq", 2)):
        config = RunConfig(
            keep=0.15,
            include="0",
            method=method,
            metric="loss",
            allocation="uniform",
            value_bits=bits,
            factor_bits=4 if bits == 4 else 16,
            calibrate_on=str(wikitext),
            samples=8,
            sample_tokens=64,
        )
        out = tmp_path / f"{method}-{bits}"
        compress_model(
            source,
            config,
            SerialExecutor(),
            out,
            tmp_path / f"{out.name}.run",
            calibration=tmp_path / "calibration",
        )
        [row] = Manifest(out / "manifest").groups().to_pylist()
        losses[out.name] = row["expected_loss"]
        assert (row["chosen"] is None) == (method != "auto")
        if method == "auto":
            assert row["stored_bytes"] <= row["byte_budget"]
            assert row["runner_up"] != row["chosen"]
            assert row["expected_loss"] <= row["runner_up_loss"]
            chosen = row["chosen"]
            AutoModelForCausalLM.from_pretrained(out)
    best = losses.pop("auto-16")
    assert best <= min(losses.values())
    assert losses.get(chosen, best) == best
