"""The loss that a compressed model was expected to have, held against what it has.

Measured is the divergence of the dense model's predictions from the compressed one's on a text,
``KL(dense || compressed)`` in nats per token: of the whole model, and of the dense model with one
block compressed, for a sample of the blocks. Expected is what the manifest says of the same (see
docs/calibration.md). As in orchestrator.evaluation.perplexity pieces do not depend on the pool, and
every finished one is kept.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lestd_kernels.errors import LestdError
from orchestrator.console import output
from orchestrator.evaluation.model import EvaluationModel, require_positive, worker_spec
from orchestrator.evaluation.perplexity import cut, read_tokens, text_settings
from orchestrator.evaluation.pieces import EvaluationDirectory, run_pieces
from orchestrator.evaluation.records import (
    ModelFacts,
    evaluation_id,
    evaluation_versions,
    model_columns,
)
from orchestrator.evaluation.statistics import correlation, jackknife_stderr
from orchestrator.execution.executor import Executor, Listener
from orchestrator.manifest.manifest import Manifest
from orchestrator.manifest.schemas import DIVERGENCE_TASK
from workers.contracts import Failure
from workers.evaluation.contracts import DivergenceRequest, DivergenceResult
from workers.evaluation.divergence import DivergenceWorker
from workers.storage.files import AnyPath
from workers.storage.names import MANIFEST_DIR

_TASK_VERSION = "1"

Opened = tuple[EvaluationModel, ModelFacts]


@dataclass(frozen=True)
class Part:
    """A block, or the model.

    Attributes:
        name: path of the block; ``"model"``.
        expected: nats per token, as the manifest has it.
        measured: nats per token.
        stderr: its standard error, the jackknife's over the windows; None of a single window.
    """

    name: str
    expected: float
    measured: float
    stderr: float | None


@dataclass(frozen=True)
class Divergence:
    """Expected loss and measured divergence.

    Attributes:
        evaluation_id: hash of both models and of all that decides the figures.
        text: file of the text.
        windows: windows evaluated.
        tokens: positions in them.
        whole: of the compressed model.
        blocks: of the dense model with one block compressed.
        correlation: Pearson's, of the logarithms of the blocks' expected and measured figures; None
            of fewer than three blocks.
    """

    evaluation_id: str
    text: str
    windows: int
    tokens: int
    whole: Part
    blocks: tuple[Part, ...]
    correlation: float | None


def measure_divergence(
    compressed: Opened,
    dense: Opened,
    text_path: Path,
    executor: Executor,
    run_dir: AnyPath,
    *,
    blocks: int,
    max_windows: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int = 1,
    gpus: int = 1,
    progress: Callable[[int, int], None] | None = None,
    on_event: Listener | None = None,
) -> tuple[Divergence, list[dict[str, Any]]]:
    """Measure divergences; continue where an earlier such call stopped.

    Args:
        compressed: a model that was compressed in the metric loss.
        dense: the one that it was made of.
        text_path: UTF-8 text.
        executor: who runs the workers.
        run_dir: where finished pieces are kept, in a directory per evaluation.
        blocks: how many blocks are measured alone, spread evenly over the model.
        max_windows: the first windows only.
        dtype: compute dtype; ``"auto"`` is float32: what 16 bits round is more than small errors.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        threads: CPU threads of a worker.
        gpus: GPUs of a CUDA worker.
        progress: called with ``(windows done, windows in all)``.
        on_event: told of every start and retry of a piece.

    Returns:
        What was found, and its rows of `evaluations`.

    Raises:
        LestdError: the model has no expected loss, the text is unusable, or a piece failed.
    """
    require_positive("sensitivity", blocks)
    model, facts = compressed
    losses = _expected_losses(model.directory)
    names = list(losses)
    count = min(blocks, len(names))
    chosen = tuple(dict.fromkeys(names[i * len(names) // count] for i in range(count)))
    _, token_ids = read_tokens(model, text_path, max_windows)
    length = model.window_length
    if device == "auto":
        device = "cuda" if executor.has_cuda() else "cpu"
    dtype = "float32" if dtype == "auto" else dtype
    settings = text_settings(facts, text_path, token_ids, length, threads)
    settings |= {"against": dense[1].model_id, "blocks": chosen}
    deciding = {
        "task": DIVERGENCE_TASK,
        "task_version": _TASK_VERSION,
        "dtype": dtype,
        "device": device,
        "settings": json.dumps(settings, sort_keys=True),
        "versions": json.dumps(evaluation_versions(), sort_keys=True),
    }
    name = evaluation_id(facts, deciding)
    pieces = [DivergenceRequest(**vars(one), blocks=chosen) for one in cut(token_ids, length)]
    store = EvaluationDirectory(
        run_dir / name,
        {"model": facts.model, "model_id": facts.model_id, **deciding},
        pieces,
        _parse,
    )
    # Two models, and the logits of both: of the one that is held in its dtype, too.
    spec = worker_spec(
        DivergenceWorker,
        model,
        2 * dense[0].bytes_on_disk + 12 * length * model.vocabulary,
        dense_dir=str(dense[0].directory.resolve()),
        dtype=dtype,
        device=device,
        threads=threads,
        gpus=gpus,
    )
    for outcome in run_pieces([store], executor, spec, progress, on_event):
        if isinstance(outcome, Failure):
            raise LestdError(
                f"{model.directory} could not be held against {dense[0].directory}: "
                f"{outcome.message}; what was finished is kept in {store.path}"
            )
    results = store.ordered()
    tokens = [n for one in results for n in one.tokens]
    windows = [window for one in results for window in one.divergences]
    every = [math.fsum(losses.values()), *(losses[block] for block in chosen)]
    parts = [
        _part(part, expected, list(own), tokens)
        for part, expected, own in zip(
            ("model", *chosen), every, zip(*windows, strict=True), strict=True
        )
    ]
    found = Divergence(
        evaluation_id=name,
        text=str(text_path),
        windows=len(windows),
        tokens=sum(tokens),
        whole=parts[0],
        blocks=tuple(parts[1:]),
        correlation=correlation([(one.expected, one.measured) for one in parts[1:]]),
    )
    workers = len({one.worker for one in results})
    common = deciding | {
        "evaluation_id": name,
        "time": time.time_ns() // 1000,
        **model_columns(facts),
        "metric": "kl",
        "higher_is_better": False,
        "samples": found.windows,
        "tokens": found.tokens,
        "workers": workers,
        "seconds": math.fsum(one.seconds for one in results) / workers,
    }
    rows = [
        common | {"answer_filter": one.name, "value": one.measured, "stderr": one.stderr}
        for one in parts
    ]
    if found.correlation is not None:
        more = {"metric": "correlation", "higher_is_better": True, "value": found.correlation}
        rows.append(common | more | {"answer_filter": "model", "stderr": None})
    return found, rows


def _expected_losses(model: Path) -> dict[str, float]:
    """By block, in the order of the layers.

    Raises:
        LestdError: the manifest has none.
    """
    rows = Manifest(model / MANIFEST_DIR).groups().to_pylist()
    losses = {row["block"]: row["expected_loss"] for row in rows}
    if not losses or None in losses.values():
        raise LestdError(
            f"{model} has no expected loss to check: its manifest has one where it was compressed "
            "with --metric loss; leave out --sensitivity"
        )
    return losses


def _part(name: str, expected: float, sums: list[float], tokens: list[int]) -> Part:
    total, count = math.fsum(sums), sum(tokens)
    without = [(total - one) / (count - n) for one, n in zip(sums, tokens, strict=True)][
        : None if len(sums) > 1 else 0
    ]
    return Part(name, expected, total / count, jackknife_stderr(without))


def _parse(fields: dict[str, Any]) -> DivergenceResult:
    """A piece as it was committed.

    Raises:
        ValueError, TypeError or KeyError: it is another.
    """
    windows, blocks, tokens = (tuple(fields[name]) for name in ("windows", "blocks", "tokens"))
    divergences = tuple(tuple(map(float, one)) for one in fields["divergences"])
    if not len(windows) == len(divergences) == len(tokens) > 0:
        raise ValueError(windows)
    if any(len(one) != 1 + len(blocks) for one in divergences):
        raise ValueError(blocks)
    more = {"windows": windows, "blocks": blocks, "tokens": tokens, "divergences": divergences}
    return DivergenceResult(**fields | more)


def print_divergence(found: Divergence) -> None:
    """A row per block, and one for the model."""
    parts: Sequence[Part] = (*found.blocks, found.whole)
    rows = [
        (
            one.name,
            f"{one.expected:.5f}",
            f"{one.measured:.5f}" + ("" if one.stderr is None else f" ± {one.stderr:.5f}"),
            f"{one.measured / one.expected:.2f}" if one.expected else "",
        )
        for one in parts
    ]
    output.print_table(
        f"{found.text}: loss in nats per token, {found.windows} windows, {found.tokens:,} tokens",
        ("only this compressed", "expected", "measured, KL to the dense model", "ratio"),
        rows,
    )
    if found.correlation is not None:
        output.out.print(
            f"correlation of the blocks' expected and measured loss {found.correlation:.3f} (of "
            "their logarithms)"
        )
