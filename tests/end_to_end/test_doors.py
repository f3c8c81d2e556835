"""What is read back is checked at the door: bounded in cost, right in type, shown harmlessly."""

import csv
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import manifests
from support.cli import lestd
from support.families import save_tiny

from lestd_kernels.errors import LestdError
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.files import load_yaml, validated
from orchestrator.config.run import RunFile
from orchestrator.console import output
from orchestrator.manifest.manifest import Manifest
from orchestrator.model.card import card_metadata
from orchestrator.query.sql import run_query
from orchestrator.query.writers import print_csv
from orchestrator.source.checkpoint import read_config_json, resolve_source
from orchestrator.source.convert import convert
from orchestrator.source.side_files import find_side_files
from workers.checkpoint.headers import parse_header
from workers.storage.untrusted_files import parse_json, read_regular

BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


# -- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_only_regular_files_are_read(make: Callable[[Path], None], tmp_path: Path) -> None:
    manifest = manifests.run_of(tmp_path / "run", 2, 2) / "manifest"
    (tmp_path / "model").mkdir()
    places = [tmp_path / "model" / "config.json", tmp_path / "run.yaml"]
    places += [manifest / "model.json", manifest / "events.parquet"]
    for place in places:
        make(place)
    with pytest.raises(LestdError, match=r"config\.json cannot be read \(not a regular file\)"):
        read_config_json(tmp_path / "model")
    with pytest.raises(LestdError, match=r"run\.yaml cannot be read .*\(not a regular file\)"):
        load_yaml(tmp_path / "run.yaml")
    found = Manifest(manifest).damaged()
    assert [(bad.path.name, bad.reason) for bad in found] == [
        ("events.parquet", "not a regular file")
    ]
    assert lestd("verify", tmp_path / "run").code == 1


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_names_code_is_a_regular_file(make: Callable[[Path], None], tmp_path: Path) -> None:
    auto_map = {"AutoModel": "modeling_mine.Mine"}
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    make(tmp_path / "generation_config.json")
    make(tmp_path / "modeling_mine.py")
    assert find_side_files(tmp_path) == {"config.json"}


def test_files_are_no_larger_than_they_may_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    assert read_regular(tmp_path / "file", 100) == bytes(100)
    with pytest.raises(OSError, match="100 bytes, expected at most 99"):
        read_regular(tmp_path / "file", 99)


@pytest.mark.parametrize("depth", [100, 100_000])
def test_json_is_not_nested_deeper_than_readers_can_follow(depth: int) -> None:
    assert parse_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * depth + "]" * depth)


def test_a_header_that_repeats_names_takes_no_longer_than_another() -> None:
    text = ("{" + ",".join(f'"{n}":1' for n in range(100_000)) + ',"99999":1}').encode()
    began = time.process_time()
    with pytest.raises(LestdError, match="names '99999' twice"):
        parse_header(text, "shard", 8 + len(text))
    assert time.process_time() - began < 30  # Counting each name took an hour.


