"""From a family's description and a checkpoint's headers to the slice groups of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from transformers import PretrainedConfig

from lestd_kernels.errors import LestdError
from lestd_kernels.tensorize import GroupLayout, ModuleLayout, StoredWeight, below
from orchestrator.architectures.description import Block, Description, Experts, FeedForward
from workers.checkpoint.tensors import ShardIndex
from workers.contracts import TensorRef

COMPRESSIBLE_DTYPES = ("BF16", "F16", "F32")
"""safetensors names of the dtypes that a compressed weight may have."""

Kind = Literal["attention", "ffn", "experts", "linear"]
SCOPES = (*get_args(Kind), "all")
"""Scopes: one kind of block in every layer that has one, or all kinds."""

LINEAR: Kind = "linear"
"""The kind of a group of one matrix."""

BLOCK_NAMES = {
    "attention": "attention blocks",
    "ffn": "dense feed-forward blocks",
    "experts": "experts",
    "linear": "matrices that are groups of their own",
}
# Where modules read: on the residual stream's side, and where they write into it.
_READS = {
    "attention": ("in", "heads"),
    "ffn": ("in", "hidden"),
    "experts": ("in_{expert}", "hidden_{expert}"),
    "linear": ("in", "in"),
}


@dataclass(frozen=True)
class SliceGroup:
    """One block of one layer: its slice group and where its weights lie.

    Attributes:
        layer: index of the decoder layer, or `OUTSIDE` (workers.contracts).
        scope: which kind of block it is.
        block: path of the block in the loaded model.
        tensor_prefix: path of the block in the checkpoint's tensor names; differs from `block`
            where the checkpoint leaves the base model's prefix out, or calls the block otherwise.
        layout: how the weights divide into slices.
        tensors: the layout's `ModuleLayout.source` -> its tensor, in the layout's order; one dtype.
        norms: `ModuleLayout.reads` -> scale of the norm that makes this input, where one does.
        dense_prefix: path of the block in the checkpoint, where `tensor_prefix` is another that a
            compressed model must have; else empty.
    """

    layer: int
    scope: Kind
    block: str
    tensor_prefix: str
    layout: GroupLayout
    tensors: dict[str, TensorRef]
    norms: dict[str, TensorRef]
    dense_prefix: str = ""


class Architecture(Description):
    """One model family; fields as in the package's docstring."""

    def layout(self, config: PretrainedConfig, scope: Kind = "attention") -> GroupLayout:
        """The slice group of every block of that kind in a model with this config.

        Raises:
            LestdError: the config's head counts or widths are not possible.
        """
        if scope == "attention":
            return self._attention_layout(config)
        block = self._block(scope)
        assert isinstance(block, FeedForward)
        # Only GPT-J leaves its width unstated.
        width = getattr(config, block.hidden_width) or 4 * config.hidden_size
        count = _count(config, block) if isinstance(block, Experts) else 1
        if min(width, count, config.hidden_size) < 1:
            raise LestdError(
                f"config.json has a hidden size of {config.hidden_size}, and {width} and {count} "
                f"as width and number of the {BLOCK_NAMES[scope]}; expected positive numbers; use "
                "the config.json that belongs to the weights"
            )
        modules = tuple(
            _feed_forward_module(block, scope, position, expert)
            for expert in range(count)
            for position in range(len(block.modules))
        )
        guard = block.guard if isinstance(block, Experts) else None
        return GroupLayout(config.hidden_size, width, modules, guard)

    def _attention_layout(self, config: PretrainedConfig) -> GroupLayout:
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads or config.hidden_size < 1:
            raise LestdError(
                f"config.json has {heads} attention heads, {kv_heads} key/value heads and a "
                f"hidden size of {config.hidden_size}; expected positive numbers, the first a "
                "multiple of the second; use the config.json that belongs to the weights"
            )
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        counts = {"q": heads, "k": kv_heads, "v": kv_heads, "o": heads}
        modules = []
        for module in self.attention.modules:
            if len({counts[p] for p in module.projections}) > 1:
                raise LestdError(
                    f"{module.name} fuses projections with {heads} and {kv_heads} heads, and "
                    f"{self.family} has one layout only for equal numbers; config.json must "
                    "have num_key_value_heads equal to num_attention_heads"
                )
            module_heads = range(counts[module.projections[0]])
            slices = tuple((p, head) for head in module_heads for p in module.projections)
            read = reads("attention", module.basis_side == "input")
            modules.append(ModuleLayout(module.name, module.basis_side, slices, read))
        return GroupLayout(config.hidden_size, head_dim, tuple(modules))

    def groups(self, config: PretrainedConfig, index: ShardIndex, scope: str) -> list[SliceGroup]:
        """The blocks in scope, by layer, found in the checkpoint and checked.

        Args:
            config: the model's.
            index: of the checkpoint.
            scope: one of `SCOPES`.

        Raises:
            LestdError: there is no layer, or no block in scope; a weight is absent, its shape is
                not what config.json says, or its dtype is not one that can be compressed, or
                differs within a block.
        """
        if config.num_hidden_layers < 1:
            raise LestdError(
                f"config.json has num_hidden_layers {config.num_hidden_layers}; expected at least "
                "1; use the config.json that belongs to the weights"
            )
        layers = range(config.num_hidden_layers)
        blocks = [(layer, kind) for layer in layers for kind in self._kinds(config, layer)]
        chosen = [(layer, kind) for layer, kind in blocks if scope in (kind, "all")]
        if not chosen:
            present = sorted({kind for _, kind in blocks})
            raise LestdError(
                f"scope {scope} asks for {BLOCK_NAMES[scope]}, and this {self.family} model has "
                f"none; choose {', '.join(present)} or all"
            )
        layouts = {kind: self.layout(config, kind) for _, kind in chosen}
        prefix = self._missing_prefix(index)
        before = getattr(config, "do_layer_norm_before", True)  # Some OPT models norm afterwards.
        groups = []
        for layer, kind in chosen:
            block, layout = self._block(kind), layouts[kind]
            layer_path = self.layer_path.replace("{layer}", str(layer))
            stored_path = (block.stored_path if isinstance(block, Experts) else None) or block.path
            stored_layer = layer_path.removeprefix(prefix)
            stored = below(stored_layer, stored_path)
            tensors = find_weights(index, stored, layout)
            norm = index.tensors.get(f"{stored_layer}.{block.norm}.weight") if before else None
            group = below(layer_path, block.path)
            inputs = [m.reads for m in layout.modules if m.basis_side == "input"]
            norms = {} if norm is None else dict.fromkeys(inputs, norm)
            groups.append(SliceGroup(layer, kind, group, stored, layout, tensors, norms))
        return groups

    def stacks_experts(self, index: ShardIndex) -> bool:
        """Whether a checkpoint has the experts of a layer in one tensor, and not as described.

        Transformers saves them so with ``save_original_format=False``.
        """
        if self.experts is None or any(one.stored.stacked for one in self.experts.modules):
            return False
        end = f".{below(self.experts.path, self.experts.guard)}"
        return any(name.endswith(end) for name in index.tensors)

    def _block(self, kind: Kind) -> Block:
        block = {"attention": self.attention, "ffn": self.ffn, "experts": self.experts}[kind]
        assert block is not None
        return block

    def _kinds(self, config: PretrainedConfig, layer: int) -> tuple[Kind, ...]:
        """The kinds of blocks that a layer has."""
        if self.experts is None:
            return ("attention",) if self.ffn is None else ("attention", "ffn")
        if self.ffn is None:
            return ("attention", "experts")
        dense = layer in (config.mlp_only_layers or ())
        every = config.decoder_sparse_step
        if every < 1:
            raise LestdError(
                f"config.json has decoder_sparse_step {every}; expected at least 1; use the "
                "config.json that belongs to the weights"
            )
        sparse = _count(config, self.experts) > 0 and (layer + 1) % every == 0
        return ("attention", "experts" if sparse and not dense else "ffn")

    def _missing_prefix(self, index: ShardIndex) -> str:
        """The part of `layer_path` that the checkpoint leaves out, perhaps nothing."""
        full = self.layer_path.partition("{layer}")[0]
        short = full.removeprefix(self.base_model_prefix)
        has_full = any(name.startswith(full) for name in index.tensors)
        has_short = any(name.startswith(short) for name in index.tensors)
        return self.base_model_prefix if has_short and not has_full else ""


