"""The common part of sweep and compare: models of one checkpoint, compressed and evaluated."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lestd_kernels.errors import LestdError
from orchestrator.config.options import Evaluation, chosen
from orchestrator.console import logs

if TYPE_CHECKING:  # They import torch.
    from orchestrator.compression.calibration import Calibration
    from orchestrator.config.run import RunConfig
    from orchestrator.experiments.compare import Missing
    from orchestrator.experiments.engine import Outcomes
    from orchestrator.experiments.quality import Quality
    from orchestrator.experiments.variants import Contender
    from orchestrator.source.checkpoint import Source


@dataclass(frozen=True)
class Experiment:
    """Findings of a command.

    Attributes:
        name: the model, as it was named.
        source: the model.
        first: one of the configurations.
        plot: where to draw, or None.
        outcomes: of the compressions.
        missing: sizes that are left out.
        qualities: of the dense model, then of the others.
        calibration: see `compress_all`.
    """

    name: str
    source: Source
    first: RunConfig
    plot: Path | None
    outcomes: Outcomes
    missing: list[Missing]
    qualities: list[tuple[Quality, ...]]
    calibration: Calibration | None


def run_experiment(
    command: str, given: dict[str, Any], contenders: Iterable[Contender], *, measured: bool
) -> Experiment:
    """Do what a command's options ask for; if a cluster does it, or a task fails, end the command.

    Args:
        command: its name.
        given: its options.
        contenders: the methods.
        measured: whether every model counts once: sizes that give no other are left out.

    Raises:
        LestdError: the options are impossible, or as `compress_all` and `evaluate_all`.
    """
    from orchestrator.cli.summary import print_outcome
    from orchestrator.config.cluster import cluster_options
    from orchestrator.config.layers import parse_keeps
    from orchestrator.config.run import run_options
    from orchestrator.console.plots import check_plot
    from orchestrator.execution.open import open_executor
    from orchestrator.execution.ray.jobs import jobs_address, run_as_job
    from orchestrator.experiments.compare import feasible, without_repeated
    from orchestrator.experiments.engine import (
        check_evaluable,
        compress_all,
        evaluate_all,
        models_of,
    )
    from orchestrator.manifest.manifest import default_run_dir
    from orchestrator.source.checkpoint import resolve_source

    logs.use(given["log_format"])
    asked = chosen(Evaluation, given)
    configs: dict[Contender, dict[float, RunConfig]] = {}
    for contender in contenders:
        configs[contender] = {}
        for keep in parse_keeps(given["keep"]):
            model, config = run_options(given | {"keep": keep}, contender.settings)
            configs[contender][keep] = config
    cluster = cluster_options(given)
    if jobs := jobs_address(cluster):
        there = given | {"model": model.model}
        if "speed" in there:
            there["no_speed"] = not there.pop("speed")
        raise typer.Exit(run_as_job(jobs, command, there, cluster))
    source = resolve_source(*model)
    settings = {"dtype": asked.dtype, "device": config.device, "threads": config.threads}
    examination = None
    if asked.tasks is not None:
        from orchestrator.evaluation.lm_eval_tasks import examine

        examination = examine(asked, settings)
    evaluated = asked.text is not None or examination is not None
    if evaluated or given.get("speed"):
        check_evaluable(source, asked.text, asked.window, asked.max_windows)
    missing: list[Missing] = []
    if measured:
        for contender in configs:
            configs[contender], left_out = feasible(source, contender, configs[contender])
            missing += left_out
        configs = {contender: by_keep for contender, by_keep in configs.items() if by_keep}
        if not configs:
            raise LestdError(missing[0].reason)
    out: Path = given["out"]
    plot: Path | None = given.get("plot")
    if (
        plot is None
        and (evaluated or measured)
        and importlib.util.find_spec("matplotlib") is not None
    ):
        plot = out / f"{command}.png"
    out.mkdir(parents=True, exist_ok=True)
    if plot is not None:
        check_plot(plot)
    try:
        with open_executor(cluster) as runner:
            outcomes, calibration = compress_all(
                source,
                configs,
                runner,
                out,
                calibration=given.get("calibration"),
                measured=measured,
                fresh=given["fresh"],
            )
            done = [outcome for by_keep in outcomes.values() for outcome in by_keep.values()]
            for directory, outcome in zip(models_of(outcomes, out), done, strict=True):
                if not outcome.complete:
                    print_outcome(outcome, directory, default_run_dir(directory), json=False)
            if not all(outcome.complete for outcome in done):
                raise typer.Exit(1)
            if measured:
                outcomes, repeated = without_repeated(outcomes)
                missing += repeated
            qualities = evaluate_all(
                source.directory,
                models_of(outcomes, out),
                out,
                runner,
                text=asked.text,
                window=asked.window,
                settings={**settings, "max_windows": asked.max_windows},
                examination=examination,
            )
    except KeyboardInterrupt:
        logs.log(
            "message",
            f"interrupted; finished work is kept in {out}: run the same command again to continue",
        )
        raise typer.Exit(130) from None
    return Experiment(model.model, source, config, plot, outcomes, missing, qualities, calibration)
