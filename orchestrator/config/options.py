"""The options of runs, each written once: its type, its default, and what it does.

`orchestrator.config.run` and `orchestrator.config.cluster` make of these fields what run.yaml and
cluster.yaml may say, `orchestrator.cli.options` the options of the commands that name a class, and
`orchestrator.config.reference` docs/options.md. Those of the methods are in
`lestd_kernels.options`. Nothing heavy is imported here: the command line shows its help from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_type_hints

from lestd_kernels.options import HOW, MethodOptions, Metric, Option

WHAT, CALIBRATION, WHERE, EVALUATION = (
    partial(Option, panel) for panel in ("What", "Calibration", "Where", "Evaluation")
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Which model."""

    model: Annotated[
        str | None,
        WHAT(
            "Directory of a checkpoint, Hub id such as org/name, or URL (s3://, gs://).",
            argument=True,
        ),
    ] = None
    revision: Annotated[str | None, WHAT("Branch, tag or commit on the Hub.")] = None


@dataclass(frozen=True, kw_only=True)
class ArchitectureFile:
    """Where the model keeps its weights."""

    architecture: Annotated[
        Path | None,
        WHAT(
            "JSON file that says where the model keeps its weights, as plan --show-architecture "
            "prints it.",
            default="what its family's file says, or its modules show",
        ),
    ] = None


def nats(text: str) -> float:
    """A loss in nats per token: a number, or a percentage by which perplexity may grow.

    Perplexity is the exponential of the loss, so 2% are log(1.02) nats.

    Raises:
        ValueError: it is neither.
    """
    number = text.strip()
    try:
        if number.endswith("%"):
            return math.log1p(float(number[:-1]) / 100)
        return float(number)
    except ValueError:
        raise ValueError(
            "expected nats per token, like 0.02, or a percentage of perplexity, like 2%"
        ) from None


