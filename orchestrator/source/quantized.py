"""Checkpoints that are quantized already, seen as the dense ones that they stand for.

In the index of such a checkpoint every quantized weight is one tensor again, of its dense name,
shape and dtype, which is dequantized where it is read (`workers.checkpoint.packed`). Whatever looks
at the index afterwards has an ordinary checkpoint before it, and no dense copy is ever written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lestd_kernels.errors import LestdError
from workers.checkpoint.headers import DTYPE_NAMES, DTYPES
from workers.checkpoint.packed import E8M0
from workers.checkpoint.tensors import ShardIndex
from workers.contracts import Packing, TensorRef

KEY = "quantization_config"
"""Of config.json, or of the part of it that is about text."""

_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("F32", "BF16", "F16")
_MXFP4_BLOCK = (1, 32)
_USUAL_BLOCK = (128, 128)
# Of activations and of the cache, which a dense model keeps as they come.
_OF_ACTIVATIONS = (
    *("activation_scale", "input_scale", "output_scale", "input_zero_point", "output_zero_point"),
    *("k_scale", "v_scale", "q_scale", "input_global_scale"),
)
_CT_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
_PACKED_BITS = (4, 8)
_ANEW = "download it again, or start from the model before it was quantized"

Tensors = Mapping[str, TensorRef]
Settings = Mapping[str, Any]


def quantization_of(config_json: Settings) -> Any:
    """What config.json says of a quantization, if it does."""
    parts = (config_json, config_json.get("text_config"))
    return next((part[KEY] for part in parts if isinstance(part, dict) and part.get(KEY)), None)


def without_quantization(config_json: Settings) -> dict[str, Any]:
    """The config.json of the dense model."""
    text = config_json.get("text_config")
    dense = {key: value for key, value in config_json.items() if key != KEY}
    if isinstance(text, dict):
        dense["text_config"] = {key: value for key, value in text.items() if key != KEY}
    return dense


def is_readable(quantization: object) -> bool:
    """Whether there is a way to read weights that are quantized so."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return isinstance(method, str) and method in _METHODS


def as_dense(index: ShardIndex, quantization: Settings, dtype: object) -> ShardIndex:
    """The index of the dense checkpoint that a quantized one stands for.

    Args:
        index: of the quantized one.
        quantization: which `is_readable`.
        dtype: torch's, of the dense weights; bfloat16 if it is none that weights can have.

    Raises:
        LestdError: a part is absent, or has a shape or dtype that the weight's does not allow; or
            it is quantized in a way that is not known here.
    """
    name = DTYPE_NAMES.get(dtype) if isinstance(dtype, type(DTYPES["BF16"])) else None
    packed, used = _METHODS[quantization["quant_method"]](
        index.tensors, quantization, name if name in _SCALES else "BF16"
    )
    tensors = dict(packed)
    for name, ref in index.tensors.items():
        if name in used or name.rpartition(".")[2] in _OF_ACTIVATIONS:
            continue
        if ref.dtype in (*_FLOAT8, "I8", "U8", "I32"):
            raise LestdError(
                f"tensor {name} in {ref.shard} is stored as {ref.dtype}, and no scale beside it "
                f"says what it stands for; {_ANEW}"
            )
        tensors[name] = ref
    if not packed:
        raise LestdError(
            f"config.json says that the weights in {index.location} are quantized "
            f"({quantization['quant_method']}), and none is; use the config.json that belongs to "
            "the weights"
        )
    return replace(index, tensors=dict(sorted(tensors.items())))


def _dense(
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    kind: Any,
    parts: dict[str, TensorRef],
    block: tuple[int, int],
    **more: Any,
) -> TensorRef:
    """A weight that is made of parts; the weight itself is read last."""
    ordered = dict(sorted(parts.items(), key=lambda part: part[0] == "weight"))
    weight = parts["weight"]
    place = (0, math.prod(shape) * DTYPES[dtype].itemsize)
    packing = Packing(kind, ordered, block, **more)
    return TensorRef(name, weight.shard, shape, dtype, place, weight.version, packing)


