"""Evaluation against a plain float64 loop, over odd window lengths, pools and bad input."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXAMPLE
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.families import FAMILIES, VOCABULARY, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTJConfig, ViTConfig

from lestd_kernels.errors import LestdError
from orchestrator.config.cluster import ClusterConfig
from orchestrator.evaluation import perplexity
from orchestrator.evaluation.model import open_model
from orchestrator.evaluation.perplexity import Evaluation, cut, read_tokens
from orchestrator.evaluation.records import open_models
from orchestrator.execution.executor import Executor, Listener, WorkerSpec
from orchestrator.execution.open import open_executor
from orchestrator.execution.serial import SerialExecutor
from workers.contracts import Failure
from workers.evaluation.contracts import EvalRequest, EvalResult
from workers.evaluation.perplexity import EvalWorker, window_nll

MODEL = EXAMPLE / "model"
TEXT = EXAMPLE / "wikitext-2-test.txt"


def evaluate(
    model_dir: Path, text: Path, executor: Executor, window: int | None = None, **options: Any
) -> Evaluation:
    """A whole evaluation, with a directory of its own."""
    [(model, facts)] = open_models([model_dir], window)
    with tempfile.TemporaryDirectory() as run_dir:
        found = perplexity.evaluate(model, facts, text, executor, Path(run_dir), **options)
    return found[0]


def plain_nll(model_dir: Path, token_ids: Sequence[int], length: int) -> list[float]:
    """NLL of each token but the first, in float32 by the plain definition, window by window."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    losses = []
    for start in range(0, len(token_ids) - 1, length):
        inputs = token_ids[start : min(start + length, len(token_ids) - 1)]
        with torch.no_grad():
            logits = model(torch.tensor([inputs])).logits[0].double()
        for position, row in enumerate(logits):
            target = token_ids[start + position + 1]
            losses.append(float(torch.logsumexp(row, 0) - row[target]))
    return losses


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 3000 characters of the example's text; ends in the middle of a word."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(TEXT.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def token_ids(text_file: Path) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return tokenizer(text_file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]