# -- YAML ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases are not allowed in line 2, column 10"),
        ("keep: 0.5\nkeep: 0.4\n", "'keep' is named twice in line 2, column 1"),
        ("layer_keep: {'0': 0.5, '0': 0.4}\n", "'0' is named twice in line 1"),
        ("a: !!bool x\n", "cannot be read as YAML"),
        ("a: !!timestamp x\n", "cannot be read as YAML"),
        ("#" * 300_000, "longer than 262144 characters"),
    ],
)
def test_yaml_that_costs_without_bound_or_says_two_things(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(LestdError, match=message):
        load_yaml(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("model", "values", "key"),
    [
        (RunFile, {"rank_step": True}, "rank_step"),
        (RunFile, {"rank_step": "8"}, "rank_step"),
        (RunFile, {"keep": "0.5"}, "keep"),
        (RunFile, {"value_bits": True}, "value_bits"),
        (RunFile, {"hooi_tol": float("inf")}, "hooi_tol"),
        (ClusterConfig, {"workers": "2"}, "workers"),
        (ClusterConfig, {"autoscaling": 1}, "autoscaling"),
    ],
)
def test_a_number_is_a_number(model: Any, values: dict[str, Any], key: str) -> None:
    given = {"keep": 0.5} if model is RunFile else {}
    with pytest.raises(LestdError, match=f"x: {key}: Input should be"):
        validated(model, given | values, "x")


@pytest.mark.parametrize("name", ["targets", "ignore"])
def test_an_expression_ends(name: str) -> None:
    """With Python's own the first would take years."""
    config = validated(RunFile, {"keep": 0.5, name: "(.+)+(.+)+(.+)+!"}, "x")
    assert config.names("a" * 10_000, ["b" * 10_000]) == (name == "ignore")
    for pattern in ("(", "(?=a)", "(a{1000}){1000}", "\ud800"):
        with pytest.raises(LestdError, match=f"x: {name}: expected a regular expression of RE2"):
            validated(RunFile, {"keep": 0.5, name: pattern}, "x")


def test_numbers_may_have_an_exponent(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("keep: 5e-1\nhooi_tol: 1e-5\nmax_flops: 1\n")
    run = validated(RunFile, load_yaml(tmp_path / "run.yaml"), "run.yaml")
    assert (run.keep, run.hooi_tol, run.max_flops) == (0.5, 1e-5, 1.0)


@pytest.mark.parametrize(
    ("front", "kept"),
    [
        ("license: 2024-01-01", {"license": "2024-01-01"}),
        ("license: 2024-99-99", {"license": "2024-99-99"}),
        ("license: mit\nlanguage: [en, no]", {"license": "mit", "language": ["en", "no"]}),
        ("license: {a: b}\ndatasets: [[x]]\npipeline_tag:", {}),
        ("license: mit\nlicense: gpl", {}),
        (BOMB, {}),
        ("license: [", {}),
    ],
)
def test_a_bad_card_is_left_out_and_stops_nothing(
    front: str, kept: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    assert card_metadata(tmp_path) == kept


# -- config.json ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3_moe", tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers 1000000000, more than the tensors have"),
        ("num_experts", 10**9, "num_experts 1000000000, more than"),
        ("num_local_experts", "4", "num_experts '4', expected the number of the experts"),
        ("num_attention_heads", 10**9, "num_attention_heads 1000000000, more than"),
        ("num_labels", 10**9, "num_labels 1000000000, more than"),
        ("decoder_layers", 10**9, "decoder_layers 1000000000, more than"),
        ("moe_num_experts", 10**9, "moe_num_experts 1000000000, more than"),
        ("num_layers_per_stack", 10**9, "num_layers_per_stack 1000000000, more than"),
        ("vision_config", {"depth": 10**9}, "depth 1000000000, more than"),
        ("thinker", {"vision_config": {"depths": [2, 10**9]}}, "depths 1000000000, more than"),
        ("decoder_sparse_step", 0, "decoder_sparse_step 0; expected at least 1"),
    ],
)
def test_counts_are_bounded_by_the_tensors(
    name: str, value: Any, message: str, tiny: Path, tmp_path: Path
) -> None:
    for file in tiny.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tiny / "config.json").read_text()) | {name: value}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused = lestd("plan", tmp_path, "--keep", 0.5, "--scope", "all")
    assert refused.code == 2
    assert message in refused.err
    assert resolve_source(str(tiny)).index.tensors


# -- manifests -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("groups", {"format": "{"}),
        ("groups", {"format": "null"}),
        ("groups", {"format": "[" * 100_000}),
        ("groups", {"format": '{"modules": {"q": {"slices": true}}}'}),
        ("groups", {"dense_bytes": 0}),
        ("groups", {"payload": "../../etc/passwd"}),
        ("groups", {"block": "a/../../b"}),
        ("groups", {"seconds_read": 1e308}),
        ("groups", {"seconds_read": float("nan")}),
        ("groups", {"started_at": datetime(9999, 1, 1, tzinfo=UTC)}),
        ("runs", {"config": "{"}),
        ("runs", {"config": "[1]"}),
        ("runs", {"versions": "null"}),
        ("runs", {"model_bytes": -1}),
    ],
)
def test_a_row_that_is_none_of_lestds_is_damage_to_every_command(
    table: str, change: dict[str, Any], tmp_path: Path
) -> None:
    rows = {"groups": [manifests.group(layer, 32, 8, 2) for layer in range(2)]}
    rows["runs"] = [manifests.call(0, "complete", 2, config="{}", versions="{}")]
    whole = manifests.run_of(tmp_path / "whole", 2, 2, **rows)
    rows[table][0] |= change
    bad = manifests.run_of(tmp_path / "bad", 2, 2, **rows)
    name = f"{table}.parquet"
    assert [found.path.name for found in Manifest(bad).damaged()] == [name]
    assert Manifest(whole).damaged() == []
    verified = lestd("verify", bad)
    assert verified.code == 1
    assert f"{name} is damaged: its column {next(iter(change))} has" in verified.out
    assert lestd("report", bad, "--format", "md", "--out", tmp_path / "r.md").code == 0
    assert lestd("diff", whole, bad).code == 0
    assert lestd("diff", bad, whole, "--json").code == 0


