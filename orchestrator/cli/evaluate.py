"""The command that judges models: perplexity on a text, and tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lestd_kernels.errors import LestdError
from orchestrator.cli.application import app
from orchestrator.cli.options import (
    Address,
    BatchSize,
    ClusterFile,
    ComputeDtype,
    Data,
    DeviceOption,
    ExecutorOption,
    Fewshot,
    IncludePath,
    Json,
    Limit,
    LogFormatOption,
    MaxWindows,
    Tasks,
    Text,
    Threads,
    Window,
    Workers,
    refuse_unused,
)
from orchestrator.console import logs, output
from orchestrator.console.logs import LogFormat
from workers.storage.files import as_path

if TYPE_CHECKING:  # It imports lm_eval.
    from orchestrator.evaluation.lm_eval_tasks import Examination


@app.command(rich_help_panel="Judge and compare")
def evaluate(
    model: Annotated[Path, typer.Argument(help="Directory of a compressed or a dense model.")],
    text: Text = None,
    tasks: Tasks = None,
    against: Annotated[
        Path | None, typer.Option(help="A second model, usually the dense one, to compare with.")
    ] = None,
    window: Window = None,
    max_windows: MaxWindows = None,
    data: Data = None,
    include_path: IncludePath = None,
    limit: Limit = None,
    fewshot: Fewshot = None,
    batch_size: BatchSize = None,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Keep what was asked and answered, in RUN_DIR.")
    ] = False,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where finished parts are kept.",
            show_default="MODEL.eval, beside MODEL",
            parser=as_path,
        ),
    ] = None,
    dtype: ComputeDtype = "auto",
    device: DeviceOption = None,
    threads: Threads = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="GPUs of a worker, for a model that does not fit one.",
            show_default="1",
        ),
    ] = None,
    executor: ExecutorOption = None,
    workers: Workers = None,
    address: Address = None,
    cluster: ClusterFile = None,
    log_format: LogFormatOption = LogFormat.text,
    json: Json = False,
) -> None:
    """Measure perplexity over non-overlapping windows of a text, or judge by tasks of lm-eval.

    Run the same command again to continue what was interrupted.
    """
    given = dict(locals())
    if text is None and tasks is None:
        raise LestdError("there is nothing to evaluate; give --text FILE, --tasks NAMES or both")
    refuse_unused(given)
    from orchestrator.config.cluster import cluster_options
    from orchestrator.evaluation.perplexity_table import (
        describe_evaluations,
        evaluate_models,
        print_evaluations,
    )
    from orchestrator.evaluation.records import manifest_of_evaluations, open_models, record
    from orchestrator.execution.open import open_executor
    from orchestrator.execution.ray.jobs import jobs_address, run_as_job
    from orchestrator.manifest.manifest import default_evaluation_dir

    logs.use(log_format)
    cluster_config = cluster_options(cluster, executor=executor, workers=workers, address=address)
    if jobs := jobs_address(cluster_config):
        raise typer.Exit(run_as_job(jobs, "evaluate", given, cluster_config))
    opened = open_models([model] if against is None else [against, model], window)
    run_dir = run_dir or default_evaluation_dir(model)
    keep = partial(record, manifest=manifest_of_evaluations(model, run_dir))
    common: dict[str, Any] = {"dtype": dtype, "device": device or "auto", "threads": threads or 1}
    common["gpus"] = gpus or 1
    examination = None if tasks is None else examine(given, common)
    evaluations, judged = [], []  # type: list[Any], list[Any]
    try:
        with open_executor(cluster_config) as runner:
            if text is not None:
                settings = {**common, "max_windows": max_windows}
                evaluations = evaluate_models(opened, text, runner, run_dir, keep, settings)
            if examination is not None:
                from orchestrator.evaluation.lm_eval_table import judge_models

                judged = judge_models(opened, examination, runner, run_dir, keep, log_samples)
    except KeyboardInterrupt:
        logs.log(
            "message",
            f"interrupted; what was finished is kept in {run_dir}: run the same command again to "
            "continue",
        )
        raise typer.Exit(130) from None
    shown: dict[str, Any] = {}
    if evaluations:
        shown |= describe_evaluations(evaluations)
        if not json:
            print_evaluations(evaluations)
    if examination is not None:
        from orchestrator.evaluation.lm_eval_table import describe_judgements, print_judgements

        shown["judgements"] = describe_judgements(judged, examination)
        if not json:
            print_judgements(shown["judgements"], run_dir if log_samples else None)
    if json:
        output.print_json(shown)


def examine(given: Mapping[str, Any], common: dict[str, Any]) -> Examination:
    """The tasks of a command's options; `common` are settings that options do not decide alone.

    Raises:
        LestdError: see `open_examination`.
    """
    from orchestrator.evaluation.lm_eval_tasks import JudgeSettings, open_examination
    from workers.evaluation.lm_eval_tasks import TaskSource

    names = tuple(filter(None, (name.strip() for name in given["tasks"].split(","))))
    local, included = (
        None if given[name] is None else str(given[name].absolute())
        for name in ("data", "include_path")
    )
    source = TaskSource(local, included, given["fewshot"], given["limit"])
    return open_examination(JudgeSettings(names, source, given["batch_size"] or 1, **common))
