"""Perplexity of a model on a text, by a pool of workers.

The text is tokenized once, as a whole and without special tokens, into t_0 ... t_{n-1}. Window i
reads t_{iL} ... t_{iL+L-1} and predicts the token after each of them, so the windows do not
overlap, the last one may be shorter, and every token but t_0 is predicted exactly once:

    token perplexity = exp(NLL / predicted tokens)      word perplexity = exp(NLL / words)

NLL is the summed negative log-likelihood in nats; words are the whitespace-separated words of the
text that was evaluated. Where `max_windows` cuts the text, that is the text which t_0 up to the
last predicted token decode to, and a word that the cut divides counts as one.

Pieces (a fixed number of consecutive windows) do not depend on the pool, and the windows' sums are
added in window order with `math.fsum`: any number of workers gives the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lestd_kernels.errors import LestdError, first_line
from orchestrator.executor import Executor, WorkerSpec
from orchestrator.source import load_config, read_config_json
from workers.checkpoint import ShardIndex
from workers.contracts import EvalRequest, EvalResult, Failure
from workers.evaluate import EvalWorker
from workers.files import file_sha256

DTYPES = ("auto", "bfloat16", "float16", "float32")
"""Compute dtypes; ``"auto"`` is the checkpoint's own."""

_LONGEST_DEFAULT_WINDOW = 2048
_WINDOWS_PER_PIECE = 4
# Python with torch and transformers, before it holds a model.
_WORKER_BASE_BYTES = 600 * 2**20


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
        model: directory of the model.
        text: file of the text.
        text_sha256: of that file.
        token_perplexity: ``exp(nll / tokens)``.
        word_perplexity: ``exp(nll / words)``; comparable between models of different tokenizers.
        nll: summed negative log-likelihood of the predicted tokens, in nats.
        tokens: predicted tokens.
        words: whitespace-separated words of the evaluated text.
        windows: windows evaluated.
        window_length: inputs of a full window.
        dtype: compute dtype as asked for; ``"auto"`` is the checkpoint's own.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads of a worker.
        workers: workers that took part.
        seconds: wall clock, with tokenizing and loading.
        model_bytes_on_disk: bytes of the model's safetensors files, headers included.
    """

    model: str
    text: str
    text_sha256: str
    token_perplexity: float
    word_perplexity: float
    nll: float
    tokens: int
    words: int
    windows: int
    window_length: int
    dtype: str
    device: str
    threads: int
    workers: int
    seconds: float
    model_bytes_on_disk: int


@dataclass(frozen=True)
class EvaluationModel:
    """A model that can be evaluated, as far as this is known before its weights are read.

    Attributes:
        directory: where it lies.
        tokenizer: its tokenizer.
        vocabulary: number of token ids that it knows.
        window_length: inputs of a full window.
        bytes_on_disk: bytes of its safetensors files, headers included.
    """

    directory: Path
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    window_length: int
    bytes_on_disk: int


def open_model(model_dir: Path, window: int | None = None) -> EvaluationModel:
    """Find a dense or a compressed model, and what evaluating it takes.

    Args:
        model_dir: directory of the model, with its tokenizer.
        window: inputs per window; None for the smaller of 2048 and the model's positions.

    Raises:
        LestdError: its config, its tokenizer, its index or a shard is missing or damaged, it is no
            language model, or the window is longer than its positions.
    """
    _require_positive("window", window)
    config_json = read_config_json(model_dir)
    config = load_config(model_dir)
    text_config = config.get_text_config()
    vocabulary = getattr(text_config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise LestdError(
            f"{model_dir} is not a language model: its config.json, of model_type "
            f"{config_json.get('model_type')!r}, has no vocab_size"
        )
    # GPT-J's n_positions answers to this name too; some families say -1 where there is no limit.
    positions = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        positions = None
    if window is not None and positions is not None and window > positions:
        raise LestdError(
            f"window {window} is longer than the {positions} positions of {model_dir}; "
            f"use at most {positions}"
        )
    default = min(_LONGEST_DEFAULT_WINDOW, positions or _LONGEST_DEFAULT_WINDOW)
    index = ShardIndex.from_directory(model_dir)
    return EvaluationModel(
        directory=model_dir,
        tokenizer=_load_tokenizer(model_dir),
        vocabulary=vocabulary,
        window_length=default if window is None else window,
        bytes_on_disk=sum((model_dir / shard).stat().st_size for shard in index.shards),
    )


def evaluate(
    model: EvaluationModel,
    text_path: Path,
    executor: Executor,
    *,
    max_windows: int | None = None,
    dtype: str = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure token and word perplexity.

    Args:
        model: see `open_model`.
        text_path: UTF-8 text.
        executor: who runs the workers.
        max_windows: evaluate the first windows only.
        dtype: one of `DTYPES`.
        device: where workers compute; ``"auto"`` takes GPUs where there are any.
        threads: CPU threads of a worker. The last bit of the result depends on it.
        progress: called with ``(windows done, windows in all)``.

    Raises:
        LestdError: a setting is impossible, the text is missing or unusable, the tokenizer is
            another model's, or a piece failed.
    """
    start = time.perf_counter()
    _require_positive("threads", threads)
    _require_positive("max-windows", max_windows)
    if dtype not in DTYPES:
        raise LestdError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    text = _read_text(text_path)
    token_ids = _tokenize(model.tokenizer, text, text_path)
    if max(token_ids) >= model.vocabulary:
        raise LestdError(
            f"{model.directory}: the tokenizer gives token id {max(token_ids)} but the model's "
            f"vocab_size is {model.vocabulary}; the tokenizer files belong to another model"
        )

    length = model.window_length
    windows = -(-(len(token_ids) - 1) // length)
    if max_windows is not None and max_windows < windows:
        windows = max_windows
        token_ids = token_ids[: windows * length + 1]
        text = str(model.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))
    words = len(text.split())

    if device == "auto":
        device = "cuda" if executor.has_cuda() else "cpu"
    spec = WorkerSpec(
        EvalWorker,
        {
            "model_dir": str(model.directory.resolve()),
            "dtype": dtype,
            "device": device,
            "threads": threads,
        },
        threads=threads,
        # Twice the weights leaves room for 16-bit weights computed in float32; logits are held
        # in the compute dtype and, chunk by chunk, in float32.
        memory_bytes=_WORKER_BASE_BYTES + 2 * model.bytes_on_disk + 4 * length * model.vocabulary,
        device=device,
    )
    nll, workers = _score(spec, _pieces(token_ids, length), executor, model.directory, progress)
    tokens = len(token_ids) - 1
    return Evaluation(
        model=str(model.directory),
        text=str(text_path),
        text_sha256=file_sha256(text_path),
        token_perplexity=_perplexity(nll, tokens),
        word_perplexity=_perplexity(nll, words),
        nll=nll,
        tokens=tokens,
        words=words,
        windows=windows,
        window_length=length,
        dtype=dtype,
        device=device,
        threads=threads,
        workers=workers,
        seconds=time.perf_counter() - start,
        model_bytes_on_disk=model.bytes_on_disk,
    )


