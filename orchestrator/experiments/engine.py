"""A checkpoint at several sizes, by one or several methods: compressed and evaluated.

    DIR/keep-0.80           a model, DIR/keep-0.80.run its run: as `lestd compress` makes them; of
                            several methods in DIR/METHOD-AND-OPTIONS
    DIR/calibration         the activations of the dense model, where somebody needs them
    DIR/evaluations         finished pieces of the evaluations, of the dense model too
    DIR/manifest            their rows; those of a model and the dense one are in its own as well

The compressions of one method share what no byte budget decides (see
`orchestrator.compression.several_sizes`). Every finished task, and every finished piece of an
evaluation, is kept and found again by the same call.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lestd_kernels.errors import LestdError
from lestd_kernels.methods import CALIBRATED
from orchestrator.compression.calibration import (
    CALIBRATION_DIR,
    CALIBRATION_FILE,
    Calibration,
    calibrate_for,
)
from orchestrator.compression.pipeline import Outcome, compress_model, device_of
from orchestrator.compression.preflight import require_usable
from orchestrator.compression.several_sizes import compress_together
from orchestrator.config.run import RunConfig
from orchestrator.console import logs, output
from orchestrator.console.progress_bar import Meter
from orchestrator.evaluation.model import open_model
from orchestrator.evaluation.perplexity import read_tokens
from orchestrator.evaluation.perplexity_table import evaluate_models
from orchestrator.evaluation.records import open_models, record
from orchestrator.execution.executor import Executor
from orchestrator.experiments.progress import SweepProgress
from orchestrator.experiments.quality import Point, Quality, task_qualities, text_qualities
from orchestrator.experiments.variants import Contender
from orchestrator.manifest.manifest import Manifest, default_run_dir
from orchestrator.planning.plan import make_plan
from orchestrator.run.directory import RunDirectory
from orchestrator.source.checkpoint import Source
from workers.checkpoint.tensors import ShardIndex
from workers.storage.building import empty_own_directory, make_own_directory
from workers.storage.names import MANIFEST_DIR

if TYPE_CHECKING:  # It imports lm_eval.
    from orchestrator.evaluation.lm_eval_tasks import Examination

Outcomes = Mapping[Contender, Mapping[float, Outcome]]
"""By method and keep."""


def model_dir(out: Path, keep: float) -> Path:
    """Where the model of a keep is put."""
    short = f"{keep:.2f}"
    return out / f"keep-{short if float(short) == keep else repr(keep)}"


def compress_all(
    source: Source,
    contenders: Mapping[Contender, Mapping[float, RunConfig]],
    executor: Executor,
    out: Path,
    *,
    calibration: Path | None = None,
    measured: bool = False,
    fresh: bool = False,
) -> tuple[Outcomes, Calibration | None]:
    """Compress a checkpoint by every method to every size; continue where an earlier call stopped.

    Args:
        source: the checkpoint.
        contenders: what to compute, by method and keep; those of a method are alike but for the
            keep.
        executor: who computes.
        out: directory of the experiment.
        calibration: directory of one that others share; None for one in `out`.
        measured: whether the activations are wanted for more than what is compressed with them.
        fresh: forget what an earlier call left there, but for a calibration that is shared.

    Returns:
        The outcomes; the activations, where they are wanted and there is a calibration text.

    Raises:
        LestdError: as `compress_model`, or the disk cannot hold all of the models.
    """
    plans = {
        contender: [make_plan(source, config) for config in configs.values()]
        for contender, configs in contenders.items()
    }
    _require_disk(out, sum(plan.disk_bytes for some in plans.values() for plan in some))
    where, found = calibration or out / CALIBRATION_DIR, None
    first = next(iter(contenders))
    keep, config = next(iter(contenders[first].items()))
    if config.used_metric in CALIBRATED or (measured and config.calibrate_on is not None):
        # Once, before the compressions find that each wants it.
        begun = RunDirectory(default_run_dir(model_dir(out / first.directory, keep)))
        if fresh and calibration is None:
            require_usable(source, config, executor)
            empty_own_directory(where, CALIBRATION_FILE)
        with Meter("calibrate", "bytes") as meter:
            found = calibrate_for(
                [planned.task for planned in plans[first][0].tasks],
                source,
                config,
                device_of(config, None if fresh else begun.binding(), executor),
                executor,
                where,
                **SweepProgress(meter).listeners(out.name),
            )
    outcomes = {}
    for contender, configs in contenders.items():
        directory = out / contender.directory
        if contender.directory:
            make_own_directory(directory)
        reuse_bytes = max(
            planned.bounds.reuse_bytes for plan in plans[contender] for planned in plan.tasks
        )
        keeps = ", ".join(map(str, configs))
        logs.log("sweep_started", f"{directory.name}: {keeps}", out=str(directory))
        with Meter("compress", "bytes") as meter:
            progress = SweepProgress(meter)
            compressions = [
                partial(
                    compress_model,
                    source,
                    config,
                    out=model_dir(directory, keep),
                    run_dir=default_run_dir(model_dir(directory, keep)),
                    calibration=where,
                    fresh=fresh,
                    **progress.listeners(model_dir(directory, keep).name),
                )
                for keep, config in configs.items()
            ]
            done = compress_together(compressions, executor, reuse_bytes)
        outcomes[contender] = dict(zip(configs, done, strict=True))
    return outcomes, found


def models_of(outcomes: Outcomes, out: Path) -> list[Path]:
    """The models' directories, in the order of the outcomes."""
    return [
        model_dir(out / contender.directory, keep)
        for contender, by_keep in outcomes.items()
        for keep in by_keep
    ]


