"""Two models side by side: prefill and decode speed, time to first token, peak memory.

Each model has a process of its own, so that its peak memory is its own. Both stay loaded, and
repetitions alternate (A B A B ...): what slows the machine down for a while slows both. Prompts are
random tokens from a fixed seed. The first repetition of each does not count; of the others the
medians do, and the ratios are ratios of medians.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from lestd_kernels.errors import LestdError
from lestd_kernels.formats.shared_tucker import QUANT_METHOD
from orchestrator.console import output
from orchestrator.console.plots import write_figure
from orchestrator.evaluation.model import DTYPES, resolve_dtype
from orchestrator.model.adapter import adapter_stored_bytes
from orchestrator.source.checkpoint import load_config
from workers.bench import BenchModel, BenchSettings, Repetition, serve
from workers.checkpoint.tensors import ShardIndex

Progress = Callable[[int, int], None]
"""Called with (repetitions done, repetitions in all), of both models together."""


_END_SECONDS = 10.0
_STEADY = 1.5  # Beyond this spread of the repetitions, the median says little.


@dataclass(frozen=True)
class ModelFigures:
    """Measurements of one model; rates and times are medians over the repetitions.

    Attributes:
        model: its directory.
        prefill_tokens_per_second: ``B L / prefill seconds``.
        decode_tokens_per_second: ``B (N - 1) / decode seconds``.
        time_to_first_token_seconds: from the prompts to the first tokens on the host.
        peak_memory_bytes: at most, from before it was loaded to the end; without the libraries.
        weight_bytes: bytes of its parameters and buffers in memory.
        stored_bytes: bytes of its tensors on disk.
        load_seconds: wall clock of loading.
        repetitions: each one, in order.
    """

    model: str
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token_seconds: float
    peak_memory_bytes: int
    weight_bytes: int
    stored_bytes: int
    load_seconds: float
    repetitions: tuple[Repetition, ...]


FIGURES = {
    "prefill_tokens_per_second": "prefill, tokens/s",
    "decode_tokens_per_second": "decode, tokens/s",
    "time_to_first_token_seconds": "time to first token, ms",
    "peak_memory_bytes": "peak memory, MiB",
}
"""The compared figures of `ModelFigures`, and what they are called for people."""

UNITS = {"time_to_first_token_seconds": 1e-3, "peak_memory_bytes": 2.0**20}
"""Divisors that make figures readable."""


@dataclass(frozen=True)
class Comparison:
    """A dense and a compressed model, measured in one run.

    Attributes:
        dense, compressed: the models.
        ratios: compressed / dense for each of `FIGURES`.
        spread: slowest over fastest repetition of one model, of prefill or decoding.
        settings: as asked for.
        repeats: repetitions that count, of each model.
        device: name of the hardware.
        dtypes: compute dtype of the dense and of the compressed model.
        threads: CPU threads of a model's process.
        versions: of torch and transformers.
        seconds: wall clock of the whole comparison.
    """

    dense: ModelFigures
    compressed: ModelFigures
    ratios: dict[str, float]
    spread: float
    settings: BenchSettings
    repeats: int
    device: str
    dtypes: tuple[str, str]
    threads: int
    versions: dict[str, str]
    seconds: float


def compare(
    dense: Path,
    compressed: Path,
    settings: BenchSettings,
    repeats: int,
    progress: Progress | None = None,
) -> Comparison:
    """Measure two models in turn.

    Args:
        dense: directory of the dense model.
        compressed: directory of the compressed one.
        settings: how to time them.
        repeats: repetitions of each that count.
        progress: told of every repetition.

    Raises:
        LestdError: a model is missing, damaged or cannot be loaded, the two have different
            vocabularies or stand in the wrong order, prompt and new tokens do not fit their
            positions, or a process died.
    """
    began = time.perf_counter()
    if settings.dtype not in DTYPES:
        raise LestdError(f"dtype must be one of {', '.join(DTYPES)}, got {settings.dtype!r}")
    models = (dense.absolute(), compressed.absolute())
    _check_models(models, settings)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    for model in models:
        resolve_dtype(model, settings.dtype, device)  # Says where it is not the checkpoint's.
    stored = [
        ShardIndex.from_directory(model).stored_bytes + adapter_stored_bytes(model)
        for model in models
    ]
    repetitions: tuple[list[Repetition], list[Repetition]] = ([], [])
    report = progress or (lambda done, total: None)
    with ExitStack() as stack:
        children = [stack.enter_context(_child(model, settings)) for model in models]
        report(0, 2 * repeats)
        loaded: list[BenchModel] = [child.ask("load") for child in children]
        for turn in range(2 * repeats):
            repetitions[turn % 2].append(children[turn % 2].ask("measure"))
            report(turn + 1, 2 * repeats)
        peaks: list[int] = [child.ask("peak_memory") for child in children]
    first, second = (
        _figures(models[i], settings, stored[i], loaded[i], peaks[i], repetitions[i])
        for i in range(2)
    )
    return Comparison(
        dense=first,
        compressed=second,
        ratios={name: _ratio(getattr(second, name), getattr(first, name)) for name in FIGURES},
        spread=max(_spread(model) for model in repetitions),
        settings=settings,
        repeats=repeats,
        device=loaded[0].device,
        dtypes=(loaded[0].dtype, loaded[1].dtype),
        threads=loaded[0].threads,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        seconds=time.perf_counter() - began,
    )


def _check_models(models: tuple[Path, Path], settings: BenchSettings) -> None:
    """Refuse what the configs rule out, before anything is loaded."""
    vocabularies, compressed = [], []
    length = settings.prompt_tokens + settings.new_tokens
    for model in models:
        if not model.is_dir():
            raise LestdError(f"{model} is not a directory; give the directory of a model")
        loaded = load_config(model)
        quantization = getattr(loaded, "quantization_config", None) or {}
        compressed.append(quantization.get("quant_method") == QUANT_METHOD)
        config = loaded.get_text_config()
        vocabularies.append(getattr(config, "vocab_size", None))
        positions = getattr(config, "max_position_embeddings", None)
        if isinstance(positions, int) and 0 < positions < length:
            raise LestdError(
                f"{settings.prompt_tokens} prompt tokens and {settings.new_tokens} new ones are "
                f"more than the {positions} positions of {model}; choose fewer with "
                "--prompt-tokens or --new-tokens"
            )
    if vocabularies[0] != vocabularies[1] or vocabularies[0] is None:
        raise LestdError(
            f"{models[0]} has vocab_size {vocabularies[0]} and {models[1]} has {vocabularies[1]}, "
            "expected the same; compare a language model with its own compressed form"
        )
    if compressed == [True, False]:
        raise LestdError(
            f"{models[0]} is a model compressed by lestd and {models[1]} is not; give the dense "
            "model first"
        )


class _Child:
    """A model's process, as its parent sees it."""

    def __init__(self, model: Path, process: Any, pipe: Connection) -> None:
        self._model, self._process, self._pipe = model, process, pipe

    def ask(self, name: str) -> Any:
        """The answer to one request of `workers.bench.serve`."""
        try:
            self._pipe.send(name)
            good, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(_END_SECONDS)
            raise LestdError(
                f"the process that measured {self._model} died (exit code "
                f"{self._process.exitcode}; -9 means that it was killed, as a machine out of "
                "memory does); free memory, or use a smaller --batch or --prompt-tokens"
            ) from None
        if not good:
            raise LestdError(answer)
        return answer


