"""Texts that a user names: read and cut into windows of tokens."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lestd_kernels.errors import LestdError

# A token of a common tokenizer is four characters of English, and fewer of most else.
_CHARACTERS_PER_TOKEN = 8


def read_text(path: Path, option: str) -> str:
    """The contents of a UTF-8 file, as it stands.

    Args:
        path: of the file.
        option: by which the user named it.

    Raises:
        LestdError: it cannot be read, or is not UTF-8.
    """
    try:
        # Bytes first: text mode would turn "\r\n" into "\n".
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise LestdError(
            f"the text {path} cannot be read ({error.strerror}); check {option}"
        ) from error
    except UnicodeDecodeError as error:
        raise LestdError(
            f"the text {path} is not UTF-8: byte {error.start} is "
            f"0x{error.object[error.start]:02x}; convert it to UTF-8"
        ) from error


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> list[int]:
    """The first token ids of a text, without special tokens; fewer where it has no more.

    No more of the text is tokenized than it takes: up to the end of a line, since a cut elsewhere
    would change the tokens before it.
    """
    limit = _CHARACTERS_PER_TOKEN * count
    while True:
        stop = text.rfind("\n", 0, limit) + 1 if limit < len(text) else len(text)
        # verbose=False: a text longer than the model is no reason to warn.
        found: list[int] = tokenizer(text[:stop], add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        if len(found) >= count or stop == len(text):
            return found[:count]
        limit *= 2
