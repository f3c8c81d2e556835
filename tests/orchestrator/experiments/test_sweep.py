"""`lestd sweep`: several sizes at once, each as `lestd compress` makes it, evaluated and drawn."""

import json
import shutil
import signal
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from support import kills
from support.cli import PATIENCE, digest_tree, lestd, run_lestd, start_lestd
from support.lm_eval_data import DATA

from orchestrator.config.layers import parse_keeps
from orchestrator.config.run import RunConfig
from orchestrator.execution.serial import SerialExecutor
from orchestrator.experiments.curves import save_curve
from orchestrator.experiments.engine import model_dir
from orchestrator.experiments.quality import Point, Quality, _main_figures
from orchestrator.manifest.manifest import Manifest
from orchestrator.planning.plan import make_plan
from orchestrator.source.checkpoint import resolve_source

SERIAL = ("--executor", "serial")
KEEPS = (0.6, 0.25)
FEW = ("--window", 100, "--max-windows", 4)
TASKS = ("--tasks", "mathqa,truthfulqa_mc2", "--data", DATA, "--limit", 2, "--fewshot", 0)


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
    """Rows of tasks and pieces of evaluations, with the inodes that a repetition would change."""
    rows = {p for p in out.rglob("*.parquet") if {p.parent.name, p.stem} & {"groups", "slices"}}
    return {
        path: path.stat().st_ino for path in rows | set(out.glob("evaluations/*/pieces/*.json"))
    }


def beginning(text: Path, size: int, path: Path) -> Path:
    """The first bytes of a text."""
    path.write_bytes(text.read_bytes()[:size])
    return path