# -- the arithmetic -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("positions", "vocabulary"), [(1, 2), (255, 7), (256, 7), (700, 131)])
def test_window_nll_is_the_float64_log_softmax(
    positions: int, vocabulary: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(positions)
    logits = (5 * torch.randn(positions, vocabulary, generator=generator)).to(dtype)
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    log_probabilities = logits.double().log_softmax(dim=1)
    expected = -sum(float(log_probabilities[i, t]) for i, t in enumerate(targets))
    assert window_nll(logits, targets) == pytest.approx(expected, rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(tokens=st.integers(2, 200), length=st.integers(1, 70))
def test_every_token_but_the_first_is_predicted_once_in_its_window(
    tokens: int, length: int
) -> None:
    pieces = cut(list(range(tokens)), length)
    windows = [index for piece in pieces for index in piece.windows]
    contents = [ids for piece in pieces for ids in piece.token_ids]
    assert windows == list(range(len(windows)))
    assert [target for ids in contents for target in ids[1:]] == list(range(1, tokens))
    assert all(ids[0] == index * length for index, ids in zip(windows, contents, strict=True))
    assert all(len(ids) == length + 1 for ids in contents[:-1])
    assert len({piece.task_id for piece in pieces}) == len(pieces)


@pytest.mark.parametrize("family", FAMILIES)
def test_worker_scores_every_family(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(VOCABULARY, (30,), generator=generator).tolist()
    windows = (tuple(ids[0:14]), tuple(ids[13:27]), tuple(ids[26:30]))
    result = EvalWorker(str(tmp_path)).run(EvalRequest("piece", (4, 5, 6), windows))
    assert isinstance(result, EvalResult)
    losses = plain_nll(tmp_path, ids, 13)
    expected = [sum(losses[0:13]), sum(losses[13:26]), sum(losses[26:])]
    assert result.windows == (4, 5, 6)
    assert result.tokens == (13, 13, 3)
    assert result.nll == pytest.approx(expected, rel=1e-5)


# -- the whole ------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [7, 256, None])
def test_perplexities_by_a_plain_loop(
    window: int | None, text_file: Path, token_ids: list[int]
) -> None:
    found = evaluate(MODEL, text_file, SerialExecutor(), window=window, dtype="float32")
    length = window or 512  # The model has 512 positions.
    losses = plain_nll(MODEL, token_ids, length)
    words = len(text_file.read_text(encoding="utf-8").split())
    assert found.window_length == length
    assert found.windows == math.ceil(len(losses) / length)
    assert (found.tokens, found.words) == (len(token_ids) - 1, words)
    assert found.nll == pytest.approx(sum(losses), rel=1e-6)
    assert found.token_perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found.word_perplexity == pytest.approx(math.exp(sum(losses) / words), rel=1e-5)
    assert found.model_bytes_on_disk == (MODEL / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_first_windows_of_the_example() -> None:
    # 41.07 was measured independently, by another program, over the same 160 windows.
    found = evaluate(MODEL, TEXT, SerialExecutor(), window=256, max_windows=160)
    assert found.token_perplexity == pytest.approx(41.07, abs=0.005)
    assert (found.windows, found.tokens) == (160, 160 * 256)

    # Words of the text up to the end of the last predicted token, by the tokenizer's offsets.
    text = TEXT.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    end = offsets["offset_mapping"][160 * 256][1]
    assert found.words == len(text[:end].split())
    assert found.word_perplexity == math.exp(found.nll / found.words)


def test_max_windows_beyond_the_text_changes_nothing(text_file: Path) -> None:
    whole = evaluate(MODEL, text_file, SerialExecutor(), window=100)
    capped = evaluate(MODEL, text_file, SerialExecutor(), window=100, max_windows=10_000)
    assert (capped.nll, capped.words, capped.windows) == (whole.nll, whole.words, whole.windows)


def test_the_first_windows_are_those_of_the_whole_text() -> None:
    """Though only the beginning of the text is tokenized for them."""
    model = open_model(MODEL, 64)
    _, whole = read_tokens(model, TEXT)
    for windows in (1, 7, 200):
        assert read_tokens(model, TEXT, windows)[1] == whole[: 64 * windows + 1]


def test_default_window_is_the_models_positions_whatever_their_name(
    tmp_path: Path, text_file: Path
) -> None:
    config = GPTJConfig(vocab_size=4096, n_positions=48, n_embd=16, n_layer=1, n_head=2)
    config.rotary_dim = 4
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, tmp_path)
    assert evaluate(tmp_path, text_file, SerialExecutor(), max_windows=2).window_length == 48


def test_a_cut_before_the_first_word_has_no_finite_word_perplexity(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n \n\n \n\n words at last")
    found = evaluate(MODEL, path, SerialExecutor(), window=1, max_windows=1)
    assert (found.words, found.word_perplexity) == (0, math.inf)
    assert math.isfinite(found.token_perplexity)


def test_positions_of_minus_one_are_no_limit(copied_model: Path, text_file: Path) -> None:
    edit_json(copied_model / "config.json", max_position_embeddings=-1)
    assert open_model(copied_model).window_length == 2048
    assert open_model(copied_model, 5000).window_length == 5000


class LastFirstExecutor(SerialExecutor):
    """Finishes the last piece first, as a pool may."""

    def map(
        self, spec: WorkerSpec, items: Sequence[Any], on_event: Listener | None = None
    ) -> Iterator[Any]:
        return super().map(spec, items[::-1], on_event)


def test_order_of_completion_changes_no_bit_and_progress_counts_windows(text_file: Path) -> None:
    seen: list[tuple[int, int]] = []
    serial = evaluate(MODEL, text_file, SerialExecutor(), window=33)
    reverse = evaluate(
        MODEL, text_file, LastFirstExecutor(), window=33, progress=lambda *at: seen.append(at)
    )
    assert reverse.nll == serial.nll
    assert seen == sorted(seen)
    assert seen[-1] == (serial.windows, serial.windows)


@pytest.mark.slow
@pytest.mark.ray
def test_any_pool_size_gives_the_same_bits(
    text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serial = evaluate(MODEL, text_file, SerialExecutor(), window=40)
    with open_executor(ClusterConfig(workers=1)) as pool:
        found = [evaluate(MODEL, text_file, pool, window=40)]
        monkeypatch.setattr(pool, "_workers", 2)
        found.append(evaluate(MODEL, text_file, pool, window=40))
    for pooled in found:
        assert pooled.nll == serial.nll
        assert pooled.token_perplexity == serial.token_perplexity
        assert pooled.word_perplexity == serial.word_perplexity


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"a", "at least two"),
        (b"caf\xe9 au lait", "not UTF-8: byte 3 is 0xe9"),
    ],
)
def test_unusable_text_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LestdError, match=message) as caught:
        evaluate(MODEL, path, SerialExecutor())
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 513}, "window 513 is longer than the 512 positions"),
        ({"window": 0}, "window must be at least 1"),
        ({"max_windows": 0}, "max-windows must be at least 1"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"threads": -2}, "threads must be at least 1, got -2"),
        ({"dtype": "float8"}, "dtype must be one of auto, .*, got 'float8'"),
    ],
)
def test_impossible_settings_are_refused(
    options: dict[str, Any], message: str, text_file: Path
) -> None:
    with pytest.raises(LestdError, match=message):
        evaluate(MODEL, text_file, SerialExecutor(), **options)


