"""A size that follows from the loss that it may cost."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from support.cli import digest_tree, lestd

from lestd_kernels.errors import LestdError
from orchestrator.compression.pipeline import compress_model
from orchestrator.config.run import RunConfig
from orchestrator.execution.serial import SerialExecutor
from orchestrator.manifest.manifest import Manifest
from orchestrator.planning import decide
from orchestrator.source.checkpoint import resolve_source

TARGET = 0.02


@pytest.fixture(scope="module")
def command(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, wikitext: Path
) -> list[object]:
    """`lestd COMMAND` with all but what differs."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_bytes(wikitext.read_bytes()[:20000])
    options: list[object] = [tiny_llama, "--method", "svd_llm", "--calibrate-on", text]
    return [*options, "--samples", 8, "--sample-tokens", 64]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, command: list[object]) -> Path:
    out = tmp_path_factory.mktemp("target") / "out"
    finished = lestd(
        *("compress", *command, "--target-loss", TARGET, "--executor", "serial", "--out", out)
    )
    assert finished.code == 0, finished.err
    return out


def test_the_fewest_bytes_within_the_loss_are_found(made: Path, command: list[object]) -> None:
    rows = Manifest(made / "manifest").groups().to_pylist()
    assert {row["metric"] for row in rows} == {"loss"}
    assert 0.9 * TARGET < sum(row["expected_loss"] for row in rows) <= TARGET

    def plan(target: float, *more: object) -> dict:
        shown = lestd("plan", *command, "--target-loss", target, "--json", *more)
        assert shown.code == 0, shown.err
        return json.loads(shown.out)

    undecided = plan(TARGET)
    assert not undecided["budgets_decided"]
    assert undecided["curves_found"] == 0
    # What one run has found answers for any target, and writes nothing.
    before = digest_tree(made.with_name("out.run"))
    sizes = []
    for target in (2 * TARGET, TARGET, TARGET / 4):
        planned = plan(target, "--out", made)
        assert planned["budgets_decided"]
        assert planned["total"]["expected_loss"] == pytest.approx(target, rel=0.05)
        sizes.append(planned["total"]["byte_budget"])
    assert digest_tree(made.with_name("out.run")) == before
    assert sizes == sorted(sizes)
    assert sum(row["stored_bytes"] for row in rows) == pytest.approx(sizes[1], rel=0.05)
    words = " ".join(lestd("plan", *command, "--target-loss", TARGET).out.split())
    assert "0 of 4 are there" in words
    assert "calibration comes first" in words


def test_a_run_that_was_stopped_decides_the_same(
    made: Path, tiny_llama: Path, command: list[object], tmp_path: Path
) -> None:
    config = RunConfig(
        target_loss=TARGET,
        method="svd_llm",
        calibrate_on=str(command[command.index("--calibrate-on") + 1]),
        samples=8,
        sample_tokens=64,
    )
    arguments = resolve_source(str(tiny_llama)), config, SerialExecutor(), tmp_path / "out"

    def stop(at: tuple[str, int], result: object, done: int, planned: int) -> None:
        if (type(result).__name__, done) == at:
            raise KeyboardInterrupt

    for at in (("CurveResult", 2), ("Result", 1), ("Result", 3)):
        with pytest.raises(KeyboardInterrupt):
            compress_model(*arguments, tmp_path / "out.run", on_progress=partial(stop, at))
    assert compress_model(*arguments, tmp_path / "out.run").complete
    kept = [p.name for p in (made.iterdir()) if p.suffix == ".safetensors"]
    assert kept
    for name in kept:
        assert (tmp_path / "out" / name).read_bytes() == (made / name).read_bytes()


def test_a_promise_that_fails_is_followed_by_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves that promise half of the loss that comes."""
    budgets: list[list[int]] = []

    class Planned:
        def __init__(self, block: str) -> None:
            self.block = self.task_id = block

    class Plan:
        target_loss = 1.0
        curve_tasks = (Planned("a"), Planned("b"))

    monkeypatch.setattr(decide, "_with_budgets", lambda plan, found: budgets.append(found) or found)
    curves = {
        name: [{"byte_budget": b, "predicted_squared_error": e / b} for b in range(1, 200)]
        for name, e in (("a", 10.0), ("b", 40.0))
    }
    tried: list[list[dict[str, float]]] = []
    while (found := decide.decide(Plan(), curves, tried)) is not None:
        error = 2 * (10 / found[0] + 40 / found[1])
        tried.append([{"metric_squared_error": error}])
    assert [row["metric_squared_error"] <= 2 for [row] in tried] == [False] * (len(tried) - 1) + [
        True
    ]
    assert 1 < len(tried) <= 4
    assert sum(budgets[0]) < sum(budgets[-1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"allocation": "uniform"}, "divides the bytes over the layers itself"),
        ({"layer_keep": {"0": 0.5}}, "divides the bytes over the layers itself"),
        ({"metric": "activation"}, "counted in the metric 'loss'"),
        ({"keep": 0.4}, "exactly one of"),
        ({"method": "asvd"}, "counted in the metric 'loss'"),
    ],
)
def test_what_does_not_go_with_a_target_is_refused(options: dict, words: str) -> None:
    given = {"method": "svd_llm", "target_loss": 0.1, "calibrate_on": "text.txt"} | options
    with pytest.raises(ValueError, match=words):
        RunConfig(**given)


def test_a_loss_out_of_reach_is_refused(
    tiny_llama: Path, command: list[object], tmp_path: Path
) -> None:
    found = lestd(
        *("compress", *command, "--target-loss", 1e-15, "--executor", "serial"),
        *("--out", tmp_path / "out"),
    )
    assert found.code == 2
    assert "is out of reach: with all bytes it is" in " ".join(found.err.split())
    assert LestdError.__name__ not in found.err