def _grid(ref: TensorRef, shape: tuple[int, ...], block: tuple[int, int], of: str) -> TensorRef:
    """A scale or zero point, with an axis for each of the weight's.

    Args:
        ref: as it lies on disk.
        shape: of the weight, ``(..., out, in)``.
        block: rows and columns of each value.
        of: name of the weight.
    """
    *stack, rows, columns = shape
    expected = (*stack, -(-rows // block[0]), -(-columns // block[1]))
    if [size for size in ref.shape if size != 1] != [size for size in expected if size != 1]:
        raise LestdError(
            f"tensor {ref.name} in {ref.shard} has the shape {list(ref.shape)}, and "
            f"{list(expected)} was expected of the scales of {of}, {list(shape)} in blocks of "
            f"{block[0]} x {block[1]}; {_ANEW}"
        )
    return replace(ref, shape=expected)


def _scale(
    tensors: Tensors, name: str, shape: tuple[int, ...], block: tuple[int, int], of: str
) -> TensorRef:
    """The scales of a weight, checked; arguments as those of `_grid`."""
    ref = _part(tensors, name, of)
    if ref.dtype not in (*_SCALES, *E8M0):
        raise LestdError(
            f"tensor {name} in {ref.shard} is stored as {ref.dtype}, and scales as "
            f"{', '.join((*_SCALES, *E8M0))} were expected; {_ANEW}"
        )
    return _grid(ref, shape, block, of)


def _part(tensors: Tensors, name: str, of: str) -> TensorRef:
    if name not in tensors:
        raise LestdError(
            f"{of} in {tensors[of].shard} is stored as {tensors[of].dtype}, and its scales, tensor "
            f"{name}, are absent; {_ANEW}"
        )
    return tensors[name]


Found = tuple[dict[str, TensorRef], set[str]]
"""Dense tensors, and the names of those that they are made of."""


def _fine_grained(tensors: Tensors, quantization: Settings, dtype: str) -> Found:
    """FP8 as DeepSeek and Qwen publish it: ``X`` and ``X_scale_inv``, in blocks or one for all."""
    block = _block(quantization.get("weight_block_size", _USUAL_BLOCK), "weight_block_size")
    found, used = {}, set()
    for name, ref in tensors.items():
        if ref.dtype not in _FLOAT8:
            continue
        _require_matrices(ref)
        own = block or (ref.shape[-2], ref.shape[-1])
        scale = _scale(tensors, f"{name}_scale_inv", ref.shape, own, name)
        parts = {"weight": ref, "scale": scale}
        found[name] = _dense(name, ref.shape, dtype, "float8", parts, own)
        used |= {name, scale.name}
    return found, used


def _mxfp4(tensors: Tensors, _: Settings, dtype: str) -> Found:
    """MXFP4 as gpt-oss is published: ``X_blocks`` and ``X_scales`` of the transposed ``X``."""
    found, used = {}, set()
    for name, ref in tensors.items():
        dense = name.removesuffix("_blocks")
        if dense == name or ref.dtype != "U8":
            continue
        if len(ref.shape) != 4 or 2 * ref.shape[-1] != _MXFP4_BLOCK[1]:
            raise LestdError(
                f"tensor {name} in {ref.shard} has the shape {list(ref.shape)}, and blocks of 16 "
                f"bytes along the last of four axes were expected; {_ANEW}"
            )
        count, rows, groups, size = ref.shape
        shape = (count, rows, groups * _MXFP4_BLOCK[1])
        scale = _scale(tensors, f"{dense}_scales", shape, _MXFP4_BLOCK, name)
        if scale.dtype not in E8M0:
            raise LestdError(
                f"tensor {scale.name} in {scale.shard} is stored as {scale.dtype}, and MXFP4 has "
                f"scales of U8; {_ANEW}"
            )
        parts = {"weight": replace(ref, shape=(count, rows, groups * size)), "scale": scale}
        found[dense] = _dense(
            dense,
            (count, shape[2], rows),
            dtype,
            "float4",
            parts,
            _MXFP4_BLOCK,
            bits=4,
            transposed=True,
        )
        used |= {name, scale.name}
    return found, used


def _compressed_tensors(tensors: Tensors, quantization: Settings, dtype: str) -> Found:
    """The formats of compressed-tensors that scale numbers, and do nothing else to them."""
    _require_plain(quantization)
    found, used = {}, set()
    for name, ref in tensors.items():
        prefix, _, end = name.rpartition(".")
        packed = end == "weight_packed"
        if not packed and not (end == "weight" and ref.dtype in (*_FLOAT8, "I8")):
            continue
        _require_matrices(ref, (2,))
        scheme = _scheme(quantization, "float" if ref.dtype in _FLOAT8 else "int")
        shape, bits = ref.shape, scheme["num_bits"]
        scale = _part(tensors, f"{prefix}.weight_scale", name)
        if packed:
            shape = _unpacked_shape(ref, scale, scheme)
        block = _block_of(scheme, shape)
        parts = {"weight": ref, "scale": _scale(tensors, scale.name, shape, block, name)}
        zero = tensors.get(f"{prefix}.weight_zero_point")
        if zero is not None and ref.dtype not in _FLOAT8:
            rows, columns = parts["scale"].shape
            in_words = zero.dtype == "I32"
            expected = (-(-rows * bits // 32) if in_words else rows, columns)
            parts["zero_point"] = _grid(zero, expected, (1, 1), name)
        for part, one, size in (
            ("columns", "weight_g_idx", shape[1]),
            ("shape", "weight_shape", 2),
        ):
            if (told := tensors.get(f"{prefix}.{one}")) is not None:
                if told.shape != (size,) or told.dtype not in ("I32", "I64"):
                    raise LestdError(
                        f"tensor {told.name} in {told.shard} is {told.dtype} of the shape "
                        f"{list(told.shape)}, expected I32 or I64 of [{size}]; {_ANEW}"
                    )
                parts[part] = told
        dense = f"{prefix}.weight"
        kind = "float8" if ref.dtype in _FLOAT8 else "integer"
        found[dense] = _dense(dense, shape, dtype, kind, parts, block, bits=bits)
        used |= {part.name for part in parts.values()} | {f"{prefix}.weight_zero_point"}
    return found, used


def _require_plain(quantization: Settings) -> None:
    groups = quantization.get("config_groups")
    formats = {quantization.get("format")}
    if isinstance(groups, dict):
        formats |= {one["format"] for one in groups.values() if _is_told(one, "format")}
    sparsity = quantization.get("sparsity_config")
    sparse = isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense")
    if sparse or quantization.get("transform_config") or not formats <= {*_CT_FORMATS, None}:
        raise LestdError(
            f"config.json has a compressed-tensors checkpoint of the format "
            f"{', '.join(sorted(map(str, formats)))}"
            f"{', sparse' if sparse else ''}"
            f"{', with transforms' if quantization.get('transform_config') else ''}; read are "
            f"{', '.join(_CT_FORMATS)} alone; start from the model before it was quantized"
        )


def _is_told(group: object, name: str) -> bool:
    return isinstance(group, dict) and group.get(name) is not None


def _scheme(quantization: Settings, kind: str) -> Settings:
    """How weights of a kind are quantized: alike in all groups of modules."""
    groups = quantization.get("config_groups")
    schemes = [
        one["weights"]
        for one in (groups.values() if isinstance(groups, dict) else ())
        if _is_told(one, "weights") and isinstance(one["weights"], dict)
    ]
    names = ("num_bits", "strategy", "group_size", "block_structure")
    fitting = [{n: one.get(n) for n in names} for one in schemes if one.get("type") == kind]
    if not fitting or any(one != fitting[0] for one in fitting):
        raise LestdError(
            f"config.json has {len(fitting)} ways in which weights of the type {kind!r} are "
            "quantized by compressed-tensors, expected one; start from the model before it was "
            "quantized"
        )
    if fitting[0]["num_bits"] not in _PACKED_BITS:
        raise LestdError(
            f"config.json has weights of {fitting[0]['num_bits']!r} bits, expected "
            f"{' or '.join(map(str, _PACKED_BITS))}; start from the model before it was quantized"
        )
    return fitting[0]


def _block_of(scheme: Settings, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns that one scale counts for."""
    strategy, size = scheme["strategy"], scheme["group_size"]
    if strategy == "block" and (block := _block(scheme["block_structure"], "block_structure")):
        return block
    if strategy in ("group", "tensor_group") and type(size) is int and size > 0:
        return 1, size
    if strategy in ("channel", "tensor"):
        return (1 if strategy == "channel" else shape[0]), shape[1]
    raise LestdError(
        f"config.json has weights quantized with the strategy {strategy!r} and group_size "
        f"{size!r}, expected tensor, channel, block or group; start from the model before it was "
        "quantized"
    )


def _unpacked_shape(ref: TensorRef, scale: TensorRef, scheme: Settings) -> tuple[int, int]:
    """Shape of a weight that is packed in words of 32 bits."""
    each = 32 // scheme["num_bits"]
    columns = ref.shape[1] * each
    size = scheme["group_size"]
    if scheme["strategy"] == "group" and type(size) is int and len(scale.shape) == 2:
        columns = scale.shape[1] * size
    if ref.dtype != "I32" or -(-columns // each) != ref.shape[1]:
        raise LestdError(
            f"tensor {ref.name} in {ref.shard} is {ref.dtype} of the shape {list(ref.shape)}, "
            f"expected I32 of {[ref.shape[0], -(-columns // each)]} for {columns} columns of "
            f"{scheme['num_bits']} bits; {_ANEW}"
        )
    return ref.shape[0], columns


def _block(found: Any, name: str) -> tuple[int, int] | None:
    if found is None:
        return None
    if (
        isinstance(found, list | tuple)
        and len(found) == 2
        and all(type(size) is int and size > 0 for size in found)
    ):
        return found[0], found[1]
    raise LestdError(
        f"config.json has the {name} {found!r}, expected two positive numbers; use the config.json "
        "that belongs to the weights"
    )


def _require_matrices(ref: TensorRef, axes: tuple[int, ...] = (2, 3)) -> None:
    if len(ref.shape) not in axes or 0 in ref.shape:
        raise LestdError(
            f"tensor {ref.name} in {ref.shard} is {ref.dtype} of the shape {list(ref.shape)}, "
            f"expected a matrix{' or a stack of them' if 3 in axes else ''}; {_ANEW}"
        )


_METHODS: dict[str, Callable[[Tensors, Settings, str], Found]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fine_grained,
    "mxfp4": _mxfp4,
}
READABLE = ", ".join(_METHODS)
"""The names of the methods that can be read."""
