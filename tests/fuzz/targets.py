"""The kinds of input: valid directories, what of them is damaged, and the commands that read it."""

from __future__ import annotations

import errno
import importlib
import json
import os
import pkgutil
import random
import re
import shlex
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import yaml
from damage import json_file, tensors
from driver import Probe, RefusedError, Target, WrongError
from safetensors.torch import load_file, save_file
from support.cli import digest_tree
from support.every_family import save_any
from support.families import CONFIGS, save_tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from typer.testing import CliRunner

import lestd_kernels
import orchestrator
import workers
from lestd_kernels.errors import LestdError
from orchestrator.architectures import load_architecture
from orchestrator.architectures.infer import infer
from orchestrator.cli import app
from orchestrator.source.checkpoint import resolve_source

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
TOKENS = torch.tensor([[3, 14, 15, 9, 26, 5, 35]])
WORDS = {"<unk>": 0, "the": 3, "cat": 4, "sat": 5, "on": 6, "mat": 7}
CARD = {"license": "mit", "language": ["en"], "datasets": ["x/y"], "pipeline_tag": "x"}
RUN = {
    "keep": 0.5,
    "scope": "all",
    "layer_keep": {"0": 0.6},
    "rank_step": 4,
    "include": "0-1",
    "value_bits": 16,
    "max_flops": 2.0,
}
CLUSTER = {"executor": "ray", "workers": 2, "max_attempts": 3, "task_timeout": 60.0}


def preload() -> None:
    """Import all that the commands import, once for all processes that are forked then."""
    for package in (orchestrator, workers, lestd_kernels):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            # vLLM's plug-in is for an environment of its own.
            if not module.name.endswith(("__main__", "vllm_plugin")):
                importlib.import_module(module.name)
    for config in CONFIGS.values():
        assert MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def lestd(*args: str) -> str:
    """Run a command; what it printed, if it did its work.

    Raises:
        RefusedError: it ended with 1 or 2, and one sentence or a list of problems.
        WrongError: it ended in another way.
    """
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    said = result.stdout + result.stderr
    if "Traceback" in said:
        raise WrongError(f"a traceback: {said}")
    if CONTROL.search(said):
        raise WrongError(f"control characters: {said!r}")
    if os.strerror(errno.EFBIG) in said:  # The limit of `driver`.
        raise WrongError(f"too much: {said}")
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    if result.exit_code == 2 and (len(errors) != 1 or not result.stderr.endswith(errors[0] + "\n")):
        raise WrongError(f"not one sentence: {result.stderr!r}")
    if result.exit_code in (1, 2):
        raise RefusedError(said)
    if result.exit_code != 0:
        raise WrongError(f"exit code {result.exit_code}: {said}")
    return result.stdout


def command(line: str) -> Probe:
    """A probe that runs a command; PLACE in its line is the directory."""

    def probe(place: Path) -> str:
        report = place / "report.md"
        printed = lestd(*(arg.replace("PLACE", str(place)) for arg in shlex.split(line)))
        return printed + (report.read_text() if report.exists() else "")

    probe.__name__ = re.sub(r"\W+", "-", line)
    return probe


def compress(place: Path) -> str:
    """Compress, or continue; a model that is said to be complete verifies.

    Shards of a run whose payloads are recorded do not depend on the rest of its state, of which
    what tells of earlier calls cannot be made again.
    """
    out = place / "out"
    if out.exists():
        shutil.rmtree(out)
    options = (place / "options").read_text().replace("PLACE", str(place)).split()
    lestd("compress", str(place / "dense"), "--out", str(out), "--executor", "serial", *options)
    try:
        lestd("verify", str(out), "--run-dir", str(place / "none"))
    except RefusedError as error:
        raise WrongError(f"verify finds problems in what compress made: {error}") from error
    return json.dumps({k: v for k, v in digest_tree(out).items() if k.endswith(".safetensors")})


