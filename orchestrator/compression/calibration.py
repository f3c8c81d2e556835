"""Calibration: what a model's modules read, and what its loss makes of what they write.

    RUN_DIR/calibration/
        calibration.json                            of what: the model, the tokens, the software
        layer-00007-self_attn.safetensors           per block; appears whole or not at all
        layer-00007-self_attn.outputs.safetensors   likewise, for the metric loss
        pieces/                                     see `workers.calibration.contracts`

The first has, for each input of its block (see `workers.calibration.statistics`), under the name
`<block>.<input>`:

    <name>               X^T X, summed over the tokens, ``(n, n)``, float32
    <name>.mean_abs      mean of |x| of each channel, ``(n,)``, float32
    <name>.max_abs       maximum of |x| of each channel, ``(n,)``, float32
    <name>.out_max_abs   of a down projection: maximum of |y| of each output channel, float32
    <name>.tokens        how many tokens, ``(1,)``, int64; an expert has those routed to it

The second has for each module, under ``<block>.<module>.output``, B of
`lestd_kernels.methods.common.base.Metrics`: float32, ``(m, m)``, ``(heads, p, p)`` or ``(m,)``.

The first `samples` windows of the text are divided into pieces, and each piece goes through the
layers one after the other, in float32, and where B is wanted from the loss back. Windows and pieces
do not depend on the pool, and are added up in their order: any number of workers gives the same
bytes. (Timing a machine for a plan's prediction is another thing: `orchestrator.planning.timing`.)
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
from lestd_kernels.methods.common.base import LOSS, STATISTICS
from orchestrator.compression.calibration_items import items_of
from orchestrator.config.run import RunConfig
from orchestrator.console.output import size
from orchestrator.execution.executor import Executor, Listener, WorkerSpec
from orchestrator.execution.resume import resume
from orchestrator.planning.calibration_costs import (
    FEWEST_PIECES,
    CalibrationCosts,
    blocks_of,
    calibration_costs,
    input_bytes,
    output_bytes,
    windows_of_a_piece,
)
from orchestrator.run.fingerprint import differences, holds_work, starts_over
from orchestrator.source.checkpoint import Source
from orchestrator.source.texts import Samples, samples_of
from workers.calibration.contracts import (
    PIECES_DIR,
    Calibrated,
    CalibratedBlock,
    CalibrationItem,
)
from workers.calibration.worker import CalibrationWorker
from workers.checkpoint.digests import sample_digests
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
_DIVISION = "windows_of_a_piece"


@dataclass(frozen=True)
class Calibration:
    """Recorded statistics of a model's activations.

    Attributes:
        directory: where the files are.
        digest: sha256 of all that decides them.
        refs: name of each tensor -> where it lies.
    """

    directory: AnyPath
    digest: str
    refs: dict[str, TensorRef]


def with_metrics(task: TaskT, calibration: Calibration) -> TaskT:
    """The task with the location of its metric's tensors."""
    wanted = {
        reads + suffix: f"{task.block}.{reads}{suffix}"
        for reads in {module.reads: None for module in task.layout.modules}
        for suffix in ("", *(f".{one}" for one in STATISTICS))
    }
    if task.method_args["metric"] == LOSS:
        for module in task.layout.modules:
            wanted[f"{module.reads}.tokens"] = f"{task.block}.{module.reads}.tokens"
            wanted[f"{module.name}.output"] = f"{task.block}.{module.name}.output"
    refs = calibration.refs
    return replace(task, metric_tensors={k: refs[n] for k, n in wanted.items() if n in refs})


