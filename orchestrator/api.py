"""The commands as functions, in the same words: what `import lestd` offers.

Options are those of docs/options.md, by their keys: ``keep=0.4``, ``executor="serial"``,
``recipe="small-4bit"``, and ``config=`` and ``cluster=`` for files. They are checked as those of
the command line are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, get_args

from upath import UPath

from lestd_kernels.errors import LestdError
from orchestrator.config.cluster import ClusterConfig, cluster_options
from orchestrator.config.files import Strict, typed, validated
from orchestrator.config.keywords import EvaluateOptions, RunOptions
from orchestrator.config.options import (
    ClusterFile,
    ConfigFile,
    Evaluation,
    Host,
    Tracking,
    described,
)
from orchestrator.config.run import RunFile, run_options
from orchestrator.execution.open import open_executor
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.source.checkpoint import resolve_source
from orchestrator.tracking import tracked
from workers.storage.files import AnyPath, as_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orchestrator.compression.pipeline import OnProgress, Outcome
    from orchestrator.evaluation.divergence import Divergence
    from orchestrator.evaluation.lm_eval_scores import TaskScores
    from orchestrator.evaluation.lm_eval_tasks import Examination
    from orchestrator.evaluation.perplexity import Evaluation as Perplexity
    from orchestrator.execution.executor import Listener

Location = str | os.PathLike[str]
"""A directory, or a URL of an object store."""


_RUN = (RunFile, ClusterConfig, ConfigFile, ClusterFile, Tracking)


class _Asked(Strict, Host, Evaluation, frozen=True):
    """What `evaluate` is asked for."""


def plan(model: Location, **options: Unpack[RunOptions]) -> Plan:
    """What a compression would do: reads headers only, writes nothing.

    Args:
        model: directory of a checkpoint, Hub id, or URL.
        options: of the run, such as ``keep=0.4``.

    Raises:
        LestdError: an option is unknown or not valid, or the checkpoint cannot be compressed so.
    """
    given = _given(options | {"model": model}, *_RUN)
    chosen, config = run_options(given)
    return make_plan(resolve_source(*chosen), config)


def compress(
    model: Location,
    out: Location | UPath,
    *,
    run_dir: Location | UPath | None = None,
    calibration: Location | UPath | None = None,
    fresh: bool = False,
    time: bool = False,
    on_event: Listener | None = None,
    on_progress: OnProgress | None = None,
    **options: Unpack[RunOptions],
) -> Outcome:
    """Compress a checkpoint; the same call again continues where an earlier one stopped.

    Progress is shown on standard error.

    Args:
        model: directory of a checkpoint, Hub id, or URL.
        out: directory or URL of the compressed model, which appears when it is complete.
        run_dir: where finished work is kept; None for ``OUT.run``, beside OUT.
        calibration: directory of the calibration, which runs may share; None for one in the run's.
        fresh: forget what an earlier call left.
        time: predict the time as well; measures this machine briefly.
        on_event: told of every start of a task and of every retry.
        on_progress: called as tasks finish: the result, how many are done, how many are planned.
        options: of the run and of the cluster, such as ``keep=0.4, executor="serial"``.

    Returns:
        How it ended; `Outcome.complete` is False where tasks failed, and `Outcome.failures` says
        why. Finished tasks are kept either way.

    Raises:
        LestdError: an option is unknown or not valid, or the checkpoint cannot be compressed so.
    """
    from orchestrator.compression.pipeline import compress_model
    from orchestrator.compression.progress import CompressionProgress
    from orchestrator.execution.ray.metrics import RunMetrics
    from orchestrator.manifest.manifest import default_run_dir
    from orchestrator.planning.timing import predict_seconds

    given = _given(options | {"model": model}, *_RUN)
    chosen, config = run_options(given)
    cluster = _here(given)
    source = resolve_source(*chosen)
    planned = make_plan(source, config)  # Refuse what is impossible before Ray is started.
    predicted = predict_seconds(planned, config.device, config.threads) if time else None
    target = _place(out)
    metrics = RunMetrics(target.name) if cluster.executor == "ray" else None
    settings = config.model_dump(mode="json") | {"model": chosen.model}
    with (
        tracked(given.get("track"), target.name, settings) as run,
        open_executor(cluster) as executor,
        CompressionProgress(target.name, metrics) as shown,
    ):
        outcome = compress_model(
            source,
            config,
            executor,
            target,
            default_run_dir(target) if run_dir is None else _place(run_dir),
            calibration=None if calibration is None else _place(calibration),
            fresh=fresh,
            on_start=shown.on_start,
            on_event=_each(shown.on_event, on_event),
            on_progress=_each(shown.on_progress, run.on_progress, on_progress),
            predicted=predicted,
        )
        shown.ended(outcome)
        if outcome.failures:
            first = outcome.failures[0]
            run.problem = f"{len(outcome.failures)} tasks failed; {first.task_id}: {first.message}"
    return outcome


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate` found.

    Attributes:
        perplexities: on the text, one of each model: `against` first, then the model; empty
            without a text.
        scores: of each model in that order, of each task; empty without tasks.
        examination: the tasks; None without.
        divergence: with `sensitivity` expected loss and measured divergence.
    """

    perplexities: list[Perplexity]
    scores: list[list[TaskScores]]
    examination: Examination | None
    divergence: Divergence | None = None