def convert(place: Path) -> str:
    """Convert pickled weights; the tensors are those that torch loads."""
    lestd("convert", str(place / "pickled"), str(place / "converted"))
    source, out = place / "pickled" / "pytorch_model.bin", place / "converted"
    expected = torch.load(source, weights_only=True)
    actual = {k: v for shard in out.glob("*.safetensors") for k, v in load_file(shard).items()}
    if expected.keys() != actual.keys():
        raise WrongError(f"other tensors: {expected.keys() ^ actual.keys()}")
    for name, tensor in expected.items():
        try:
            torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0, equal_nan=True)
        except AssertionError as error:
            raise WrongError(f"another value: {name}") from error
    return str({name: tensor.shape for name, tensor in actual.items()})


def compress_and_load(place: Path) -> str:
    """What compress says is complete loads, and runs, where the dense model does."""
    made = compress(place)
    try:
        _logits(place / "dense")
    except Exception:  # Of a config.json that makes no sense in its own way.
        return made
    try:
        _logits(place / "out")
    except LestdError as error:
        raise WrongError(f"what compress made does not load: {error}") from error
    return made


def load(place: Path) -> str:
    """Load a compressed model with Transformers and run it.

    Its logits are the same at every call, and of the first token whatever follows; where they are
    not those of the sound model, `verify` says what is wrong.
    """
    try:
        logits, again, first = _logits(place / "out")
    except LestdError as error:
        if "\n" in str(error):
            raise WrongError(f"not one sentence: {error}") from error
        raise RefusedError(str(error)) from error
    if not torch.equal(logits.nan_to_num(), again.nan_to_num()):
        raise WrongError("other logits the second time")
    if not torch.allclose(logits[:, :1], first, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise WrongError("other logits for one token than for many")
    if torch.equal(logits, load_file(place / "logits.safetensors")["logits"]):
        return "the same"
    try:
        lestd("verify", str(place / "out"))
    except RefusedError:
        return "other, as verify says"
    raise WrongError("other logits, and verify finds no problem")


def _logits(out: Path) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        return [model(TOKENS[:, :count]).logits for count in (7, 7, 1)]


def make_checkpoint(place: Path, family: str, options: str) -> None:
    """A dense model with a tokenizer and a card, and the files of configuration for it."""
    save = save_tiny if family in CONFIGS else save_any
    dense = save(family, place / "dense")
    tokenizer = Tokenizer(WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(dense / "tokenizer.json"))
    (dense / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (dense / "README.md").write_text(f"---\n{yaml.safe_dump(CARD)}---\n# A model\n")
    (place / "text.txt").write_text("the cat sat on the mat " * 20)
    (place / "options").write_text(options)
    (place / "run.yaml").write_text(yaml.safe_dump(RUN))
    (place / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))


def make_model(place: Path, family: str, options: str) -> None:
    """A dense model, the compressed one, its run and its logits."""
    make_checkpoint(place, family, options)
    compress(place)
    save_file({"logits": _logits(place / "out")[0]}, place / "logits.safetensors")


def make_pickle(place: Path) -> None:
    """A model whose weights are pickled."""
    dense = save_tiny("llama", place / "pickled", max_shard_size="1GB")
    torch.save(load_file(dense / "model.safetensors"), dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()


def make_described(place: Path, found: bool) -> None:
    """A dense model, and a file that says where it keeps its weights."""
    make_checkpoint(
        place, "mixtral", "--keep 0.5 --architecture PLACE/architecture.json --scope all"
    )
    known = load_architecture("mixtral")
    if found:
        source = resolve_source(str(place / "dense"))
        known = infer(source.config, source.index)
    (place / "architecture.json").write_text(known.model_dump_json())


def make_cleaned(place: Path) -> None:
    """A compressed model without its run."""
    make_model(place, *MODELS["lestd"])
    shutil.rmtree(place / "out.run")


MODELS = {
    "lestd": ("llama-gqa", "--keep 0.5"),
    "sparse": ("llama", "--keep 0.2 --type-mode learned"),
    "pruned": ("llama", "--keep 0.2 --method magnitude --scope all"),
    "bits": ("qwen3", "--keep 0.4 --value-bits 4 --keep-outliers 0.01"),
    "chain": ("opt", "--keep 0.4 --method tt"),
    "experts": ("mixtral", "--keep 0.4 --method td_moe --scope experts"),
    "coded": ("llama", "--keep 0.2 --method watersic --metric weight"),
    "rtn": ("gpt_neox", "--keep 0.4 --method rtn --value-bits 4 --scope all"),
}
"""Family and options of the compressed models, named for what their payloads hold."""
BASES: dict[str, Callable[[Path], None]] = {
    "checkpoint": partial(make_checkpoint, family="llama", options="--keep 0.5"),
    "inferred": partial(make_checkpoint, family="qwen2_moe", options="--keep 0.5 --scope all"),
    "described": partial(make_described, found=False),
    "found": partial(make_described, found=True),
    "pickles": make_pickle,
    "cleaned": make_cleaned,
    **{name: partial(make_model, family=one[0], options=one[1]) for name, one in MODELS.items()},
}

plan = command("plan PLACE/dense --config PLACE/run.yaml --json")
plan_all = command("plan PLACE/dense --keep 0.5 --scope all --json")
dry_run = command(
    "compress PLACE/dense --out PLACE/out --keep 0.5 --dry-run --executor serial "
    "--cluster PLACE/cluster.yaml"
)
verify = command("verify PLACE/out")
export = command("export PLACE/out --dense PLACE/exported")
evaluate = command(
    "evaluate PLACE/out --text PLACE/text.txt --window 8 --max-windows 1 --executor serial"
)


def readers(run: str) -> list[Probe]:
    """The commands that read the manifest of a run or of a model."""
    lines = ["status PLACE/out", "verify PLACE/out", "compact PLACE/out", "clean PLACE/out"]
    lines += [f"query {run} 'from groups' --csv", f"query {run} 'from slices'"]
    lines += [f"query {run} 'from events' --json", f"diff {run} {run} --all"]
    lines += [f"report {run} --format md --out PLACE/report.md"]
    return [command(line) for line in lines]


OF_RUN = (*readers("PLACE/out.run"), compress)
OF_MODEL = (*readers("PLACE/out"), evaluate)


def groups(path: Path, rng: random.Random) -> None:
    """The quantization_config of a model that is still ours."""
    json_file(path, rng, part="quantization_config")
    config = json.loads(path.read_text())
    config["quantization_config"]["quant_method"] = "lestd"
    path.write_text(json.dumps(config))


TARGETS = [
    Target("headers", "checkpoint", ("dense/*.safetensors",), (plan, plan, compress)),
    Target("indices", "checkpoint", ("dense/*.index.json",), (plan, plan, compress)),
    Target("configs", "checkpoint", ("dense/config.json",), (plan, plan, compress)),
    Target("inferred", "inferred", ("dense/config.json",), (plan_all, compress_and_load)),
    Target("described", "described", ("architecture.json",), (compress_and_load,)),
    Target("found", "found", ("architecture.json",), (compress_and_load,)),
    Target("side-files", "checkpoint", ("dense/[gt]*.json",), (compress,)),
    Target("cards", "checkpoint", ("dense/README.md",), (compress,)),
    Target("run-files", "checkpoint", ("run.yaml",), (plan,)),
    Target("cluster-files", "checkpoint", ("cluster.yaml",), (dry_run,)),
    Target("pickles", "pickles", ("pickled/*.bin",), (convert,)),
    Target("records", "lestd", ("out.run/*.json",), OF_RUN),
    Target("parts", "lestd", ("out.run/manifest/*/*.parquet",), OF_RUN),
    Target("manifests", "cleaned", ("out/manifest/*",), OF_MODEL),
    Target("payloads", "lestd", ("out.run/payloads/*",), (verify, compress)),
    Target("outputs", "lestd", ("out/*.*",), (verify, export, evaluate)),
    *(
        Target(f"{kind}-{base}", base, victims, (load, load, export), damage)
        for kind, victims, damage in [
            ("groups", ("out/config.json",), groups),
            ("tensors", ("out/lestd-*.safetensors",), tensors),
        ]
        for base in MODELS
    ),
]