def _count(config: PretrainedConfig, experts: Experts) -> int:
    count = getattr(config, experts.count)
    if type(count) is not int:  # Under its other names Transformers lets anything pass.
        raise LestdError(
            f"config.json has {experts.count} {count!r}, expected the number of the experts; use "
            "the config.json that belongs to the weights"
        )
    return count


def reads(kind: Kind, from_stream: bool) -> str:
    """Name of the input of a module that reads the residual stream, or of one that writes it."""
    return _READS[kind][0 if from_stream else 1]


def _feed_forward_module(
    block: FeedForward, kind: Kind, position: int, expert: int
) -> ModuleLayout:
    """One module of a dense feed-forward block, or of one expert."""
    module = block.modules[position]
    slices = tuple((projection, expert) for projection in module.projections)
    read = reads(kind, module.basis_side == "input").replace("{expert}", str(expert))
    if not isinstance(block, Experts):
        return ModuleLayout(module.name, module.basis_side, slices, read)
    described = block.modules[position].stored
    stored = StoredWeight(
        described.tensor.replace("{expert}", str(expert)),
        expert if described.stacked else None,
        described.part,
        described.transposed,
    )
    return ModuleLayout(f"expert_{expert}.{module.name}", module.basis_side, slices, read, stored)


def find_weights(index: ShardIndex, path: str, layout: GroupLayout) -> dict[str, TensorRef]:
    """The weights of one block by their sources, checked; one expert of many is a part of a tensor.

    Raises:
        LestdError: see `Architecture.groups`.
    """
    experts = 1 + max((m.stored.index or 0 for m in layout.modules if m.stored), default=0)
    tensors: dict[str, TensorRef] = {}
    for module in layout.modules:
        if module.source in tensors:  # Another part of the same matrix.
            continue
        stored = module.stored
        name = below(path, f"{module.name}.weight" if stored is None else stored.tensor)
        expected: tuple[int, ...] = layout.source_shape(module)
        number = None if stored is None else stored.index
        ref = _find_weight(index, name)
        _check_weight(ref, expected if number is None else (experts, *expected))
        tensors[module.source] = ref if number is None else ref.matrix(number)
    _check_same_dtype(list(tensors.values()))
    return tensors


