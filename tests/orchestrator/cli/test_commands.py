"""What commands have in common: their options, what they pass on, what they say of blocks."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from support.cli import lestd
from transformers import OPTConfig, OPTForCausalLM

from lestd_kernels.methods import METHODS
from orchestrator.cli import compress, sweep
from orchestrator.cli.application import app
from orchestrator.config.options import MethodChoice, described
from orchestrator.config.recipes import recipes
from orchestrator.config.run import RunConfig
from orchestrator.console.output import size
from orchestrator.manifest.manifest import Manifest
from orchestrator.run.directory import RunDirectory
from orchestrator.run.fingerprint import fingerprint
from orchestrator.source.checkpoint import resolve_source


def test_help_lists_every_command() -> None:
    shown = lestd("--help")
    assert shown.code == 0, shown.err
    for command in app.registered_commands:
        assert command.callback is not None
        assert f" {command.name or command.callback.__name__} " in shown.out


def test_help_names_every_method() -> None:
    [option] = [one.option for one in described(MethodChoice) if one.name == "method"]
    words = option.help.replace(",", " ").replace(":", " ").replace(".", " ").split()
    assert not METHODS.keys() - set(words)


def test_recipes_are_listed_and_one_is_a_run_file(tiny_llama: Path, tmp_path: Path) -> None:
    listed = lestd("recipes").out
    assert [line.split()[0] for line in listed.splitlines()] == list(recipes())
    file = tmp_path / "run.yaml"
    file.write_text(lestd("recipes", "safe-8bit").out)
    by_name, by_file = (
        lestd("plan", tiny_llama, option, value, "--json").out
        for option, value in (("--recipe", "safe-8bit"), ("--config", file))
    )
    assert by_name == by_file


def test_plan_offers_a_calibration_that_is_no_larger_than_the_model(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, ffn_dim=8192, num_attention_heads=4
    )
    OPTForCausalLM(config).save_pretrained(tmp_path / "wide")
    text = tmp_path / "text.txt"
    text.write_text("words " * 100)
    options = ("--keep", 0.5, "--scope", "all", "--method", "svd_llm", "--calibrate-on", text)
    shown = " ".join(lestd("plan", tmp_path / "wide", *options).out.split())
    whole, offered = 4 * (3 * 32**2 + 8192**2), 4 * (3 * 32**2 + 2 * 4096**2)
    assert f"of disk it takes {size(whole)}" in shown
    assert "more than the model itself has, for inputs that are wide or many: with " in shown
    assert f"--gram-width 4096 it is {size(offered)} and" in shown
    narrow = " ".join(lestd("plan", tmp_path / "wide", *options, "--gram-width", 4096).out.split())
    assert f"of disk it takes {size(offered)}" in narrow
    assert "--gram-width" not in narrow


@pytest.mark.parametrize("command", [compress.plan, sweep.sweep])
def test_what_decides_the_bytes_are_options_of_every_command(command: Any) -> None:
    decisive = (
        inspect.signature(compress.compress).parameters.keys() & RunConfig.model_fields.keys()
    )
    assert decisive - inspect.signature(command).parameters.keys() <= {
        "keep_model",
        "target_loss",
        "device",
        "threads",
    }


def test_a_text_that_is_not_used_is_no_part_of_a_run(tiny_llama: Path, tmp_path: Path) -> None:
    source = resolve_source(str(tiny_llama))
    plain = fingerprint(source, RunConfig(keep=0.5, method="svd"), "cpu")
    text = str(tmp_path / "text.txt")
    unused = RunConfig(keep=0.5, method="svd", calibrate_on=text, samples=3, sample_tokens=9)
    assert fingerprint(source, unused, "cpu") == plain


def test_status_names_the_block_and_tells_of_the_calibration(
    tiny_llama: Path, wikitext: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command: list[object] = ["compress", tiny_llama, "--keep", 0.5, "--scope", "all", "--out", out]
    command += ["--method", "svd_llm", "--calibrate-on", wikitext, "--samples", 2]
    command += ["--sample-tokens", 16, "--executor", "serial"]
    assert lestd(*command).code == 0
    state = json.loads(lestd("status", out, "--json").out)
    assert [layer["scope"] for layer in state["layers"][:2]] == ["attention", "ffn"]
    assert "calibrating" not in state
    card = (out / "README.md").read_text()
    assert "(attention, ffn)" in card
    assert "| 0 | ffn |" in card

    # As it stands while a driver has found the activations of some blocks, and begun no task.
    run = RunDirectory(tmp_path / "out.run")
    for table in ("groups", "slices", "events"):
        for part in (run.path / "manifest" / table).glob("*.parquet"):
            part.unlink()
    with run.locked():
        state = json.loads(lestd("status", out, "--json").out)
        assert state["calibrating"] == len(state["layers"])
        shown = " ".join(lestd("status", out).out.split())
        assert "the activations of the calibration text come first" in shown


def test_a_job_is_told_not_to_measure_speed(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def run_as_job(address: str, command: str, options: dict[str, Any], cluster: Any) -> int:
        asked.append(options)
        return 0

    monkeypatch.setattr("orchestrator.execution.ray.jobs.run_as_job", run_as_job)
    common: list[object] = ["compare", tiny_llama, "--methods", "svd", "--keep", 0.5]
    common += ["--out", tmp_path, "--address", "http://localhost:1"]
    for option in ([], ["--no-speed"]):
        assert lestd(*common, *option).code == 0
    assert [options["no_speed"] for options in asked] == [False, True]
    assert all("speed" not in options for options in asked)


@pytest.mark.parametrize(("keep", "bits"), [(0.55, 8), (0.3, 4), (0.15, 2)])
def test_the_manifest_has_the_bits_that_a_quantizer_chose(
    tiny_llama: Path, tmp_path: Path, keep: float, bits: int
) -> None:
    out = tmp_path / "out"
    options = ("--method", "rtn", "--keep", keep, "--executor", "serial")
    assert lestd("compress", tiny_llama, "--out", out, *options).code == 0
    assert {row["value_bits"] for row in Manifest(out).groups().to_pylist()} == {bits}
