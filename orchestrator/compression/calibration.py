"""Calibration: Gram matrices of what a model's modules read, on samples of a text.

    RUN_DIR/calibration/
        calibration.json                    of what: the model, the tokens, the software
        layer-00007-self_attn.safetensors   per block; appears whole or not at all
        pieces/                             what `workers.calibration.worker` keeps while it is at
        work

A file has, for each input of its block (see `workers.calibration.statistics`), under the name
`<block>.<input>`:

    <name>               X^T X, summed over the tokens, ``(n, n)``, float32
    <name>.mean_abs      mean of |x| of each channel, ``(n,)``, float32
    <name>.max_abs       maximum of |x| of each channel, ``(n,)``, float32
    <name>.out_max_abs   of a down projection: maximum of |y| of each output channel, float32
    <name>.tokens        how many tokens, ``(1,)``, int64; an expert has those routed to it

The first `samples` windows of the text are divided into pieces, and each piece goes through the
layers one after the other, in float32. Windows and pieces do not depend on the pool, and are added
up in their order: any number of workers gives the same bytes. (Timing a machine for a plan's
prediction is another thing: `orchestrator.planning.timing`.)
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import transformers

from lestd_kernels.errors import LestdError
from lestd_kernels.methods.common.base import STATISTICS
from orchestrator.config.run import RunConfig
from orchestrator.console.output import size
from orchestrator.execution.executor import Executor, Listener, WorkerSpec
from orchestrator.execution.resume import resume
from orchestrator.planning.plan import WORKER_BASE_BYTES
from orchestrator.run.fingerprint import differences, holds_work, starts_over
from orchestrator.source.checkpoint import Source
from orchestrator.source.texts import Samples, samples_of
from workers.calibration.worker import (
    PIECES_DIR,
    Calibrated,
    CalibratedBlock,
    CalibrationItem,
    CalibrationPiece,
    CalibrationSum,
    CalibrationWorker,
    grams_path,
    hidden_path,
)
from workers.checkpoint.digests import sample_digests
from workers.checkpoint.headers import DTYPES
from workers.checkpoint.tensors import read_header
from workers.contracts import Failure, Task, TensorRef
from workers.host.devices import software_versions
from workers.storage.building import make_own_directory
from workers.storage.files import AnyPath, is_file, list_names, make_directory, remove_tree
from workers.storage.json_files import read_json, write_json
from workers.storage.names import TEMPORARY

TaskT = TypeVar("TaskT", bound=Task)

CALIBRATION_DIR = "calibration"
"""Its name in a run directory."""
CALIBRATION_FILE = "calibration.json"
"""In it: what it is of. A directory without it is no calibration."""

# A constant: who adds up in which order changes the last bit, and each piece has Gram matrices of
# its own on disk until its layer is done.
_PIECES = 8


@dataclass(frozen=True)
class Calibration:
    """What is known of a model's activations.

    Attributes:
        directory: where the files are.
        digest: sha256 of all that decides them.
        refs: name of each tensor -> where it lies.
    """

    directory: AnyPath
    digest: str
    refs: dict[str, TensorRef]


def blocks_of(tasks: Iterable[Task]) -> list[CalibratedBlock]:
    """What the decomposition of these slice groups wants to know."""
    return [
        CalibratedBlock(
            task.layer,
            task.block,
            {module.name: module.reads for module in task.layout.modules},
            {m.reads: task.layout.weight_shape(m)[1] for m in task.layout.modules},
        )
        for task in tasks
    ]


def with_metrics(task: TaskT, calibration: Calibration) -> TaskT:
    """The task with the place of the activations of its modules' inputs."""
    metrics = {}
    for reads in {module.reads: None for module in task.layout.modules}:
        for suffix in ("", *(f".{one}" for one in STATISTICS)):
            if (ref := calibration.refs.get(f"{task.block}.{reads}{suffix}")) is not None:
                metrics[reads + suffix] = ref
    return replace(task, metric_tensors=metrics)


def calibrate_for(
    tasks: Iterable[Task],
    source: Source,
    config: RunConfig,
    device: str,
    executor: Executor,
    directory: AnyPath,
    **listeners: Any,
) -> Calibration:
    """The activations that the slice groups of a run with a calibration text want to know.

    `device` is the class that ``auto`` came to mean; the other arguments, and what is raised, are
    those of `calibrate` and `orchestrator.source.texts.read_samples`.
    """
    return calibrate(
        source,
        blocks_of(tasks),
        samples_of(source, config),
        executor,
        directory,
        device=device,
        threads=config.threads,
        **listeners,
    )


