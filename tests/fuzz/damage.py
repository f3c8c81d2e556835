"""Ways to damage a valid file, as its format has them; the same seed does the same damage."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file, save_file

Damage = Callable[[Path, random.Random], None]

STRANGE: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 99, 10**9, 2**31, 2**63, -(2**63), 10**30),
    *(0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), "", "x", "0", "a\nb", "\x1b[31m\x07"),
    *("\ud800", "\0", "é" * 3000, "../../outside", "/dev/zero", ".", [], {}, [[]], {"": None}),
    *([0] * 3, {"a": {"b": [1, {"c": None}]}}, [None] * 2000, "[" * 5000),
]
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in pairwise("abcdefghi")
)
YAML_TEXTS = [
    BOMB,
    "license: &a [*a]\n",
    "keep: &a {keep: *a}\n",
    "license: 2024-99-99\n",
    "license: 2024-01-01T99:99:99Z\n",
    "license: !!python/object/apply:os.system [false]\n",
    "license: !!binary aGVsbG8\n",
    "license: !!set {a, b}\n",
    "? [a, b]\n: c\n",
    "? {a: b}\n: c\n",
    "<<: [1, 2]\n",
    "license: mit\nlicense: gpl\n",
    "keep: 0.5\nkeep: 0.6\n",
    "rank_step: 1:1:1:1:1\n",
    "license: " + "9" * 5000 + "\n",
    "--- \n...\n--- {}\n",
    "%YAML 9.9\n---\n{}\n",
    "[" * 3000,
    "{" * 3000,
    "- " * 3000,
    "license: \x07\n",
    "license: '\\ud800'\n",
    'license: "\\ud800"\n',
    'license: "\\e[31m"\n',
    "license: .nan\n",
]


def raw(path: Path, rng: random.Random) -> None:
    """Bytes: flipped, cut off, repeated, overwritten."""
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content) + 1)
    size = rng.choice([1, 2, 8, 64, 1000])
    choice = rng.randrange(7)
    if choice == 0 and content:
        for _ in range(rng.choice([1, 1, 2, 16])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif choice == 1:
        del content[at:]
    elif choice == 2:
        del content[at : at + size]
    elif choice == 3:
        content[at:at] = content[at : at + size] * rng.choice([1, 2, 100])
    elif choice == 4:
        content[at : at + size] = bytes([rng.choice([0, 255, 0x80, 0x22, 0x5B])]) * size
    elif choice == 5:
        content[at:at] = rng.randbytes(size)
    else:
        content = bytearray(rng.choice([b"", b"\0", b"\xef\xbb\xbf" + content, b"[" * 100_000]))
    path.write_bytes(content)


def another_kind(path: Path, rng: random.Random) -> None:
    """Not a regular file any more."""
    path.unlink()
    choice = rng.randrange(5)
    if choice == 0:
        os.mkfifo(path)
    elif choice == 1:
        path.mkdir()
    elif choice == 2:
        path.symlink_to("/dev/zero")
    elif choice == 3:
        path.symlink_to(path.name)
    else:
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def nodes(tree: Any) -> list[tuple[Any, Any]]:
    """Every place of a tree of dicts and lists: its container, and its key there."""
    found = []
    if isinstance(tree, (dict, list)):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            found += [(tree, key), *nodes(tree[key])]
    return found


def tree(root: Any, rng: random.Random, strange: list[Any] = STRANGE) -> None:
    """Change one to three nodes of a tree, in place."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = nodes(root)
        if not places:
            return
        box, key = rng.choice(places)
        other_box, other_key = rng.choice(places)
        new = copy.deepcopy(rng.choice(strange))  # Later changes must not reach the list.
        choice, value = rng.randrange(8), box[key]
        if choice <= 2:
            box[key] = new
        elif choice == 3:
            del box[key]
        elif choice == 4:
            box[key] = json.loads(json.dumps(other_box[other_key], default=str))
        elif choice == 5 and isinstance(value, (int, float)):
            box[key] = rng.choice([value + 1, value - 1, -value, 2 * value, value // 2, str(value)])
        elif choice == 6 and isinstance(box, dict):
            box[rng.choice(["", "x", f"{key}x", "\x1b[31m", *map(str, box)])] = box.pop(key)
        elif isinstance(box, list):
            box.insert(key, new)
        else:
            box[f"{key}_"] = new


def json_file(path: Path, rng: random.Random, part: str | None = None) -> None:
    """Nodes of a JSON file, or of one part of it, and what only its text can have."""
    data = json.loads(path.read_bytes())
    tree(data if part is None else data[part], rng)
    text = json.dumps(data)
    if part is None and rng.randrange(8) == 0:
        old, new = rng.choice(
            [('": ', '": ' + "[" * 100_000), ('": ', '": ' + "9" * 5000), (": ", ': 1, "x": ')]
        )
        text = text.replace(old, new, 1)
    path.write_text(text)


def yaml_file(path: Path, rng: random.Random) -> None:
    """Nodes of a YAML file, and texts that YAML alone has."""
    path.write_bytes(_damaged_yaml(path.read_text(), rng).encode(errors="surrogatepass"))


def _damaged_yaml(text: str, rng: random.Random) -> str:
    if rng.randrange(3) == 0:
        return rng.choice([text, ""]) + rng.choice(YAML_TEXTS)
    data = yaml.safe_load(text)
    tree(data, rng, [*STRANGE, date(2024, 1, 1), {1, 2}, b"bytes", {3: 4}, {None: 1}])
    return str(yaml.safe_dump(data, allow_unicode=True))


def card(path: Path, rng: random.Random) -> None:
    """The front matter of a model card, and what stands around it."""
    text = path.read_text().split("---\n", 2)[1]
    before, fence = rng.choice(["", "", "", "\n", "\ufeff", "\r\n", " "]), "---\n"
    body = "\n# A model\n" + rng.choice(["", "\x1b[31m", "---\n"])
    damaged = before + fence + _damaged_yaml(text, rng) + rng.choice([fence, fence, "", "..."])
    path.write_bytes((damaged + body).encode(errors="surrogatepass"))


def header(path: Path, rng: random.Random) -> None:
    """The header of a safetensors file, whose length stays true."""
    content = path.read_bytes()
    stop = 8 + int.from_bytes(content[:8], "little")
    data = json.loads(content[8:stop])
    tree(data, rng)
    text = json.dumps(data).encode()
    if rng.randrange(6) == 0:  # The same name over and over.
        text = b"{" + b", ".join([json.dumps("a").encode() + b": {}"] * 50_000) + b"}"
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[stop:])


def tensors(path: Path, rng: random.Random) -> None:
    """The tensors of a valid safetensors file, those of indices and codes first."""
    held = load_file(path)
    whole = [name for name, tensor in held.items() if not tensor.is_floating_point()]
    name = rng.choice(whole if whole and rng.randrange(4) else list(held))
    tensor = held[name].clone()
    flat, choice = tensor.flatten(), rng.randrange(12)
    at, other = rng.randrange(max(1, len(flat))), rng.randrange(max(1, len(flat)))
    if choice <= 4 and len(flat):
        octets = flat.view(torch.uint8)
        for _ in range(rng.choice([1, 1, 2, 2, 3, 8])):
            octets[rng.randrange(len(octets))] ^= 1 << rng.randrange(8)
        tensor = flat.view(tensor.shape)
    elif choice == 5 and len(flat):
        flat[at], flat[other] = flat[other].item(), flat[at].item()
        tensor = flat.view(tensor.shape)
    elif choice == 6 and len(flat):
        flat[at] = flat[other].item()
        tensor = flat.view(tensor.shape)
    elif choice == 7:
        tensor = torch.full_like(tensor, rng.choice([0, 1, 255 if name in whole else 65504]))
    elif choice == 8:
        tensor = rng.choice([flat[:-1], flat.repeat(2), flat[:0], flat.reshape(1, -1)])
    elif choice == 9:
        tensor = tensor.to(rng.choice([torch.int64, torch.uint8, torch.float16, torch.bool]))
    elif choice == 10:
        held[rng.choice([f"{name}.x", "\x1b[31m", *held])] = tensor
        held.pop(name)
    else:
        tensor = held[rng.choice(list(held))].clone()
    if choice != 10:
        held[name] = tensor.contiguous()
    save_file({n: t.contiguous() for n, t in held.items()}, path, metadata={"format": "pt"})


def safetensors_file(path: Path, rng: random.Random) -> None:
    """Header or tensors."""
    rng.choice([header, tensors])(path, rng)


def cells(path: Path, rng: random.Random) -> None:
    """Cells, columns and rows of a Parquet file."""
    table = pq.read_table(path)
    rows, schema = table.to_pylist(), table.schema
    at = rng.randrange(len(schema))
    field, choice = schema.field(at), rng.randrange(9)
    if choice <= 4 and rows:
        row = rng.choice(rows)
        row[field.name] = _cell(field, row[field.name], rng)
        table = pa.Table.from_pylist(rows, schema=schema)
    elif choice == 5:
        table = table.remove_column(at)
    elif choice == 6:
        kind = rng.choice([pa.string(), pa.int64(), pa.binary(), pa.list_(pa.int8()), pa.null()])
        column = pa.nulls(len(table), kind)
        if kind == pa.string():
            column = pa.array([rng.choice(["", "{", "\x1b[31m"])] * len(table))
        table = table.set_column(at, pa.field(field.name, kind), column)
    elif choice == 7:
        table = rng.choice([table.slice(0, 0), pa.concat_tables([table] * 3), table.slice(1)])
    else:
        table = table.rename_columns([*table.column_names[:-1], rng.choice(table.column_names)])
    pq.write_table(table, path)


def _cell(field: pa.Field, value: Any, rng: random.Random) -> Any:
    kind = field.type
    if rng.randrange(5) == 0:
        return None
    if pa.types.is_integer(kind):
        top = 2 ** (kind.bit_width - 1)
        return rng.choice([0, -1, 1, top - 1, -top, (value or 0) + 1])
    if pa.types.is_floating(kind):
        return rng.choice([0.0, -1.0, 1e308, float("nan"), float("inf"), 2.0])
    if pa.types.is_string(kind):
        if isinstance(value, str) and value.startswith(("{", "[")) and rng.randrange(2):
            data = json.loads(value)
            tree(data, rng)
            return json.dumps(data)
        texts = [one for one in STRANGE if isinstance(one, str) and one != "\ud800"]
        return rng.choice([*texts, "{", "null", "[]", "[" * 100_000, "=1+1", "a/b", '{"a": NaN}'])
    if pa.types.is_timestamp(kind):
        return rng.choice([0, 2**62, -(2**62)])
    if pa.types.is_list(kind):
        return rng.choice([[], [value[0]] * 2 if value else [], [None]])
    return value


def pickled(path: Path, rng: random.Random) -> None:
    """A pickled checkpoint with something that is not a plain tensor, or damage in its archive."""
    content: dict[Any, Any] = dict(torch.load(path, weights_only=True))
    name = rng.choice(list(content))
    tensor = content[name]
    odd: list[Callable[[], Any]] = [
        lambda: torch.zeros(1).expand(10**9),
        lambda: torch.zeros(1).as_strided((2**40,), (0,)),
        lambda: torch.zeros(8).as_strided((3, 3), (1, 2)),
        lambda: torch.empty(3, device="meta"),
        lambda: torch.empty(2**50, device="meta"),
        lambda: torch.ones(3, dtype=torch.complex64).conj(),
        lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
        lambda: torch.ones(3, dtype=torch.complex128),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: torch.nn.Parameter(tensor.clone()),
        lambda: tensor.t(),
        lambda: tensor.flatten()[::2],
        lambda: torch.ones(()),
        lambda: torch.ones(0, 3),
        lambda: rng.choice([None, 3, "x", [tensor], {"x": tensor}, OrderedDict(x=tensor)]),
        lambda: content,
    ]
    choice = rng.randrange(4)
    if choice == 0:
        key = rng.choice(["", "\ud800", "\x1b[31m", "__metadata__", "a" * 10**5, 3, None, b"x"])
        content[key] = content.pop(name)
    elif choice <= 2:
        content[name] = rng.choice(odd)()
    whole: Any = content
    if rng.randrange(12) == 0:
        whole = rng.choice([[tensor], tensor, None, {"state_dict": content}, {}])
    try:
        torch.save(whole, path, _use_new_zipfile_serialization=rng.randrange(3) > 0)
    except Exception:  # What torch cannot save in one format it may in the other.
        torch.save(whole, path)
    if choice == 3 and zipfile.is_zipfile(path):
        path.write_bytes(_damaged_archive(path.read_bytes(), rng))


def _damaged_archive(content: bytes, rng: random.Random) -> bytes:
    """The pickle inside of the archive changed, with a checksum that is true."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w") as new:
        for name in old.namelist():
            member = bytearray(old.read(name))
            if name.endswith("data.pkl"):
                for _ in range(rng.choice([1, 2, 8])):
                    member[rng.randrange(len(member))] = rng.choice([0, 255, rng.randrange(256)])
            new.writestr(name, bytes(member))
    return result.getvalue()


BY_SUFFIX: dict[str, Damage] = {
    ".json": json_file,
    ".yaml": yaml_file,
    ".md": card,
    ".safetensors": safetensors_file,
    ".parquet": cells,
    ".bin": pickled,
}


def anything(path: Path, rng: random.Random) -> None:
    """Damage as the file's format has it; of every eight files two in their bytes or their kind."""
    choice = rng.randrange(8)
    damage = raw if choice == 0 else another_kind if choice == 1 else BY_SUFFIX[path.suffix]
    damage(path, rng)