@dataclass(frozen=True, kw_only=True)
class Target:
    """How small, or how good; one of the three."""

    keep: Annotated[
        float | None,
        WHAT("Stored bytes / dense bytes of the weights in scope.", gt=0, lt=1, first=True),
    ] = None
    keep_model: Annotated[
        float | None, WHAT("The same for the whole model; replaces --keep.", gt=0, lt=1)
    ] = None
    target_loss: Annotated[
        float | None,
        WHAT(
            "In place of --keep what it may cost, as expected: a loss in nats per token, like "
            "0.02, or a percentage of perplexity, like 2%; the size follows. Needs --calibrate-on.",
            gt=0,
            parse=nats,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Which weights."""

    scope: Annotated[
        Literal["attention", "ffn", "experts", "linear", "all"],
        WHAT(
            "Weights to compress. linear: matrices that belong to none of the other kinds, each "
            "on its own.",
            first=True,
        ),
    ] = "attention"
    include: Annotated[str | None, WHAT('Only these layers, like "0-3,7".')] = None
    exclude: Annotated[str | None, WHAT("All layers except these.")] = None
    targets: Annotated[
        str | None,
        WHAT(
            "Only blocks whose path, or that of a matrix of theirs, matches this expression (of "
            "RE2). In scope linear or all that may be outside of the decoder layers, too: lm_head, "
            "projectors, towers of other inputs."
        ),
    ] = None
    ignore: Annotated[str | None, WHAT("All blocks except those that match this one.")] = None


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Which layer gets how many bytes."""

    allocation: Annotated[
        Literal["uniform", "global"] | None,
        HOW(
            "uniform: the same keep in each layer. global: bytes go where they lower the error "
            "most; two passes.",
            default="global in the metric loss, else uniform",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class MethodChoice:
    """Which method, and in which norm it makes the error small."""

    method: Annotated[
        str,
        HOW(
            "lestd: shared basis, sparse core. tucker (TensorLLM), hosvd: dense core. "
            "per_head_tucker, tt, td_moe: other tensor formats. svd, svd_llm, asvd, laser: low "
            "rank. magnitude, wanda, sparsegpt: pruning. rtn, gptq: quantization, watersic: by "
            "entropy. auto: for each "
            "layer the one of least expected loss. auto, svd_llm, asvd, wanda, sparsegpt and gptq "
            "need --calibrate-on.",
            first=True,
        ),
    ] = "lestd"
    metric: Annotated[
        Metric | None,
        HOW(
            "Norm of the error: weight (Frobenius), norm (scaled by the preceding norm), "
            "activation (of the outputs on the calibration text), loss (of the model's "
            "predictions there, in nats per token).",
            default="activation with --calibrate-on, else norm for lestd and watersic, and for "
            "others the first that docs/methods.md names",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """Calibration: the sample of the model's inputs."""

    calibrate_on: Annotated[
        str | None, CALIBRATION("UTF-8 text whose activations define the metric.", first=True)
    ] = None
    samples: Annotated[int, CALIBRATION("Windows of the calibration text.", ge=1)] = 128
    sample_tokens: Annotated[int, CALIBRATION("Tokens per such window.", ge=1)] = 256
    gram_width: Annotated[
        int | None,
        CALIBRATION(
            "Of inputs with more channels keep the Gram matrix of each N neighbours at most: less "
            "disk and time, for wide models.",
            ge=64,
            default="all channels",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Host:
    """Device and threads of a worker."""

    device: Annotated[Literal["auto", "cpu", "cuda"], WHERE("auto: GPUs if there are any.")] = (
        "auto"
    )
    threads: Annotated[int, WHERE("CPU threads per worker; changes the last bit.", ge=1)] = 1


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Workers that run the tasks. Nothing here affects the bytes of the result."""

    executor: Annotated[Literal["ray", "serial"], WHERE("ray, or in this process.")] = "ray"
    workers: Annotated[
        int | None, WHERE("Number of workers.", default="what GPUs, CPUs and memory allow", ge=1)
    ] = None
    address: Annotated[
        str | None,
        WHERE(
            "Ray cluster. auto, or HOST:6379 of its head: join it from here, a machine of it. "
            "http://HEAD:8265 or ray://HEAD:10001: run this command there as a Ray job and follow "
            "it.",
            default="RAY_ADDRESS, one running here, a local one",
        ),
    ] = None
    max_attempts: Annotated[
        int,
        WHERE(
            "Attempts at a task whose worker was lost before it counts as failed.",
            ge=1,
            file_only=True,
        ),
    ] = 4
    task_timeout: Annotated[
        float | None,
        WHERE(
            "Seconds until a worker counts as hung.",
            default="ten times what the slowest finished task took per byte, at least 600; until "
            "one has finished, six hours",
            gt=0,
            file_only=True,
        ),
    ] = None
    autoscaling: Annotated[
        bool,
        WHERE(
            "Nodes join on demand: request them, and wait for what no node offers yet.",
            file_only=True,
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Dtype that a model computes in."""

    dtype: Annotated[
        str,
        EVALUATION(
            "Compute dtype: float32, bfloat16, float16, or auto: the checkpoint's, and float32 on "
            "a CPU that only emulates that."
        ),
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class Windows(Precision):
    """How a text is cut."""

    window: Annotated[
        int | None,
        EVALUATION(
            "Tokens per window.", default="the smaller of 2048 and the model's positions", ge=1
        ),
    ] = None
    max_windows: Annotated[
        int | None, EVALUATION("Evaluate only the first windows.", default="all", ge=1)
    ] = None


@dataclass(frozen=True, kw_only=True)
class Evaluation(Windows):
    """Evaluation: perplexity on a text, tasks of lm-eval, or both."""

    text: Annotated[Path | None, EVALUATION("UTF-8 text to predict.", first=True)] = None
    tasks: Annotated[
        str | None,
        EVALUATION("Tasks of lm-eval, separated by commas; needs lestd[eval].", first=True),
    ] = None
    data: Annotated[
        Path | None,
        EVALUATION(
            "Directory of local data for wikitext, mathqa, gsm8k, truthfulqa_mc1 and _mc2.",
            default="the Hub",
        ),
    ] = None
    include_path: Annotated[Path | None, EVALUATION("Directory of more lm-eval task files.")] = None
    limit: Annotated[
        int | None,
        EVALUATION("Only the first documents of each task.", default="all", ge=1),
    ] = None
    fewshot: Annotated[
        int | None,
        EVALUATION("Examples before each question.", default="each task's own", ge=0),
    ] = None
    batch_size: Annotated[
        int, EVALUATION("Requests of tasks at once; 1 gives lm-eval's digits.", ge=1)
    ] = 1


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Where the run is shown besides."""

    track: Annotated[
        Literal["mlflow", "wandb", "trackio"] | None,
        WHERE("Also log settings, blocks and results there; an extra of lestd for each."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """Where options of the run stand too."""

    recipe: Annotated[
        str | None,
        WHAT(
            "Options under a name, see lestd recipes; those of a file and of here win.", first=True
        ),
    ] = None

    config: Annotated[
        Path | None, WHAT("run.yaml: any of these options and more; options here win.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ClusterFile:
    """Where options of the cluster stand too."""

    cluster: Annotated[Path | None, WHERE("cluster.yaml: where to run; options here win.")] = None


RUN = (Checkpoint, ArchitectureFile, Weights, ConfigFile, Allocation, CalibrationText)
METHOD = (MethodChoice, MethodOptions)
HOSTS = (Host, Cluster, ClusterFile)


class Described(NamedTuple):
    """One field of a class of options."""

    name: str
    type: Any
    option: Option
    default: Any


def described(group: type) -> Iterator[Described]:
    """The options of a class: one of this file, or a model that is made of them."""
    for name, hint in get_type_hints(group, include_extras=True).items():
        for option in filter(lambda mark: isinstance(mark, Option), get_args(hint)):
            yield Described(name, get_args(hint)[0], option, getattr(group, name, None))


OptionsT = TypeVar("OptionsT", Host, Precision, Evaluation, Windows)


def chosen(group: type[OptionsT], given: Mapping[str, Any]) -> OptionsT:
    """The options of a class, from what was given on the command line; None is the default."""
    names = (field.name for field in fields(group))
    return group(**{name: given[name] for name in names if given[name] is not None})
