"""The options that several commands share, with their help."""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import StrEnum
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from lestd_kernels.errors import LestdError
from orchestrator.console.logs import LogFormat
from workers.storage.files import as_path


class Scope(StrEnum):
    """Which weights are compressed."""

    attention = "attention"
    ffn = "ffn"
    experts = "experts"
    all = "all"


class ExecutorName(StrEnum):
    """Who runs the tasks."""

    ray = "ray"
    serial = "serial"


class Device(StrEnum):
    """Where workers compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class TypeMode(StrEnum):
    """How the four projections share the core."""

    identity = "identity"
    learned = "learned"


class TdMoeMode(StrEnum):
    """What td_moe does with the expert mode."""

    preserve = "preserve"
    compress = "compress"


class Whitening(StrEnum):
    """Which sides of the experts td_moe whitens."""

    none = "none"
    input = "input"
    output = "output"
    both = "both"


class Metric(StrEnum):
    """In which norm the error is made small."""

    weight = "weight"
    norm = "norm"
    activation = "activation"


class Allocation(StrEnum):
    """How bytes are divided among the layers."""

    uniform = "uniform"
    global_ = "global"


class Pattern(StrEnum):
    """Where core elements may be kept."""

    unstructured = "unstructured"
    two_of_four = "2:4"


class ExportDtype(StrEnum):
    """Dtype of reconstructed weights."""

    auto = "auto"
    float32 = "float32"


def absolute(path: Path | None) -> Path | None:
    """An absolute path without ``..``; unlike `Path.resolve`, a link at its end is kept."""
    return path and Path(os.path.abspath(path))  # noqa: PTH100


_what, _how, _calibration, _where, _evaluation, _output = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in ("What", "How", "Calibration", "Where", "Evaluation", "Output")
)

Model = Annotated[
    str | None,
    typer.Argument(
        help="Directory of a checkpoint, Hub id such as org/name, or URL (s3://, gs://)."
    ),
]
# Typer knows no unions: what `as_path` returns is an `AnyPath`.
Out = Annotated[
    Path,
    typer.Argument(help="The compressed model's directory, given as --out.", parser=as_path),
]
RunDir = Annotated[
    Path | None,
    typer.Option(help="Run directory.", show_default="OUT.run, beside OUT", parser=as_path),
]
Revision = Annotated[str | None, _what(help="Branch, tag or commit on the Hub.")]
Keep = Annotated[
    float | None,
    _what(help="Stored bytes / dense bytes of the weights in scope, between 0 and 1."),
]
KeepModel = Annotated[float | None, _what(help="The same for the whole model.")]
ScopeOption = Annotated[Scope | None, _what(help="Weights to compress.", show_default="attention")]
Include = Annotated[str | None, _what(help='Only these layers, like "0-3,7".')]
Exclude = Annotated[str | None, _what(help="All layers but these.")]
AllocationOption = Annotated[
    Allocation | None,
    _how(
        help="uniform: each layer the same keep. global: bytes where they lower the error most; "
        "two passes.",
        show_default="uniform",
    ),
]
MethodOption = Annotated[
    str | None,
    _how(
        help="lestd: shared basis, sparse core. tucker (TensorLLM), hosvd: dense core. "
        "per_head_tucker, tt, td_moe: other tensor formats. svd, svd_llm, asvd, laser: low rank. "
        "magnitude, wanda, sparsegpt: pruning. rtn, gptq: quantization. svd_llm, asvd, wanda, "
        "sparsegpt and gptq need --calibrate-on.",
        show_default="lestd",
    ),
]
TypeModeOption = Annotated[
    TypeMode | None,
    _how(help="learned: U3 mixes Q, K, V, O; no GQA.", show_default="identity"),
]
PatternOption = Annotated[
    Pattern | None,
    _how(
        help="2:4: of each four core elements two, for sparse tensor cores.",
        show_default="unstructured",
    ),
]
MetricOption = Annotated[
    Metric | None,
    _how(
        help="Norm of the error: weight (Frobenius), norm (scaled by the preceding norm), "
        "activation (of the calibration text).",
        show_default="activation with --calibrate-on, else the method's own",
    ),
]
CalibrateOn = Annotated[
    str | None,
    _calibration(help="UTF-8 text whose activations make the metric.", show_default="none"),
]
Samples = Annotated[
    int | None,
    _calibration(min=1, help="Windows of the calibration text.", show_default="128"),
]
SampleTokens = Annotated[
    int | None, _calibration(min=1, help="Tokens of such a window.", show_default="256")
]
CalibrationDir = Annotated[
    Path | None,
    _calibration(
        "--calibration",
        help="Directory of the activations of that text, which runs may share.",
        show_default="calibration, in the run directory",
        parser=as_path,
    ),
]
ValueBits = Annotated[
    int | None,
    _how(
        help="Bits of a stored value: 16, 8, 4, 3 or 2; the scales of groups of 64 count too.",
        show_default="16; rtn and gptq: the most that fit",
    ),
]
FactorBits = Annotated[
    int | None,
    _how(help="Bits of an element of a factor: 16, 8 or 4.", show_default="16"),
]
TdMoeModeOption = Annotated[
    TdMoeMode | None,
    _how(
        "--td-moe-mode",
        help="Method td_moe: preserve (a core per expert) or compress (mixtures of fewer cores).",
        show_default="preserve",
    ),
]
WhiteningOption = Annotated[
    Whitening | None,
    _how(
        help="Method td_moe with --calibrate-on: the sides that are whitened, none, input, output "
        "or both.",
        show_default="input",
    ),
]
KeepOutliers = Annotated[
    float | None,
    _how(
        help="Share of the weights, the outliers, that is kept exactly.",
        show_default="0",
    ),
]
MaxFlops = Annotated[
    float | None,
    _how(help="Multiply-adds per token relative to dense, at most.", show_default="no cap"),
]
DeviceOption = Annotated[
    Device | None, _where(help="auto: GPUs where there are any.", show_default="auto")
]
Threads = Annotated[
    int | None,
    _where(min=1, help="CPU threads of a worker; decides the last bit.", show_default="1"),
]
ConfigFile = Annotated[
    Path | None,
    _what("--config", help="run.yaml: any of these options and more; options here win."),
]
ClusterFile = Annotated[
    Path | None, _where("--cluster", help="cluster.yaml: where to run; options here win.")
]
ExecutorOption = Annotated[
    ExecutorName | None,
    _where(help="ray, or in this process.", show_default="ray"),
]
Address = Annotated[
    str | None,
    _where(
        help="Ray cluster. auto, or HOST:6379 of its head: join it from here, a machine of it. "
        "http://HEAD:8265 or ray://HEAD:10001: run this command there as a Ray job and follow it.",
        show_default="RAY_ADDRESS, one running here, a local one",
    ),
]
Workers = Annotated[
    int | None,
    _where(min=1, help="Workers.", show_default="what GPUs, CPUs and memory allow"),
]
ComputeDtype = Annotated[
    str,
    _evaluation(
        help="Compute dtype: float32, bfloat16, float16, or auto: the checkpoint's, and float32 on "
        "a CPU that only emulates that."
    ),
]
Window = Annotated[
    int | None,
    _evaluation(
        min=1,
        help="Tokens per window.",
        show_default="the smaller of 2048 and the model's positions",
    ),
]
MaxWindows = Annotated[
    int | None, _evaluation(min=1, help="Only the first windows.", show_default="all")
]
Text = Annotated[Path | None, _evaluation(help="UTF-8 text to predict.")]
Tasks = Annotated[
    str | None,
    _evaluation(help="Tasks of lm-eval, with commas between them; needs lestd[eval]."),
]
Data = Annotated[
    Path | None,
    _evaluation(
        help="Directory of local data for wikitext, mathqa, gsm8k, truthfulqa_mc1 and _mc2.",
        show_default="the Hub",
    ),
]
IncludePath = Annotated[Path | None, _evaluation(help="Directory of more lm-eval task files.")]
Limit = Annotated[
    int | None,
    _evaluation(min=1, help="Only the first documents of each task.", show_default="all"),
]
Fewshot = Annotated[
    int | None,
    _evaluation(min=0, help="Examples before a question.", show_default="each task's own"),
]
BatchSize = Annotated[
    int | None,
    _evaluation(
        min=1, help="Requests of tasks at once; 1 gives lm-eval's digits.", show_default="1"
    ),
]
PromptTokens = Annotated[int, typer.Option(min=1, help="Tokens of a prompt; random.")]
NewTokens = Annotated[
    int, typer.Option(min=2, help="Tokens to decode, the one of the prefill included.")
]
Batch = Annotated[int, typer.Option(min=1, help="Sequences at once.")]
Repeats = Annotated[int, typer.Option(min=2, help="Repetitions that count, of each model.")]
BenchThreads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads of a model.", show_default="torch's own"),
]
Plot = Annotated[
    Path | None,
    _output(help="Draw the figures too: FILE.png or FILE.svg; needs lestd[report]."),
]
Time = Annotated[
    bool,
    typer.Option("--time", help="Predict the time as well: measures this machine briefly."),
]
Json = Annotated[bool, _output("--json", help="Print one JSON object instead of tables.")]
LogFormatOption = Annotated[
    LogFormat,
    _output(help="Of progress and problems on standard error; json: an object per line."),
]


_BELONG = {
    "text": ("window", "max_windows"),
    "tasks": ("data", "include_path", "limit", "fewshot", "batch_size", "log_samples"),
}


def refuse_unused(given: Mapping[str, Any]) -> None:
    """Refuse what belongs to one way of judging and would be ignored in the other.

    Args:
        given: the options.

    Raises:
        LestdError: there is such an option, or lm_eval is needed and not installed.
    """
    for needed, options in _BELONG.items():
        unused = [name for name in options if given.get(name) not in (None, False)]
        if given[needed] is None and unused:
            raise LestdError(
                f"--{unused[0].replace('_', '-')} belongs to --{needed}, which is not given; give "
                "both or neither"
            )
    if given["tasks"] is not None and find_spec("lm_eval") is None:
        raise LestdError('--tasks needs lm_eval, which is not installed; pip install "lestd[eval]"')
