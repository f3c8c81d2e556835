"""Tasks of made tensors."""

from pathlib import Path

from safetensors.torch import save_file

from lestd_kernels.tensorize import fold_weights
from support.groups import mha, unfolding
from workers.checkpoint.tensors import read_header
from workers.contracts import Task

LAYOUT = mha(40, 12, 3)


def task(path: Path, scale: float) -> Task:
    """A block of float32 weights, written to a shard."""
    weights = fold_weights(unfolding(LAYOUT) * scale, LAYOUT)
    save_file({f"{name}.weight": weight for name, weight in weights.items()}, path)
    refs = read_header(path)
    return Task(
        task_id="task",
        layer=0,
        block="block",
        tensor_prefix="block",
        tensors={m.name: refs[f"{m.name}.weight"] for m in LAYOUT.modules},
        layout=LAYOUT,
        method="lestd",
        method_args={},
        byte_budget=LAYOUT.elements * 2,
        value_dtype="float32",
        predicted_memory_bytes=0,
    )