def calibrate(
    source: Source,
    blocks: Sequence[CalibratedBlock],
    samples: Samples,
    executor: Executor,
    directory: AnyPath,
    *,
    device: str = "cpu",
    threads: int = 1,
    require_lock: Callable[[], None] = lambda: None,
    on_start: Callable[[str, Sequence[CalibrationItem], set[str]], None] | None = None,
    on_event: Listener | None = None,
    on_progress: Callable[[Calibrated | Failure, int, int], None] | None = None,
) -> Calibration:
    """Find the Gram matrices of some blocks; continue where an earlier such call stopped.

    What is there already, of whichever blocks, is not computed again.

    Args:
        source: the dense model.
        blocks: whose inputs are wanted.
        samples: see `orchestrator.source.texts`.
        executor: who runs the workers.
        directory: of the calibration; several runs may use one, one at a time.
        device: ``"cpu"`` or ``"cuda"``: where workers compute.
        threads: CPU threads of a worker. The last bit of the result depends on it.
        require_lock: called before anything is believed to be done; raises if another driver has
            taken over.
        on_start: called with ``"calibrate"``, the items that are left to do, and no finished ones;
            not called where none is.
        on_event: told of every start and retry of an item.
        on_progress: called with every finished or failed item, the number done and that of all.

    Returns:
        Calibration: with all tensors of the blocks.

    Raises:
        LestdError: the directory is of another model, text or software, or cannot be written; its
            disk is too small; or an item failed.
    """
    about = samples.about | {
        "source_sha256": _digest(
            {"config.json": source.config_json, "shards": sample_digests(source.index)}
        ),
        "device": device,
        "threads": threads,
        "versions": software_versions() | {"transformers": transformers.__version__},
    }
    if isinstance(directory, Path):
        directory = directory.absolute()  # Workers have directories of their own.
    _begin(directory, about)
    layer_bytes = _layer_bytes(source, blocks[0].layers)
    items = _items(blocks, samples.token_ids, directory, layer_bytes)
    if items:
        make_own_directory(directory / PIECES_DIR)
        _require_disk(source, blocks, samples, directory)
        memory_bytes = _worker_memory_bytes(source, blocks, samples, max(layer_bytes.values()))
        spec = WorkerSpec(
            CalibrationWorker,
            {
                "directory": str(directory),
                "config_json": source.config_json,
                "tensors": source.index.tensors,
                "layers": blocks[0].layers,
                "device": device,
                "threads": threads,
            },
            threads=threads,
            memory_bytes=memory_bytes,
            device=device,
            device_memory_bytes=memory_bytes,
        )
        if on_start is not None:
            on_start("calibrate", items, set())
        # Workers have written what there is to commit.
        kept = resume(executor, spec, items, (), lambda _: require_lock(), on_event, on_progress)
        for outcome in kept:
            if isinstance(outcome, Failure):
                raise LestdError(
                    f"calibration failed: {outcome.message}; what was finished is kept in "
                    f"{directory}, the same command continues"
                )
    remove_tree(directory / PIECES_DIR)
    refs: dict[str, TensorRef] = {}
    for file in sorted({block.file for block in blocks}):
        path = directory / file
        refs |= read_header(path if isinstance(path, Path) else str(path))
    return Calibration(directory, _digest(about), refs)


def _begin(directory: AnyPath, about: dict[str, Any]) -> None:
    """Make the directory, or see that it is of the same model, text and software."""
    about = json.loads(json.dumps(about))
    if is_file(directory / CALIBRATION_FILE):
        recorded = read_json(directory / CALIBRATION_FILE)
        if holds_work(directory, directory / PIECES_DIR):
            if changes := differences(recorded, about):
                raise LestdError(
                    f"{directory} holds a calibration that differs in: {'; '.join(changes)}; undo "
                    "the change, or choose another directory for this one (--calibration, or "
                    "another --out)"
                )
            return
        if not starts_over(recorded, about, f"the calibration that was begun in {directory}"):
            return
    elif names := [name for name in list_names(directory) if not name.startswith(TEMPORARY)]:
        raise LestdError(
            f"{directory} is not empty and holds {names[0]}, but no {CALIBRATION_FILE}; choose "
            "another directory"
        )
    make_directory(directory)
    write_json(directory / CALIBRATION_FILE, about)


