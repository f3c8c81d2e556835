"""Schema of the entries of ``quantization_config["groups"]``: one check for all readers.

Keys, types and ranges; that matrices chain up to the shapes of their modules; that nothing is
stored twice; and that the dense tensors that modules stand for are whole. Nothing is allocated, and
no time is spent that grows with a number that the file states.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple, get_args

from lestd_kernels.errors import LestdError
from lestd_kernels.formats.chain import Chain
from lestd_kernels.formats.entries import groups_sha256
from lestd_kernels.formats.ops import Mix, Op, Permute, op_of
from lestd_kernels.formats.shared_tucker import SharedTucker
from lestd_kernels.storage.codecs import CODECS, PATTERNS
from lestd_kernels.storage.few_bits import FULL_BITS, QUANTIZED_BITS
from lestd_kernels.storage.matrix import RANS
from lestd_kernels.storage.rans import MOST_ELEMENTS_PER_BYTE
from lestd_kernels.tensorize import PROJECTIONS, BasisSide, below

COPY_AGAIN = "upgrade lestd, or copy the model again from where it was made"
_MOST, _MOST_ELEMENTS = 2**31 - 1, 2**48
_MOST_SHOWN = 60
_PATH = re.compile(r"\w+(\.\w+)*", re.ASCII)


class Field(NamedTuple):
    """Rule for the value of a key."""

    expected: str
    holds: Callable[[Any], bool]


Fields = dict[str, Field]


def _whole(least: int, most: int = _MOST) -> Field:
    expected = f"a whole number from {least} to {most}"
    return Field(expected, lambda v: type(v) is int and least <= v <= most)


def _one_of(*known: object) -> Field:
    expected = " or ".join(map(str, known))
    return Field(expected, lambda v: any(type(v) is type(one) and v == one for one in known))


def _list_of(one: Field) -> Field:
    expected = f"a list, each {one.expected}"
    return Field(expected, lambda v: isinstance(v, list) and v != [] and all(map(one.holds, v)))


def _named(least: int) -> Field:
    expected = f"an object of at least {least} names"
    return Field(
        expected, lambda v: isinstance(v, dict) and len(v) >= least and all(map(_is_path, v))
    )


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and _PATH.fullmatch(value) is not None


_COUNT, _INDEX, _FLAG = _whole(1), _whole(0), _one_of(True, False)
_WHERE = Field("the path of a module", _is_path)
_BLOCK = Field("the path of a module, or none", lambda v: v == "" or _is_path(v))
_ANY = Field("anything", lambda v: True)
_LIST = Field("a list that is not empty", lambda v: isinstance(v, list) and v != [])

_GROUP: Fields = {
    "kind": _one_of(SharedTucker.kind, Chain.kind),
    "value_type": _one_of("bfloat16", "float16", "float32"),
    "path": _BLOCK,  # Empty for the model itself.
    "width": _COUNT,
    "head_dim": _COUNT,
    "modules": _named(1),
    "ranks": _named(0),
}
_GROUP_OPTIONS: Fields = dict.fromkeys(("guard", "stored_path", "dense_path"), _WHERE)
_OF_KIND: Mapping[str, tuple[Fields, Fields]] = {
    SharedTucker.kind: ({"factors": _ANY}, {"core": _ANY}),
    Chain.kind: ({"shared": _named(0)}, {}),
}
_FACTORS: Fields = {"U1": _WHERE, "U2": _WHERE}
_PACKED: Fields = {"codec": _one_of(*CODECS), "nnz": _whole(0, _MOST_ELEMENTS)}
_PACKED_OPTIONS: Fields = {"pattern": _one_of(*PATTERNS)}
_CORE: Fields = {"path": _WHERE, "columns": _COUNT} | _PACKED
_MATRIX: Fields = {
    "rows": _COUNT,
    "columns": _COUNT,
    "codec": _one_of(*CODECS, RANS),
    "nnz": _PACKED["nnz"],
}
_MATRIX_OPTIONS: Fields = _PACKED_OPTIONS | {
    "value_bits": _one_of(FULL_BITS, *QUANTIZED_BITS),
    "exponent": _whole(-126, 127),
    "with_zero": _FLAG,
}
_CODED: Fields = {"bytes": _COUNT, "packed_bytes": _whole(0, _MOST_ELEMENTS)}
_MODULE: Fields = {"basis_side": _one_of(*get_args(BasisSide)), "slices": _COUNT}
_MODULE_OPTIONS: Fields = {"stored": _ANY}
_TYPES = _list_of(_whole(0, len(PROJECTIONS) - 1))
_CHAIN: Fields = {"ops": _LIST, "own": _LIST}
_STORED: Fields = {"tensor": _WHERE}
_STORED_OPTIONS: Fields = {
    **{"index": _INDEX, "part": _list_of(_INDEX)},
    **dict.fromkeys(("transposed", "concatenated"), _FLAG),
}
_OPS: Mapping[str, tuple[Fields, Fields]] = {
    "permute": ({"permute": _list_of(_INDEX), "shape": _list_of(_COUNT)}, {}),
    "mix": ({"mix": _WHERE, "weights": _INDEX, "rows": _COUNT}, {}),
    "matrix": (
        {"matrix": Field("a name or an index", lambda v: _is_path(v) or _INDEX.holds(v))},
        {"transposed": _FLAG, "blocks": _COUNT, "distinct": _FLAG, "each": _COUNT},
    ),
}


def check_groups(groups: Any, sha256: Any = None) -> None:
    """Check the value of ``quantization_config["groups"]``.

    Args:
        groups: the value.
        sha256: that of ``groups_sha256`` beside it, where there is one.

    Raises:
        LestdError: it is not what `SharedTucker.describe` and `Chain.describe` write, or not what
            was written.
    """
    if not _LIST.holds(groups):
        raise damaged("quantization_config names no groups")
    placed: dict[str, tuple[int, int] | None] = {}
    for number, entry in enumerate(groups):
        where = f"quantization_config.groups[{number}]"
        _check_group(where, entry)
        for path, shape in _places(entry):
            if path in placed and (shape is None or placed[path] is None):
                raise damaged(f"{where} names {path}, where another matrix is stored")
            if (known := placed.setdefault(path, shape)) != shape:
                raise damaged(f"groups disagree about the shape of {path}, {known} and {shape}")
    if sha256 not in (None, groups_sha256(groups)):
        raise damaged("quantization_config.groups are not those of its groups_sha256")


def damaged(what: str) -> LestdError:
    """The error for an entry, of which a sentence without its end is given."""
    return LestdError(f"config.json: {what}: {COPY_AGAIN}.")


def shown(value: Any) -> str:
    """A value of a damaged file, as a message shows it: short, and without control characters."""
    if isinstance(value, dict | list):
        return f"of type {type(value).__name__}"
    if isinstance(value, int) and value.bit_length() > 4 * _MOST_SHOWN:
        return f"of {value.bit_length()} bits"
    text = ascii(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _check_fields(where: str, entry: Any, required: Fields, optional: Fields | None = None) -> None:
    """Check the keys of an object and their values; without `optional` others are not looked at."""
    if not isinstance(entry, dict):
        raise damaged(f"{where} is {shown(entry)}, expected an object")
    for key in required:
        if key not in entry:
            raise damaged(f"{where} has no {key!r}")
    known = required if optional is None else required | optional
    for key, value in entry.items():
        if key in known and not known[key].holds(value):
            raise damaged(f"{where} has {key} {shown(value)}, expected {known[key].expected}")
        if key not in known and optional is not None:
            raise damaged(f"{where} has the unknown key {shown(key)}, expected {', '.join(known)}")


def _check_group(where: str, entry: Any) -> None:
    _check_fields(where, entry, {"kind": _GROUP["kind"]})
    required, optional = _OF_KIND[entry["kind"]]
    _check_fields(where, entry, _GROUP | required, _GROUP_OPTIONS | optional)
    _check_fields(f"{where}.ranks", entry["ranks"], {}, dict.fromkeys(entry["ranks"], _INDEX))
    if entry["kind"] == SharedTucker.kind:
        _check_tucker(where, entry)
    else:
        _check_chains(where, entry)
    _check_stored(where, entry)


def _check_size(where: str, rows: int, columns: int, nnz: int = 0) -> None:
    if not nnz <= rows * columns <= _MOST_ELEMENTS:
        raise damaged(f"{where} has shape {rows} x {columns} and {nnz} non-zeros")


def _check_tucker(where: str, entry: dict[str, Any]) -> None:
    ranks, core = entry["ranks"], entry.get("core")
    known = ("R1", "R2") if core is None else ("R1", "R2", "R3")
    _check_fields(f"{where}.ranks", ranks, dict.fromkeys(known, _COUNT), {})
    R1, R2, R3 = ranks["R1"], ranks["R2"], ranks.get("R3", 1)
    _check_fields(f"{where}.factors", entry["factors"], _FACTORS, {})
    _check_size(f"{where}.factors.U1", entry["width"], R1)
    _check_size(f"{where}.factors.U2", entry["head_dim"], R2)
    if core is not None:
        _check_fields(f"{where}.core", core, _CORE, _PACKED_OPTIONS)
        _check_size(f"{where}.core", R1, core["columns"], core["nnz"])
    for name, module in entry["modules"].items():
        at = f"{where}.modules.{name}"
        if core is None:
            _check_fields(at, module, _MODULE | _PACKED, _MODULE_OPTIONS | _PACKED_OPTIONS)
            _check_size(at, R1, module["slices"] * R2, module["nnz"])
            continue
        _check_fields(at, module, _MODULE | {"types": _TYPES}, _MODULE_OPTIONS)
        slices, types = module["slices"], module["types"]
        regular = len(set(types)) == len(types) and slices % len(types) == 0
        if not regular or core["columns"] != slices // len(types) * R2 * R3:
            raise damaged(
                f"{at} has {slices} slices of types {types}, which does not agree with a core of "
                f"{core['columns']} columns and ranks {R2} and {R3}"
            )


def _check_matrix(where: str, entry: Any, more: Fields | None = None) -> None:
    coded = _CODED if isinstance(entry, dict) and entry.get("codec") == RANS else {}
    _check_fields(where, entry, _MATRIX | coded | (more or {}), _MATRIX_OPTIONS)
    _check_size(where, entry["rows"], entry["columns"], entry["nnz"])
    if coded and entry["rows"] * entry["columns"] > MOST_ELEMENTS_PER_BYTE * entry["bytes"]:
        raise damaged(f"{where} has {entry['bytes']} bytes, too few for its shape")


def _check_chains(where: str, entry: dict[str, Any]) -> None:
    for name, matrix in entry["shared"].items():
        _check_matrix(f"{where}.shared.{name}", matrix, {"path": _WHERE})
    for name, module in entry["modules"].items():
        at = f"{where}.modules.{name}"
        _check_fields(at, module, _MODULE | _CHAIN, _MODULE_OPTIONS | {"side": _ANY})
        for index, matrix in enumerate(module["own"]):
            _check_matrix(f"{at}.own[{index}]", matrix)
        matrices = {**entry["shared"], **dict(enumerate(module["own"]))}
        inputs, outputs = module_shape(entry, module)
        width = inputs
        for index, op in enumerate(module["ops"]):
            what = f"{at}.ops[{index}]"
            kind = next((key for key in _OPS if isinstance(op, dict) and key in op), "matrix")
            _check_fields(what, op, *_OPS[kind])
            if (after := _width_after(width, op_of(op), matrices)) is None:
                raise damaged(f"{what} does not fit its matrix and {width} elements")
            width = after
        if width != outputs:
            raise damaged(f"{at}.ops make {width} elements of {inputs}, expected {outputs}")
        if "side" in module:
            _check_matrix(f"{at}.side", module["side"])
            if (found := _sizes(module["side"])) != (inputs, outputs):
                raise damaged(f"{at}.side is {found}, expected {(inputs, outputs)}")


def module_shape(entry: Mapping[str, Any], module: Mapping[str, Any]) -> tuple[int, int]:
    """``(in, out)`` of a module of a group."""
    columns = module["slices"] * entry["head_dim"]
    shape = entry["width"], columns
    return shape if module["basis_side"] == "input" else shape[::-1]


def _sizes(matrix: Mapping[str, Any]) -> tuple[int, int]:
    return matrix["rows"], matrix["columns"]


def _width_after(width: int, op: Op, matrices: Mapping[str | int, Any]) -> int | None:
    """Elements that an op makes of so many; None where it does not fit."""
    if isinstance(op, Permute):
        permutes = sorted(op.order) == list(range(len(op.shape)))
        return width if permutes and math.prod(op.shape) == width else None
    name = op.matrices if isinstance(op, Mix) else op.matrix
    if name not in matrices or (isinstance(op, Mix) and op.weights not in matrices):
        return None
    rows, columns = _sizes(matrices[name])
    if isinstance(op, Mix):
        fits = _sizes(matrices[op.weights]) == (1, rows) and columns % op.rows == 0
        return columns // op.rows if fits and width == op.rows else None
    if op.distinct:
        count, rest = divmod(op.blocks, op.each)
        if rest or rows % count:
            return None
        rows //= count
    elif op.each != 1:
        return None
    if op.transposed:
        rows, columns = columns, rows
    return op.blocks * columns if width == op.blocks * rows else None


def _check_stored(where: str, entry: dict[str, Any]) -> None:
    """Check that modules of one dense tensor make up all of it, and no other module is there."""
    # Tensor -> of each of its modules index and part, and what they must have in common.
    found: dict[str, list[tuple[tuple[int | None, int], Any]]] = {}
    for name, module in entry["modules"].items():
        at, stored = f"{where}.modules.{name}.stored", module.get("stored")
        if stored is None:
            found.setdefault(f"{name}.weight", []).append(((None, 0), None))
            continue
        _check_fields(at, stored, _STORED, _STORED_OPTIONS)
        part = stored.get("part", [0, 1])
        if len(part) != 2 or part[0] >= part[1]:
            raise damaged(f"{at} has part {part[:3]}, expected a number and how many there are")
        flags = stored.get("transposed", False), stored.get("concatenated", False)
        alike = (part[1], *flags, module_shape(entry, module))
        place = stored.get("index"), part[0]
        found.setdefault(stored["tensor"], []).append((place, alike))
    for tensor, members in found.items():
        places, shapes = ({member[i] for member in members} for i in range(2))
        parts = min(max(part for _, part in places) + 1, len(members))
        count = len(members) // parts
        numbers = [None] if (None, 0) in places else range(count)
        whole = len(members) == len(places) and places == set(product(numbers, range(parts)))
        if not whole or len(shapes) > 1:
            raise damaged(f"{where} has modules that do not make up the dense tensor {tensor}")


def _places(entry: dict[str, Any]) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Path of everything that a group stores; with its shape what groups may have in common."""
    for name in entry["modules"]:
        yield below(entry["path"], name), None
    for matrix in entry.get("shared", {}).values():
        yield matrix["path"], None
    if "core" in entry:
        yield entry["core"]["path"], None
    if "factors" in entry:
        ranks = entry["ranks"]
        yield entry["factors"]["U1"], (entry["width"], ranks["R1"])
        yield entry["factors"]["U2"], (entry["head_dim"], ranks["R2"])
