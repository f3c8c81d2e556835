"""Status and verification of what is damaged: problems are named, and never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.cli import Finished, lestd
from support.families import save_tiny

from workers.checkpoint.tensors import INDEX_FILE


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a compressed model ``out`` and its run ``out.run``."""
    root = tmp_path_factory.mktemp("compressed")
    model = save_tiny("llama-gqa", root / "model")
    options = ("--keep", 0.5, "--executor", "serial", "--out", root / "out")
    assert lestd("compress", model, *options).code == 0
    return root


@pytest.fixture
def out(compressed: Path, tmp_path: Path) -> Path:
    for name in ("out", "out.run"):
        shutil.copytree(compressed / name, tmp_path / name)
    return tmp_path / "out"


def problems(out: Path) -> list[str]:
    result = lestd("verify", out, "--json")
    found = json.loads(result.out)["problems"]
    assert result.code == (1 if found else 0)
    assert not any("\n" in problem for problem in found)
    return found


def test_what_is_whole_has_no_problem(out: Path) -> None:
    assert problems(out) == []


def first(directory: Path) -> Path:
    return sorted(directory.glob("*.parquet"))[0]


def fewer_rows(path: Path) -> None:
    pq.write_table(pq.read_table(path, partitioning=None).slice(1), path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, ["has 0 rows in slices", "which has 12 slices"]),
        (fewer_rows, ["has 11 rows in slices", "which has 12 slices"]),
        (lambda path: path.write_bytes(b"PAR1"), ["is damaged", "has 0 rows in slices"]),
    ],
)
def test_a_group_of_the_run_without_its_slices(
    out: Path, damage: Callable[[Path], object], words: list[str]
) -> None:
    path = first(out.with_name("out.run") / "manifest" / "slices")
    damage(path)
    found = " ".join(problems(out))
    for word in [*words, path.stem, "out.run"]:
        assert word in found


@pytest.mark.parametrize(
    ("damage", "count"),
    [(Path.unlink, 2), (fewer_rows, 1), (lambda path: path.write_bytes(b""), 3)],
)
def test_a_group_of_the_model_without_its_slices(
    out: Path, damage: Callable[[Path], object], count: int
) -> None:
    damage(out / "manifest" / "slices.parquet")
    found = problems(out)
    assert len(found) == count
    assert all(str(out / "manifest") in problem for problem in found)


@pytest.mark.parametrize("column", ["payload", "format", "layer"])
def test_a_group_row_without_what_it_needs(out: Path, column: str) -> None:
    path = first(out.with_name("out.run") / "manifest" / "groups")
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table.drop_columns([column]), path)
    assert f"it has rows without {column}" in " ".join(problems(out))


@pytest.mark.parametrize("name", ["config.json", "README.md", "dense-*.safetensors"])
def test_files_of_the_model_that_changed_or_went(out: Path, name: str) -> None:
    path = sorted(out.glob(name))[0]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert problems(out) == [f"{path} does not have the sha256 that the manifest states"]
    path.unlink()
    assert f"{path} is missing" in problems(out)


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"files": 3}', '{"files": {"config.json": 1}}'])
def test_a_model_that_does_not_say_what_files_it_has(out: Path, text: str) -> None:
    (out / "manifest" / "model.json").write_text(text)
    [problem] = problems(out)
    assert str(out / "manifest") in problem


def test_a_model_without_its_manifest(out: Path) -> None:
    shutil.rmtree(out / "manifest")
    assert problems(out) == [f"{out} has no manifest to check it against"]


@pytest.mark.parametrize(
    "index",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": ["x"]}}',
        '{"weight_map": {"a": "../x.safetensors"}}',
    ],
)
def test_an_index_that_is_none(out: Path, index: str) -> None:
    (out / INDEX_FILE).write_text(index)
    found = problems(out)
    assert len(found) == 2  # It is not the file that the manifest describes, either.
    assert all(problem.startswith(str(out / INDEX_FILE)) for problem in found)


def test_an_index_and_shards_that_disagree(out: Path) -> None:
    path = out / INDEX_FILE
    index = json.loads(path.read_text())
    shard = index["weight_map"].pop("model.norm.weight")
    index["weight_map"]["ghost"] = shard
    path.write_text(json.dumps(index))
    found = problems(out)
    assert f"{out / shard} lacks ghost" in found
    assert f"{path} does not name model.norm.weight of {shard}" in found


def refused(result: Finished, *words: str) -> None:
    assert (result.code, result.out) == (2, "")
    [error] = [line for line in result.err.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    "plan",
    [
        "{}",
        "[]",
        "{",
        "",
        '{"layers": {}}',
        '{"layers": [3]}',
        '{"layers": [{"task_id": "x"}]}',
        '{"layers": [{"task_id": "x", "layer": "0", "block": "g", "byte_budget": 1}]}',
    ],
)
def test_status_of_a_damaged_plan(out: Path, plan: str) -> None:
    path = out.with_name("out.run") / "plan.json"
    path.write_text(plan)
    refused(lestd("status", out), str(path))


def test_status_names_damaged_files_and_what_repairs_them(compressed: Path, out: Path) -> None:
    bad = first(out.with_name("out.run") / "manifest" / "groups")
    bad.write_bytes(b"PAR1")
    shown = lestd("status", out)
    assert shown.code == 0
    assert shown.err.startswith(f"{bad} is damaged and left out: ")
    assert "1 file of the manifest cannot be read: the same lestd compress" in shown.out
    assert json.loads(lestd("status", out, "--json").out)["damaged"][0]["path"] == str(bad)
    options = ("--keep", 0.5, "--executor", "serial", "--out", out)
    assert lestd("compress", compressed / "model", *options).code == 0
    again = lestd("status", out)
    assert (again.err, again.out.splitlines()[-1].split(":")[0]) == ("", "complete")


def test_after_clean_the_model_answers(out: Path) -> None:
    before = json.loads(lestd("status", out, "--json").out)
    assert lestd("clean", out).code == 0
    after = json.loads(lestd("status", out, "--json").out)
    assert after.pop("cleaned")
    assert not before.pop("cleaned")
    assert after == before
    assert "its run directory was cleaned" in lestd("status", out).out
    second = lestd("clean", out)
    assert (second.code, second.out) == (0, f"{out} is complete; its run directory was cleaned\n")


@pytest.mark.parametrize("command", ["status", "verify", "clean"])
def test_a_run_directory_is_no_model(command: str, out: Path) -> None:
    run = out.with_name("out.run")
    refused(lestd(command, run), f"{run} is a run directory; name {out}")
    other = run.rename(out.with_name("elsewhere"))
    refused(lestd(command, other), "run directory; name the directory given to --out")


def test_nothing_to_look_at(tmp_path: Path) -> None:
    refused(lestd("status", tmp_path / "out"), "out.run holds no run")
    refused(lestd("verify", tmp_path / "out"), "holds anything that lestd made")
    model = save_tiny("llama", tmp_path / "dense")
    refused(lestd("verify", model), "holds anything that lestd made")
