"""What sweep and compare have in common: models of one checkpoint, compressed and judged."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from orchestrator.cli.evaluate import examine
from orchestrator.console import logs

if TYPE_CHECKING:  # They import torch.
    from orchestrator.compression.calibration import Calibration
    from orchestrator.config.cluster import ClusterConfig
    from orchestrator.config.run import RunConfig
    from orchestrator.evaluation.lm_eval_tasks import Examination
    from orchestrator.experiments.compare import Missing
    from orchestrator.experiments.engine import Outcomes
    from orchestrator.experiments.quality import Quality
    from orchestrator.experiments.variants import Contender
    from orchestrator.source.checkpoint import Source


@dataclass(frozen=True)
class Experiment:
    """What a command asks for.

    Attributes:
        name: the model, as it was named.
        source: the model.
        contenders: what to compute, by method and keep.
        cluster: who computes.
        settings: what evaluations take of it.
        examination: the tasks, or None.
    """

    name: str
    source: Source
    contenders: dict[Contender, dict[float, RunConfig]]
    cluster: ClusterConfig
    settings: dict[str, Any]
    examination: Examination | None

    @property
    def first(self) -> RunConfig:
        """One of the configurations, which are alike but for method and keep."""
        return next(iter(next(iter(self.contenders.values())).values()))


def open_experiment(
    command: str,
    given: dict[str, Any],
    contenders: Iterable[Contender],
    judged: bool,
    job: dict[str, Any],
) -> Experiment:
    """Read a command's options, or hand the command to a cluster, which ends this one.

    Args:
        command: its name.
        given: its options.
        contenders: the methods.
        judged: whether the dense model is to be loaded.
        job: its options as the cluster is given them.

    Raises:
        LestdError: they are impossible, or the model cannot be found or loaded.
    """
    from orchestrator.config.cluster import cluster_options
    from orchestrator.config.layers import parse_keeps
    from orchestrator.config.run import RunFile, run_options
    from orchestrator.execution.ray.jobs import jobs_address, run_as_job
    from orchestrator.experiments.engine import check_judgeable
    from orchestrator.source.checkpoint import resolve_source

    logs.use(given["log_format"])
    options = {k: v for k, v in given.items() if k in RunFile.model_fields and k != "model"}
    configs: dict[Contender, dict[float, RunConfig]] = {}
    for contender in contenders:
        configs[contender] = {}
        for keep in parse_keeps(given["keep"]):
            own = options | contender.settings | {"keep": keep}
            name, revision, configs[contender][keep] = run_options(
                given["model"], given["config"], own
            )
    who = {name: given[name] for name in ("executor", "workers", "address")}
    cluster = cluster_options(given["cluster"], **who)
    if jobs := jobs_address(cluster):
        raise typer.Exit(run_as_job(jobs, command, job | {"model": name}, cluster))
    source = resolve_source(name, revision)
    first = next(iter(next(iter(configs.values())).values()))
    settings = {"dtype": given["dtype"], "device": first.device, "threads": first.threads}
    examination = None if given["tasks"] is None else examine(given, settings)
    if judged:
        check_judgeable(source, given["text"], given["window"])
    return Experiment(name, source, configs, cluster, settings, examination)


def prepare_plot(out: Path, name: str, plot: Path | None, wanted: bool) -> Path | None:
    """Make the directory of an experiment; where its plot goes, None for nowhere.

    Raises:
        LestdError: it could not be written.
    """
    from orchestrator.console.plots import check_plot

    if plot is None and wanted and importlib.util.find_spec("matplotlib") is not None:
        plot = out / name
    out.mkdir(parents=True, exist_ok=True)
    if plot is not None:
        check_plot(plot)
    return plot


def run_experiment(
    asked: Experiment, given: dict[str, Any], measured: bool
) -> tuple[Outcomes, list[Missing], list[tuple[Quality, ...]], Calibration | None]:
    """Compress and judge; where a task has failed, say so and end the command.

    Args:
        asked: what to do.
        given: the command's options.
        measured: whether errors are measured, of each model once.

    Returns:
        The outcomes, what is left out of them, how all models are judged, and the activations.
    """
    from orchestrator.cli.summary import print_outcome
    from orchestrator.execution.open import open_executor
    from orchestrator.experiments.compare import without_repeated
    from orchestrator.experiments.engine import compress_all, judge_all, models_of
    from orchestrator.manifest.manifest import default_run_dir

    out: Path = given["out"]
    missing: list[Missing] = []
    try:
        with open_executor(asked.cluster) as runner:
            outcomes, calibration = compress_all(
                asked.source,
                asked.contenders,
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
                outcomes, missing = without_repeated(outcomes)
            qualities = judge_all(
                asked.source.directory,
                models_of(outcomes, out),
                out,
                runner,
                text=given["text"],
                window=given["window"],
                settings={**asked.settings, "max_windows": given["max_windows"]},
                examination=asked.examination,
            )
    except KeyboardInterrupt:
        logs.log(
            "message",
            f"interrupted; what is done is kept in {out}: run the same command again to continue",
        )
        raise typer.Exit(130) from None
    return outcomes, missing, qualities, calibration
