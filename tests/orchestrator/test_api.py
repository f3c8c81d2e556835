"""`import lestd`: the commands as functions, in their words."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.cli import digest_tree
from support.cli import lestd as command
from transformers import AutoModelForCausalLM

import lestd


def test_a_function_makes_the_bytes_of_the_command(
    tiny_llama: Path, wikitext: Path, tmp_path: Path
) -> None:
    by_command, by_function = tmp_path / "command", tmp_path / "function"
    options = ("--keep", 0.4, "--executor", "serial", "--include", "0-1")
    assert command("compress", tiny_llama, "--out", by_command, *options).code == 0
    told: list[tuple[int, int]] = []
    outcome = lestd.compress(
        tiny_llama,
        by_function,
        keep=0.4,
        executor="serial",
        include="0-1",
        on_progress=lambda result, done, planned: told.append((done, planned)),
    )
    assert outcome.complete
    assert told == [(1, 2), (2, 2)]
    assert digest_tree(by_function) == digest_tree(by_command)
    plan = lestd.plan(str(tiny_llama), keep=0.4, include="0-1")
    assert outcome.plan.to_dict() == plan.to_dict()
    assert lestd.Manifest(by_function / "manifest").groups().num_rows == 2
    named = lestd.plan(tiny_llama, recipe="safe-8bit", include="0")
    same = {"method": "rtn", "value_bits": 8, "scale_groups": "inputs", "scope": "all"}
    assert named.to_dict() == lestd.plan(tiny_llama, keep=0.55, include="0", **same).to_dict()

    settings = ("--text", wikitext, "--window", 64, "--max-windows", 1, "--executor", "serial")
    shown = json.loads(command("evaluate", by_command, *settings, "--json").out)["models"]
    found = lestd.evaluate(
        str(by_function), text=str(wikitext), window=64, max_windows=1, executor="serial"
    )
    [one] = found.perplexities
    assert [one.token_perplexity] == [model["token_perplexity"] for model in shown]

    model, tokenizer = lestd.load(by_function, dtype="float32")
    ids = tokenizer("the quick brown fox", return_tensors="pt").input_ids
    plain = AutoModelForCausalLM.from_pretrained(by_function, dtype=torch.float32)
    assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kep": 0.4}, "no option 'kep'; did you mean 'keep'"),
        ({"keep": 2.0}, "less than 1"),
        ({"keep": 0.4, "text": "x.txt"}, "no option 'text'"),
        ({"keep": 0.4, "address": "http://head:8265"}, "takes jobs; run the command"),
    ],
)
def test_what_is_wrong_is_refused_in_a_sentence(
    tiny_llama: Path, tmp_path: Path, options: dict, message: str
) -> None:
    with pytest.raises(lestd.LestdError, match=message):
        lestd.compress(tiny_llama, tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())


def test_loading_needs_neither_ray_nor_pyarrow() -> None:
    program = "import lestd, sys; print(sorted({'ray', 'pyarrow', 'torch'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
