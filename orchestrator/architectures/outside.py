"""Linear modules outside of the decoder layers: the head, projectors, towers of other inputs.

They belong to no block of a decoder layer, and no description names them: a run takes those that
its user names, each as a group of one matrix.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import PretrainedConfig

from lestd_kernels.tensorize import below
from orchestrator.architectures.groups import SliceGroup
from orchestrator.architectures.infer import build_without_weights, decoder_layers
from orchestrator.architectures.recognise import Recogniser
from orchestrator.architectures.structure import LeftDense, groups_of
from workers.checkpoint.tensors import ShardIndex
from workers.contracts import OUTSIDE


def outside_groups(
    config: PretrainedConfig, index: ShardIndex, wanted: Callable[[str], bool]
) -> tuple[list[SliceGroup], list[LeftDense]]:
    """The modules outside of the decoder layers that are wanted.

    Args:
        config: the model's.
        index: of its checkpoint.
        wanted: of the path of a module in the model.

    Returns:
        Groups of one matrix in the order of the model's modules, of the layer `OUTSIDE`; and what
        is wanted, too, but stays dense, with the reason.

    Raises:
        LestdError: Transformers cannot build the model, its decoder layers cannot be told, or a
            weight is not what the modules say.
    """
    model = build_without_weights(config)
    layers_path, _ = decoder_layers(model)
    found = Recogniser(model, index).outside(layers_path)
    groups = [
        group
        for block in found.blocks
        if wanted(below(block.path, block.modules[0].name))
        for group in groups_of(block.model_copy(update={"layers": (OUTSIDE,)}), index)
    ]
    dense = [
        LeftDense(layers=(), module=path, why=why) for path, why in found.dense if wanted(path)
    ]
    return groups, dense
