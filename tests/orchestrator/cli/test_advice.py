"""What a refusal advises is done, to the letter, and works: with the same --out, nothing deleted.

Each situation is a command that is refused, words of the advice, and the command that follows it.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli import digest_tree, lestd
from support.families import POSITIONS, VOCABULARY, save_tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SERIAL = ("--executor", "serial")
SHORT = ("--samples", 4, "--sample-tokens", 16)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Place:
    """What the situations share: read only.

    Attributes:
        model: a dense model with a tokenizer.
        compressed: the same, compressed by lestd.
        text: of 2,000 words, a token each.
        short: of 20.
    """

    model: Path
    compressed: Path
    text: Path
    short: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("advice")
    model = save_tiny("llama", root / "model")
    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(model)
    made = Place(model, root / "compressed", root / "text.txt", root / "short.txt")
    made.text.write_text(" ".join(f"w{1 + i * i % 89}" for i in range(2000)))
    made.short.write_text("w1 w2 " * 10)
    result = lestd("compress", model, "--keep", 0.5, "--out", made.compressed, *SERIAL)
    assert result.code == 0, result.err
    return made


Command = tuple[Any, ...]
Situation = Callable[[Place, Path], tuple[Command, str, Command]]


def compress(place: Place, *options: object, model: Path | None = None) -> Command:
    keep = () if "--keep" in options else ("--keep", 0.5)
    return ("compress", model or place.model, *keep, *SERIAL, *options)


def plan(place: Place, *options: object, model: Path | None = None) -> Command:
    """Refused by the same words as the command that would do it."""
    keep = () if "--keep-model" in options or "--keep" in options else ("--keep", 0.5)
    return ("plan", model or place.model, *keep, *options)


def a_longer_text(place: Place, out: Path) -> tuple[Command, str, Command]:
    def calibrated(text: Path) -> Command:
        return compress(place, "--out", out, "--calibrate-on", text, *SHORT)

    return calibrated(place.short), "give a longer text", calibrated(place.text)


def fewer_samples(place: Place, out: Path) -> tuple[Command, str, Command]:
    calibrated = compress(place, "--out", out, "--calibrate-on", place.short, "--sample-tokens", 16)
    return (
        (*calibrated, "--samples", 4),
        "or smaller --samples and --sample-tokens",
        (*calibrated, "--samples", 1),
    )


def a_shorter_window_of_calibration(place: Place, out: Path) -> tuple[Command, str, Command]:
    calibrated = compress(place, "--out", out, "--calibrate-on", place.text, "--samples", 4)
    return (
        (*calibrated, "--sample-tokens", 1000),
        f"give --sample-tokens of at most {POSITIONS}",
        (*calibrated, "--sample-tokens", POSITIONS),
    )


def the_tokenizer_of_the_source(place: Place, out: Path) -> tuple[Command, str, Command]:
    bare = shutil.copytree(place.model, out.with_name("bare"))
    for name in TOKENIZER:
        (bare / name).unlink()
    command = compress(place, "--out", out, "--calibrate-on", place.text, *SHORT, model=bare)
    return command, f"copy the tokenizer files of the original model into it|{bare}", command


def the_tokenizer_of_a_compressed_model(place: Place, out: Path) -> tuple[Command, str, Command]:
    bare = shutil.copytree(place.compressed, out.with_name("bare"))
    for name in TOKENIZER:
        (bare / name).unlink()
    command = ("evaluate", bare, "--text", place.short, *SERIAL)
    return command, f"copy the tokenizer files of the original model into it|{bare}", command


def another_window(place: Place, out: Path) -> tuple[Command, str, Command]:
    command = ("evaluate", place.model, "--text", place.short, "--run-dir", out, *SERIAL)
    return (
        (*command, "--window", 1000),
        f"give --window of at most {POSITIONS}",
        (*command, "--window", POSITIONS),
    )


def the_processor(place: Place, out: Path) -> tuple[Command, str, Command]:
    command = compress(place, "--out", out)
    return (*command, "--device", "cuda"), "use --device cpu", (*command, "--device", "cpu")


def the_processor_for_a_calibration(place: Place, out: Path) -> tuple[Command, str, Command]:
    command = compress(place, "--out", out, "--calibrate-on", place.text, *SHORT)
    return (*command, "--device", "cuda"), "use --device cpu", (*command, "--device", "cpu")


def the_processor_for_a_sweep(place: Place, out: Path) -> tuple[Command, str, Command]:
    command = ("sweep", place.model, "--keep", "0.5", "--out", out, *SERIAL)
    command += ("--calibrate-on", place.text, *SHORT)
    return (*command, "--device", "cuda"), "use --device cpu", (*command, "--device", "cpu")


def the_processor_for_a_comparison(place: Place, out: Path) -> tuple[Command, str, Command]:
    command = ("compare", place.model, "--methods", "lestd,rtn", "--keep", "0.6", "--out", out)
    command += ("--no-speed", *SERIAL, "--calibrate-on", place.text, *SHORT)
    return (*command, "--device", "cuda"), "use --device cpu", (*command, "--device", "cpu")


def the_processor_for_an_evaluation(place: Place, out: Path) -> tuple[Command, str, Command]:
    command = ("evaluate", place.model, "--text", place.short, "--run-dir", out, *SERIAL)
    return (*command, "--device", "cuda"), "use --device cpu", (*command, "--device", "cpu")


def the_processor_for_an_audit(place: Place, out: Path) -> tuple[Command, str, Command]:
    command = ("audit", place.model, "--run-dir", out, *SERIAL)
    return (*command, "--device", "cuda"), "use --device cpu", (*command, "--device", "cpu")


def the_processor_for_a_recovery(place: Place, out: Path) -> tuple[Command, str, Command]:
    command = recover(place, out, "--steps", 1)
    return (*command, "--device", "cuda"), "use --device cpu", (*command, "--device", "cpu")


def a_larger_keep(place: Place, out: Path) -> tuple[Command, str, Command]:
    return plan(place, "--keep", 0.01), "raise keep", plan(place, "--keep", 0.5)


def more_flops(place: Place, out: Path) -> tuple[Command, str, Command]:
    command = plan(place)
    return (*command, "--max-flops", 0.001), "raise max_flops", (*command, "--max-flops", 1.0)


def a_keep_of_the_model_that_can_be_reached(
    place: Place, out: Path
) -> tuple[Command, str, Command]:
    command = plan(place, "--keep-model")
    return (*command, 0.1), "choose a value above that and below 1", (*command, 0.9)


def layers_that_exist(place: Place, out: Path) -> tuple[Command, str, Command]:
    command = plan(place, "--include")
    return (*command, "7"), "has layers 0 to 1; correct the list", (*command, "1")


def a_text_for_a_method(place: Place, out: Path) -> tuple[Command, str, Command]:
    command = plan(place, "--method", "svd_llm")
    return command, "(--calibrate-on TEXT)", (*command, "--calibrate-on", place.text, *SHORT)


def a_scope_that_a_method_knows(place: Place, out: Path) -> tuple[Command, str, Command]:
    command = plan(place, "--method", "per_head_tucker", "--scope")
    return (*command, "ffn"), "use scope attention", (*command, "attention")


def another_method_where_there_are_no_experts(
    place: Place, out: Path
) -> tuple[Command, str, Command]:
    command = plan(place, "--method")
    return (*command, "td_moe"), "or another method", (*command, "svd")


def scope_experts(place: Place, out: Path) -> tuple[Command, str, Command]:
    moe = save_tiny("mixtral", out.with_name("moe"))
    command = plan(place, "--method", "td_moe", "--scope", model=moe)
    return (*command, "attention"), "use scope experts", (*command, "experts")


def identity_types(place: Place, out: Path) -> tuple[Command, str, Command]:
    gqa = save_tiny("llama-gqa", out.with_name("gqa"))
    command = plan(place, "--type-mode", model=gqa)
    return (*command, "learned"), "use type_mode 'identity'", (*command, "identity")


def no_revision(place: Place, out: Path) -> tuple[Command, str, Command]:
    command = plan(place)
    return (*command, "--revision", "main"), "leave --revision out", command


def the_model_of_a_run_directory(place: Place, out: Path) -> tuple[Command, str, Command]:
    run = place.compressed.with_name("compressed.run")
    return ("status", run), f"name {place.compressed}", ("status", place.compressed)


def directories_of_their_own(place: Place, out: Path) -> tuple[Command, str, Command]:
    command = compress(place, "--out", out, "--run-dir")
    return (*command, out / "run"), "must be directories of their own", (*command, out.parent / "r")


def another_name_for_a_run(place: Place, out: Path) -> tuple[Command, str, Command]:
    foreign = out.with_name("notes")
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    command = compress(place, "--out", out, "--run-dir")
    return (*command, foreign), "choose another --run-dir", (*command, out.parent / "r")


def undo_a_change(place: Place, out: Path) -> tuple[Command, str, Command]:
    done = compress(place, "--out", out)
    assert lestd(*done).code == 0
    return compress(place, "--out", out, "--keep", 0.6), "undo the change to continue it", done


def start_over_fresh(place: Place, out: Path) -> tuple[Command, str, Command]:
    assert lestd(*compress(place, "--out", out)).code == 0
    other = compress(place, "--out", out, "--keep", 0.6)
    return other, "or start over with --fresh", (*other, "--fresh")


def weights_for_a_plot(place: Place, out: Path) -> tuple[Command, str, Command]:
    command = ("sweep", place.model, "--keep", "0.5", "--out", out, *SERIAL)
    return (*command, "--plot", out.with_name("p.png")), "or leave --plot out", command


def a_text_to_evaluate(place: Place, out: Path) -> tuple[Command, str, Command]:
    command = ("evaluate", place.model, "--run-dir", out, *SERIAL)
    return command, "give --text FILE", (*command, "--text", place.short)


def a_dense_model_elsewhere(place: Place, out: Path) -> tuple[Command, str, Command]:
    copy = shutil.copytree(place.compressed, out.with_name("copy"))
    command = ("export", copy, "--dense")
    return (*command, copy / "dense"), "give --dense a name elsewhere", (*command, out)


def recover(place: Place, out: Path, *options: object) -> Command:
    command = ("recover", place.compressed, "--text", place.text, "--out", out, "--batch", 2)
    return (*command, "--train", "factors", "--window", 16, "--max-windows", 2, *options)


def a_shorter_window_of_training(place: Place, out: Path) -> tuple[Command, str, Command]:
    command = ("recover", place.compressed, "--text", place.short, "--out", out, "--steps", 1)
    command += ("--train", "factors", "--eval-text", place.text, "--max-windows", 2, "--window")
    return (*command, POSITIONS), "or a smaller --window", (*command, 8)


def a_smaller_rate(place: Place, out: Path) -> tuple[Command, str, Command]:
    command = recover(place, out, "--save-every", 1, "--steps", 4, "--lr")
    return (
        (*command, 1e30),
        "start over with --fresh and a smaller --lr",
        (*command, 1e-4, "--fresh"),
    )


SLOW: list[Situation] = [the_processor_for_a_comparison, the_processor_for_an_audit]
SITUATIONS: list[Any] = [
    a_longer_text,
    fewer_samples,
    a_shorter_window_of_calibration,
    the_tokenizer_of_the_source,
    the_tokenizer_of_a_compressed_model,
    another_window,
    the_processor,
    the_processor_for_a_calibration,
    the_processor_for_a_sweep,
    the_processor_for_an_evaluation,
    the_processor_for_a_recovery,
    a_larger_keep,
    more_flops,
    a_keep_of_the_model_that_can_be_reached,
    layers_that_exist,
    a_text_for_a_method,
    a_scope_that_a_method_knows,
    another_method_where_there_are_no_experts,
    scope_experts,
    identity_types,
    no_revision,
    the_model_of_a_run_directory,
    directories_of_their_own,
    another_name_for_a_run,
    undo_a_change,
    start_over_fresh,
    weights_for_a_plot,
    a_text_to_evaluate,
    a_dense_model_elsewhere,
    a_shorter_window_of_training,
    a_smaller_rate,
    *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW),
]


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda one: one.__name__)
def test_advice_that_is_followed_works(situation: Situation, place: Place, tmp_path: Path) -> None:
    command, advice, corrected = situation(place, tmp_path / "out")
    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    refused = lestd(*command)
    assert refused.code in (1, 2), (refused.out, refused.err)
    advice, _, bare = advice.partition("|")
    assert advice in refused.err, refused.err
    for name in TOKENIZER if bare else ():
        shutil.copy(place.model / name, bare)
    followed = lestd(*corrected)
    assert followed.code == 0, (refused.err, followed.err)


def test_a_refused_command_leaves_nothing(place: Place, tmp_path: Path) -> None:
    command, _, _ = a_longer_text(place, tmp_path / "out")
    assert lestd(*command).code == 2
    assert not any(tmp_path.iterdir())


def test_nor_does_it_delete_what_it_would_replace(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command, _, _ = a_longer_text(place, out)
    assert lestd(*compress(place, "--out", out)).code == 0
    before = digest_tree(tmp_path)
    assert lestd(*command, "--fresh").code == 2
    assert digest_tree(tmp_path) == before


def test_what_nothing_was_finished_of_is_started_over_and_said_so(
    place: Place, tmp_path: Path
) -> None:
    model = shutil.copytree(place.model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    options = ("--metric", "weight", "--keep", 0.9, "--out", tmp_path / "out")
    command = compress(place, *options, model=model)

    def save(dtype: torch.dtype) -> None:
        for shard in model.glob("*.safetensors"):
            tensors = load_file(place.model / shard.name)
            large = {n: 6e4 + 0 * W if "self_attn" in n else W for n, W in tensors.items()}
            save_file({n: W.to(dtype) for n, W in large.items()}, shard, {"format": "pt"})
        (model / "config.json").write_text(json.dumps(config | {"dtype": str(dtype)[6:]}))

    save(torch.float16)
    refused = lestd(*command)
    assert refused.code == 1
    assert "convert the checkpoint to bfloat16" in refused.err
    save(torch.bfloat16)
    followed = lestd(*command)
    assert followed.code == 0, followed.err
    assert 'config.json.dtype (was "float16", is "bfloat16")' in followed.err
    assert "nothing of it was finished, so it is started over" in followed.err
    again = lestd(*command)
    assert (again.code, "started over" in again.err) == (0, False)


def test_pickled_weights_in_the_current_directory(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(place.model, tmp_path / "a model")
    tensors = {}
    for shard in model.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (model / "model.safetensors.index.json").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    monkeypatch.chdir(model)
    refused = lestd("plan", ".", "--keep", 0.5)
    convert = shlex.split(refused.err[refused.err.index("lestd convert ") :])[1:]
    assert lestd(*convert).code == 0
    assert lestd("plan", convert[-1], "--keep", 0.5).code == 0
    assert not any(path.is_dir() for path in model.iterdir())
