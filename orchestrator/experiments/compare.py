"""Several methods at the same bytes: what is measured of their models, and what is left out.

    DIR/figures                        what was measured of each model, kept for the next call
    DIR/compare.md, DIR/compare.png    the table and the plot

The models are those of `orchestrator.experiments.engine`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lestd_kernels.errors import LestdError
from orchestrator.compression.calibration import Calibration
from orchestrator.compression.pipeline import Outcome
from orchestrator.config.run import RunConfig
from orchestrator.console import logs
from orchestrator.console.progress_bar import Meter
from orchestrator.evaluation.records import open_models
from orchestrator.experiments.engine import Outcomes, points_of
from orchestrator.experiments.quality import Point, Quality
from orchestrator.experiments.speed import compare as compare_speed
from orchestrator.experiments.variants import Contender
from orchestrator.experiments.weight_errors import WeightErrors, weight_errors
from orchestrator.manifest.result_rows import counted_bytes, total_memory_bytes
from orchestrator.planning.plan import make_plan
from orchestrator.source.checkpoint import Source
from workers.bench import BenchSettings
from workers.checkpoint.tensors import ShardIndex
from workers.storage.building import make_own_directory
from workers.storage.json_files import read_json, write_json

_STAGES = "seconds_"
_REPEATS = 3


@dataclass(frozen=True)
class Measured:
    """A model of the comparison.

    Attributes:
        label: method and options; ``"dense"``.
        point: what a sweep says of it.
        byte_budget: bytes that its weights in scope were allowed.
        counted_bytes: those bytes of them that the budget is for, on disk or in memory.
        memory_bytes: of its weights in scope once they are loaded.
        model_bytes: data bytes of all of its tensors.
        operator_error: largest ``||W - W_hat||_2 / ||W||_2`` of its weights.
        operator_module: the module that has it.
        activation_error: ``||X (W - W_hat)|| / ||X W||`` on the calibration text; None where there
            is none.
        seconds: work of all workers that compressed it.
        decode_ratio: decoded tokens per second / those of the dense model, side by side; None
            where it was not asked for.
    """

    label: str
    point: Point
    byte_budget: int
    counted_bytes: int
    memory_bytes: int
    model_bytes: int
    operator_error: float = 0.0
    operator_module: str = ""
    activation_error: float | None = None
    seconds: float = 0.0
    decode_ratio: float | None = None


@dataclass(frozen=True)
class Missing:
    """A size that a method does not reach, or reaches by one that is in the table already.

    Attributes:
        label: method and options.
        keep: what was asked for.
        reason: a sentence.
    """

    label: str
    keep: float
    reason: str


def feasible(
    source: Source, contender: Contender, configs: Mapping[float, RunConfig]
) -> tuple[dict[float, RunConfig], list[Missing]]:
    """The keeps at which a method gives models of their own, and why the others are left out.

    A size that no ranks or bits fit is left out. So is one at which a method stores no more than
    at a smaller one: quantizers have one size, and a factorization ends at full rank.
    """
    kept: dict[float, RunConfig] = {}
    missing = []
    sizes: dict[int, float] = {}
    for keep in sorted(configs):
        try:
            plan = make_plan(source, configs[keep])
        except LestdError as error:
            missing.append(Missing(contender.label, keep, str(error)))
            continue
        if (size := plan.max_bytes) in sizes:
            same = f"it stores no more than at keep {sizes[size]:g}"
            missing.append(Missing(contender.label, keep, same))
            continue
        sizes[size] = keep
        kept[keep] = configs[keep]
    return {keep: kept[keep] for keep in configs if keep in kept}, missing


def comparison_rows(
    source: Source,
    outcomes: Outcomes,
    out: Path,
    qualities: Sequence[tuple[Quality, ...]],
    calibration: Calibration | None,
    speed: BenchSettings | None,
) -> list[Measured]:
    """The dense model, then those of the methods, all measured, the largest keep first.

    Args:
        source: the dense model.
        outcomes: complete ones.
        out: directory of the comparison.
        qualities: see `evaluate_all`.
        calibration: activations that errors are measured with, too.
        speed: how to time decoding; None for not at all.

    Raises:
        LestdError: a model is damaged or cannot be timed.
    """
    dense, *points = points_of(source, outcomes, out, qualities)
    each = [(contender, one) for contender, some in outcomes.items() for one in some.values()]
    rows = []
    with Meter("measure", "models") as meter:
        meter.update(0, len(points))
        for point, (contender, outcome) in zip(points, each, strict=True):
            row = _counted(contender, point, outcome)
            figures = out / "figures" / f"{contender.directory}-{Path(point.model).name}.json"
            row = _with_errors(row, outcome, calibration, figures)
            rows.append(row if speed is None else _timed(row, source, speed, figures))
            meter.update(len(rows), len(points))
    rows.sort(key=lambda row: row.point.keep or 0.0, reverse=True)
    whole = source.index.stored_bytes
    return [Measured("dense", dense, *3 * (dense.stored_bytes,), whole), *rows]


def _counted(contender: Contender, point: Point, outcome: Outcome) -> Measured:
    rows = outcome.rows
    return Measured(
        label=contender.label,
        point=point,
        byte_budget=sum(row["byte_budget"] for row in rows),
        counted_bytes=sum(map(counted_bytes, rows)),
        memory_bytes=total_memory_bytes(rows),
        model_bytes=ShardIndex.from_directory(Path(point.model)).stored_bytes,
        seconds=sum(
            value or 0.0 for row in rows for key, value in row.items() if key.startswith(_STAGES)
        ),
    )


def _with_errors(
    row: Measured, outcome: Outcome, calibration: Calibration | None, path: Path
) -> Measured:
    """The row with the errors of its weights, which are kept in a file for the next call."""
    model = Path(row.point.model)
    of = {"model_id": _model_id(model), "calibration": calibration and calibration.digest}
    known = read_json(path) if path.is_file() else {}
    if known.get("of") != of:
        tasks = [planned.task for planned in outcome.plan.tasks]
        found = weight_errors(model, tasks, {} if calibration is None else calibration.refs)
        known = {"of": of, "errors": asdict(found)}
        make_own_directory(path.parent)
        write_json(path, known)
    errors = WeightErrors(**known["errors"])
    logs.log("measured", f"{row.label}, {model.name}: operator error {errors.operator_error:.4f}")
    return replace(row, **asdict(errors))


def _timed(row: Measured, source: Source, speed: BenchSettings, path: Path) -> Measured:
    """The row with its decode speed, kept likewise."""
    known = read_json(path)
    if known.get("speed_settings") != asdict(speed):
        found = compare_speed(source.directory, Path(row.point.model), speed, _REPEATS)
        ratio = found.ratios["decode_tokens_per_second"]
        known |= {"speed_settings": asdict(speed), "decode_ratio": ratio}
        write_json(path, known)
    return replace(row, decode_ratio=known["decode_ratio"])


def _model_id(model: Path) -> str:
    [(_, facts)] = open_models([model])
    return facts.model_id


def without_repeated(
    outcomes: Outcomes,
) -> tuple[dict[Contender, dict[float, Outcome]], list[Missing]]:
    """The outcomes without those that store what the same method does at a smaller keep.

    Quantizers have one size, whatever they are allowed; it is listed at the smallest keep that it
    fits.
    """
    kept: dict[Contender, dict[float, Outcome]] = {}
    missing = []
    for contender, by_keep in outcomes.items():
        seen: dict[tuple[str, ...], float] = {}
        for keep in sorted(by_keep):
            payloads = tuple(row["sha256"] for row in by_keep[keep].rows)
            if payloads in seen:
                same = f"it is the model of keep {seen[payloads]:g}"
                missing.append(Missing(contender.label, keep, same))
            else:
                seen[payloads] = keep
        kept[contender] = {k: v for k, v in by_keep.items() if k in seen.values()}
    return kept, missing