def _items(
    blocks: Sequence[CalibratedBlock],
    windows: Sequence[tuple[int, ...]],
    directory: AnyPath,
    layer_bytes: dict[int, int],
) -> list[CalibrationItem]:
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
    length = -(-len(windows) // _PIECES)
    pieces = [windows[start : start + length] for start in range(0, len(windows), length)]
    begin = [_first_layer(wanted, piece, kept, directory) for piece in range(len(pieces))]
    items: list[CalibrationItem] = []
    # A layer's sums come behind the next layer's pieces: nobody waits for the slowest piece.
    due: list[CalibrationItem] = []
    for layer in range(last + 1):
        here = tuple(wanted.get(layer, ()))
        items += [
            CalibrationPiece(
                task_id=_piece_id(layer, piece),
                block=f"layer {layer}, samples from {piece * length}",
                layer=layer,
                piece=piece,
                blocks=here,
                token_ids=tuple(samples) if layer == 0 else (),
                last=layer == last,
                after=(_piece_id(layer - 1, piece),),
                dense_bytes=layer_bytes[layer] * len(samples) // len(windows),
            )
            for piece, samples in enumerate(pieces)
            if layer >= begin[piece]
        ]
        items += due
        due = []
        if here:
            due.append(
                CalibrationSum(
                    task_id=f"{layer:04d}-sum",
                    block=f"layer {layer}, sums",
                    layer=layer,
                    pieces=len(pieces),
                    blocks=here,
                    after=tuple(_piece_id(layer, piece) for piece in range(len(pieces))),
                    dense_bytes=_gram_bytes(here),
                )
            )
    return items + due


def _piece_id(layer: int, piece: int) -> str:
    return f"{layer:04d}-{piece}"


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


def _layer_bytes(source: Source, layers: str) -> dict[int, int]:
    """Stored bytes of each decoder layer; its index follows the name of their list."""
    name = layers.rpartition(".")[2]
    found: dict[int, int] = {}
    for ref in source.index.tensors.values():
        _, _, rest = f".{ref.name}".partition(f".{name}.")
        index = rest.partition(".")[0]
        if index.isdecimal():
            found[int(index)] = found.get(int(index), 0) + ref.stored_bytes
    return found


def _gram_bytes(blocks: Iterable[CalibratedBlock]) -> int:
    return sum(4 * width**2 for block in blocks for width in block.widths.values())


def _gram_bytes_of_a_layer(blocks: Sequence[CalibratedBlock]) -> int:
    layers = {block.layer for block in blocks}
    return max(_gram_bytes(b for b in blocks if b.layer == layer) for layer in layers)


def _hidden_bytes_of_a_window(source: Source, samples: Samples) -> int:
    width: int = source.config.get_text_config().hidden_size
    return 4 * width * int(samples.about["sample_tokens"])


def _worker_memory_bytes(
    source: Source, blocks: Sequence[CalibratedBlock], samples: Samples, layer_bytes: int
) -> int:
    """Memory that a worker is expected to need.

    A layer in float32, of which stacked experts are there twice while they are put together; the
    largest tensor outside of the layers, an embedding; the Gram matrices, twice while they are
    written; and some dozens of activations as large as the hidden states.
    """
    in_float32 = max(4 // DTYPES[ref.dtype].itemsize for ref in source.index.tensors.values())
    outside = max(ref.stored_bytes for ref in source.index.tensors.values())
    weights = (2 * layer_bytes + outside) * in_float32
    activations = 48 * _hidden_bytes_of_a_window(source, samples)
    return WORKER_BASE_BYTES + weights + 2 * _gram_bytes_of_a_layer(blocks) + activations


def _require_disk(
    source: Source, blocks: Sequence[CalibratedBlock], samples: Samples, directory: AnyPath
) -> None:
    """Refuse a disk that cannot hold the sums, two layers of pieces and the hidden states."""
    if not isinstance(directory, Path):
        return
    pieces = 2 * _PIECES * _gram_bytes_of_a_layer(blocks)
    hidden = 2 * len(samples.token_ids) * _hidden_bytes_of_a_window(source, samples)
    missing = (block for block in blocks if not (directory / block.file).exists())
    needed = _gram_bytes(missing) + pieces + hidden
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise LestdError(
            f"the disk of {directory} has {size(free)} free, but the calibration needs "
            f"{size(needed)} there while it is made; free some, or choose another directory"
        )


def _digest(about: Any) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
