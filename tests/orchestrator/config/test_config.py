"""Configuration: what is accepted, and how a mistake is answered."""

import math
import re
from pathlib import Path

import pytest
import yaml
from support.paths import ROOT

from lestd_kernels.errors import LestdError
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.files import Strict, load_yaml, validated
from orchestrator.config.layers import list_of_layers, parse_layers
from orchestrator.config.options import described
from orchestrator.config.recipes import options_of, recipes
from orchestrator.config.reference import keywords, page
from orchestrator.config.run import RunConfig, RunFile, run_options, scope_keep


@pytest.mark.parametrize(
    ("text", "layers"), [("3", {3}), ("0-2", {0, 1, 2}), ("0-1,5,7-8", {0, 1, 5, 7, 8})]
)
def test_layer_lists(text: str, layers: set[int]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("key", ["include", "exclude", "layer_keep"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-9999999999", "layer 9999999999 is too high; expected layers below 10,000"),
        ("10000", "layer 10000 is too high"),
        ("0,7-3", 'the range 7-3 runs backwards; write "3-7"'),
        ("9" * 5000, 'expected layers like "0-3,7"'),
        ("0-", 'expected layers like "0-3,7"'),
        ("-1", 'expected layers like "0-3,7"'),
        ("", 'expected layers like "0-3,7"'),
    ],
)
def test_layer_lists_that_are_none(key: str, text: str, message: str) -> None:
    value = {text: 0.5} if key == "layer_keep" else text
    with pytest.raises(LestdError) as caught:
        validated(RunFile, {"keep": 0.4, key: value}, "run.yaml")
    assert str(caught.value).startswith(f"run.yaml: {key}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_layer_lists_end_where_they_should() -> None:
    assert parse_layers("0-9999") == set(range(10_000))
    assert list_of_layers(parse_layers("7,0-1,2,3,5-6")) == "0-3,5-7"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"keep": 0.4, "inclde": "0"}, ["inclde", "include"]),
        ({"keep": 0.4, "zzz": 1}, ["zzz", "known"]),
        ({"keep": 0}, ["keep", "0"]),
        ({"keep": 1.0}, ["keep", "1"]),
        ({"keep": float("nan")}, ["keep"]),
        ({}, ["exactly one of keep, keep_model and target_loss"]),
        ({"keep": 0.4, "keep_model": 0.8}, ["exactly one of keep, keep_model and target_loss"]),
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


@pytest.mark.parametrize("model", [RunFile, ClusterConfig])
def test_every_key_is_described(model: type[Strict]) -> None:
    assert {one.name for one in described(model)} == model.model_fields.keys()


def test_the_page_of_options_is_made_from_them() -> None:
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == page(), "make reference"
    home = ROOT / "orchestrator" / "config" / "keywords.py"
    assert home.read_text(encoding="utf-8") == keywords(), "make reference"


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: there\nkeep_model: 0.8\nthreads: 3\nsamples: 5\n")
    given = {"model": None, "config": file, "keep": 0.4, "samples": 7, "device": None}
    (model, *_), config = run_options(given)
    assert (model, config.keep, config.keep_model) == ("there", 0.4, None)
    assert (config.samples, config.threads, config.device) == (7, 3, "auto")


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_holds_what_a_run_needs_beside_model_and_text(name: str) -> None:
    one = recipes()[name]
    assert one.text.startswith(f"# {one.summary}\n")
    text = {"calibrate_on": "text"} if "calibrate_on" in one.text else {}
    _, config = run_options({"model": "there", "recipe": name, **text})
    options = options_of(name)
    assert config.model_dump(include=set(options)) == options