def evaluate(
    model: Location,
    *,
    against: Location | None = None,
    gpus: int = 1,
    sensitivity: int | None = None,
    log_samples: bool = False,
    run_dir: Location | UPath | None = None,
    **options: Unpack[EvaluateOptions],
) -> Evaluated:
    """Measure perplexity over windows of a text, or evaluate by tasks of lm-eval, or both.

    Finished parts are kept; the same call again continues. Progress is shown on standard error.

    Args:
        model: directory of a compressed or a dense model.
        against: a second model, usually the dense one, to compare with.
        gpus: GPUs of a worker.
        sensitivity: of so many blocks, and of the model, measure on the text the divergence from
            `against`, to hold it against the expected loss.
        log_samples: keep what was asked and answered.
        run_dir: where finished parts are kept; None for ``MODEL.eval``, beside MODEL.
        options: such as ``text="test.txt", max_windows=100`` or ``tasks="gsm8k"``.

    Raises:
        LestdError: an option is unknown or not valid, or a model cannot be evaluated.
    """
    from orchestrator.evaluation.divergence import measure_divergence
    from orchestrator.evaluation.perplexity_table import evaluate_models
    from orchestrator.evaluation.progress import PieceProgress
    from orchestrator.evaluation.records import manifest_of_evaluations, open_models, record
    from orchestrator.manifest.manifest import default_evaluation_dir

    given = _given(options, _Asked, ClusterConfig, ClusterFile, Tracking)
    asked = validated(_Asked, typed(_Asked, given), "options")
    if asked.text is None and asked.tasks is None:
        raise LestdError("there is nothing to evaluate; give --text FILE, --tasks NAMES or both")
    if sensitivity is not None and (against is None or asked.text is None):
        raise LestdError("--sensitivity needs the dense model and a text: --against and --text")
    cluster = _here(given)
    directories = [Path(one) for one in (against, model) if one is not None]
    opened = open_models(directories, asked.window)
    kept = default_evaluation_dir(Path(model)) if run_dir is None else _place(run_dir)
    keep = partial(record, manifest=manifest_of_evaluations(Path(model), kept))
    host = {field.name: getattr(asked, field.name) for field in fields(Host)}
    common: dict[str, Any] = {"dtype": asked.dtype, **host, "gpus": gpus}
    examination = None
    if asked.tasks is not None:
        from orchestrator.evaluation.lm_eval_tasks import examine

        examination = examine(asked, common)
    found = Evaluated([], [], examination)
    divergence = None
    with (
        tracked(
            given.get("track"), f"{Path(model).name} evaluated", asked.model_dump(mode="json")
        ) as run,
        open_executor(cluster) as executor,
    ):
        if asked.text is not None:
            settings = {**common, "max_windows": asked.max_windows}
            found.perplexities.extend(
                evaluate_models(opened, asked.text, executor, kept, keep, settings)
            )
            if sensitivity is not None:
                with PieceProgress("divergence", "windows") as shown:
                    divergence, rows = measure_divergence(
                        opened[1],
                        opened[0],
                        asked.text,
                        executor,
                        kept,
                        blocks=sensitivity,
                        progress=shown.update,
                        on_event=shown.on_event,
                        **settings,
                    )
                keep(rows)
        if examination is not None:
            from orchestrator.evaluation.lm_eval_table import evaluate_tasks

            found.scores.extend(
                evaluate_tasks(opened, examination, executor, kept, keep, log_samples)
            )
        for evaluation in found.perplexities:
            run.log_of(Path(evaluation.model).name, asdict(evaluation))
        for scores in found.scores:
            for one in scores:
                figures = {figure.metric: figure.value for figure in one.figures}
                run.log_of(f"{Path(one.model).name}/{one.task}", figures)
    return replace(found, divergence=divergence)


def load(
    directory: Location, *, dtype: str = "auto", device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a compressed or a dense model in evaluation mode, and its tokenizer.

    The same as ``AutoModelForCausalLM.from_pretrained`` after ``import lestd``, but that absent and
    mismatched tensors are refused, and ``"auto"`` is float32 where the CPU only emulates bfloat16.

    Args:
        directory: where the model lies.
        dtype: compute dtype: ``"auto"``, ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        LestdError: a file is missing or damaged, or a tensor has another shape.
    """
    from orchestrator.source.tokenizer import load_tokenizer
    from workers.host.loading import load_model

    tokenizer = load_tokenizer(Path(directory), os.fspath(directory))
    model: PreTrainedModel = load_model(os.fspath(directory), dtype, device)
    return model, tokenizer


def _place(where: Location | UPath) -> AnyPath:
    """A directory or a URL as a path."""
    return as_path(os.fspath(where)) if isinstance(where, str | os.PathLike) else where


def _each(*listeners: Callable[..., None] | None) -> Callable[..., None]:
    """Tell several listeners; None is nobody."""

    def tell(*told: Any) -> None:
        for listener in filter(None, listeners):
            listener(*told)

    return tell


def _given(options: Mapping[str, Any], *groups: type) -> dict[str, Any]:
    """Options as the command line gives them: None is nothing, paths are paths and text is text.

    Raises:
        LestdError: one has an unknown name.
    """
    kinds = {one.name: one.type for group in groups for one in described(group)}
    given: dict[str, Any] = {}
    for name, value in options.items():
        if name not in kinds:
            close = get_close_matches(name, kinds, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see docs/options.md"
            raise LestdError(f"there is no option {name!r}; {hint}")
        if isinstance(value, str | os.PathLike):
            is_path = Path in (kinds[name], *get_args(kinds[name]))
            value = Path(value) if is_path else os.fspath(value)
        if value is not None:
            given[name] = value
    return given


def _here(given: Mapping[str, Any]) -> ClusterConfig:
    """Where to compute; a job runs a command, not a function.

    Raises:
        LestdError: an option is not valid, or the address is that of a jobs API.
    """
    from orchestrator.execution.ray.jobs import jobs_address

    cluster = cluster_options(given)
    if jobs_address(cluster):
        raise LestdError(
            f"address {cluster.address!r} takes jobs; run the command lestd with --address, or "
            "join the cluster from one of its machines, with HOST:6379"
        )
    return cluster