@pytest.fixture
def copied_model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[]", "3", "{", "\xff", '{"model": {}}'])
def test_damaged_tokenizer_is_refused(copied_model: Path, name: str, content: str) -> None:
    (copied_model / name).write_text(content, encoding="latin-1")
    if (name, content) == ("tokenizer_config.json", '{"model": {}}'):
        assert open_model(copied_model).vocabulary == 4096  # A key that nobody knows does no harm.
        return
    with pytest.raises(LestdError, match="has no usable tokenizer") as caught:
        open_model(copied_model)
    assert str(caught.value).startswith(str(copied_model))
    assert "\n" not in str(caught.value)


def test_empty_tokenizer_is_refused(copied_model: Path) -> None:
    (copied_model / "tokenizer.json").write_text("{}")
    with pytest.raises(LestdError, match=r"has no usable tokenizer \(KeyError"):
        open_model(copied_model)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": "4"},
        {"num_attention_heads": 0},
        {"quantization_config": "abc"},
        {"model_type": ["llama"]},
        {"model_type": {}},
        {"vocab_size": None},
        {"dtype": "foo"},
    ],
)
def test_config_of_wrong_types_is_refused(copied_model: Path, change: dict[str, Any]) -> None:
    edit_json(copied_model / "config.json", **change)
    with pytest.raises(LestdError, match=r"config\.json is not a config that") as caught:
        open_model(copied_model)
    assert str(caught.value).startswith(str(copied_model))
    assert "\n" not in str(caught.value)


def test_what_is_no_language_model_is_refused(copied_model: Path) -> None:
    ViTConfig().save_pretrained(copied_model)
    with pytest.raises(LestdError, match=r"is not a language model: .* 'vit', has no vocab_size"):
        open_model(copied_model)


def test_model_without_tokenizer_is_refused(copied_model: Path, text_file: Path) -> None:
    for path in copied_model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(LestdError, match="has no usable tokenizer"):
        evaluate(copied_model, text_file, SerialExecutor())


def test_tokenizer_of_another_model_is_refused(copied_model: Path, text_file: Path) -> None:
    config = json.loads((copied_model / "config.json").read_text())
    (copied_model / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(LestdError, match="vocab_size is 300"):
        evaluate(copied_model, text_file, SerialExecutor())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json; expected the directory of a Transformers model"),
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json must hold a JSON object"),
        ('{"model_type": "no-such-family"}', "config.json is not a config .*no-such-family"),
    ],
)
def test_directory_without_usable_config_is_refused(
    config: str | None, message: str, tmp_path: Path, text_file: Path
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(LestdError, match=message):
        evaluate(tmp_path, text_file, SerialExecutor())


def test_non_finite_loss_names_its_window(copied_model: Path, text_file: Path) -> None:
    weights = load_file(copied_model / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, copied_model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LestdError, match="the loss of window 0 is nan, computed in"):
        evaluate(copied_model, text_file, SerialExecutor())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (None, r"lacks 1 of the model's tensors, the first is model\.norm\.weight"),
        ((3,), r"tensor model\.norm\.weight has shape \(3,\), config\.json makes it \(256,\)"),
    ],
)
def test_absent_and_misshapen_tensors_are_named(
    shape: tuple[int, ...] | None, message: str, copied_model: Path, text_file: Path
) -> None:
    weights = load_file(copied_model / "model.safetensors")
    del weights["model.norm.weight"]
    if shape is not None:
        weights["model.norm.weight"] = torch.ones(shape)
    save_file(weights, copied_model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LestdError, match=message):
        evaluate(copied_model, text_file, SerialExecutor())


def test_what_goes_wrong_in_a_worker_is_a_failure_not_an_exception(tmp_path: Path) -> None:
    failure = EvalWorker(str(tmp_path)).run(EvalRequest("piece", (0,), ((1, 2),)))
    assert isinstance(failure, Failure)
    assert (failure.task_id, failure.kind) == ("piece", "application")
    assert str(tmp_path) in failure.message


class BrokenWorker(EvalWorker):
    def _score(self, request: EvalRequest) -> EvalResult:
        raise RuntimeError("\nthe kernel is missing\nand here follows a page of advice")


def test_an_error_of_many_lines_is_told_in_one() -> None:
    failure = BrokenWorker(str(MODEL)).run(EvalRequest("piece", (0,), ((1, 2),)))
    assert isinstance(failure, Failure)
    assert failure.message == "piece: RuntimeError: the kernel is missing"
    assert "a page of advice" in failure.traceback