def test_only_the_part_with_the_row_is_damaged(tmp_path: Path) -> None:
    manifest = Manifest(manifests.run_of(tmp_path / "run", 2, 2))
    folder = manifest.directory / "groups"
    folder.mkdir()
    for layer, dense in ((7, 1), (8, 0)):
        rows = [manifests.group(layer, 32, 8, 2, dense_bytes=dense)]
        part = manifests.write(tmp_path / str(layer), groups=rows) / "manifest" / "groups.parquet"
        part.rename(folder / f"{layer}.parquet")
    assert [bad.path.name for bad in manifest.damaged()] == ["8.parquet"]
    assert manifest.groups()["layer"].to_pylist() == [0, 1, 7]


# -- pickles -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("a", lambda: torch.zeros(1).expand(2**28), "fewer elements than that"),
        ("a", lambda: torch.empty(4, device="meta"), "on the device meta"),
        ("a", lambda: torch.nested.nested_tensor([torch.zeros(2)]), "is nested"),
        ("a\ud800", lambda: torch.zeros(2), "has a name that no tensor may have"),
        ("__metadata__", lambda: torch.zeros(2), "has a name that no tensor may have"),
    ],
)
def test_tensors_without_bytes_of_their_own_are_not_converted(
    name: str, tensor: Callable[[], torch.Tensor], message: str, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    torch.save({name: tensor()}, tmp_path / "in" / "pytorch_model.bin")
    with pytest.raises(LestdError, match=message):
        convert(str(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_conjugated_tensors_are_converted(tmp_path: Path) -> None:
    values = torch.tensor([1 + 2j, 3 - 4j]).conj()
    negated = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    assert values.is_conj()
    assert negated.is_neg()
    (tmp_path / "in").mkdir()
    torch.save({"a": values, "b": negated}, tmp_path / "in" / "pytorch_model.bin")
    convert(str(tmp_path / "in"), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["a"], values)
    assert found["b"].tolist() == [-2, 4]


# -- what is shown -------------------------------------------------------------------------------

EVIL = "=cmd\x1b]0;x\x07[/bold]\x9b2J:bug:"


def test_data_does_not_steer_the_terminal(tmp_path: Path) -> None:
    runs = [manifests.call(0, "complete", 2, model=EVIL, config=json.dumps({EVIL: EVIL}))]
    evil = manifests.run_of(tmp_path / "evil", 2, 2, runs=runs)
    plain = manifests.run_of(
        tmp_path / "plain", 2, 2, runs=[manifests.call(1, "complete", 2, config='{"a": 1}')]
    )
    said = lestd("diff", plain, evil)
    said_of_errors = lestd("query", evil, f'select "{EVIL}" from runs')
    shown = said.out + said.err + said_of_errors.err
    assert "=cmd\\x1b]0;x\\x07" in shown
    assert "[/bold]" in shown
    assert ":bug:" in shown
    assert not {char for char in shown if not char.isprintable()} - {"\n"}


@pytest.mark.parametrize("terminal", [False, True])
def test_csv_has_no_formulas(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [manifests.call(0, "complete", 2, model=EVIL, planned_seconds=-3.5)]
    run = manifests.run_of(tmp_path / "run", 2, 2, runs=runs)
    sql = "select model, '-1' as a, '\t@x' as b, planned_seconds as c, -2 as d, 'a=\nb' as e"
    printed = io.StringIO()
    monkeypatch.setattr(printed, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("sys.stdout", printed)
    print_csv(run_query([run], f"{sql} from runs", print))
    (row,) = csv.DictReader(io.StringIO(printed.getvalue()))
    assert row == {
        "model": "'" + (output.visible(EVIL) if terminal else EVIL),
        **{"a": "'-1", "b": "'\t@x", "c": "-3.5", "d": "-2", "e": "a=\nb"},
    }


def test_closed_streams_end_without_a_traceback() -> None:
    command = f"{sys.executable} -m orchestrator query --list"
    codes = {"| head -c 0": 0, "<&- >&- 2>&-": 0, ">/dev/full": 2}
    runs = {
        how: subprocess.Popen(["bash", "-c", f"{command} {how}"], stderr=subprocess.PIPE, text=True)
        for how in codes
    }
    for how, run in runs.items():
        said = run.communicate(timeout=120)[1]
        assert "Traceback" not in said
        assert "Exception ignored" not in said
        assert run.returncode == codes[how], how
