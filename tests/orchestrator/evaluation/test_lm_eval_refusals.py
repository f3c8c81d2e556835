"""What evaluating refuses, and with which sentence."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXAMPLE
from lm_eval.api.metrics import bits_per_byte, mean, weighted_perplexity
from safetensors.torch import load_file, save_file
from support.cli import Finished, lestd
from support.lm_eval_data import DATA, MODEL

from orchestrator.evaluation.lm_eval_table import paired_stderr
from workers.contracts import Failure
from workers.evaluation.contracts import LmEvalRequest
from workers.evaluation.lm_eval import LmEvalWorker
from workers.evaluation.lm_eval_tasks import BuiltTask, TaskSource, load_tasks
from workers.evaluation.local_data import LOCAL_TASKS

TEXT = EXAMPLE / "wikitext-2-test.txt"


def refused(*args: object) -> str:
    result: Finished = lestd("evaluate", *args, "--executor", "serial")
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1, result.err
    return result.err


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA, tmp_path / "data"))


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to evaluate; give --text FILE, --tasks NAMES or both"),
        (("--text", TEXT, "--limit", 3), "--limit belongs to --tasks"),
        (("--text", TEXT, "--log-samples"), "--log-samples belongs to --tasks"),
        (("--text", TEXT, "--data", DATA), "--data belongs to --tasks"),
        (("--tasks", "mathqa", "--data", DATA, "--window", 9), "--window belongs to --text"),
        (("--tasks", " , "), "--tasks names no task"),
        (("--tasks", "mathqa", "--data", DATA, "--dtype", "int8"), "dtype must be one of"),
        (("--tasks", "mathqa", "--data", "/nowhere"), "/nowhere/mathqa/test.jsonl cannot be read"),
        (("--tasks", "x", "--include-path", "/nowhere"), "/nowhere is not a directory"),
        (("--tasks", "gsm8k", "--data", DATA), "train.jsonl to take them from; .* --fewshot 0"),
        (("--tasks", "mathqa", "--data", DATA, "--fewshot", 2), "shows 2 examples"),
    ],
)
def test_options_that_cannot_be(options: tuple[object, ...], message: str, tmp_path: Path) -> None:
    err = refused(MODEL, *options, "--run-dir", tmp_path / "run")
    assert re.search(message, err), err
    assert not (tmp_path / "run").exists()


def test_without_the_hub_the_way_to_local_data_is_named(tmp_path: Path) -> None:
    err = refused(MODEL, "--tasks", "mathqa", "--run-dir", tmp_path / "run")
    assert "task mathqa cannot be loaded (ConnectionError" in err
    assert "give local files by --data DIR" in err


def test_without_lm_eval_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.cli.options.find_spec", lambda name: None)
    assert 'pip install "lestd[eval]"' in refused(MODEL, "--tasks", "mathqa", "--data", DATA)


def test_lm_eval_tasks_alone_imports_lm_eval() -> None:
    code = (
        "import sys, orchestrator.cli, orchestrator.evaluation.perplexity_table\n"
        "import orchestrator.experiments.engine, orchestrator.experiments.tables\n"
        "print({'lm_eval', 'datasets'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@pytest.mark.slow
def test_a_misspelt_task_is_met_with_what_may_be_meant() -> None:
    err = refused(MODEL, "--tasks", "mathqq", "--data", DATA)
    assert "lm-eval has no task mathqq; did you mean" in err
    assert "mathqa" in err


def test_a_run_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    options = ("--tasks", "mathqa", "--data", DATA, "--limit", 1, "--run-dir", tmp_path / "run")
    result = lestd("evaluate", MODEL, *options, "--executor", "serial")
    assert result.code == 2
    assert "cannot be written" in result.err
    assert "--run-dir" in result.err


# -- local data -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("mathqa", b"", "holds no document"),
        ("mathqa", b'{"Problem": "p"}\n', "line 1: expected an object with the texts Problem, opt"),
        ("mathqa", b"[1]\n", "line 1: expected an object"),
        ("gsm8k", b'{"question": "q", "answer": "a"}\n{', "line 2: not valid JSON"),
        ("gsm8k", b"\xff", "is not UTF-8"),
        ("wikitext", b"\n \n", "holds no document"),
        ("truthfulqa_mc1", b"Question,Answer\na,b\n", "has no column 'Best Answer'"),
        (
            "truthfulqa_mc2",
            b"Question,Best Answer,Correct Answers,Incorrect Answers\nq,b,c,\n",
            "line 2: a question needs",
        ),
    ],
)
def test_damaged_data_names_its_place(task: str, content: bytes, message: str, data: Path) -> None:
    path = data / LOCAL_TASKS[task].file
    path.unlink()
    path.write_bytes(content)
    err = refused(MODEL, "--tasks", task, "--data", data, "--fewshot", 0)
    assert str(path) in err
    assert message in err


def test_the_whole_test_text_is_divided_as_the_hubs(data: Path) -> None:
    """The Hub's document-level WikiText-2 has 62 test documents, of the 60 articles."""
    rows = LOCAL_TASKS["wikitext"].rows(data)["test"]
    assert len(rows) == 62
    text = (data / "wikitext-2" / "test.txt").read_bytes().decode()
    assert "\n" + "\n".join(row["page"] for row in rows) == "\n" + text.removeprefix(" \n")