@contextmanager
def _child(model: Path, settings: BenchSettings) -> Iterator[_Child]:
    # Not forked: a fork would begin with the parent's memory, and breaks CUDA.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, str(model), settings), daemon=True)
    process.start()
    theirs.close()  # So that the pipe ends when the process does.
    try:
        yield _Child(model, process, ours)
    finally:
        ours.close()
        # Idle, it ends by itself; at work (an interruption) it is not waited for.
        process.terminate()
        process.join(_END_SECONDS)


def _figures(
    model: Path,
    settings: BenchSettings,
    stored_bytes: int,
    loaded: BenchModel,
    peak: int,
    repetitions: list[Repetition],
) -> ModelFigures:
    prefilled = settings.batch * settings.prompt_tokens
    decoded = settings.batch * (settings.new_tokens - 1)
    return ModelFigures(
        model=str(model),
        prefill_tokens_per_second=prefilled / median(r.prefill_seconds for r in repetitions),
        decode_tokens_per_second=decoded / median(r.decode_seconds for r in repetitions),
        time_to_first_token_seconds=median(r.first_token_seconds for r in repetitions),
        peak_memory_bytes=peak,
        weight_bytes=loaded.weight_bytes,
        stored_bytes=stored_bytes,
        load_seconds=loaded.load_seconds,
        repetitions=tuple(repetitions),
    )


