"""`lestd bench`: what is measured, how it is reported, what is refused. No time is asserted."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
from support.cli import lestd, run_lestd
from support.exports import compress_example
from support.families import FAMILIES, MHA_FAMILIES, VOCABULARY, save_pair, save_tiny
from transformers import AutoModelForCausalLM

from lestd_kernels.errors import LestdError
from lestd_kernels.modules.shared_tucker_linear import CompressedLinear
from orchestrator.console import output
from orchestrator.console.plots import PLOT_FORMATS
from orchestrator.experiments import speed
from orchestrator.experiments.speed import Comparison, compare, save_plot
from workers.bench import BenchSettings, BenchWorker
from workers.checkpoint.tensors import ShardIndex
from workers.host import loading

CASES = [(family, "identity") for family in FAMILIES] + [(f, "learned") for f in MHA_FAMILIES]
SMALL = BenchSettings(5, 3, 2, "auto", "cpu", 1)
ON_CPU = ("--threads", 1, "--device", "cpu", "--dtype", "bfloat16")
FEW = ("--prompt-tokens", 6, "--new-tokens", 4, "--repeats", 3, *ON_CPU)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory, tiny_llama) -> Path:
    return compress_example(tiny_llama, tmp_path_factory.mktemp("example") / "small")


class Measured(NamedTuple):
    """One run of the command: its JSON, its plot, what was compared and what was asked for."""

    figures: dict[str, Any]
    plot: Path
    comparison: Comparison
    asked: list[tuple[str, str]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory, tiny_llama, compressed) -> Measured:
    plot = tmp_path_factory.mktemp("plot") / "figures.svg"
    comparisons: list[Comparison] = []
    asked: list[tuple[str, str]] = []
    ask = speed._Child.ask

    def recorded(self, name):
        asked.append((self._model.name, name))
        return ask(self, name)

    def compared(*args):
        comparisons.append(compare(*args))
        return comparisons[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed._Child, "ask", recorded)
        patch.setattr(speed, "compare", compared)
        run = lestd("bench", tiny_llama, compressed, *FEW, "--batch", 2, "--plot", plot, "--json")
    assert run.code == 0, run.err
    assert run.err.splitlines()[-1] == "bench: 100 %"
    return Measured(json.loads(run.out), plot, *comparisons, asked)


# What is measured.


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_the_timed_loop_is_greedy_generation(tmp_path, family, mode):
    """Dense and compressed: the tokens are those of `generate`, with and without cache."""
    directory, dense = save_pair(family, mode, "bitmask", tmp_path)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(VOCABULARY, (2, 9), generator=generator)
    worker = BenchWorker(str(directory), BenchSettings(9, 7, 2, "float32", "cpu", 1))
    tokens, repetition = worker.decode()
    for model in (dense, AutoModelForCausalLM.from_pretrained(directory)):
        for use_cache in (True, False):
            expected = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=7,
                do_sample=False,
                eos_token_id=VOCABULARY,
                use_cache=use_cache,
            )
            assert expected[:, 9:].T.tolist() == tokens
    assert any(isinstance(module, CompressedLinear) for module in worker._model.modules())
    assert 0 < repetition.prefill_seconds < repetition.first_token_seconds
    assert repetition.decode_seconds > 0
    # The prompts are those of the seed, every time.
    assert worker.decode()[0] == tokens


@pytest.mark.parametrize(
    ("dtype", "emulated", "computed"),
    [
        ("float32", (), "float32"),
        ("bfloat16", (torch.bfloat16,), "bfloat16"),
        ("auto", (torch.bfloat16,), "float16"),
        ("auto", (torch.float16,), "float32"),
    ],
)
def test_the_compute_dtype(tmp_path, monkeypatch, dtype, emulated, computed):
    monkeypatch.setattr(loading, "emulated", emulated.__contains__)
    directory = save_tiny("llama", tmp_path, torch.float16)
    worker = BenchWorker(str(directory), BenchSettings(4, 2, 1, dtype, "cpu", 1))
    loaded = worker.load()
    assert loaded.dtype == computed
    assert (loaded.device_type, loaded.threads) == ("cpu", 1)
    stored = ShardIndex.from_directory(directory).stored_bytes
    # The rotary frequencies are float32 buffers that no file holds.
    assert 0 <= loaded.weight_bytes - stored * (2 if computed == "float32" else 1) < 1000


def test_models_are_measured_in_turn_each_in_its_own_process(measured, tiny_llama, compressed):
    found, asked = measured.comparison, measured.asked
    names = [tiny_llama.name, compressed.name]
    steps = ["load", *["measure"] * 3, "peak_memory"]
    assert asked == [(name, step) for step in steps for name in names]
    assert [found.dense.model, found.compressed.model] == [str(tiny_llama), str(compressed)]
    for model, directory in ((found.dense, tiny_llama), (found.compressed, compressed)):
        assert len(model.repetitions) == 3
        assert len({r.decode_seconds for r in model.repetitions}) == 3
        assert model.stored_bytes == ShardIndex.from_directory(directory).stored_bytes
        assert 0 <= model.weight_bytes - model.stored_bytes < 1000
        # Both hold their weights, and neither holds the other's libraries or a second copy of many.
        assert model.weight_bytes < model.peak_memory_bytes < 200 * 2**20
    assert found.compressed.weight_bytes < found.dense.weight_bytes
    assert not multiprocessing.active_children()


# What is reported.


def test_the_json_is_complete(measured, tiny_llama, compressed):
    figures = measured.figures
    assert figures.keys() == {
        "dense", "compressed", "ratios", "spread", "settings", "repeats", "device", "dtypes",
        "threads", "versions", "seconds",
    }  # fmt: skip
    assert figures["settings"] == {
        "prompt_tokens": 6, "new_tokens": 4, "batch": 2, "dtype": "bfloat16", "device": "cpu",
        "threads": 1, "seed": 0,
    }  # fmt: skip
    assert (figures["repeats"], figures["threads"]) == (3, 1)
    assert figures["dtypes"] == ["bfloat16", "bfloat16"]
    assert figures["versions"]["torch"] == torch.__version__
    assert figures["dense"]["model"] == str(tiny_llama)
    assert figures["compressed"]["model"] == str(compressed)
    for model in (figures["dense"], figures["compressed"]):
        repetitions = model["repetitions"]
        assert len(repetitions) == 3
        prefill, first, decode = (
            median(r[name] for r in repetitions)
            for name in ("prefill_seconds", "first_token_seconds", "decode_seconds")
        )
        assert model["prefill_tokens_per_second"] == pytest.approx(2 * 6 / prefill)
        assert model["decode_tokens_per_second"] == pytest.approx(2 * 3 / decode)
        assert model["time_to_first_token_seconds"] == pytest.approx(first)
        for name in ("peak_memory_bytes", "weight_bytes", "stored_bytes", "load_seconds"):
            assert model[name] > 0
    assert figures["ratios"].keys() == speed.FIGURES.keys()
    for name, ratio in figures["ratios"].items():
        expected = figures["compressed"][name] / figures["dense"][name]
        assert ratio == pytest.approx(expected)
        assert ratio > 0


@pytest.mark.slow
def test_the_table_and_the_plot_as_a_user_sees_them(tiny_llama, compressed, tmp_path):
    """In a process of its own, in another directory, with relative paths."""
    shutil.copytree(tiny_llama, tmp_path / "big")
    shutil.copytree(compressed, tmp_path / "small")
    run = run_lestd("bench", "big", "small", *FEW, "--plot", "plot.png", cwd=tmp_path)
    assert run.code == 0, run.err
    for title in speed.FIGURES.values():
        assert title in run.out
    assert "medians of 3 repetitions; batch 1, 6 prompt tokens, 4 new tokens" in run.out
    assert "bfloat16" in run.out
    sizes = [
        output.size(ShardIndex.from_directory(d).stored_bytes) for d in (tiny_llama, compressed)
    ]
    assert f"on disk {sizes[0]} and {sizes[1]}" in run.out
    assert {line.split(":")[0] for line in run.err.splitlines()} == {"bench"}
    pytest.importorskip("matplotlib")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_plot_shows_every_figure(measured):
    text = measured.plot.read_text()
    assert "<svg" in text
    assert text.count("<!-- compressed -->") == len(speed.FIGURES)
    for title in speed.FIGURES.values():
        assert f"<!-- {title} -->" in text
    assert [path.name for path in measured.plot.parent.iterdir()] == ["figures.svg"]


def test_the_same_comparison_gives_the_same_plot(measured, tmp_path):
    for kind in PLOT_FORMATS:
        for name in ("one", "two"):
            save_plot(measured.comparison, tmp_path / f"{name}.{kind}")
        one, two = ((tmp_path / f"{name}.{kind}").read_bytes() for name in ("one", "two"))
        assert one == two
        assert len(one) > 5000


def test_a_ratio_that_does_not_exist_is_null(measured, capsys):
    found = measured.comparison
    nothing = Comparison(
        **vars(found) | {"ratios": {n: speed._ratio(1.0, 0) for n in speed.FIGURES}}
    )
    speed.print_comparison(nothing, json=True)
    assert set(json.loads(capsys.readouterr().out)["ratios"].values()) == {None}
    speed.print_comparison(nothing, json=False)
    assert "nan" in capsys.readouterr().out
    assert asdict(nothing)["dense"] == asdict(found)["dense"]


def test_unsteady_repetitions_are_told(measured, capsys):
    found = measured.comparison
    spreads = [
        max(times) / min(times)
        for model in (found.dense, found.compressed)
        for name in ("prefill_seconds", "decode_seconds")
        for times in [[getattr(repetition, name) for repetition in model.repetitions]]
    ]
    assert measured.figures["spread"] == found.spread == max(spreads) > 1
    for spread, told in ((1.4, False), (1.6, True)):
        speed.print_comparison(replace(found, spread=spread), json=False)
        assert (f"differ by up to {spread} x" in capsys.readouterr().out) == told


# What is refused, before anything is loaded.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--plot", "figures.pdf"], "expected .png or .svg"),
        (["--plot", "nowhere/at/all.png"], "no directory nowhere/at"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--prompt-tokens", 500, "--new-tokens", 13], "more than the 512 positions"),
    ],
)
def test_bad_options_are_refused(tiny_llama, compressed, options, expected):
    run = lestd("bench", tiny_llama, compressed, *options)
    assert (run.code, run.out) == (2, "")
    assert run.err.startswith("error: ")
    assert expected in run.err
    assert run.err.count("\n") == 1


@pytest.mark.parametrize("option", ["--new-tokens", "--prompt-tokens", "--repeats", "--batch"])
def test_nothing_to_measure_is_refused(tiny_llama, compressed, option):
    run = lestd(
        "bench", tiny_llama, compressed, option, 1 if option in ("--new-tokens", "--repeats") else 0
    )
    assert run.code == 2
    assert option in run.err


def test_a_plot_without_matplotlib_is_refused(tiny_llama, compressed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = lestd("bench", tiny_llama, compressed, "--plot", tmp_path / "plot.png")
    assert run.code == 2
    assert "pip install 'lestd[report]'" in run.err
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_compared_are_refused(tiny_llama, compressed, tmp_path):
    for models in ((tmp_path / "no", compressed), (tiny_llama, tmp_path / "no")):
        run = lestd("bench", *models)
        assert run.code == 2
        assert f"{tmp_path / 'no'} is not a directory" in run.err
    run = lestd("bench", tiny_llama, tmp_path)
    assert run.code == 2
    assert "config.json" in run.err
    other = save_tiny("llama", tmp_path / "other")
    run = lestd("bench", tiny_llama, other, *FEW)
    assert run.code == 2
    assert "vocab_size 4096" in run.err
    assert "91" in run.err
    run = lestd("bench", compressed, tiny_llama, *FEW)
    assert run.code == 2
    assert "give the dense model first" in run.err


# What goes wrong on the way.


def test_a_model_that_does_not_load_is_named(compressed, tiny_llama, tmp_path):
    broken = Path(shutil.copytree(compressed, tmp_path / "broken"))
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["groups"][0]["kind"] = "new"
    (broken / "config.json").write_text(json.dumps(config))
    run = lestd("bench", tiny_llama, broken, *FEW)
    assert (run.code, run.out) == (2, "")
    assert "kind 'new'" in run.err
    assert "Traceback" not in run.err
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_process_that_dies_is_reported(tiny_llama, compressed):
    def kill(done: int, total: int) -> None:
        if done == 1:
            multiprocessing.active_children()[0].kill()

    with pytest.raises(LestdError, match=r"measured .* died \(exit code -9") as caught:
        compare(tiny_llama, compressed, SMALL, 2, kill)
    assert "memory" in str(caught.value)
    assert not multiprocessing.active_children()


def test_an_interruption_ends_both_processes(tiny_llama, compressed):
    def interrupt(done: int, total: int) -> None:
        assert len(multiprocessing.active_children()) == 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(tiny_llama, compressed, SMALL, 1, interrupt)
    assert not multiprocessing.active_children()
