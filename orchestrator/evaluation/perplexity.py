"""Perplexity of a model on a text, by a pool of workers.

The text is tokenized as a whole and without special tokens, into t_0 ... t_{n-1}; where
`max_windows` cuts it, no further than these windows take, which have the same tokens. Window i
reads t_{iL} ... t_{iL+L-1} and predicts the token after each of them, so the windows do not
overlap, the last one may be shorter, and every token but t_0 is predicted exactly once:

    token perplexity = exp(NLL / predicted tokens)      word perplexity = exp(NLL / words)

NLL is the summed negative log-likelihood in nats; words are the whitespace-separated words of the
text that was evaluated. Where `max_windows` cuts the text, that is the text which t_0 up to the
last predicted token decode to, and a word that the cut divides counts as one.

Pieces (a fixed number of consecutive windows) do not depend on the pool, and the windows' sums are
added in window order with `math.fsum`: any number of workers gives the same bits. Every finished
piece is committed to the evaluation's directory, so a kill costs the pieces in flight.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lestd_kernels.errors import LestdError
from orchestrator.evaluation.model import (
    DTYPES,
    EvaluationModel,
    require_positive,
    resolve_dtype,
    worker_spec,
)
from orchestrator.evaluation.pieces import EvaluationDirectory, run_pieces
from orchestrator.evaluation.records import ModelFacts, evaluation_id, evaluation_versions
from orchestrator.execution.executor import Executor, Listener
from orchestrator.source.texts import decode_text, first_tokens
from workers.contracts import Failure
from workers.evaluation.contracts import EvalRequest, EvalResult
from workers.evaluation.perplexity import EvalWorker
from workers.storage.files import AnyPath, file_sha256
from workers.storage.untrusted_files import MAX_TEXT_BYTES, read_regular

TEXT_TASK = "text"
"""Name of the task that `lestd evaluate --text` is in the table."""
PERPLEXITIES = ("token_perplexity", "word_perplexity")
"""Its metrics."""

_TASK_VERSION = "1"
_WINDOWS_PER_PIECE = 4


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
        evaluation_id: hash of the model and of all that decides the figures.
        model: directory of the model.
        text: file of the text.
        token_perplexity: ``exp(nll / tokens)``.
        word_perplexity: ``exp(nll / words)``; comparable between models of different tokenizers.
        nll: summed negative log-likelihood of the predicted tokens, in nats.
        tokens: predicted tokens.
        words: whitespace-separated words of the evaluated text.
        windows: windows evaluated.
        window_length: inputs of a full window.
        token_ids_sha256: of the evaluated tokens.
        window_scores: of each window its negative log-likelihood in nats, and its predicted tokens.
        dtype: compute dtype.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads of a worker.
        workers: workers that took part.
        seconds: what they worked, without loading, divided by their number.
        model_bytes_on_disk: bytes of the model's safetensors files, headers included.
    """

    evaluation_id: str
    model: str
    text: str
    token_perplexity: float
    word_perplexity: float
    nll: float
    tokens: int
    words: int
    windows: int
    window_length: int
    token_ids_sha256: str
    window_scores: tuple[tuple[float, int], ...] = field(repr=False)
    dtype: str
    device: str
    threads: int
    workers: int
    seconds: float
    model_bytes_on_disk: int

    def without_each_window(self) -> list[float]:
        """The token perplexity without each window in turn; empty where there is one only."""
        if self.windows < 2:
            return []
        return [_perplexity(self.nll - nll, self.tokens - n) for nll, n in self.window_scores]


