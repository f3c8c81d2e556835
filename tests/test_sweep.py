"""`lestd sweep`: several sizes at once, each as `lestd compress` makes it, judged and drawn."""

import json
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli import digest_tree, lestd, run_lestd, start_lestd
from conftest import LAYERS
from safetensors.torch import load_file, save_file

from orchestrator.config import RunConfig
from orchestrator.executor import SerialExecutor
from orchestrator.manifest import Manifest
from orchestrator.plan import make_plan
from orchestrator.source import resolve_source
from orchestrator.sweep import Point, model_dir, parse_keeps, save_curve

SERIAL = ("--executor", "serial")
KEEPS = (0.6, 0.25)
FEW = ("--window", 100, "--max-windows", 4)


def sweep(model: Path, out: Path, *options: object) -> tuple[object, ...]:
    return ("sweep", model, "--keep", ",".join(map(str, KEEPS)), "--out", out, *options)


def require_same_as_apart(model: Path, out: Path, apart: Path, *options: object) -> None:
    """Every model of a sweep has the bytes that `lestd compress` gives it."""
    for keep in KEEPS:
        alone = model_dir(apart, keep)
        result = lestd("compress", model, "--keep", keep, "--out", alone, *options, *SERIAL)
        assert result.code == 0, result.err
        assert digest_tree(model_dir(out, keep)) == digest_tree(alone)
        run, expected = (Path(f"{d}.run/payloads") for d in (model_dir(out, keep), alone))
        assert {p.name for p in run.iterdir()} == {p.name for p in expected.iterdir()}
        assert lestd("verify", model_dir(out, keep)).code == 0
        state = json.loads(lestd("status", model_dir(out, keep), "--json").out)
        assert (state["state"], state["done"]) == ("complete", len(state["layers"]))


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--allocation", "global"),
        # What these change is compared budget by budget in test_bundles.py as well.
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                ("--method", "tucker"),
                ("--type-mode", "learned"),
                ("--pattern", "2:4"),
                ("--max-flops", 0.6, "--include", "1-2"),
            )
        ),
    ],
    ids=lambda options: " ".join(map(str, options)) or "lestd",
)
def test_models_are_those_of_separate_compressions(
    tiny_llama: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    result = lestd(*sweep(tiny_llama, tmp_path / "out", *options, *SERIAL))
    assert result.code == 0, result.err
    require_same_as_apart(tiny_llama, tmp_path / "out", tmp_path / "apart", *options)


def results(out: Path) -> dict[Path, int]:
    """Rows of tasks and evaluations, with the inodes that a repetition would change."""
    tables = {"groups", "slices", "evaluations"}
    return {p: p.stat().st_ino for p in out.rglob("*.parquet") if {p.parent.name, p.stem} & tables}


def test_the_whole_command(tiny_llama: Path, wikitext: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = sweep(tiny_llama, out, "--text", wikitext, *FEW, *SERIAL)
    first = run_lestd(*command, "--json")
    assert first.code == 0, first.err
    found = json.loads(first.out)
    assert [point["keep"] for point in found["points"]] == list(KEEPS)
    options = ("--text", wikitext, *FEW, *SERIAL, "--json")
    for entry in (found["dense"], *found["points"]):
        [judged] = json.loads(lestd("evaluate", entry["model"], *options).out)["models"]
        for name in ("token_perplexity", "word_perplexity", "model_bytes_on_disk"):
            assert entry[name] == judged[name]
        for name in ("token_perplexity", "word_perplexity"):
            assert entry[f"{name}_difference"] == entry[name] - found["dense"][name]
        stored = judged["weights_in_scope"] or {"stored_bytes": 4 * 2**19}
        assert entry["stored_bytes"] == stored["stored_bytes"]
    assert found["plot"] == str(out / "sweep.png")
    assert (out / "sweep.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    # The same command finds everything done, and says the same.
    before = results(out)
    again = lestd(*command, "--json")
    assert json.loads(again.out) == found
    assert results(out) == before
    assert "evaluate" not in again.err
    # Of another text only the evaluation is new, and the dense model belongs to it.
    text = tmp_path / "short.txt"
    text.write_bytes(wikitext.read_bytes()[:3000])
    other = lestd(*sweep(tiny_llama, out, "--text", text, *FEW, *SERIAL))
    assert other.code == 0, other.err
    assert "tasks were finished before" in other.err
    for words in ("dense", "to dense", "word ppl", f"{KEEPS[1]}", "plot"):
        assert words in other.out
    rows = Manifest(out / "manifest").evaluations().to_pylist()
    assert len({row["evaluation_id"] for row in rows}) == 2 * (1 + len(KEEPS))


def committed(out: Path) -> dict[Path, int]:
    """Group rows of all runs of a sweep, with the inodes that a repetition would change."""
    return {path: path.stat().st_ino for path in out.glob("*.run/manifest/groups/*.parquet")}


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=str)
def test_a_sweep_that_is_ended_goes_on(many_layers: Path, tmp_path: Path, end: int) -> None:
    out, half = tmp_path / "out", ("--include", f"0-{LAYERS // 2 - 1}")
    process = start_lestd(*sweep(many_layers, out, *half, *SERIAL))
    while process.poll() is None and len(committed(out)) < 9:
        time.sleep(0.002)
    process.send_signal(end)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if end == signal.SIGINT else -end), err
    finished = committed(out)
    assert 9 <= len(finished) < LAYERS // 2 * len(KEEPS)
    # One that was killed between the commits of a bundle.
    lost = next(path for path in finished if f"keep-{KEEPS[1]:.2f}.run" in str(path))
    lost.unlink()
    del finished[lost]
    result = lestd(*sweep(many_layers, out, *half, *SERIAL))
    assert result.code == 0, result.err
    assert finished.items() <= committed(out).items()
    for keep in KEEPS:
        starts = Manifest(f"{model_dir(out, keep)}.run").events().to_pylist()
        times = {
            path.stem for path in finished if path.is_relative_to(f"{model_dir(out, keep)}.run")
        }
        begun = [row["task_id"] for row in starts if row["kind"] == "started"]
        assert {t: begun.count(t) for t in times} == dict.fromkeys(times, 1)
    require_same_as_apart(many_layers, out, tmp_path / "apart", *half)


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_on_two_workers_has_the_same_bytes(many_layers: Path, tmp_path: Path) -> None:
    few = ("--include", "0-31")
    result = run_lestd(*sweep(many_layers, tmp_path / "out", *few, "--workers", 2))
    assert result.code == 0, result.err
    rows = [
        row
        for keep in KEEPS
        for row in Manifest(model_dir(tmp_path / "out", keep)).groups().to_pylist()
    ]
    # Both budgets of a layer were one worker's.
    assert len({(row["group"], row["worker"]) for row in rows}) == 32
    require_same_as_apart(many_layers, tmp_path / "out", tmp_path / "apart", *few)


def test_a_layer_that_fails_is_named_for_every_keep(many_layers: Path, tmp_path: Path) -> None:
    model, name = tmp_path / "model", "model.layers.5.self_attn.q_proj.weight"
    shutil.copytree(many_layers, model)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    shard = model / index["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][3, 4] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    out = tmp_path / "out"
    result = lestd(*sweep(model, out, "--include", "4-7", *SERIAL))
    assert result.code == 1
    assert result.err.count("1 of 4 tasks failed; the other 3 are kept") == len(KEEPS)
    assert name in result.err
    assert len(committed(out)) == 3 * len(KEEPS)
    assert not any(model_dir(out, keep).exists() for keep in KEEPS)


def test_what_is_refused(tiny_llama: Path, wikitext: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def refusal(*options: object) -> str:
        result = lestd(*options)
        assert (result.code, result.out) == (2, "")
        return result.err

    start = ("sweep", tiny_llama, "--out", out, *SERIAL, "--keep")
    assert "--keep must be numbers like 0.8,0.6,0.4, got '0.8;0.6'" in refusal(*start, "0.8;0.6")
    assert "--keep names a number twice" in refusal(*start, "0.8,0.80")
    assert "keep: Input should be less than 1" in refusal(*start, "0.8,1.5")
    assert "raise keep" in refusal(*start, "0.8,0.0001")
    assert "the text" in refusal(*start, "0.8,0.6", "--text", tmp_path / "none.txt")
    assert "give --text" in refusal(*start, "0.8,0.6", "--plot", tmp_path / "plot.png")
    plot = tmp_path / "plot.gif"
    assert "expected .png or .svg" in refusal(*start, "0.8", "--text", wikitext, "--plot", plot)
    assert not out.exists() or not list(out.iterdir())

    # A run of another configuration among them ends all, and leaves no lock behind.
    other = ("compress", tiny_llama, "--out", model_dir(out, KEEPS[1]), "--keep", KEEPS[1])
    assert lestd(*other, "--method", "tucker", *SERIAL).code == 0
    assert 'config.method (was "tucker", is "lestd")' in refusal(*sweep(tiny_llama, out, *SERIAL))
    assert lestd(*sweep(tiny_llama, out, *SERIAL, "--fresh")).code == 0


def test_a_machine_that_is_too_small_is_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve_source(str(tiny_llama))
    plans = [make_plan(source, RunConfig(keep=keep)) for keep in KEEPS]
    [reuse_bytes] = {planned.bounds.reuse_bytes for plan in plans for planned in plan.tasks}
    memory = max(plan.worker_memory_bytes for plan in plans) + reuse_bytes
    command = sweep(tiny_llama, tmp_path / "out", *SERIAL)
    monkeypatch.setattr(SerialExecutor, "worker_memory_bytes", lambda self: memory - 1)
    refused = lestd(*command)
    assert refused.code == 2
    assert "a worker needs about" in refused.err
    monkeypatch.setattr(SerialExecutor, "worker_memory_bytes", lambda self: memory)
    with monkeypatch.context() as patch:
        disk = sum(plan.disk_bytes for plan in plans)
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=disk // 2))
        refused = lestd(*command)
        assert refused.code == 2
        assert "free, but the models need" in refused.err
    assert lestd(*command).code == 0


def test_directories_are_named_by_their_keep() -> None:
    keeps = parse_keeps("0.8,0.125,0.12,.5")
    names = [model_dir(Path("out"), keep).name for keep in keeps]
    assert names == ["keep-0.80", "keep-0.125", "keep-0.12", "keep-0.50"]


def test_the_plot_shows_every_model(tmp_path: Path) -> None:
    points = [
        Point(keep, "model", 0, int((8 + (keep or 1)) * 2**20), 0.1, {"token_perplexity": value})
        for keep, value in ((None, 40.0), (0.3, 55.0), (0.7, 45.0))
    ]
    for name in ("one.svg", "two.svg"):
        save_curve(points, "the title", tmp_path / name)
    drawn = (tmp_path / "one.svg").read_text()
    for text in ("keep 0.3", "keep 0.7", "dense, 40.00", "token perplexity", "the title"):
        assert f"<!-- {text} -->" in drawn
    assert "stroke-dasharray" in drawn
    assert drawn == (tmp_path / "two.svg").read_text()
