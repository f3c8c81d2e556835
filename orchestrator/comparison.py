"""Several methods at the same bytes: compressed, measured and judged beside the dense model.

A comparison is a sweep for each method:

    DIR/METHOD-AND-OPTIONS/keep-0.80   a model, as `lestd compress` makes it, its run beside it
    DIR/evaluations, DIR/manifest      as of a sweep (see orchestrator.sweep)
    DIR/figures                        what else was measured of each model
    DIR/compare.md, DIR/compare.png    the table and the plot

Whatever is finished, a task, a piece of an evaluation or a figure, is kept and found again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lestd_kernels.errors import LestdError
from lestd_kernels.methods import ACTIVATION
from orchestrator import logs
from orchestrator.bench import compare as compare_speed
from orchestrator.config import RunConfig
from orchestrator.contenders import Contender
from orchestrator.curve import Point
from orchestrator.executor import Executor
from orchestrator.manifest import read_json, write_json
from orchestrator.meter import Meter
from orchestrator.pipeline import Outcome
from orchestrator.plan import make_plan
from orchestrator.recording import open_models
from orchestrator.source import Source
from orchestrator.sweep import compress_keeps, model_dir, sweep_points
from orchestrator.weight_errors import largest_operator_error
from workers.bench import BenchSettings
from workers.checkpoint import ShardIndex

_STAGES = "seconds_"
_REPEATS = 3


@dataclass(frozen=True)
class Row:
    """A model of the comparison.

    Attributes:
        label: method and options; ``"dense"``.
        point: what a sweep says of it.
        byte_budget: bytes that its weights in scope were allowed.
        model_bytes: data bytes of all of its tensors.
        operator_error: largest ``||W - W_hat||_2 / ||W||_2`` of its weights.
        operator_tensor: the weight that has it.
        activation_error: ``||X (W - W_hat)|| / ||X W||`` on the calibration text; None where the
            method did not work in that metric.
        seconds: work of all workers that compressed it.
        decode_ratio: decoded tokens per second / those of the dense model, side by side; None
            where it was not asked for.
    """

    label: str
    point: Point
    byte_budget: int
    model_bytes: int
    operator_error: float = 0.0
    operator_tensor: str = ""
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


def compress_contenders(
    source: Source,
    contenders: Mapping[Contender, Mapping[float, RunConfig]],
    executor: Executor,
    out: Path,
    *,
    fresh: bool,
) -> dict[Contender, dict[float, Outcome]]:
    """Compress by every method to every keep; see `compress_keeps`."""
    outcomes = {}
    for contender, configs in contenders.items():
        directory = out / contender.directory
        directory.mkdir(parents=True, exist_ok=True)
        outcomes[contender] = compress_keeps(source, configs, executor, directory, fresh=fresh)
    return outcomes


def comparison_rows(
    source: Source,
    outcomes: Mapping[Contender, Mapping[float, Outcome]],
    out: Path,
    qualities: Sequence[tuple[Any, ...]],
    speed: BenchSettings | None,
) -> list[Row]:
    """The dense model, then those of the methods, all measured, the largest keep first.

    Args:
        source: the dense model.
        outcomes: complete ones.
        out: directory of the comparison.
        qualities: of the dense model, then of each other in this order; see `judge_keeps`.
        speed: how to time decoding; None for not at all.

    Raises:
        LestdError: a model is damaged or cannot be timed.
    """
    dense, *others = qualities
    rows: list[Row] = []
    with Meter("measure", "models") as meter:
        total = len(others)
        meter.update(0, total)
        for contender, by_keep in outcomes.items():
            own = [dense, *(others.pop(0) for _ in by_keep)]
            directory = out / contender.directory
            first, *points = sweep_points(source, by_keep, directory, own)
            if not rows:
                rows.append(_dense_row(source, first))
            for point, outcome in zip(points, by_keep.values(), strict=True):
                row = _counted(contender, point, outcome)
                figures = out / "figures" / f"{contender.directory}-{Path(point.model).name}.json"
                rows.append(_measured(row, source, figures, speed))
                meter.update(len(rows) - 1, total)
    return [*rows[:1], *sorted(rows[1:], key=lambda row: row.point.keep or 0.0, reverse=True)]


def _dense_row(source: Source, point: Point) -> Row:
    return Row("dense", point, point.stored_bytes, source.index.stored_bytes)


def _counted(contender: Contender, point: Point, outcome: Outcome) -> Row:
    rows = outcome.rows
    calibrated = [row for row in rows if row["metric"] == ACTIVATION]
    error = None
    if len(calibrated) == len(rows):
        norm = sum(row["metric_squared_norm"] for row in rows)
        error = (sum(row["metric_squared_error"] for row in rows) / norm) ** 0.5 if norm else 0.0
    return Row(
        label=contender.label,
        point=point,
        byte_budget=sum(row["byte_budget"] for row in rows),
        model_bytes=ShardIndex.from_directory(Path(point.model)).stored_bytes,
        activation_error=error,
        seconds=sum(
            value or 0.0 for row in rows for key, value in row.items() if key.startswith(_STAGES)
        ),
    )


def _measured(row: Row, source: Source, path: Path, speed: BenchSettings | None) -> Row:
    """The row with what takes time to measure, which is kept in a file for the next call."""
    model = Path(row.point.model)
    [(_, facts)] = open_models([model])
    known = read_json(path) if path.is_file() else {}
    if known.get("model_id") != facts.model_id:
        known = {"model_id": facts.model_id}
    if "operator_error" not in known:
        worst = largest_operator_error(model, source.index)
        known |= {"operator_error": worst.value, "operator_tensor": worst.tensor}
        _keep(path, known)
    ratio = None
    if speed is not None:
        if known.get("speed_settings") != asdict(speed):
            found = compare_speed(source.directory, model, speed, _REPEATS)
            known |= {
                "speed_settings": asdict(speed),
                "decode_ratio": found.ratios["decode_tokens_per_second"],
            }
            _keep(path, known)
        ratio = known["decode_ratio"]
    logs.log("measured", f"{row.label}, {model.name}: operator error {known['operator_error']:.4f}")
    return replace(
        row,
        operator_error=known["operator_error"],
        operator_tensor=known["operator_tensor"],
        decode_ratio=ratio,
    )


def _keep(path: Path, known: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_json(path, known)


def models_of(outcomes: Mapping[Contender, Mapping[float, Outcome]], out: Path) -> list[Path]:
    """The models' directories, in the order of the rows."""
    return [
        model_dir(out / contender.directory, keep)
        for contender, by_keep in outcomes.items()
        for keep in by_keep
    ]