def _find_weight(index: ShardIndex, name: str) -> TensorRef:
    if name not in index.tensors:
        raise LestdError(
            f"tensor {name} is absent from the checkpoint in {index.location}, which its "
            "config.json says it has; download it again, or use the config.json that belongs to it"
        )
    return index.tensors[name]


def _check_weight(ref: TensorRef, expected: tuple[int, ...]) -> None:
    if ref.shape != expected:
        raise LestdError(
            f"tensor {ref.name} in {ref.shard} has the shape {list(ref.shape)}, and config.json "
            f"says {list(expected)}; use the config.json that belongs to the weights"
        )
    if ref.dtype not in COMPRESSIBLE_DTYPES:
        raise LestdError(
            f"tensor {ref.name} in {ref.shard} is stored as {ref.dtype}, and only "
            f"{', '.join(COMPRESSIBLE_DTYPES)} can be compressed; start from the model before it "
            "was quantized or converted"
        )


def _check_same_dtype(refs: list[TensorRef]) -> None:
    first = refs[0]
    for ref in refs[1:]:
        if ref.dtype != first.dtype:
            raise LestdError(
                f"tensor {ref.name} in {ref.shard} is stored as {ref.dtype} and {first.name} as "
                f"{first.dtype}; the weights of one block must have one dtype, save the model in "
                "one"
            )