def calibrate_for(
    tasks: Iterable[Task],
    source: Source,
    config: RunConfig,
    device: str,
    executor: Executor,
    directory: AnyPath,
    **listeners: Any,
) -> Calibration:
    """The activations that the slice groups of a run with a calibration text need.

    `device` is the class that ``auto`` came to mean; the other arguments, and what is raised, are
    those of `calibrate` and `orchestrator.source.texts.read_samples`.
    """
    return calibrate(
        source,
        blocks_of(tasks, config.gram_width),
        samples_of(source, config),
        executor,
        directory,
        device=device,
        threads=config.threads,
        gram_width=config.gram_width,
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
    gram_width: int | None = None,
    require_lock: Callable[[], None] = lambda: None,
    on_start: Callable[[str, Sequence[CalibrationItem], set[str]], None] | None = None,
    on_event: Listener | None = None,
    on_progress: Callable[[Calibrated | Failure, int, int], None] | None = None,
) -> Calibration:
    """Find the Gram matrices of some blocks; continue where an earlier such call stopped.

    What already exists, of whichever blocks, is not computed again.

    Args:
        source: the dense model.
        blocks: whose inputs are wanted.
        samples: see `orchestrator.source.texts`.
        executor: who runs the workers.
        directory: of the calibration; several runs may use one, one at a time.
        device: ``"cpu"`` or ``"cuda"``: where workers compute.
        threads: CPU threads of a worker. The last bit of the result depends on it.
        gram_width: what decided the shapes of the blocks' Gram matrices, see `blocks_of`.
        require_lock: called before anything is believed to be done; raises if another driver has
            taken over.
        on_start: called with ``"calibrate"``, the items of what is missing, and the ids of those
            that are finished; not called where nothing is missing.
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
    if gram_width is not None:
        about["gram_width"] = gram_width
    if isinstance(directory, Path):
        directory = directory.absolute()  # Workers have directories of their own.
    length = _windows_of_a_piece(directory, blocks, len(samples.token_ids))
    _begin(directory, about | {_DIVISION: length})
    items, finished = items_of(source, blocks, samples.token_ids, directory, length)
    if items:
        make_own_directory(directory / PIECES_DIR)
        window = int(samples.about["sample_tokens"])
        costs = calibration_costs(source, blocks, len(samples.token_ids), window)
        _require_disk(blocks, costs, directory)
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
            memory_bytes=costs.memory_bytes,
            device=device,
            device_memory_bytes=costs.memory_bytes,
        )
        if on_start is not None:
            on_start("calibrate", items, finished)

        def commit(_: Sequence[object]) -> None:
            require_lock()  # Workers have written what there is to commit.

        for outcome in resume(executor, spec, items, finished, commit, on_event, on_progress):
            if isinstance(outcome, Failure):
                raise LestdError(
                    f"calibration failed: {outcome.message}; finished work is kept in "
                    f"{directory}, run the same command again to continue"
                )
    remove_tree(directory / PIECES_DIR)
    refs: dict[str, TensorRef] = {}
    files = {block.file for block in blocks}
    files |= {block.outputs_file for block in blocks if block.outputs}
    for file in sorted(files):
        path = directory / file
        refs |= read_header(path if isinstance(path, Path) else str(path))
    return Calibration(directory, _digest(about), refs)


def _windows_of_a_piece(directory: AnyPath, blocks: Sequence[CalibratedBlock], windows: int) -> int:
    """As the run divides the samples that began the calibration, or as this one does."""
    if not is_file(directory / CALIBRATION_FILE):
        return windows_of_a_piece(blocks, windows)
    if not holds_work(directory, directory / PIECES_DIR):
        return windows_of_a_piece(blocks, windows)
    # Earlier versions did not say it, and had one division only.
    length = read_json(directory / CALIBRATION_FILE).get(_DIVISION, -(-windows // FEWEST_PIECES))
    if not isinstance(length, int) or length < 1:
        raise LestdError(
            f"{directory / CALIBRATION_FILE} has the {_DIVISION} {length!r}, expected a positive "
            "number; choose another directory for the calibration (--calibration, or another --out)"
        )
    return length


def _begin(directory: AnyPath, about: dict[str, Any]) -> None:
    """Make the directory, or see that it is of the same model, text and software."""
    about = json.loads(json.dumps(about))
    if is_file(directory / CALIBRATION_FILE):
        recorded = {_DIVISION: about[_DIVISION]} | read_json(directory / CALIBRATION_FILE)
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
            f"{directory} is not empty and holds {names[0]} but no {CALIBRATION_FILE}; choose "
            "another directory"
        )
    make_directory(directory)
    write_json(directory / CALIBRATION_FILE, about)


def _require_disk(
    blocks: Sequence[CalibratedBlock], costs: CalibrationCosts, directory: AnyPath
) -> None:
    """Refuse a disk that cannot hold what is missing, and what lies beside it meanwhile."""
    if not isinstance(directory, Path):
        return
    kept = input_bytes(block for block in blocks if not (directory / block.file).exists())
    kept += output_bytes(block for block in blocks if not (directory / block.outputs_file).exists())
    needed = kept + costs.working_bytes
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise LestdError(
            f"the disk of {directory} has {size(free)} free, but the calibration needs "
            f"{size(needed)} there while it runs; free some, or choose another directory"
        )


def _digest(about: Any) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
