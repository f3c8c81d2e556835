"""What the driver and the workers of a calibration say to each other, and where their files lie.

CALIBRATION/                                        see `orchestrator.compression.calibration`
    layer-00007-self_attn.safetensors               done: of inputs, the sums over all pieces
    layer-00007-self_attn.outputs.safetensors       done: of the gradients of outputs likewise
    pieces/layer-00007-00003.hidden                 a piece's hidden states before that layer
    pieces/layer-00007-00003.gradient               the gradient of its loss by them
    pieces/layer-00007-self_attn-00003.grams        what the modules of a block read of it
    pieces/layer-00007-self_attn-00003.squares      and the gradients of what they make of it
"""

from __future__ import annotations

from dataclasses import dataclass

from workers.storage.files import AnyPath

PIECES_DIR = "pieces"


@dataclass(frozen=True)
class WatchedOutput:
    """A module, the gradients of whose outputs are wanted.

    Attributes:
        module: name in its block.
        weight: path below the block of the parameter that makes the outputs in memory.
        expert: where that stacks the weights of experts, the index of this one's.
        columns: start, stop and step of the module's outputs among those of the weight.
        shape: of B, see `lestd_kernels.methods.common.base.Metrics`: ``(m, m)``,
            ``(heads, p, p)`` or ``(m,)``.
    """

    module: str
    weight: str
    expert: int | None
    columns: tuple[int, int, int]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class CalibratedBlock:
    """A block of one layer, the inputs of whose modules are wanted.

    Attributes:
        layer: index of the decoder layer.
        path: path of the block in the loaded model, ``"model.layers.7.self_attn"``.
        modules: module of the block -> name of the input that it reads.
        grams: name of the input -> shape of its Gram matrix: ``(n, n)``, or ``(k, p, p)`` of the
            blocks on its diagonal.
        outputs: of the modules, where the gradients of their outputs are wanted, too.
    """

    layer: int
    path: str
    modules: dict[str, str]
    grams: dict[str, tuple[int, ...]]
    outputs: tuple[WatchedOutput, ...] = ()

    @property
    def layers(self) -> str:
        """Path of the list of decoder layers, ``"model.layers"``."""
        return f"{self.path}.".partition(f".{self.layer}.")[0]

    @property
    def stem(self) -> str:
        """How the names of its files begin."""
        block = f"{self.path}.".partition(f".{self.layer}.")[2].rstrip(".")
        return f"layer-{self.layer:05d}-{block or 'layer'}"

    @property
    def file(self) -> str:
        """Name of the file of its inputs' Gram matrices."""
        return f"{self.stem}.safetensors"

    @property
    def outputs_file(self) -> str:
        """Name of the file of its outputs' gradients."""
        return f"{self.stem}.outputs.safetensors"


@dataclass(frozen=True)
class CalibrationPiece:
    """One piece of the samples, to go through one layer, or its gradient back through it.

    Attributes:
        task_id: its id among those of the calibration.
        block: names it in messages.
        layer: index of the layer; on the way back the number of layers stands for what comes
            after the last one: norm, head and loss.
        piece: index of the piece.
        blocks: what is wanted of this layer: the inputs of their modules, or on the way back the
            gradients of their outputs.
        token_ids: the samples; for the first layer only.
        last: whether nobody wants to know what comes after this layer, or on the way back before.
        after: items that must have ended before.
        dense_bytes: how much work it is: its share of the layer's weights.
        back: whether it is on the way back.
        keeps: whether the way back will need the hidden states before this layer once more.
        first_window: index of its first window among all; on the way back only.
    """

    task_id: str
    block: str
    layer: int
    piece: int
    blocks: tuple[CalibratedBlock, ...]
    token_ids: tuple[tuple[int, ...], ...]
    last: bool
    after: tuple[str, ...]
    dense_bytes: int
    back: bool = False
    keeps: bool = False
    first_window: int = 0


@dataclass(frozen=True)
class CalibrationSum:
    """Sum of a layer's statistics over all pieces, in their order.

    Attributes:
        task_id: its id among those of the calibration.
        block: names it in messages.
        layer: index of the layer.
        pieces: how many there are.
        blocks: of this layer.
        after: items that must have ended before.
        dense_bytes: how much work it is: bytes of the sums.
        back: whether it is of the way back.
        tokens: N, those of all samples.
    """

    task_id: str
    block: str
    layer: int
    pieces: int
    blocks: tuple[CalibratedBlock, ...]
    after: tuple[str, ...]
    dense_bytes: int
    back: bool
    tokens: int


CalibrationItem = CalibrationPiece | CalibrationSum


@dataclass(frozen=True)
class Calibrated:
    """An item is done: its files are written.

    Attributes:
        task_id: the item's.
        dense_bytes: the item's.
        seconds: what it took, by stage.
        worker: who did it, ``host:pid``.
        attempt: 1 for the first.
    """

    task_id: str
    dense_bytes: int
    seconds: dict[str, float]
    worker: str
    attempt: int = 1


def hidden_path(directory: AnyPath, layer: int, piece: int) -> AnyPath:
    """The hidden states of a piece before a layer."""
    return directory / PIECES_DIR / f"layer-{layer:05d}-{piece:05d}.hidden"


def gradient_path(directory: AnyPath, layer: int, piece: int) -> AnyPath:
    """The gradient of a piece's loss by its hidden states before a layer."""
    return directory / PIECES_DIR / f"layer-{layer:05d}-{piece:05d}.gradient"


def part_path(directory: AnyPath, block: CalibratedBlock, piece: int, back: bool) -> AnyPath:
    """A block's share of a piece: of what it reads, or of the gradients of what it makes."""
    suffix = "squares" if back else "grams"
    return directory / PIECES_DIR / f"{block.stem}-{piece:05d}.{suffix}"