def _require_disk(out: Path, needed: int) -> None:
    """Refuse a sweep that its disk cannot hold, beside what is there of it."""
    stats = [path.lstat() for path in out.rglob("*") if path.is_file()]
    present = sum({stat.st_ino: stat.st_size for stat in stats}.values())
    free = shutil.disk_usage(out).free
    if free < needed - present:
        raise LestdError(
            f"the disk of {out} has {output.size(free)} free, but the models need "
            f"{output.size(needed - present)} there; free some, or choose another --out or fewer "
            "keeps"
        )


def check_evaluable(
    source: Source, text: Path | None, window: int | None, max_windows: int | None
) -> None:
    """Refuse, before anything is compressed, what could not be evaluated afterwards.

    Raises:
        LestdError: the checkpoint is not in a local directory or has no usable tokenizer, or the
            text cannot be predicted.
    """
    if not Path(source.index.location).is_dir():
        raise LestdError(
            f"--text and --tasks need the dense model in a local directory, but {source.model} "
            "lies elsewhere; download it first, or leave them out"
        )
    model = open_model(source.directory, window)
    if text is not None:
        read_tokens(model, text, max_windows)


def evaluate_all(
    dense: Path,
    compressed: Sequence[Path],
    out: Path,
    executor: Executor,
    *,
    text: Path | None,
    window: int | None,
    settings: dict[str, Any],
    examination: Examination | None,
) -> list[tuple[Quality, ...]]:
    """Evaluate the dense model and the compressed ones; continue where an earlier call stopped.

    Args:
        dense: directory of the dense model.
        compressed: directories of the others.
        out: directory of the experiment.
        executor: who computes.
        text: what to predict, or None.
        window: see `open_model`.
        settings: what `evaluate` takes by keyword.
        examination: what to ask, or None.

    Returns:
        The qualities of the dense model, then those of the others; empty where nothing is asked.

    Raises:
        LestdError: see `run_tasks` and `evaluate`.
    """
    models = [dense, *compressed]
    qualities: list[tuple[Quality, ...]] = [() for _ in models]
    if text is None and examination is None:
        return qualities
    opened = open_models(models, window)

    def keep_rows(rows: Sequence[dict[str, Any]]) -> None:
        record(rows, Manifest(out / MANIFEST_DIR))
        for model in models[1:]:
            if rows[0]["model"] in (str(dense), str(model)):
                record(rows, Manifest(model / MANIFEST_DIR))

    pieces = out / "evaluations"
    if text is not None:
        evaluations = evaluate_models(opened, text, executor, pieces, keep_rows, settings)
        qualities = text_qualities(evaluations)
    if examination is not None:
        # It imports lm_eval, which a text does not need.
        from orchestrator.evaluation.lm_eval_table import evaluate_tasks

        evaluated = evaluate_tasks(opened, examination, executor, pieces, keep_rows)
        more = task_qualities(evaluated, examination)
        qualities = [a + b for a, b in zip(qualities, more, strict=True)]
    return qualities


def points_of(
    source: Source, outcomes: Outcomes, out: Path, qualities: Sequence[tuple[Quality, ...]]
) -> list[Point]:
    """The dense model, then the compressed ones.

    Args:
        source: the dense model.
        outcomes: complete ones.
        out: directory of the experiment.
        qualities: see `evaluate_all`.
    """
    done = [outcome for by_keep in outcomes.values() for outcome in by_keep.values()]
    keeps = [keep for by_keep in outcomes.values() for keep in by_keep]
    location = source.index.location
    on_disk = 0
    if Path(location).is_dir():
        on_disk = sum((Path(location) / shard).stat().st_size for shard in source.index.shards)
    points = [Point(None, source.model, done[0].plan.dense_bytes, on_disk, 0.0, qualities[0])]
    models = models_of(outcomes, out)
    for keep, model, outcome, quality in zip(keeps, models, done, qualities[1:], strict=True):
        shards = ShardIndex.from_directory(model).shards
        norm = sum(row["squared_norm"] for row in outcome.rows)
        error = sum(row["squared_error"] for row in outcome.rows)
        points.append(
            Point(
                keep,
                str(model),
                sum(row["stored_bytes"] for row in outcome.rows),
                sum((model / shard).stat().st_size for shard in shards),
                (error / norm) ** 0.5 if norm else 0.0,
                quality,
            )
        )
    return points