# -- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["nan", "absent", "tokenizer"])
def test_models_that_cannot_be_evaluated(broken: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    message = "lacks 1 of the model's tensors"
    if broken == "tokenizer":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in weights:
                weights[name] = weights[name][:300].clone()
        message = "the model's vocab_size is 300; the tokenizer files belong to another model"
    elif broken == "nan":
        weights["model.norm.weight"][0] = float("nan")
        message = "of document 0 of mathqa is nan, computed in torch.bfloat16; try --dtype float32"
    else:
        del weights["model.norm.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    options = ("--tasks", "mathqa", "--data", DATA, "--limit", 1, "--executor", "serial")
    result = lestd("evaluate", model, "--dtype", "bfloat16", *options)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert str(model) in result.err


def test_a_worker_with_other_data_says_so(data: Path) -> None:
    source = TaskSource(str(data), fewshot=0)
    worker = LmEvalWorker(str(MODEL), source)
    failure = worker.run(LmEvalRequest("mathqa 0-0", "mathqa", "mathqa", (0, 1), "0" * 64))
    assert isinstance(failure, Failure)
    assert "makes other requests of task mathqa than the driver" in failure.message


def test_the_hash_of_a_task_follows_its_data(data: Path, tmp_path: Path) -> None:
    def built(where: Path) -> str:
        tasks = load_tasks("gsm8k", TaskSource(str(where), fewshot=0, limit=3))["tasks"]
        return BuiltTask(tasks["gsm8k"], 3).sha256

    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    assert built(data) == built(moved)
    path = moved / "gsm8k" / "test.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0].replace("18", "19"), *lines[1:]]))  # An answer.
    assert built(data) != built(moved)
    path.write_text("".join([*lines[:3], *lines[4:]]))  # A question beyond the limit.
    assert built(data) == built(moved)


# -- differences ----------------------------------------------------------------------------------


def test_jackknife_of_a_perplexity_is_what_many_draws_show() -> None:
    """Against the spread of the difference over independent sets of documents."""
    generator = random.Random(7)

    def documents() -> tuple[list[tuple[float, int]], list[tuple[float, int]]]:
        pairs = []
        for _ in range(80):
            words = generator.randrange(200, 400)
            nats = words * (3 + generator.gauss(0, 0.3))
            pairs.append(((-nats, words), (-nats * 1.02 - generator.gauss(0, 8), words)))
        return [a for a, _ in pairs], [b for _, b in pairs]

    for figure in (weighted_perplexity, bits_per_byte):
        differences, errors = [], []
        for _ in range(400):
            before, after = documents()
            differences.append(figure(after) - figure(before))
            errors.append(paired_stderr(before, after, figure))
        center = math.fsum(differences) / len(differences)
        spread = math.sqrt(math.fsum((d - center) ** 2 for d in differences) / 399)
        assert math.fsum(errors) / len(errors) == pytest.approx(spread, rel=0.12)


def test_differences_that_have_no_standard_error() -> None:
    assert paired_stderr([1.0], [0.0], mean) is None
    assert paired_stderr([1.0, 0.0], [0.0], mean) is None
    assert paired_stderr(["a", "b"], ["a", "c"], max) is None
    assert paired_stderr([1.0, 0.0], [1.0, 0.0], mean) == 0.0
