"""The command that evaluates models: perplexity on a text, and tasks of lm-eval."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli.application import app
from orchestrator.cli.options import (
    Given,
    Json,
    LogFormatOption,
    given_of,
    options,
    output_option,
    refuse_unused,
)
from orchestrator.config.options import HOSTS, Evaluation, Tracking
from orchestrator.console import logs, output
from orchestrator.console.logs import LogFormat
from workers.storage.files import as_path


@app.command(rich_help_panel="Evaluate and compare")
@options(Evaluation, *HOSTS, Tracking)
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
    sensitivity: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Check the expected loss of a model compressed in the metric loss: measure, on "
            "--text, the divergence from --against with only one block compressed, for so many "
            "blocks.",
            rich_help_panel="Evaluation",
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
    refuse_unused(given)
    from orchestrator import api
    from orchestrator.config.cluster import cluster_options
    from orchestrator.evaluation.divergence import print_divergence
    from orchestrator.evaluation.perplexity_table import describe_evaluations, print_evaluations
    from orchestrator.execution.ray.jobs import jobs_address, run_as_job
    from orchestrator.manifest.manifest import default_evaluation_dir

    logs.use(log_format)
    cluster_config = cluster_options(given)
    if jobs := jobs_address(cluster_config):
        raise typer.Exit(run_as_job(jobs, "evaluate", given, cluster_config))
    run_dir = run_dir or default_evaluation_dir(model)
    try:
        found = api.evaluate(
            model,
            against=against,
            gpus=gpus or 1,
            sensitivity=sensitivity,
            log_samples=log_samples,
            run_dir=run_dir,
            **given_of(given, Evaluation, *HOSTS, Tracking),
        )
    except KeyboardInterrupt:
        logs.log(
            "message",
            f"interrupted; finished work is kept in {run_dir}: run the same command again to "
            "continue",
        )
        raise typer.Exit(130) from None
    shown: dict[str, Any] = {}
    if found.perplexities:
        shown |= describe_evaluations(found.perplexities)
        if not json:
            print_evaluations(found.perplexities)
    if found.divergence is not None:
        shown["divergence"] = asdict(found.divergence)
        if not json:
            print_divergence(found.divergence)
    if found.examination is not None:
        from orchestrator.evaluation.lm_eval_table import describe_scores, print_scores

        shown["tasks"] = describe_scores(found.scores, found.examination)
        if not json:
            print_scores(shown["tasks"], run_dir if log_samples else None)
    if json:
        output.print_json(shown)
