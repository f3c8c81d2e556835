"""A checkpoint at several sizes: compressed and judged, with the dense model as what to beat.

    DIR/keep-0.80           the model, DIR/keep-0.80.run its run: as `lestd compress` makes them
    DIR/manifest            the evaluations, of the dense model too

The compressions share what no byte budget decides (see `orchestrator.bundles`). Whatever is
finished, a task or an evaluation, is kept and found again by the same call.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import transformers

from lestd_kernels.errors import LestdError
from orchestrator import logs, tables
from orchestrator.bench import write_figure
from orchestrator.bundles import compress_together
from orchestrator.config import RunConfig
from orchestrator.evaluation import evaluate, open_model
from orchestrator.executor import Executor
from orchestrator.manifest import MANIFEST_DIR, Manifest, default_run_dir
from orchestrator.meter import Meter
from orchestrator.pipeline import Outcome, compress_model
from orchestrator.plan import make_plan
from orchestrator.progress import SweepProgress
from orchestrator.source import Source, read_config_json
from workers.checkpoint import ShardIndex
from workers.decompose import software_versions
from workers.files import file_sha256
from workers.sampling import sample_digests

PERPLEXITIES = {"token_perplexity": "token ppl", "word_perplexity": "word ppl"}
"""What a model is judged by, and what it is called for people."""


def parse_keeps(text: str) -> list[float]:
    """Keeps from a list like ``"0.8,0.6"``, in its order.

    Raises:
        LestdError: it is no such list, or names a keep twice.
    """
    try:
        keeps = [float(part) for part in text.split(",")]
    except ValueError:
        raise LestdError(f"--keep must be numbers like 0.8,0.6,0.4, got {text!r}") from None
    if len(set(keeps)) < len(keeps):
        raise LestdError(f"--keep names a number twice in {text!r}; name each once")
    return keeps


def model_dir(out: Path, keep: float) -> Path:
    """Where the model of a keep is put."""
    short = f"{keep:.2f}"
    return out / f"keep-{short if float(short) == keep else repr(keep)}"


@dataclass(frozen=True)
class Point:
    """A model of the sweep.

    Attributes:
        keep: what was asked for; None for the dense model.
        model: its directory, or how the dense one was named.
        stored_bytes: bytes of its weights in scope.
        model_bytes_on_disk: bytes of its safetensors files, headers included.
        relative_error: ``||W - W_hat|| / ||W||`` over the weights in scope.
        quality: value by name, see `PERPLEXITIES`; empty where it was not judged.
    """

    keep: float | None
    model: str
    stored_bytes: int
    model_bytes_on_disk: int
    relative_error: float
    quality: dict[str, float]


def compress_keeps(
    source: Source,
    configs: Mapping[float, RunConfig],
    executor: Executor,
    out: Path,
    *,
    fresh: bool = False,
) -> dict[float, Outcome]:
    """Compress a checkpoint to each of several sizes; continue where an earlier call stopped.

    Args:
        source: the checkpoint.
        configs: what to compute, by keep; alike but for the keep.
        executor: who computes.
        out: directory of the sweep.
        fresh: forget what an earlier call left there.

    Returns:
        The outcomes, by keep.

    Raises:
        LestdError: as `compress_model`, or the disk cannot hold all of the models.
    """
    plans = [make_plan(source, config) for config in configs.values()]
    _require_disk(out, sum(plan.disk_bytes for plan in plans))
    reuse_bytes = max(planned.bounds.reuse_bytes for plan in plans for planned in plan.tasks)
    logs.log("sweep_started", f"{out.name}: {', '.join(map(str, configs))}", out=str(out))
    with Meter("compress", "bytes") as meter:
        progress = SweepProgress(meter)
        compressions = [
            partial(
                compress_model,
                source,
                config,
                out=model_dir(out, keep),
                run_dir=default_run_dir(model_dir(out, keep)),
                fresh=fresh,
                **progress.listeners(model_dir(out, keep).name),
            )
            for keep, config in configs.items()
        ]
        outcomes = compress_together(compressions, executor, reuse_bytes)
    return dict(zip(configs, outcomes, strict=True))


def _require_disk(out: Path, needed: int) -> None:
    """Refuse a sweep that its disk cannot hold, beside what is there of it."""
    stats = [path.lstat() for path in out.rglob("*") if path.is_file()]
    present = sum({stat.st_ino: stat.st_size for stat in stats}.values())
    free = shutil.disk_usage(out).free
    if free < needed - present:
        raise LestdError(
            f"the disk of {out} has {tables.size(free)} free, but the models need "
            f"{tables.size(needed - present)} there; free some, or choose another --out or fewer "
            "keeps"
        )


def judge(
    model: Path, text: Path, executor: Executor, settings: dict[str, Any], kept: Manifest
) -> dict[str, float]:
    """Quality of a model on a text: of an earlier call, if nothing has changed since.

    Args:
        model: its directory.
        text: the text.
        executor: who computes.
        settings: ``window``, for `open_model`, and what `evaluate` takes by keyword.
        kept: where evaluations are kept.

    Returns:
        Value by name, see `PERPLEXITIES`.
    """
    index = ShardIndex.from_directory(model)
    shards = sample_digests(index)
    model_id = _digest({"config.json": read_config_json(model), "shards": shards})
    tokenizer = {path.name: file_sha256(path) for path in sorted(model.glob("tokenizer*"))}
    deciding = settings | {"text_sha256": file_sha256(text), "tokenizer": tokenizer}
    deciding |= software_versions() | {"transformers": transformers.__version__}
    name = _digest({"model_id": model_id} | deciding)[:32]
    rows = [row for row in kept.evaluations().to_pylist() if row["evaluation_id"] == name]
    if not rows:
        opened = open_model(model, settings["window"])
        options = {key: value for key, value in settings.items() if key != "window"}
        with Meter(f"evaluate {model.name}", "windows") as meter:
            evaluation = evaluate(opened, text, executor, progress=meter.update, **options)
        common = {
            "evaluation_id": name,
            "at": time.time_ns() // 1000,
            "model": str(model),
            "model_id": model_id,
            "model_bytes": evaluation.model_bytes_on_disk,
            "task": "text",
            "filter": "none",
            "higher_is_better": False,
            "samples": evaluation.windows,
            "tokens": evaluation.tokens,
            "settings": json.dumps(deciding, sort_keys=True),
            "dtype": evaluation.dtype,
            "device": evaluation.device,
            "seconds": evaluation.seconds,
            "versions": json.dumps(software_versions(), sort_keys=True),
        }
        rows = [
            common | {"metric": metric, "value": getattr(evaluation, metric)}
            for metric in PERPLEXITIES
        ]
        kept.record_evaluation(rows)
    return {row["metric"]: row["value"] for row in rows}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_judgeable(source: Source, text: Path, window: int | None) -> None:
    """Refuse, before anything is compressed, what could not be judged afterwards.

    Raises:
        LestdError: the checkpoint is not in a local directory or has no usable tokenizer, or there
            is no text.
    """
    if not Path(source.index.location).is_dir():
        raise LestdError(
            f"--text needs the dense model in a local directory, but {source.model} lies "
            "elsewhere; download it first, or leave --text out"
        )
    if not text.is_file():
        raise LestdError(f"the text {text} cannot be read (no such file); check --text")
    open_model(source.directory, window)


def sweep_points(
    source: Source,
    outcomes: Mapping[float, Outcome],
    out: Path,
    text: Path | None,
    executor: Executor,
    settings: dict[str, Any],
) -> list[Point]:
    """The dense model, then those of the keeps; judged if there is a text.

    Args:
        source: the dense model.
        outcomes: complete ones, by keep.
        out: directory of the sweep.
        text: what to judge by; None: sizes and errors only.
        executor: who computes.
        settings: see `judge`.
    """
    kept = Manifest(out / MANIFEST_DIR)

    def quality(model: Path) -> dict[str, float]:
        return {} if text is None else judge(model, text, executor, settings, kept)

    plan = next(iter(outcomes.values())).plan
    location = source.index.location
    on_disk = 0
    if Path(location).is_dir():
        on_disk = sum((Path(location) / shard).stat().st_size for shard in source.index.shards)
    dense = quality(source.directory)
    points = [Point(None, source.model, plan.dense_bytes, on_disk, 0.0, dense)]
    for keep, outcome in outcomes.items():
        model = model_dir(out, keep)
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
                quality(model),
            )
        )
    return points


def print_sweep(points: Sequence[Point], text: Path | None, plot: Path | None, json: bool) -> None:
    """Print a sweep as a table, or as one JSON object."""
    dense = points[0]
    if json:
        entries = []
        for point in points:
            entry = asdict(point)
            entry |= {
                f"{name}_difference": value - dense.quality[name]
                for name, value in point.quality.items()
            }
            entries.append(entry | entry.pop("quality"))
        where = {"text": text and str(text), "plot": plot and str(plot)}
        tables.print_json(where | {"dense": entries[0], "points": entries[1:]})
        return
    columns = ["keep", "weights in scope", "files on disk", "relative error"]
    for name in dense.quality:
        columns += [PERPLEXITIES[name], "to dense"]
    rows = []
    for point in points:
        row = ["dense" if point.keep is None else f"{point.keep:g}"]
        row += [tables.size(point.stored_bytes), tables.size(point.model_bytes_on_disk)]
        row.append(f"{point.relative_error:.4f}")
        for name, value in point.quality.items():
            row += [f"{value:.4f}", f"{value - dense.quality[name]:+.4f}"]
        rows.append(row)
    tables.print_table(dense.model, columns, rows)
    if plot is not None:
        tables.out.print(f"plot {plot}", soft_wrap=True)


def save_curve(points: Sequence[Point], title: str, path: Path) -> None:
    """Draw size on disk against token perplexity; the dense model is the line to beat.

    Args:
        points: the dense model first; judged.
        title: what stands above.
        path: the file; `bench.check_plot` has accepted it.
    """
    # An extra of the package, and slow to import: only who asks for a plot needs it.
    from matplotlib.figure import Figure

    name = next(iter(PERPLEXITIES))
    dense, *compressed = points
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(dense.quality[name], color="0.4", linestyle="--", linewidth=1)
    compressed = sorted(compressed, key=lambda point: point.model_bytes_on_disk)
    sizes = [point.model_bytes_on_disk / 2**20 for point in compressed]
    axes.plot(sizes, [point.quality[name] for point in compressed], "o-", color="tab:blue")
    whole = dense.model_bytes_on_disk / 2**20
    axes.plot([whole], [dense.quality[name]], "s", color="0.4")
    for x, point in zip(sizes, compressed, strict=True):
        at = (x, point.quality[name])
        axes.annotate(f"keep {point.keep:g}", at, (5, 3), textcoords="offset points")
    at = (whole, dense.quality[name])
    told = f"dense, {dense.quality[name]:.2f}"  # Below its line: all others are above it.
    axes.annotate(told, at, (0, -6), textcoords="offset points", ha="right", va="top")
    axes.margins(x=0.08, y=0.12)
    axes.set_xlabel("safetensors files on disk, MiB")
    axes.set_ylabel("token perplexity")
    axes.set_title(title, fontsize="medium")
    write_figure(figure, path)
