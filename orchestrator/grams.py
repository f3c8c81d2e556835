"""Calibration: Gram matrices of what a model's modules read, on samples of a text.

    RUN_DIR/calibration/
        calibration.json                    of what: the model, the tokens, the software
        layer-00007-self_attn.safetensors   per block; appears whole or not at all
        pieces/                             what `workers.calibrate` keeps while it is at work

A file has, for each input of its block (see `workers.inputs`), under the name `<group>.<input>`:

    <name>               X^T X, summed over the tokens, ``(n, n)``, float32
    <name>.mean_abs      mean of |x| of each channel, ``(n,)``, float32
    <name>.max_abs       maximum of |x| of each channel, ``(n,)``, float32
    <name>.out_max_abs   of a down projection: maximum of |y| of each output channel, float32
    <name>.tokens        how many tokens, ``(1,)``, int64; an expert has those routed to it

The first `samples` windows of the text are divided into pieces, and each piece goes through the
layers one after the other, in float32. Windows and pieces do not depend on the pool, and are added
up in their order: any number of workers gives the same bytes. (Timing a machine for a plan's
prediction is another thing: `orchestrator.calibration`.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from lestd_kernels.errors import LestdError
from orchestrator.evaluation import load_tokenizer, require_positive, window_length
from orchestrator.executor import Executor, Listener, WorkerSpec
from orchestrator.manifest import read_json, write_json
from orchestrator.rundir import require_same
from orchestrator.source import Source
from orchestrator.texts import first_tokens, read_text
from workers.calibrate import (
    PIECES_DIR,
    CalibratedBlock,
    CalibrationPiece,
    CalibrationSum,
    CalibrationWorker,
    grams_path,
    hidden_path,
)
from workers.checkpoint import read_header
from workers.contracts import Failure, TensorRef
from workers.decompose import software_versions
from workers.files import (
    AnyPath,
    file_sha256,
    is_file,
    list_names,
    make_directory,
    remove_tree,
)
from workers.sampling import sample_digests

CALIBRATION_DIR = "calibration"
"""Its name in a run directory."""

# A constant: who adds up in which order decides the last bit, and each piece has Gram matrices of
# its own on disk until its layer is done.
_PIECES = 8
_ABOUT_FILE = "calibration.json"
_WORKER_BASE_BYTES = 600 * 2**20


@dataclass(frozen=True)
class Calibration:
    """What is known of a model's activations.

    Attributes:
        directory: where the files are.
        digest: sha256 of all that decides them.
        samples: windows of the text.
        sample_tokens: tokens of each.
        refs: name of each tensor -> where it lies.
    """

    directory: AnyPath
    digest: str
    samples: int
    sample_tokens: int
    refs: dict[str, TensorRef]


@dataclass(frozen=True)
class Samples:
    """The windows that a calibration runs on.

    Attributes:
        token_ids: of each window.
        about: what they are, for `calibration.json`.
    """

    token_ids: tuple[tuple[int, ...], ...]
    about: dict[str, Any]


def read_samples(source: Source, text: Path, samples: int, sample_tokens: int | None) -> Samples:
    """The first windows of a text, without overlap and without special tokens.

    Args:
        source: the model.
        text: UTF-8 text.
        samples: number of windows.
        sample_tokens: tokens of each; None for the smaller of 2048 and the model's positions.

    Raises:
        LestdError: the text cannot be read or is too short, the tokenizer is missing or another
            model's, or a window is longer than the model's positions.
    """
    require_positive("samples", samples)
    require_positive("sample-tokens", sample_tokens)
    length = window_length(source.config, sample_tokens, source.model)
    content = read_text(text, "--calibrate-on")
    tokenizer = load_tokenizer(source.fetch_side_files())
    token_ids = first_tokens(tokenizer, content, samples * length)
    if len(token_ids) < samples * length:
        raise LestdError(
            f"the text {text} has {len(token_ids):,} tokens, but {samples} samples of {length} "
            f"take {samples * length:,}; give a longer text, or --samples "
            f"{max(1, len(token_ids) // length)}"
            + ("" if len(token_ids) >= length else f" --sample-tokens {max(1, len(token_ids))}")
        )
    vocabulary = source.config.get_text_config().vocab_size
    if max(token_ids) >= vocabulary:
        raise LestdError(
            f"{source.model}: the tokenizer gives token id {max(token_ids)} but the model's "
            f"vocab_size is {vocabulary}; the tokenizer files belong to another model"
        )
    windows = tuple(tuple(token_ids[i * length : (i + 1) * length]) for i in range(samples))
    about = {
        "text": text.name,
        "text_sha256": file_sha256(text),
        "token_ids_sha256": hashlib.sha256(json.dumps(windows).encode()).hexdigest(),
        "samples": samples,
        "sample_tokens": length,
    }
    return Samples(windows, about)


def calibrate(
    source: Source,
    blocks: Sequence[CalibratedBlock],
    samples: Samples,
    executor: Executor,
    directory: AnyPath,
    *,
    device: str = "cpu",
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
    on_event: Listener | None = None,
    require_lock: Callable[[], None] = lambda: None,
) -> Calibration:
    """Find the Gram matrices of some blocks; continue where an earlier such call stopped.

    What is there already, of whichever blocks, is not computed again.

    Args:
        source: the dense model.
        blocks: whose inputs are wanted.
        samples: see `read_samples`.
        executor: who runs the workers.
        directory: of the calibration; several runs may use one, one at a time.
        device: ``"cpu"`` or ``"cuda"``: where workers compute.
        threads: CPU threads of a worker. The last bit of the result depends on it.
        progress: called with ``(windows done, windows in all)``, a window counting once a layer.
        on_event: told of every start and retry of a piece.
        require_lock: called before anything is believed to be done; raises if another driver has
            taken over.

    Returns:
        Calibration: with all tensors of the blocks.

    Raises:
        LestdError: the directory is of another model, text or software, or cannot be written; or
            a piece failed.
    """
    about = samples.about | {
        "source_sha256": _digest(
            {"config.json": source.config_json, "shards": sample_digests(source.index)}
        ),
        "device": device,
        "threads": threads,
        "versions": software_versions() | {"transformers": transformers.__version__},
    }
    _begin(directory, about)
    length = about["sample_tokens"]
    items = _items(blocks, samples.token_ids, directory)
    total = len(samples.token_ids) * (1 + max(block.layer for block in blocks))
    done = total - sum(item.windows for item in items)
    if progress is not None and items:
        progress(done, total)
    if items:
        spec = WorkerSpec(
            CalibrationWorker,
            {
                "directory": str(directory.resolve() if isinstance(directory, Path) else directory),
                "config_json": source.config_json,
                "tensors": source.index.tensors,
                "layers": blocks[0].layers,
                "device": device,
                "threads": threads,
            },
            threads=threads,
            memory_bytes=worker_memory_bytes(source, blocks, length),
            device=device,
            device_memory_bytes=worker_memory_bytes(source, blocks, length),
        )
        for outcome in executor.map(spec, items, on_event):
            require_lock()
            if isinstance(outcome, Failure):
                raise LestdError(
                    f"calibration failed: {outcome.message}; what was finished is kept in "
                    f"{directory}, the same command continues"
                )
            done += outcome.windows
            if progress is not None:
                progress(done, total)
    remove_tree(directory / PIECES_DIR)
    refs: dict[str, TensorRef] = {}
    for file in sorted({block.file for block in blocks}):
        path = directory / file
        refs |= read_header(path if isinstance(path, Path) else str(path))
    return Calibration(directory, _digest(about), about["samples"], length, refs)


def _begin(directory: AnyPath, about: dict[str, Any]) -> None:
    """Make the directory, or see that it is of the same model, text and software."""
    about = json.loads(json.dumps(about))
    if is_file(directory / _ABOUT_FILE):
        require_same(read_json(directory / _ABOUT_FILE), about, directory)
        return
    if names := list_names(directory):
        raise LestdError(
            f"{directory} is not empty and holds {names[0]}, but no {_ABOUT_FILE}; choose another "
            "directory"
        )
    make_directory(directory)
    write_json(directory / _ABOUT_FILE, about)


def _items(
    blocks: Sequence[CalibratedBlock],
    windows: Sequence[tuple[int, ...]],
    directory: AnyPath,
) -> list[CalibrationPiece | CalibrationSum]:
    """What is left to do, in an order in which each item comes after those that it waits for."""
    present = set(list_names(directory))
    wanted: dict[int, list[CalibratedBlock]] = {}
    for block in blocks:
        if block.file not in present:
            wanted.setdefault(block.layer, []).append(block)
    if not wanted:
        return []
    kept = set(list_names(directory / PIECES_DIR))
    last = max(wanted)
    size = -(-len(windows) // _PIECES)
    pieces = [windows[start : start + size] for start in range(0, len(windows), size)]
    begin = [_first_layer(wanted, piece, kept, directory) for piece in range(len(pieces))]
    items: list[CalibrationPiece | CalibrationSum] = []
    # A layer's sums come behind the next layer's pieces: nobody waits for the slowest piece.
    due: CalibrationSum | None = None
    for layer in range(last + 1):
        names = [
            f"layer {layer}, piece {piece + 1} of {len(pieces)}" for piece in range(len(pieces))
        ]
        here = tuple(wanted.get(layer, ()))
        items += [
            CalibrationPiece(
                task_id=names[piece],
                layer=layer,
                piece=piece,
                windows=len(samples),
                blocks=here,
                token_ids=tuple(samples) if layer == 0 else (),
                last=layer == last,
                after=(_name(layer - 1, piece, len(pieces)),),
            )
            for piece, samples in enumerate(pieces)
            if layer >= begin[piece]
        ]
        if due is not None:
            items.append(due)
        sums = CalibrationSum(f"layer {layer}, sums", layer, len(pieces), here, tuple(names))
        due = sums if here else None
    return [*items, due] if due is not None else items


def _name(layer: int, piece: int, pieces: int) -> str:
    return f"layer {layer}, piece {piece + 1} of {pieces}"


def _first_layer(
    wanted: dict[int, list[CalibratedBlock]], piece: int, kept: set[str], directory: AnyPath
) -> int:
    """The first layer that a piece has yet to go through.

    It goes on from the last of its hidden states that are kept, or begins anew, if a layer before
    those lacks what it should have left there.
    """
    last = max(wanted)
    lacking = [
        layer
        for layer, blocks in wanted.items()
        if any(grams_path(directory, block, piece).name not in kept for block in blocks)
    ]
    first = min(lacking, default=last + 1)
    reached = (i for i in range(first + 1) if hidden_path(directory, i, piece).name in kept)
    return max(reached, default=0) if lacking else first


def worker_memory_bytes(
    source: Source, blocks: Sequence[CalibratedBlock], sample_tokens: int
) -> int:
    """Main memory that a worker is expected to need.

    The largest layer in float32, twice, since stacked experts are put together from single ones;
    with the Gram matrices of its inputs, also twice when they leave the device; and activations of
    one window.
    """
    elements: dict[int, int] = {}
    per_token = 0
    layers = blocks[0].layers.rpartition(".")[2]
    for name, ref in source.index.tensors.items():
        parts = name.split(".")
        if layers in parts[:-1] and parts[parts.index(layers) + 1].isdecimal():
            layer = int(parts[parts.index(layers) + 1])
            count = ref.stored_bytes // _itemsize(ref)
            elements[layer] = elements.get(layer, 0) + count
            per_token = max(per_token, *ref.shape)
    grams: dict[int, int] = {}
    for block in blocks:
        squares = sum(width**2 for width in block.widths.values())
        grams[block.layer] = grams.get(block.layer, 0) + squares
    outside = max(ref.stored_bytes // _itemsize(ref) for ref in source.index.tensors.values())
    floats = 2 * max(elements.values(), default=0) + outside + 2 * max(grams.values())
    return _WORKER_BASE_BYTES + 4 * (floats + 16 * per_token * sample_tokens)


def _itemsize(ref: TensorRef) -> int:
    count = 1
    for size in ref.shape:
        count *= size
    return ref.stored_bytes // count if count else 1


def _digest(about: Any) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