def _spread(repetitions: list[Repetition]) -> float:
    prefills = [repetition.prefill_seconds for repetition in repetitions]
    decodes = [repetition.decode_seconds for repetition in repetitions]
    return max(max(prefills) / min(prefills), max(decodes) / min(decodes))


def _ratio(compressed: float, dense: float) -> float:
    return compressed / dense if dense else math.nan


def print_comparison(comparison: Comparison, json: bool) -> None:
    """Print a comparison as a table, or as one JSON object."""
    if json:
        output.print_json(asdict(comparison))
        return
    one, other, s = comparison.dense, comparison.compressed, comparison.settings
    rows = []
    for name, title in FIGURES.items():
        values = [getattr(model, name) / UNITS.get(name, 1.0) for model in (one, other)]
        rows.append((title, *(f"{v:,.2f}" for v in values), f"{comparison.ratios[name]:.3f}"))
    columns = ("", "dense", "compressed", "compressed / dense")
    title = f"{other.model} against {one.model}"
    output.print_table(title, columns, rows)
    output.out.print(
        f"medians of {comparison.repeats} repetitions; batch {s.batch}, {s.prompt_tokens} prompt "
        f"tokens, {s.new_tokens} new tokens; {_where(comparison)}\n"
        f"weights in memory {output.size(one.weight_bytes)} and {output.size(other.weight_bytes)}, "
        f"on disk {output.size(one.stored_bytes)} and {output.size(other.stored_bytes)}; "
        f"loaded in {one.load_seconds:.2f} s and {other.load_seconds:.2f} s",
        soft_wrap=True,
    )
    if comparison.spread > _STEADY:
        output.out.print(
            f"repetitions of one model differ by up to {comparison.spread:.1f} x: something else "
            "was using the machine, or a repetition is too short; measure again when it is idle, "
            "or with fewer --threads or more --new-tokens",
            style="yellow",
            soft_wrap=True,
        )


def _where(comparison: Comparison) -> str:
    """Dtype, hardware and threads."""
    dtypes = " and ".join(dict.fromkeys(comparison.dtypes))
    threads = "1 thread" if comparison.threads == 1 else f"{comparison.threads} threads"
    return f"{dtypes}; {comparison.device}, {threads}"


def save_plot(comparison: Comparison, path: Path) -> None:
    """Draw the compared figures as bars, with a dot for each repetition.

    Same comparison and same matplotlib, same bytes.

    Args:
        comparison: what was measured.
        path: the file, one of `PLOT_FORMATS` by its ending; `check_plot` has accepted it.
    """
    # An extra of the package, and slow to import: only who asks for a plot needs it.
    from matplotlib.figure import Figure

    s = comparison.settings
    figure = Figure(figsize=(3 * len(FIGURES), 3.6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(FIGURES)), FIGURES.items(), strict=True):
        for position, model in enumerate((comparison.dense, comparison.compressed)):
            scale = UNITS.get(name, 1.0)
            axes.bar(
                position, getattr(model, name) / scale, 0.6, color=("0.7", "tab:blue")[position]
            )
            dots = [value / scale for value in _each(model, name, s)]
            axes.plot([position] * len(dots), dots, ".", color="black", markersize=4)
        axes.set_xticks((0, 1), ("dense", "compressed"))
        axes.set_title(f"{title}\nratio {comparison.ratios[name]:.3f}", fontsize="medium")
    figure.suptitle(
        f"{Path(comparison.compressed.model).name}: batch {s.batch}, {s.prompt_tokens} prompt and "
        f"{s.new_tokens} new tokens; {_where(comparison)}; "
        "bars: medians, dots: repetitions",
        fontsize="medium",
    )
    write_figure(figure, path)


def _each(model: ModelFigures, name: str, settings: BenchSettings) -> list[float]:
    """A figure of every repetition; none where it is one of the whole process."""
    if name == "prefill_tokens_per_second":
        tokens = settings.batch * settings.prompt_tokens
        return [tokens / r.prefill_seconds for r in model.repetitions]
    if name == "decode_tokens_per_second":
        tokens = settings.batch * (settings.new_tokens - 1)
        return [tokens / r.decode_seconds for r in model.repetitions]
    if name == "time_to_first_token_seconds":
        return [r.first_token_seconds for r in model.repetitions]
    return []
