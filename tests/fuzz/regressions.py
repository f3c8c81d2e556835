"""Inputs that once were findings, as targets whose damage is no matter of chance."""

from __future__ import annotations

import io
import json
import os
import random
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from damage import BOMB
from driver import Probe, Target
from safetensors.torch import load_file, save_file
from targets import (
    TARGETS,
    command,
    compress,
    compress_and_load,
    convert,
    dry_run,
    load,
    plan,
    verify,
)

Change = Callable[[Path], object]


def case(name: str, victim: str, probe: Probe, change: Change) -> Target:
    """One input of the target `name`: its damage is `change`."""

    def damage(path: Path, rng: random.Random) -> None:
        change(path)

    [target] = (one for one in TARGETS if one.name == name)
    return replace(target, victims=(victim,), probes=(probe,), damage=damage)


def text(content: str) -> Change:
    """The file has this text."""
    return lambda path: path.write_text(content)


def replaced(old: str, new: str) -> Change:
    """The file has another text wherever it had `old`."""
    return lambda path: path.write_text(path.read_text().replace(old, new))


def pipe(path: Path) -> None:
    """The file is a pipe that nobody writes to."""
    path.unlink()
    os.mkfifo(path)


def endless(path: Path) -> None:
    """The file is a device without an end."""
    path.unlink()
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    """The file is a link to itself."""
    path.unlink()
    path.symlink_to(path.name)


def cell(name: str, value: Any) -> Change:
    """A column of a table of figures has this value."""

    def change(path: Path) -> None:
        table = pq.read_table(path)
        rows = [row | {name: value} for row in table.to_pylist()]
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)

    return change


def tensor(name: str, value: Callable[[], torch.Tensor]) -> Change:
    """A pickled checkpoint has this tensor besides."""
    return lambda path: torch.save(torch.load(path) | {name: value()}, path)


def longer_storage(path: Path) -> None:
    """The pickle in the archive says that the storages are of wider elements than they are."""
    result = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(result, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                content = content.replace(b"FloatStorage", b"DoubleStorage")
            new.writestr(name, content)
    path.write_bytes(result.getvalue())


def column(path: Path) -> None:
    """A column has a name that steers a terminal."""
    table = pq.read_table(path)
    pq.write_table(table.rename_columns(["\x1b[31m", *table.column_names[1:]]), path)


def guard(path: Path) -> None:
    """The empty tensor that stands for the experts is none."""
    held: dict[str, Any] = load_file(path)
    [name] = (name for name, one in held.items() if not one.numel())
    save_file(held | {name: torch.zeros(195, dtype=torch.uint8)}, path, metadata={"format": "pt"})


def attention_only(path: Path) -> None:
    """An architecture without feed-forward blocks and experts."""
    found: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps({key: found[key] for key in found if key not in ("ffn", "experts")}))


BIN, PARTS, GROUPS = "pickled/*.bin", "out.run/manifest/slices/*", "out.run/manifest/groups/*"

REGRESSIONS = [
    case("run-files", "run.yaml", plan, text(BOMB)),
    case("run-files", "run.yaml", plan, endless),
    case("cluster-files", "cluster.yaml", dry_run, pipe),
    case("cards", "dense/README.md", compress, text(f"---\n{BOMB}---\n")),
    case("cards", "dense/README.md", compress, text("---\nlicense: 2024-99-99\n---\n")),
    case("configs", "dense/config.json", plan, pipe),
    case("side-files", "dense/generation_config.json", compress, pipe),
    case("side-files", "dense/generation_config.json", compress, endless),
    case("parts", PARTS, verify, endless),
    case("parts", PARTS, verify, pipe),
    case("parts", PARTS, command("compact PLACE/out"), column),
    case("parts", GROUPS, command("diff PLACE/out.run PLACE/out.run"), cell("seconds_read", 1e308)),
    case("parts", GROUPS, compress, cell("scope", None)),
    case("parts", "out.run/manifest/events/*", compress, cell("task_id", None)),
    case("described", "architecture.json", compress_and_load, endless),
    case("described", "architecture.json", compress_and_load, replaced("self_attn", "self_attn.")),
    case("described", "architecture.json", compress_and_load, attention_only),
    case("found", "architecture.json", compress_and_load, pipe),
    case("found", "architecture.json", compress_and_load, replaced('"experts":4', '"experts":5')),
    case("payloads", "out.run/payloads/*", verify, loop),
    case("pickles", BIN, convert, tensor("\ud800", lambda: torch.ones(3))),
    case("pickles", BIN, convert, tensor("x", lambda: torch.zeros(1).expand(2**40))),
    case("pickles", BIN, convert, tensor("x", lambda: torch.ones(3, device="meta"))),
    case("pickles", BIN, convert, tensor("x", lambda: torch.ones(3, dtype=torch.cfloat).conj())),
    case("pickles", BIN, convert, tensor("x", lambda: torch.tensor([float("nan")]))),
    case("pickles", BIN, convert, longer_storage),
    case("tensors-experts", "out/lestd-00000-*", load, guard),
]
