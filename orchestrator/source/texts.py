"""Texts that a user names: decoded, and cut into samples of tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lestd_kernels.errors import LestdError, first_line
from orchestrator.config.run import RunConfig
from orchestrator.source.checkpoint import Source
from orchestrator.source.tokenizer import load_tokenizer, window_length
from workers.storage.untrusted_files import MAX_TEXT_BYTES, read_regular

# A token of a common tokenizer is four characters of English, and fewer of most else.
_CHARACTERS_PER_TOKEN = 8


def decode_text(content: bytes, path: Path | str) -> str:
    """The text of a UTF-8 file.

    Args:
        content: of the file: text mode would turn "\\r\\n" into "\\n".
        path: of the file.

    Raises:
        LestdError: it is not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LestdError(
            f"the text {path} is not UTF-8: byte {error.start} is "
            f"0x{error.object[error.start]:02x}; convert it to UTF-8"
        ) from error


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int | None) -> list[int]:
    """The first token ids of a text (None: all), without special tokens; fewer where it ends.

    No more of the text is tokenized than it takes: up to the end of a line and a token further,
    since a cut elsewhere would change the tokens before it.
    """
    limit = len(text) if count is None else _CHARACTERS_PER_TOKEN * count
    while True:
        stop = text.rfind("\n", 0, limit) + 1 if limit < len(text) else len(text)
        # verbose=False: a text longer than the model is no reason to warn.
        found: list[int] = tokenizer(text[:stop], add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        if stop == len(text) or (count is not None and len(found) > count):
            return found[:count]
        limit *= 2


@dataclass(frozen=True)
class Samples:
    """The windows that a calibration runs on.

    Attributes:
        token_ids: of each window.
        about: what they are, for `calibration.json`.
    """

    token_ids: tuple[tuple[int, ...], ...]
    about: dict[str, Any]


def samples_of(source: Source, config: RunConfig) -> Samples:
    """The samples of a run with a calibration text; see `read_samples`."""
    assert config.calibrate_on is not None
    return read_samples(source, config.calibrate_on, config.samples, config.sample_tokens)


def read_samples(source: Source, text: str, samples: int, sample_tokens: int) -> Samples:
    """The first windows of a text, without overlap and without special tokens.

    Args:
        source: the model.
        text: path of a UTF-8 text.
        samples: number of windows.
        sample_tokens: tokens of each.

    Raises:
        LestdError: the text cannot be read or is too short, the tokenizer is missing or another
            model's, or a window is longer than the model's positions.
    """
    length = window_length(source.config, sample_tokens, source.model, "--sample-tokens")
    content = read_calibration(text)
    tokenizer = load_tokenizer(source.fetch_side_files(), source.model)
    token_ids = first_tokens(tokenizer, decode_text(content, text), samples * length)
    if len(token_ids) < samples * length:
        raise LestdError(
            f"the text {text} has {len(token_ids):,} tokens, but {samples} samples of {length} "
            f"take {samples * length:,}; give a longer text, or smaller --samples and "
            "--sample-tokens"
        )
    vocabulary = source.config.get_text_config().vocab_size
    if max(token_ids) >= vocabulary:
        raise LestdError(
            f"{source.model}: the tokenizer gives token id {max(token_ids)} but the model's "
            f"vocab_size is {vocabulary}; the tokenizer files belong to another model"
        )
    windows = tuple(tuple(token_ids[i * length : (i + 1) * length]) for i in range(samples))
    about = {
        "text_sha256": hashlib.sha256(content).hexdigest(),
        "token_ids_sha256": hashlib.sha256(json.dumps(windows).encode()).hexdigest(),
        "samples": samples,
        "sample_tokens": length,
    }
    return Samples(windows, about)


def read_calibration(path: str) -> bytes:
    """The bytes of a calibration text.

    Raises:
        LestdError: it cannot be read.
    """
    try:
        return read_regular(Path(path), MAX_TEXT_BYTES)
    except OSError as error:
        raise LestdError(
            f"the calibration text {path} cannot be read ({first_line(error)}); "
            "give --calibrate-on a UTF-8 text file"
        ) from error
