"""What a calibration has to do, and of that has done, from the files that are there.

Each piece of the samples goes one way, step by step: through the layers, and where gradients are
wanted from the loss back through them. A step reads what steps before it have written, and removes
what nobody will read again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.planning.calibration_costs import (
    input_bytes,
    layer_bytes,
    output_bytes,
    outside_bytes,
)
from orchestrator.source.checkpoint import Source
from workers.calibration.contracts import (
    PIECES_DIR,
    CalibratedBlock,
    CalibrationItem,
    CalibrationPiece,
    CalibrationSum,
    gradient_path,
    hidden_path,
    part_path,
)
from workers.storage.files import AnyPath, list_names

Wanted = Mapping[int, Sequence[CalibratedBlock]]
"""Layer -> its blocks of which something is wanted."""


@dataclass(frozen=True)
class _Step:
    """A layer on the way there, or back, or the loss; fields are those of `CalibrationPiece`."""

    layer: int
    blocks: tuple[CalibratedBlock, ...]
    last: bool
    keeps: bool = False
    back: bool = False
    is_loss: bool = False

    def needs(self, directory: AnyPath, piece: int) -> set[str]:
        """Names of the files that it reads of a piece."""
        paths = [hidden_path(directory, self.layer, piece)] if self.layer else []
        if self.back and not self.is_loss:
            paths.append(gradient_path(directory, self.layer + 1, piece))
        return {path.name for path in paths}

    def makes(self, directory: AnyPath, piece: int) -> set[str]:
        """Names of the files that it writes for later steps."""
        if self.back:
            return {gradient_path(directory, self.layer, piece).name}
        return {hidden_path(directory, self.layer + 1, piece).name}

    def leaves(self, directory: AnyPath, piece: int) -> set[str]:
        """Names of the files that it writes for the sums."""
        return {part_path(directory, block, piece, self.back).name for block in self.blocks}

    def task_id(self, piece: int | str) -> str:
        """Task id of a piece at this step, or of the sum of all pieces."""
        return f"{self.layer:04d}-{piece}" + ("-back" if self.back else "")

    @property
    def name(self) -> str:
        """How messages call it."""
        if self.is_loss:
            return "loss"
        return f"layer {self.layer}" + (", gradients" if self.back else "")


def items_of(
    source: Source,
    blocks: Sequence[CalibratedBlock],
    windows: Sequence[tuple[int, ...]],
    directory: AnyPath,
    length: int,
) -> tuple[list[CalibrationItem], set[str]]:
    """Items of what is missing, each after those that it waits for, and the ids of finished ones.

    Args:
        source: the dense model.
        blocks: what is wanted of it.
        windows: token ids of the samples.
        directory: of the calibration.
        length: windows of a piece.
    """
    present = set(list_names(directory))
    inputs: dict[int, list[CalibratedBlock]] = {}
    outputs: dict[int, list[CalibratedBlock]] = {}
    for block in blocks:
        if block.file not in present:
            inputs.setdefault(block.layer, []).append(block)
        if block.outputs and block.outputs_file not in present:
            outputs.setdefault(block.layer, []).append(block)
    steps = _steps(inputs, outputs, source.config.get_text_config().num_hidden_layers)
    if not steps:
        return [], set()
    kept = set(list_names(directory / PIECES_DIR))
    pieces = [windows[start : start + length] for start in range(0, len(windows), length)]
    begin = [_first_step(steps, piece, kept, directory) for piece in range(len(pieces))]
    work = layer_bytes(source, blocks[0].layers)
    items: list[CalibrationItem] = []
    # The sums of a step come behind the next step's pieces: nobody waits for the slowest piece.
    due: list[CalibrationItem] = []
    for number, step in enumerate(steps):
        # Back through a layer is once more through it, and as much again.
        bytes_here = work.get(step.layer, outside_bytes(source)) * (2 if step.back else 1)
        before = steps[number - 1] if number else None
        items += [
            CalibrationPiece(
                task_id=step.task_id(piece),
                block=f"{step.name}, samples from {piece * length}",
                layer=step.layer,
                piece=piece,
                blocks=step.blocks,
                token_ids=tuple(samples) if step.layer == 0 else (),
                last=step.last,
                after=(before.task_id(piece),) if before else (),
                dense_bytes=bytes_here * len(samples) // len(windows),
                back=step.back,
                keeps=step.keeps,
                first_window=piece * length,
            )
            for piece, samples in enumerate(pieces)
        ]
        items += due
        due = []
        if step.blocks:
            due.append(
                CalibrationSum(
                    task_id=step.task_id("sum"),
                    block=f"{step.name}, sums",
                    layer=step.layer,
                    pieces=len(pieces),
                    blocks=step.blocks,
                    after=tuple(step.task_id(piece) for piece in range(len(pieces))),
                    dense_bytes=(output_bytes if step.back else input_bytes)(step.blocks),
                    back=step.back,
                    tokens=sum(map(len, windows)),
                )
            )
    finished = {step.task_id(piece) for piece, first in enumerate(begin) for step in steps[:first]}
    return items + due, finished


def _steps(inputs: Wanted, outputs: Wanted, layers: int) -> list[_Step]:
    """The steps of a piece: no further than the last block that needs it."""
    last = layers - 1 if outputs else max(inputs, default=-1)
    lowest = min(outputs, default=layers)
    there = [
        _Step(layer, tuple(inputs.get(layer, ())), layer == last and not outputs, layer >= lowest)
        for layer in range(last + 1)
    ]
    if not outputs:
        return there
    back = [
        _Step(layer, tuple(outputs.get(layer, ())), layer == lowest, back=True)
        for layer in range(layers - 1, lowest - 1, -1)
    ]
    return [*there, _Step(layers, (), False, back=True, is_loss=True), *back]


def _first_step(steps: Sequence[_Step], piece: int, kept: set[str], directory: AnyPath) -> int:
    """The last step from which a piece can go on with the files that are kept."""
    needed = set[str]().union(*(step.leaves(directory, piece) for step in steps))
    for number in range(len(steps), 0, -1):
        if needed <= kept:
            return number
        step = steps[number - 1]
        needed -= step.leaves(directory, piece) | step.makes(directory, piece)
        needed |= step.needs(directory, piece)
    return 0