def _require_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise LestdError(f"{name} must be at least 1, got {value}")


def _load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        # Damaged files fail in Transformers wherever they are first used, in many ways.
        raise LestdError(
            f"{model_dir} has no usable tokenizer ({type(error).__name__}: {first_line(error)}); "
            "copy the tokenizer files of the source model into it"
        ) from error
    return tokenizer


def _read_text(path: Path) -> str:
    try:
        # Bytes first: text mode would turn "\r\n" into "\n".
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise LestdError(
            f"the text {path} cannot be read ({error.strerror}); check --text"
        ) from error
    except UnicodeDecodeError as error:
        raise LestdError(
            f"the text {path} is not UTF-8: byte {error.start} is "
            f"0x{error.object[error.start]:02x}; convert it to UTF-8"
        ) from error
    if not text.strip():
        raise LestdError(f"the text {path} is empty; evaluation needs at least two tokens")
    return text


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, path: Path) -> list[int]:
    # verbose=False: a text longer than the model is what windows are for, no reason to warn.
    token_ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(token_ids) < 2:
        raise LestdError(
            f"the text {path} has {len(token_ids)} token; evaluation needs at least two, because "
            "the first one is not predicted"
        )
    return token_ids


def _pieces(token_ids: list[int], length: int) -> list[EvalRequest]:
    starts = range(0, len(token_ids) - 1, length)
    pieces = []
    for first in range(0, len(starts), _WINDOWS_PER_PIECE):
        windows = range(first, min(first + _WINDOWS_PER_PIECE, len(starts)))
        pieces.append(
            EvalRequest(
                task_id=f"windows {windows[0]}-{windows[-1]}",
                windows=tuple(windows),
                token_ids=tuple(
                    tuple(token_ids[starts[i] : starts[i] + length + 1]) for i in windows
                ),
            )
        )
    return pieces


def _score(
    spec: WorkerSpec,
    pieces: list[EvalRequest],
    executor: Executor,
    model_dir: Path,
    progress: Callable[[int, int], None] | None,
) -> tuple[float, int]:
    """Summed negative log-likelihood of all pieces, in nats, and how many workers took part."""
    total = sum(len(piece.windows) for piece in pieces)
    nll: dict[int, float] = {}
    workers = set()
    if progress is not None:
        progress(0, total)
    for result in executor.map(spec, pieces):
        if isinstance(result, Failure):
            raise LestdError(f"{model_dir} could not be evaluated: {result.message}")
        assert isinstance(result, EvalResult)
        nll.update(zip(result.windows, result.nll, strict=True))
        workers.add(result.worker)
        if progress is not None:
            progress(len(nll), total)
    return math.fsum(nll[window] for window in sorted(nll)), len(workers)


def _perplexity(nll: float, count: int) -> float:
    try:
        return math.exp(nll / count)
    except (OverflowError, ZeroDivisionError):
        return math.inf  # A cut may leave tokens of white space only, and no word.
