"""The tokenizer of a checkpoint, and the length of windows that its model takes."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from lestd_kernels.errors import LestdError, first_line

_LONGEST_DEFAULT_WINDOW = 2048


def window_length(
    config: PretrainedConfig, window: int | None, model: str, option: str = "--window"
) -> int:
    """Tokens that a model reads at once: as many as asked for, or 2048, or all it has room for.

    Raises:
        LestdError: more are asked for than the model has positions.
    """
    # GPT-J's n_positions answers to this name too; some families say -1 where there is no limit.
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        positions = None
    if window is not None and positions is not None and window > positions:
        raise LestdError(
            f"window {window} is longer than the {positions} positions of {model}; "
            f"give {option} of at most {positions}"
        )
    if window is not None:
        return window
    return min(_LONGEST_DEFAULT_WINDOW, positions or _LONGEST_DEFAULT_WINDOW)


def load_tokenizer(model_dir: Path, model: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a directory; no code of the model, named `model`, is run.

    Raises:
        LestdError: there is none, or it is damaged.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        # Damaged files fail in Transformers wherever they are first used, in many ways.
        raise LestdError(
            f"{model} has no usable tokenizer ({type(error).__name__}: {first_line(error)}); copy "
            "the tokenizer files of the original model into it"
        ) from error
    return tokenizer
