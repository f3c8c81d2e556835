"""The command that evaluates models: perplexity on a text, and tasks of lm-eval."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lestd_kernels.errors import LestdError
from orchestrator.cli.application import app
from orchestrator.cli.options import (
    Given,
    Json,
    LogFormatOption,
    options,
    output_option,
    refuse_unused,
)
from orchestrator.config.options import HOSTS, Evaluation, Host, chosen
from orchestrator.console import logs, output
from orchestrator.console.logs import LogFormat
from workers.storage.files import as_path

if TYPE_CHECKING:  # It imports lm_eval.
    from orchestrator.evaluation.lm_eval_tasks import Examination


@app.command(rich_help_panel="Evaluate and compare")
@options(Evaluation, *HOSTS)
def evaluate(
    model: Annotated[Path, typer.Argument(help="Directory of a compressed or a dense model.")],
    given: Given,
    against: Annotated[
        Path | None, typer.Option(help="A second model, usually the dense one, to compare with.")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="GPUs per worker, for a model too large for one.",
            show_default="1",
            rich_help_panel="Where",
        ),
    ] = None,
    log_samples: Annotated[
        bool, output_option("--log-samples", help="Keep questions and answers in RUN_DIR.")
    ] = False,
    run_dir: Annotated[
        Path | None,
        output_option(
            help="Where finished parts are kept.",
            show_default="MODEL.eval, beside MODEL",
            parser=as_path,
        ),
    ] = None,
    log_format: LogFormatOption = LogFormat.text,
    json: Json = False,
) -> None:
    """Measure perplexity over non-overlapping windows of a text, or run tasks of lm-eval.

    Run the same command again to continue what was interrupted.
    """
    asked, host = chosen(Evaluation, given), chosen(Host, given)
    if asked.text is None and asked.tasks is None:
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
    cluster_config = cluster_options(given)
    if jobs := jobs_address(cluster_config):
        raise typer.Exit(run_as_job(jobs, "evaluate", given, cluster_config))
    opened = open_models([model] if against is None else [against, model], asked.window)
    run_dir = run_dir or default_evaluation_dir(model)
    keep = partial(record, manifest=manifest_of_evaluations(model, run_dir))
    common: dict[str, Any] = {"dtype": asked.dtype, **asdict(host), "gpus": gpus or 1}
    examination = None if asked.tasks is None else examine(asked, common)
    evaluations, evaluated = [], []  # type: list[Any], list[Any]
    try:
        with open_executor(cluster_config) as runner:
            if asked.text is not None:
                settings = {**common, "max_windows": asked.max_windows}
                evaluations = evaluate_models(opened, asked.text, runner, run_dir, keep, settings)
            if examination is not None:
                from orchestrator.evaluation.lm_eval_table import evaluate_tasks

                evaluated = evaluate_tasks(opened, examination, runner, run_dir, keep, log_samples)
    except KeyboardInterrupt:
        logs.log(
            "message",
            f"interrupted; finished work is kept in {run_dir}: run the same command again to "
            "continue",
        )
        raise typer.Exit(130) from None
    shown: dict[str, Any] = {}
    if evaluations:
        shown |= describe_evaluations(evaluations)
        if not json:
            print_evaluations(evaluations)
    if examination is not None:
        from orchestrator.evaluation.lm_eval_table import describe_scores, print_scores

        shown["tasks"] = describe_scores(evaluated, examination)
        if not json:
            print_scores(shown["tasks"], run_dir if log_samples else None)
    if json:
        output.print_json(shown)


def examine(asked: Evaluation, common: dict[str, Any]) -> Examination:
    """The tasks that are asked for; `common` are settings that options do not decide alone.

    Raises:
        LestdError: see `open_examination`.
    """
    from orchestrator.evaluation.lm_eval_tasks import LmEvalSettings, open_examination
    from workers.evaluation.lm_eval_tasks import TaskSource

    names = tuple(filter(None, (name.strip() for name in (asked.tasks or "").split(","))))
    local, included = (
        None if path is None else str(path.absolute()) for path in (asked.data, asked.include_path)
    )
    source = TaskSource(local, included, asked.fewshot, asked.limit)
    return open_examination(LmEvalSettings(names, source, asked.batch_size, **common))