def test_the_whole_command(tiny_llama: Path, wikitext: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluated = ("--text", beginning(wikitext, 4000, tmp_path / "text.txt"), *FEW, *TASKS, *SERIAL)
    first = lestd(*sweep(tiny_llama, out, *evaluated, "--json"))
    assert first.code == 0, first.err
    found = json.loads(first.out)
    assert [point["keep"] for point in found["points"]] == list(KEEPS)

    # `lestd evaluate` finds the same, with the same errors, in a directory of its own.
    last = found["points"][-1]
    options = (*evaluated, "--json", "--run-dir", tmp_path / "apart")
    apart = lestd("evaluate", last["model"], "--against", tiny_llama, *options)
    assert apart.code == 0, apart.err
    expected = json.loads(apart.out)
    for place, entry in enumerate((found["dense"], last)):
        quality = {
            (one["task"], one["metric"], one["answer_filter"]): one for one in entry["quality"]
        }
        assert {task for task, _, _ in quality} == {"text", "mathqa", "truthfulqa_mc2"}
        assert len(quality) == 2 + len(expected["tasks"])
        model = expected["models"][place]
        for name in ("token_perplexity", "word_perplexity"):
            one = quality["text", name, "none"]
            error = f"{name}_stderr"
            assert (one["value"], one["stderr"]) == (model[name], model.get(error))
            if place == 1:
                assert one["difference"] == expected["difference"][name]
                assert one["difference_stderr"] == expected["difference"].get(error)
            else:
                assert one["difference"] == 0
        for score in expected["tasks"]:
            one = quality[score["task"], score["metric"], score["answer_filter"]]
            assert one["higher_is_better"] is score["higher_is_better"]
            for name in ("value", "stderr"):
                assert one[name] == score["models"][place][name]
            for name in ("difference", "difference_stderr"):
                assert one[name] == (score[name] if place == 1 else 0)
        main = {key for key, one in quality.items() if one["main"] and key[0] != "text"}
        assert main == {("mathqa", "acc", "none"), ("truthfulqa_mc2", "acc", "none")}
        assert entry["model_bytes_on_disk"] == model["model_bytes_on_disk"]
        stored = model["weights_in_scope"] or {"stored_bytes": 4 * 2**19}
        assert entry["stored_bytes"] == stored["stored_bytes"]
    assert found["plot"] == str(out / "sweep.png")
    assert (out / "sweep.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    # The rows: of all models in the sweep's manifest, of two in each model's own.
    def evaluations(manifest: Path) -> set[tuple[str, str]]:
        rows = Manifest(manifest).evaluations().to_pylist()
        return {(row["model"], row["evaluation_id"]) for row in rows}

    models = [found["dense"]["model"], *(point["model"] for point in found["points"])]
    whole = evaluations(out / "manifest")
    assert {model for model, _ in whole} == set(models)
    assert len(whole) == 3 * len(models)
    for keep, model in zip(KEEPS, models[1:], strict=True):
        assert evaluations(model_dir(out, keep)) == {
            row for row in whole if row[0] in (models[0], model)
        }
    report = tmp_path / "report.md"
    options = ("--format", "md", "--out", report)
    assert lestd("report", model_dir(out, KEEPS[0]), *options).code == 0
    assert "token_perplexity" in report.read_text()

    # The same command finds everything done, and says the same.
    before = results(out)
    again = lestd(*sweep(tiny_llama, out, *evaluated, "--json"))
    assert json.loads(again.out) == found
    assert results(out) == before
    assert again.err.count("4 of 4 windows were already finished") == len(models)
    # Of another text only the evaluation is new.
    text = beginning(wikitext, 3000, tmp_path / "short.txt")
    other = lestd(*sweep(tiny_llama, out, "--text", text, *FEW, *TASKS, *SERIAL))
    assert other.code == 0, other.err
    assert "tasks were already finished" in other.err
    assert other.err.count("4 of 4 samples were already finished") == len(models)
    assert "windows were already finished" not in other.err
    for words in ("dense", "truthfulqa_mc2", "mathqa", f"{KEEPS[1]}", "plot"):
        assert words in other.out


@pytest.mark.slow
def test_a_sweep_killed_while_evaluating_evaluates_the_rest(
    tiny_llama: Path, wikitext: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--text", wikitext, "--window", 256, "--max-windows", 60, *SERIAL, "--json")
    process = start_lestd(*sweep(tiny_llama, out, *options))
    # The dense model's 15 pieces, and some of the next one's.
    while len(list(out.glob("evaluations/*/pieces/*.json"))) < 18:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = results(out)
    result = lestd(*sweep(tiny_llama, out, *options))
    assert result.code == 0, result.err
    assert kept.items() <= results(out).items()
    assert result.err.count("60 of 60 windows were already finished") == 1
    assert len(list(out.glob("evaluations/*/pieces/*.json"))) == 3 * 15


def committed(out: Path) -> dict[tuple[str, str], datetime]:
    """Finished tasks of all runs of a sweep: run and task -> when it began."""
    return {
        (run_dir.name, task_id): began
        for run_dir in out.glob("*.run")
        for task_id, began in kills.committed(run_dir).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=str)
def test_a_sweep_that_is_ended_goes_on(many_layers: Path, tmp_path: Path, end: int) -> None:
    out, some = tmp_path / "out", ("--include", "0-19")
    process = start_lestd(*sweep(many_layers, out, *some, *SERIAL))
    while process.poll() is None and len(committed(out)) < 9:
        time.sleep(0.002)
    process.send_signal(end)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == (130 if end == signal.SIGINT else -end), err
    finished = committed(out)
    assert 9 <= len(finished) < 20 * len(KEEPS)
    # One that was killed between the commits of a bundle.
    next(out.glob(f"keep-{KEEPS[1]:.2f}.run/manifest/groups/*.parquet")).unlink()
    assert len(committed(out)) < len(finished)
    finished = committed(out)
    result = lestd(*sweep(many_layers, out, *some, *SERIAL))
    assert result.code == 0, result.err
    assert finished.items() <= committed(out).items()
    for keep in KEEPS:
        starts = Manifest(f"{model_dir(out, keep)}.run").events().to_pylist()
        times = {task_id for run, task_id in finished if run == f"{model_dir(out, keep).name}.run"}
        begun = [row["task_id"] for row in starts if row["kind"] == "started"]
        assert {t: begun.count(t) for t in times} == dict.fromkeys(times, 1)
    require_same_as_apart(many_layers, out, tmp_path / "apart", *some)


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
    assert len({(row["block"], row["worker"]) for row in rows}) == 32
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
    assert "--limit belongs to --tasks" in refusal(*start, "0.8,0.6", "--limit", 3)
    assert "--window belongs to --text" in refusal(*start, "0.8", *TASKS, "--window", 9)
    assert "shows 3 examples" in refusal(*start, "0.8", *TASKS[:-1], 3)
    assert "give --text or --tasks" in refusal(*start, "0.8,0.6", "--plot", tmp_path / "plot.png")
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


def test_the_table_shows_one_figure_of_each_task() -> None:
    names = {
        "gsm8k": [("exact_match", "flexible-extract"), ("exact_match", "strict-match")],
        "mathqa": [("acc", "none"), ("acc_norm", "none")],
        "wikitext": [("bits_per_byte", "none"), ("word_perplexity", "none")],
        "another": [("f1", "none"), ("recall", "none")],
    }
    entries = [
        {"task": task, "metric": metric, "answer_filter": name}
        for task, figures in names.items()
        for metric, name in figures
    ]
    assert _main_figures(entries) == {
        "gsm8k": ("exact_match", "strict-match"),
        "mathqa": ("acc", "none"),
        "wikitext": ("word_perplexity", "none"),
        "another": ("f1", "none"),
    }


def test_the_plot_shows_every_model_in_every_figure(tmp_path: Path) -> None:
    def qualities(token: float, word: float, acc: float, norm: float) -> tuple[Quality, ...]:
        return (
            Quality("text", "token_perplexity", "none", token, 1, 0, 0.5, False, main=True),
            Quality("text", "word_perplexity", "none", word, None, 0, None, False, main=True),
            Quality("mathqa", "acc", "none", acc, 0.1, 0, 0.05, True, main=True),
            Quality("mathqa", "acc_norm", "none", norm, 0.1, 0, 0.05, True, main=False),
        )

    figures = (
        (None, (40.0, 300.0, 0.5, 0.625)),
        (0.3, (55, 400, 0.25, 0.3)),
        (0.7, (45, 350, 0.4, 0.4)),
    )
    points = [
        Point(keep, "model", 0, int((8 + (keep or 1)) * 2**20), 0.1, qualities(*values))
        for keep, values in figures
    ]
    for name in ("one.svg", "two.svg"):
        save_curve(points, "the title", tmp_path / name)
    drawn = (tmp_path / "one.svg").read_text()
    shown = ("keep 0.3", "keep 0.7", "dense, 40", "dense, 0.5", "token ppl ↓", "mathqa acc ↑")
    for text in (*shown, "the title"):
        assert f"<!-- {text} -->" in drawn
    assert "dense, 300" not in drawn
    assert "acc_norm" not in drawn
    assert drawn.count("stroke-dasharray") == 2
    assert drawn == (tmp_path / "two.svg").read_text()
