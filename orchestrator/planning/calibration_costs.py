"""What a calibration is to find, and what it costs: memory of a worker, bytes on disk.

With gradients the hidden states of all layers lie on disk at once, and a worker holds what a
layer's gradient needs of one window; without, two layers' and a window's activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lestd_kernels.methods.common.base import LOSS
from lestd_kernels.tensorize import GroupLayout, ModuleLayout
from workers.calibration.contracts import CalibratedBlock, WatchedOutput
from workers.checkpoint.headers import DTYPES
from workers.contracts import Task

if TYPE_CHECKING:
    from orchestrator.source.checkpoint import Source

FEWEST_PIECES = 8
"""Into so many pieces the samples are divided, where they have as many windows."""

_WINDOWS_OF_A_PIECE = 16
_PIECES_BYTES = 64 * 2**30

WORKER_BASE_BYTES = 600 * 2**20
"""Resident memory of a worker before its first task: the interpreter, torch and Ray."""

# Up to here B is kept whole: 16 MiB. Beyond, what low rank gains by it is little against its bytes.
_WHOLE_WIDTH = 2048


def blocks_of(tasks: Iterable[Task], gram_width: int | None = None) -> list[CalibratedBlock]:
    """Statistics that the decomposition of these slice groups needs.

    Args:
        tasks: the groups.
        gram_width: see `orchestrator.config.options.CalibrationText`.
    """
    return [
        CalibratedBlock(
            task.layer,
            task.block,
            {module.name: module.reads for module in task.layout.modules},
            {
                m.reads: gram_shape(task.layout.weight_shape(m)[1], gram_width)
                for m in task.layout.modules
            },
            _watched_outputs(task) if task.method_args["metric"] == LOSS else (),
        )
        for task in tasks
    ]


def gram_shape(width: int, most: int | None) -> tuple[int, ...]:
    """Of the Gram matrix of an input: whole, or in as few equal blocks as are narrow enough.

    Args:
        width: channels of the input.
        most: of a block; None for any.
    """
    if most is None or width <= most:
        return (width, width)
    count = next(k for k in range(2, width + 1) if width % k == 0 and width // k <= most)
    return (count, width // count, width // count)


def _watched_outputs(task: Task) -> tuple[WatchedOutput, ...]:
    """The modules of a block, and where their outputs are found in memory."""
    layout, outputs = task.layout, []
    for module in layout.modules:
        width = layout.weight_shape(module)[0]
        name = "weight" if task.path != task.block else f"{module.name}.weight"
        weight, expert, columns = name, None, (0, width, 1)
        if layout.guard is not None:  # An expert: in memory they are stacked, gate before up.
            projection, expert = module.slices[0]
            weight = "down_proj" if module.basis_side == "output" else layout.guard
            first, parts = (0, 1) if module.stored is None else module.stored.part
            if parts > 1 and not (module.stored and module.stored.concatenated):
                columns = (first, width * parts, parts)
            elif projection == "up" and layout.guard != "up_proj":
                columns = (width, 2 * width, 1)
        outputs.append(
            WatchedOutput(module.name, weight, expert, columns, gradient_shape(layout, module))
        )
    return tuple(outputs)


def gradient_shape(layout: GroupLayout, module: ModuleLayout) -> tuple[int, ...]:
    """Of which shape B of a module is, see `lestd_kernels.methods.common.base.Metrics`.

    Whole for what writes into the residual stream, and for all that is small: low-rank pairs gain
    by it (at keep 0.2 of tiny-llama's attention a perplexity of 44.5 against 45.0 per head and
    47.1 with the diagonal). Of a wide block, experts counted together, per head for heads, and the
    diagonal otherwise.
    """
    width = layout.weight_shape(module)[0]
    projection = module.slices[0][0]
    alike = sum(one == projection for one, _ in layout.slices)
    if module.basis_side == "output" or max(width, alike * layout.head_dim) <= _WHOLE_WIDTH:
        return (width, width)
    if len(module.slices) > 1:
        return (len(module.slices), layout.head_dim, layout.head_dim)
    return (width,)


def layer_bytes(source: Source, layers: str) -> dict[int, int]:
    """Stored bytes of each decoder layer; its index follows the name of their list, `layers`."""
    name = layers.rpartition(".")[2]
    found: dict[int, int] = {}
    for ref in source.index.tensors.values():
        _, _, rest = f".{ref.name}".partition(f".{name}.")
        index = rest.partition(".")[0]
        if index.isdecimal():
            found[int(index)] = found.get(int(index), 0) + ref.stored_bytes
    return found


def outside_bytes(source: Source) -> int:
    """Stored bytes of the largest tensor, mostly one outside of the layers: an embedding."""
    return max(ref.stored_bytes for ref in source.index.tensors.values())


def input_bytes(blocks: Iterable[CalibratedBlock]) -> int:
    """Bytes of the Gram matrices of these blocks' inputs."""
    return sum(4 * math.prod(shape) for block in blocks for shape in block.grams.values())