def evaluate(
    model: EvaluationModel,
    facts: ModelFacts,
    text_path: Path,
    executor: Executor,
    run_dir: AnyPath,
    *,
    max_windows: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int = 1,
    gpus: int = 1,
    progress: Callable[[int, int], None] | None = None,
    on_event: Listener | None = None,
) -> tuple[Evaluation, dict[str, Any]]:
    """Measure token and word perplexity; continue where an earlier such call stopped.

    Args:
        model: see `open_model`.
        facts: what identifies it.
        text_path: UTF-8 text.
        executor: who runs the workers.
        run_dir: where finished pieces are kept, in a directory per evaluation.
        max_windows: evaluate the first windows only.
        dtype: one of `DTYPES`.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``: where workers compute; ``"auto"`` takes GPUs
            where there are any.
        threads: CPU threads of a worker. The last bit of the result depends on it.
        gpus: GPUs of a CUDA worker, which divide the model's layers.
        progress: called with ``(windows done, windows in all)``.
        on_event: told of every start and retry of a piece.

    Returns:
        What was found, and the columns of `evaluations` that say what was asked.

    Raises:
        LestdError: a setting is impossible, the text is missing or unusable, the tokenizer is
            another model's, the directory cannot be written, or a piece failed.
    """
    require_positive("threads", threads)
    require_positive("gpus", gpus)
    if dtype not in DTYPES:
        raise LestdError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    text, token_ids = read_tokens(model, text_path, max_windows)
    length, words = model.window_length, len(text.split())
    windows = -(-(len(token_ids) - 1) // length)

    if device == "auto":
        device = "cuda" if executor.has_cuda() else "cpu"
    dtype = resolve_dtype(model.directory, dtype, device)
    settings = text_settings(facts, text_path, token_ids, length, threads)
    deciding = {
        "task": TEXT_TASK,
        "task_version": _TASK_VERSION,
        "dtype": dtype,
        "device": device,
        "settings": json.dumps(settings, sort_keys=True),
        "versions": json.dumps(evaluation_versions(), sort_keys=True),
    }
    name = evaluation_id(facts, deciding)
    store = EvaluationDirectory(
        run_dir / name,
        {"model": facts.model, "model_id": facts.model_id, **deciding},
        cut(token_ids, length),
        _parse,
    )
    # Logits are held in the compute dtype and, chunk by chunk, in float32.
    pool = {"dtype": dtype, "device": device, "threads": threads, "gpus": gpus}
    spec = worker_spec(EvalWorker, model, 4 * length * model.vocabulary, **pool)
    for outcome in run_pieces([store], executor, spec, progress, on_event):
        if isinstance(outcome, Failure):
            raise LestdError(
                f"{spec.kwargs['model_dir']} could not be evaluated: {outcome.message}; what was "
                f"finished is kept in {store.path}"
            )
    results = store.ordered()
    scores = [score for one in results for score in zip(one.nll, one.tokens, strict=True)]
    workers = len({one.worker for one in results})
    nll = math.fsum(score for score, _ in scores)
    tokens = len(token_ids) - 1
    evaluation = Evaluation(
        evaluation_id=name,
        model=str(model.directory),
        text=str(text_path),
        token_perplexity=_perplexity(nll, tokens),
        word_perplexity=_perplexity(nll, words),
        nll=nll,
        tokens=tokens,
        words=words,
        windows=windows,
        window_length=length,
        token_ids_sha256=settings["token_ids_sha256"],
        window_scores=tuple(scores),
        dtype=dtype,
        device=device,
        threads=threads,
        workers=workers,
        seconds=math.fsum(one.seconds for one in results) / workers,
        model_bytes_on_disk=model.bytes_on_disk,
    )
    return evaluation, deciding


def read_text(path: Path) -> str:
    """A text, as it stands in the file.

    Raises:
        LestdError: it cannot be read, is not UTF-8 or is empty.
    """
    try:
        content = read_regular(path, MAX_TEXT_BYTES)
    except OSError as error:
        raise LestdError(
            f"the text {path} cannot be read ({error.strerror}); check --text"
        ) from error
    text = decode_text(content, path)
    if not text.strip():
        raise LestdError(f"the text {path} is empty; evaluation needs at least two tokens")
    return text


def read_tokens(
    model: EvaluationModel, path: Path, max_windows: int | None = None
) -> tuple[str, list[int]]:
    """A text and its token ids.

    Args:
        model: whose tokenizer and windows they are.
        path: of the text.
        max_windows: of a longer text what these predict, and what it decodes to.

    Raises:
        LestdError: as `read_text`; or it has fewer than two tokens, or tokens that the model does
            not have; or `max_windows` is not positive.
    """
    require_positive("max-windows", max_windows)
    text = read_text(path)
    most = None if max_windows is None else max_windows * model.window_length + 1
    token_ids = first_tokens(model.tokenizer, text, None if most is None else most + 1)
    if most is not None and len(token_ids) > most:
        token_ids = token_ids[:most]
        text = str(model.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))
    if len(token_ids) < 2:
        raise LestdError(
            f"the text {path} has {len(token_ids)} token; evaluation needs at least two, because "
            "the first one is not predicted"
        )
    if max(token_ids) >= model.vocabulary:
        raise LestdError(
            f"{model.directory}: the tokenizer gives token id {max(token_ids)} but the model's "
            f"vocab_size is {model.vocabulary}; the tokenizer files belong to another model"
        )
    return text, token_ids


def text_settings(
    facts: ModelFacts, text_path: Path, token_ids: list[int], length: int, threads: int
) -> dict[str, Any]:
    """The settings of an evaluation on windows of a text, which decide its figures."""
    return {
        "text": text_path.name,
        "text_sha256": file_sha256(text_path),
        "token_ids_sha256": hashlib.sha256(json.dumps(token_ids).encode()).hexdigest(),
        "tokenizer_sha256": facts.tokenizer_sha256,
        "window": length,
        "windows": -(-(len(token_ids) - 1) // length),
        "threads": threads,
    }


def cut(token_ids: list[int], length: int) -> list[EvalRequest]:
    """Tokens in pieces of a few windows, which do not depend on the pool."""
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


def _parse(fields: dict[str, Any]) -> EvalResult:
    """A piece as it was committed.

    Raises:
        ValueError, TypeError or KeyError: it is another.
    """
    windows, nll, tokens = (tuple(fields[name]) for name in ("windows", "nll", "tokens"))
    if not len(windows) == len(nll) == len(tokens) > 0:
        raise ValueError(windows)
    return EvalResult(**fields | {"windows": windows, "nll": nll, "tokens": tokens})


def _perplexity(nll: float, count: int) -> float:
    try:
        return math.exp(nll / count)
    except (OverflowError, ZeroDivisionError):
        return math.inf  # A cut may leave tokens of white space only, and no word.