def test_a_recipe_gives_way_to_the_file_and_to_the_options(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: there\nscope: attention\ntarget_loss: 0.1\n")
    given = {"recipe": "smallest", "calibrate_on": "text"}
    _, plain = run_options(given | {"model": "there"})
    assert (plain.method, plain.scope, plain.keep) == ("watersic", "all", 0.2)
    _, with_file = run_options(given | {"config": file})
    assert (with_file.scope, with_file.keep, with_file.target_loss) == ("attention", None, 0.1)
    _, both = run_options(given | {"config": file, "keep_model": 0.5})
    assert (both.keep, both.keep_model, both.target_loss) == (None, 0.5, None)
    with pytest.raises(LestdError, match="no recipe named 'smalest'; did you mean smallest"):
        run_options({"model": "there", "recipe": "smalest"})


@pytest.mark.parametrize(
    ("given", "loss"), [("2%", math.log(1.02)), (" 0.5 % ", math.log(1.005)), ("0.02", 0.02)]
)
def test_a_loss_may_be_a_percentage_of_perplexity(tmp_path: Path, given: str, loss: float) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: there\ncalibrate_on: text\ntarget_loss: {given}\n")
    _, from_file = run_options({"config": file})
    _, from_here = run_options({"config": file, "target_loss": given})
    assert from_file.target_loss == from_here.target_loss == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize(
    ("given", "variant", "start"),
    [
        ({"keep": 1.0}, {}, "--keep: Input should be less than 1, got 1.0"),
        (
            {"keep": 0.5, "max_flops": 0.0},
            {},
            "--max-flops: Input should be greater than 0, got 0.0",
        ),
        ({"keep": 0.5}, {"value_bits": 5}, "--methods: value_bits: Input should be 16, 8, 4"),
        (
            {"keep": 0.5, "samples": 0},
            {"rank_step": 2},
            "--samples: Input should be at least 1, got 0",
        ),
        ({"target_loss": "2 percent"}, {}, "--target-loss: expected nats per token, like 0.02, or"),
        ({"target_loss": "-1%"}, {}, "--target-loss: Input should be greater than 0, got '-1%'"),
        ({}, {}, "FILE: keep: Input should be less than 1, got 2.0"),
        ({"samples": 2}, {}, "FILE: keep: "),
    ],
)
def test_a_wrong_value_is_called_what_the_user_called_it(
    tmp_path: Path, given: dict[str, object], variant: dict[str, object], start: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: there\nkeep: 2.0\n")
    with pytest.raises(LestdError) as caught:
        run_options({"config": file, **given}, variant)
    assert str(caught.value).startswith(start.replace("FILE", str(file)))


def test_a_misspelt_cluster_key_is_named() -> None:
    with pytest.raises(LestdError, match=r"wokers.*workers"):
        validated(ClusterConfig, {"wokers": 2}, "cluster.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "must hold keys and values, found a list"),
        ("a: 1\nb: [1\n", r"expected ',' or '\]'.* in line 3, column 1"),
        ("a: b: c\n", "mapping values are not allowed here in line 1, column 5"),
        ("a: !!python/object:os.system {}\n", "could not determine a constructor .* in line 1"),
        ("a: 2024-99-99\n", "month must be in 1..12"),
        ("[" * 5000, "cannot be read as YAML"),
        ("\xff", "cannot be read as YAML"),
        ("a: \x00", "cannot be read as YAML"),
        (None, "cannot be read as YAML .*No such file"),
    ],
)
def test_a_file_that_is_no_mapping_is_named(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(LestdError, match=message) as caught:
        load_yaml(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_the_examples_in_the_docs_are_valid() -> None:
    page = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    run, cluster = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.S))
    assert validated(RunFile, run, "running.md").keep == 0.4
    assert validated(ClusterConfig, cluster, "running.md").workers == 4


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
    config = RunConfig(keep=0.5, layer_keep={"0,2": 0.8, "1": 0.9})
    assert [config.keep_of(layer, 0.5) for layer in range(4)] == [0.8, 0.9, 0.8, 0.5]


@pytest.mark.parametrize("keys", [("0-2", "2-3"), ("2-3", "0-2"), ("2", "0,2")])
def test_a_layer_cannot_have_two(keys: tuple[str, str]) -> None:
    values = {"keep": 0.5, "layer_keep": {keys[0]: 0.8, keys[1]: 0.9}}
    with pytest.raises(LestdError) as caught:
        validated(RunFile, values, "run.yaml")
    assert (
        str(caught.value)
        == f"run.yaml: layer_keep: {keys[0]!r} and {keys[1]!r} both name layer 2; name it in one"
    )


def test_keep_model_gives_the_scope_what_the_rest_leaves() -> None:
    keep = scope_keep(RunConfig(keep_model=0.8), scope_bytes=300, model_bytes=1000)
    assert (700 + keep * 300) / 1000 == pytest.approx(0.8)
    with pytest.raises(LestdError, match=r"0\.700 of the model"):
        scope_keep(RunConfig(keep_model=0.7), scope_bytes=300, model_bytes=1000)