def output_bytes(blocks: Iterable[CalibratedBlock]) -> int:
    """Bytes of B of these blocks' modules."""
    total = 0
    for block in blocks:
        for one in block.outputs:
            total += 4 * math.prod(one.shape)
    return total


def windows_of_a_piece(blocks: Iterable[CalibratedBlock], windows: int) -> int:
    """Windows of each piece of the samples; the last may have fewer.

    As many pieces, so many workers gain. Each has matrices of its own on disk until its layer is
    done, and writing them takes as long as computing some windows: more than `FEWEST_PIECES` are
    made of whole pieces of 16 windows, and no more than have room in 64 GiB for two layers. Nothing
    of a pool is in it, because who adds up in which order decides the last bit.

    Args:
        blocks: of which statistics are wanted.
        windows: of the samples.
    """
    room = max(FEWEST_PIECES, _PIECES_BYTES // (2 * max(_largest_bytes(blocks))))
    least = min(-(-windows // FEWEST_PIECES), _WINDOWS_OF_A_PIECE)
    return max(least, -(-windows // room))


def _largest_bytes(blocks: Iterable[CalibratedBlock]) -> tuple[int, int]:
    """Bytes of the matrices of one piece in the layer that has most, of inputs and of outputs."""
    by_layer: dict[int, list[CalibratedBlock]] = {}
    for block in blocks:
        by_layer.setdefault(block.layer, []).append(block)
    layers = by_layer.values()
    return max(map(input_bytes, layers)), max(map(output_bytes, layers))


@dataclass(frozen=True)
class CalibrationCosts:
    """Memory and disk of a calibration.

    Attributes:
        memory_bytes: of a worker, at most.
        kept_bytes: on disk, of what is kept.
        working_bytes: on disk beside that while it is made, at most.
        pieces: into which the samples are divided; more workers gain nothing.
    """

    memory_bytes: int
    kept_bytes: int
    working_bytes: int
    pieces: int

    @property
    def disk_bytes(self) -> int:
        """On disk, while it is made."""
        return self.kept_bytes + self.working_bytes


def calibration_costs(
    source: Source, blocks: Sequence[CalibratedBlock], samples: int, sample_tokens: int
) -> CalibrationCosts:
    """Costs of the statistics of some blocks, none of which is known.

    Memory: a layer in float32, of which stacked experts are there twice while they are put
    together; the largest tensor outside of the layers, an embedding; the layer's matrices, those of
    inputs twice while they are written, those of outputs three times, since the window that weighs
    most and the present one are apart; some dozens of activations as large as the hidden states,
    and with gradients more of them, the probabilities of attention, and of the vocabulary.

    Args:
        source: the dense model.
        blocks: which.
        samples: how many windows.
        sample_tokens: tokens of each.
    """
    config = source.config.get_text_config()
    back = any(block.outputs for block in blocks)
    hidden = 4 * config.hidden_size * sample_tokens
    of_inputs, of_outputs = _largest_bytes(blocks)
    pieces = -(-samples // windows_of_a_piece(blocks, samples))
    in_float32 = max(4 // DTYPES[ref.dtype].itemsize for ref in source.index.tensors.values())
    largest = max(layer_bytes(source, blocks[0].layers).values())
    weights = (2 * largest + outside_bytes(source)) * in_float32
    activations = 48 * hidden
    if back:
        activations = 160 * hidden
        heads = getattr(config, "num_attention_heads", None) or 0
        activations += 4 * 12 * heads * sample_tokens**2
        activations += 4 * 6 * config.vocab_size * sample_tokens
    return CalibrationCosts(
        memory_bytes=WORKER_BASE_BYTES + weights + max(2 * of_inputs, 3 * of_outputs) + activations,
        kept_bytes=input_bytes(blocks) + output_bytes(blocks),
        working_bytes=2 * pieces * max(of_inputs, of_outputs)
        + (config.num_hidden_layers + 3 if back else 2) * samples * hidden,
        pieces=pieces,
    )
