"""Configuration: what is accepted, and how a mistake is answered."""

import re
from pathlib import Path

import pytest
import yaml

from lestd_kernels.errors import LestdError
from orchestrator.config import (
    ClusterConfig,
    RunConfig,
    RunFile,
    load_yaml,
    parse_layers,
    scope_keep,
    validated,
)


@pytest.mark.parametrize(
    ("text", "layers"), [("3", {3}), ("0-2", {0, 1, 2}), ("0-1,5,7-8", {0, 1, 5, 7, 8})]
)
def test_layer_lists(text: str, layers: set[int]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"keep": 0.4, "inclde": "0"}, ["inclde", "include"]),
        ({"keep": 0.4, "zzz": 1}, ["zzz", "known"]),
        ({"keep": 0}, ["keep", "0"]),
        ({"keep": 1.0}, ["keep", "1"]),
        ({"keep": float("nan")}, ["keep"]),
        ({}, ["exactly one of keep and keep_model"]),
        ({"keep": 0.4, "keep_model": 0.8}, ["exactly one of keep and keep_model"]),
        ({"keep": 0.4, "method": "svdd"}, ["svdd", "lestd", "tucker"]),
        ({"keep": 0.4, "include": "a-b"}, ["include", "a-b"]),
        ({"keep": 0.4, "layer_keep": {"0": 1.5}}, ["layer_keep", "1.5"]),
        ({"keep": 0.4, "max_flops": 0}, ["max_flops"]),
        ({"keep": 0.4, "threads": 0}, ["threads"]),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, object], words: list[str]) -> None:
    with pytest.raises(LestdError) as caught:
        validated(RunFile, values, "run.yaml")
    message = str(caught.value)
    assert message.startswith("run.yaml: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_misspelt_cluster_key_is_named() -> None:
    with pytest.raises(LestdError, match=r"wokers.*workers"):
        validated(ClusterConfig, {"wokers": 2}, "cluster.yaml")


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n", "\xff"])
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(LestdError, match=r"run\.yaml"):
        load_yaml(path)


def test_the_readmes_examples_are_valid() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    run, cluster = (
        yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", readme, re.S)
    )
    assert validated(RunFile, run, "README.md").keep == 0.4
    assert validated(ClusterConfig, cluster, "README.md").workers == 4


def test_layers_are_selected_and_checked() -> None:
    config = RunConfig(keep=0.5, include="0-5", exclude="2")
    assert config.select_layers(range(8)) == [0, 1, 3, 4, 5]
    with pytest.raises(LestdError, match=r"include names layer 4.*layers 0 to 3"):
        config.select_layers(range(4))
    with pytest.raises(LestdError, match="no layer"):
        RunConfig(keep=0.5, include="1", exclude="1").select_layers(range(4))
    with pytest.raises(LestdError, match="layer_keep '9' names layer 9"):
        RunConfig(keep=0.5, layer_keep={"9": 0.5}).select_layers(range(4))


def test_a_layer_can_have_a_keep_of_its_own() -> None:
    config = RunConfig(keep=0.5, layer_keep={"0-2": 0.8, "1": 0.9})
    assert [config.keep_of(layer, 0.5) for layer in range(4)] == [0.8, 0.9, 0.8, 0.5]


def test_keep_model_gives_the_scope_what_the_rest_leaves() -> None:
    keep = scope_keep(RunConfig(keep_model=0.8), scope_bytes=300, model_bytes=1000)
    assert (700 + keep * 300) / 1000 == pytest.approx(0.8)
    with pytest.raises(LestdError, match=r"0\.700 of the model"):
        scope_keep(RunConfig(keep_model=0.7), scope_bytes=300, model_bytes=1000)
