"""The command that judges models: perplexity on a text, and tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from lestd_kernels.errors import LestdError
from orchestrator import logs, tables
from orchestrator.app import app
from orchestrator.logs import LogFormat
from orchestrator.options import (
    Address,
    ClusterFile,
    ComputeDtype,
    DeviceOption,
    ExecutorOption,
    Json,
    LogFormatOption,
    MaxWindows,
    Threads,
    Window,
    Workers,
)
from workers.files import as_path


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Directory of a compressed or a dense model.")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to predict.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval, with commas between them; needs lestd[eval]."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="A second model, usually the dense one, to compare with.")
    ] = None,
    window: Window = None,
    max_windows: MaxWindows = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Directory of local data for wikitext, mathqa, gsm8k, truthfulqa_mc1 and _mc2.",
            show_default="the Hub",
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Directory of more lm-eval task files.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Only the first documents of each task.", show_default="all"),
    ] = None,
    fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="Examples before a question.", show_default="each task's own"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Requests of tasks at once; 1 gives lm-eval's digits.", show_default="1"
        ),
    ] = None,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Keep what was asked and answered, in RUN_DIR.")
    ] = False,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where finished parts of tasks are kept.",
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

    Run the same command again to continue tasks that were interrupted.
    """
    given = dict(locals())
    if text is None and tasks is None:
        raise LestdError("there is nothing to evaluate; give --text FILE, --tasks NAMES or both")
    _refuse_unused(given, "text", ("window", "max_windows"))
    _refuse_unused(
        given, "tasks", ("data", "include_path", "limit", "fewshot", "batch_size", "log_samples")
    )
    if tasks is not None and find_spec("lm_eval") is None:
        raise LestdError('--tasks needs lm_eval, which is not installed; pip install "lestd[eval]"')
    from orchestrator.config import cluster_options
    from orchestrator.executor import open_executor
    from orchestrator.manifest import default_evaluation_dir
    from orchestrator.recording import manifest_of_evaluations, open_models
    from orchestrator.submit import jobs_address, run_as_job
    from orchestrator.summary import describe_evaluations, evaluate_models, print_evaluations

    logs.use(log_format)
    cluster_config = cluster_options(cluster, executor=executor, workers=workers, address=address)
    if jobs := jobs_address(cluster_config):
        raise typer.Exit(run_as_job(jobs, "evaluate", given, cluster_config))
    opened = open_models([model] if against is None else [against, model], window)
    run_dir = run_dir or default_evaluation_dir(model)
    manifest = manifest_of_evaluations(model, run_dir)
    common: dict[str, Any] = {"dtype": dtype, "device": device or "auto", "threads": threads or 1}
    common["gpus"] = gpus or 1
    examination: Any = None
    if tasks is not None:
        from orchestrator.judging import JudgeSettings, open_examination
        from workers.judge_tasks import TaskSource

        names = tuple(filter(None, (name.strip() for name in tasks.split(","))))
        local = None if data is None else str(data.absolute())
        included = None if include_path is None else str(include_path.absolute())
        source = TaskSource(local, included, fewshot, limit)
        examination = open_examination(JudgeSettings(names, source, batch_size or 1, **common))
    evaluations, judged = [], []  # type: list[Any], list[Any]
    try:
        with open_executor(cluster_config) as runner:
            if text is not None:
                settings = {**common, "max_windows": max_windows}
                evaluations = evaluate_models(opened, text, runner, settings, manifest)
            if tasks is not None:
                from orchestrator.judged import judge_models

                judged = judge_models(opened, examination, runner, run_dir, manifest, log_samples)
    except KeyboardInterrupt:
        kept = f"; what was finished is kept in {run_dir}: run the same command again to continue"
        logs.log("message", "interrupted" + (kept if tasks is not None else ""))
        raise typer.Exit(130) from None
    shown: dict[str, Any] = {}
    if evaluations:
        shown |= describe_evaluations(evaluations)
        if not json:
            print_evaluations(evaluations)
    if judged:
        from orchestrator.judged import describe_judgements, print_judgements

        shown["judgements"] = describe_judgements(judged, examination)
        if not json:
            print_judgements(shown["judgements"], run_dir if log_samples else None)
    if json:
        tables.print_json(shown)


def _refuse_unused(given: dict[str, Any], needed: str, options: Sequence[str]) -> None:
    """What belongs to one way of judging must not be ignored in the other."""
    unused = [name for name in options if given[name] not in (None, False)]
    if given[needed] is None and unused:
        raise LestdError(
            f"--{unused[0].replace('_', '-')} belongs to --{needed}, which is not given; give both "
            "or neither"
        )
