"""Tables in files: what is compacted, killed, damaged or of another version changes no row."""

import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cli import PATIENCE
from support.s3 import s3_server
from upath import UPath

from lestd_kernels.errors import LestdError
from orchestrator.manifest import part_files as files
from orchestrator.manifest.manifest import Manifest, default_run_dir
from orchestrator.manifest.part_files import compact_table, read_table, write_part, write_table
from orchestrator.manifest.schemas import (
    EVALUATIONS,
    EVENTS,
    GROUPS,
    RUNS,
    SLICES,
    TABLES,
    TableSpec,
)
from orchestrator.run.directory import RunDirectory, compact
from workers.storage.files import read_files

NOTHING = lambda: None  # noqa: E731


def value(kind: pa.DataType, number: int) -> Any:
    """Any value of a type."""
    if pa.types.is_list(kind):
        return [value(kind.value_type, number + i) for i in range(3)]
    if pa.types.is_string(kind):
        return f"text_{number}"
    return number % 2 == 0 if pa.types.is_boolean(kind) else number


def row(spec: TableSpec, number: int, **fields: Any) -> dict[str, Any]:
    """A row with something in every column, as its check wants it."""
    found = {column.name: value(column.type, column.least + number) for column in spec.columns}
    for column in spec.columns:
        if column.check is not None and not column.check(found[column.name]):
            found[column.name] = f'{{"modules": {{}}, "number": {number}}}'
    return found | fields


def parts_of(spec: TableSpec, count: int) -> dict[str, list[dict[str, Any]]]:
    """Part files by name: some of several rows, some with ties in the table's order."""
    found = {}
    for number in range(count):
        ties = {"task_id": f"task{number}", "layer": number // 3, "block": f"g{number // 3}"}
        if spec is EVENTS:
            ties |= {"time": number // 2, "kind": "retried"}
        if spec is EVALUATIONS:
            ties = {"evaluation_id": f"e{number}", "time": number // 2, "answer_filter": None}
        if spec is RUNS:
            ties = {"invocation": f"r{number}", "started_at": number // 2}
        several = range(1 if spec in (GROUPS, EVENTS, RUNS) else 1 + number % 4)
        found[f"{number}.parquet"] = [
            row(spec, 10 * number + i, **ties)
            | ({"metric": f"m{i}"} if spec is EVALUATIONS else {})
            | ({"head": i} if spec is SLICES else {})
            for i in several
        ]
    return found


def write_parts(manifest: Path, count: int, specs: Iterable[TableSpec] = TABLES.values()) -> None:
    for spec in specs:
        (manifest / spec.name).mkdir(parents=True)
        for name, rows in parts_of(spec, count).items():
            write_part(manifest / spec.name / name, rows, spec)


def rows_of(manifest: Path) -> dict[str, list[dict[str, Any]]]:
    """All rows of all tables; no file may be damaged."""
    found = {name: read_table(manifest, spec) for name, spec in TABLES.items()}
    assert not [bad for one in found.values() for bad in one.damaged]
    return {name: one.rows.to_pylist() for name, one in found.items()}


@pytest.mark.parametrize("spec", TABLES.values(), ids=TABLES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_mixture_of_parts_and_compacted_rows_reads_equal(
    tmp_path_factory: pytest.TempPathFactory, spec: TableSpec, data: st.DataObject
) -> None:
    """Each part is a file, in the compacted file, or in both, there with older figures."""
    parts = parts_of(spec, 7)
    where = {name: data.draw(st.sampled_from(["part", "compacted", "both"])) for name in parts}
    directory = tmp_path_factory.mktemp("mixture")
    (directory / spec.name).mkdir()
    older = []
    measured = next(c.name for c in reversed(spec.columns) if c.name not in spec.key + spec.order)
    for name, rows in parts.items():
        if where[name] != "compacted":
            write_part(directory / spec.name / name, rows, spec)
        if where[name] == "compacted":
            older += rows
        elif where[name] == "both":
            older += [one | {measured: None} for one in rows]
    data.draw(st.randoms(use_true_random=False)).shuffle(groups := _by_key(older, spec))
    older = [one for rows in groups for one in rows]
    if older:
        write_table(
            directory / f"{spec.name}.parquet", pa.Table.from_pylist(older, schema=spec.schema)
        )
    everything = [one for rows in parts.values() for one in rows]
    expected = pa.Table.from_pylist(everything, schema=spec.schema).to_pylist()
    expected.sort(key=lambda one: [str(one[c]) for c in (*spec.order, *spec.key)])
    assert read_table(directory, spec).rows.to_pylist() == expected
    gone = sum(place != "compacted" for place in where.values())
    assert compact_table(directory, spec, NOTHING) == gone
    assert not [*(directory / spec.name).iterdir()]
    assert read_table(directory, spec).rows.to_pylist() == expected


def _by_key(rows: list[dict[str, Any]], spec: TableSpec) -> list[list[dict[str, Any]]]:
    """Rows of one key stay in their order."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in rows:
        found.setdefault(tuple(one[name] for name in spec.key), []).append(one)
    return [*found.values()]


KILLED = """
import itertools, os, shutil, signal, sys, time
from pathlib import Path
from orchestrator.manifest.manifest import Manifest

def counted(owner, name, before):
    real = getattr(owner, name)
    def call(*args, **kwargs):
        before()
        return real(*args, **kwargs)
    setattr(owner, name, call)

def compact(directory, before):
    for name in ("open", "fsync"):
        counted(os, name, before)
    for name in ("open", "replace", "unlink"):
        counted(Path, name, before)
    Manifest(Path(directory)).compact(lambda: None)

def killed_at(step):
    count = itertools.count(1)
    return lambda: next(count) == step and os.kill(os.getpid(), signal.SIGKILL)
"""


def run_python(code: str, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", KILLED + code, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_compaction_that_is_killed_at_any_step_loses_and_doubles_nothing(tmp_path: Path) -> None:
    write_parts(tmp_path / "manifest", 2, (GROUPS, SLICES, EVENTS, EVALUATIONS))
    expected = rows_of(tmp_path / "manifest")
    # Each step in a process of its own, which ends by SIGKILL before it does that step.
    process = run_python(
        """
for step in itertools.count(1):
    directory = f"{sys.argv[1]}/{step}/manifest"
    shutil.copytree(f"{sys.argv[1]}/manifest", directory)
    if (child := os.fork()) == 0:
        compact(directory, killed_at(step))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(status)
    if status == 0:
        break
""",
        tmp_path,
    )
    statuses = [int(line) for line in process.communicate(timeout=PATIENCE)[0].splitlines()]
    assert process.returncode == 0
    # Of each table three files are looked at; one is opened, synced, renamed, its directory opened
    # and synced; two are deleted. Of the two that have no rows one file is looked for.
    assert statuses == [signal.SIGKILL] * (3 * (3 + 5 + 2) + 2) + [0]
    for step in range(1, len(statuses) + 1):
        manifest = tmp_path / str(step) / "manifest"
        assert rows_of(manifest) == expected, step
        Manifest(manifest).compact(NOTHING)
        assert rows_of(manifest) == expected, step
        left = [*manifest.glob("*/*.parquet")]
        assert {path.parent.name for path in left} == {"evaluations"}


@pytest.mark.parametrize("step", ["list_names", "read_files", "second read_files"])
def test_a_reader_that_is_overtaken_by_compaction_sees_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Before the parts are listed, before they are read, before the compacted file is."""
    write_parts(tmp_path / "manifest", 3, [SLICES])
    expected = read_table(tmp_path / "manifest", SLICES).rows
    name = step.rpartition(" ")[2]
    real = getattr(files, name)
    count = itertools.count(1)

    def overtaken(*args: Any) -> Any:
        if next(count) == (2 if "second" in step else 1):
            with monkeypatch.context() as undone:
                undone.setattr(files, name, real)
                assert compact_table(tmp_path / "manifest", SLICES, NOTHING) == 3
        return real(*args)

    monkeypatch.setattr(files, name, overtaken)
    assert read_table(tmp_path / "manifest", SLICES).rows == expected
    assert not [*(tmp_path / "manifest" / "slices").iterdir()]


@pytest.mark.slow
def test_readers_see_the_same_while_files_are_put_together(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest"
    write_parts(manifest, 8)
    expected = rows_of(manifest)
    process = run_python("compact(sys.argv[1], lambda: time.sleep(0.02))", manifest)
    seen = set()
    while process.poll() is None:
        assert rows_of(manifest) == expected
        seen.add(len([*manifest.glob("*/*.parquet")]))
    assert process.returncode == 0
    assert len(seen) > 2  # It was caught in the middle.
    assert rows_of(manifest) == expected


def test_an_object_that_is_gone_when_it_is_read_was_compacted(tmp_path: Path) -> None:
    with s3_server() as (url, _):
        place = UPath(f"{url}/run/manifest", use_listings_cache=False)
        expected = {}
        for spec in (GROUPS, EVENTS):
            for name, rows in parts_of(spec, 3).items():
                write_part(place / spec.name / name, rows, spec)
            expected[spec.name] = Manifest(place).table(spec.name)
        content, error = read_files([place / "groups" / "0.parquet", place / "groups" / "absent"])
        assert isinstance(content, bytes)
        assert isinstance(error, FileNotFoundError)
        assert Manifest(place).compact(NOTHING) == 6
        assert [path.name for path in place.iterdir()] == ["events.parquet", "groups.parquet"]
        for name, rows in expected.items():
            assert Manifest(place).table(name) == rows
        assert not Manifest(place).damaged()


def test_a_run_is_compacted_under_its_lock(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_dir = default_run_dir(out)
    with pytest.raises(LestdError, match="does not exist, and neither does a run"):
        compact(out)
    write_parts(run_dir / "manifest", 4)
    (run_dir / "run.json").write_text('{"fingerprint": {}, "source": {}, "shard_stats": {}}')
    before = rows_of(run_dir / "manifest")
    with RunDirectory(run_dir).locked(), pytest.raises(LestdError, match="another driver"):
        compact(out)
    assert compact(run_dir) == (5 * 4, [])
    assert compact(out) == (0, [])
    assert rows_of(run_dir / "manifest") == before
    # A model whose run is gone has nothing that could be merged.
    write_parts(out / "manifest", 2)
    (run_dir / "run.json").unlink()
    assert compact(out) == (0, [])
    assert len([*(out / "manifest" / "groups").iterdir()]) == 2


def damage(manifest: Path) -> dict[str, str]:
    """Things in `groups` that are no rows of ours: name -> what is to be said of it."""
    folder = manifest / "groups"
    whole = (folder / "0.parquet").read_bytes()
    table = pq.ParquetFile(folder / "0.parquet").read()
    (folder / "truncated.parquet").write_bytes(whole[:-20])
    (folder / "empty.parquet").write_bytes(b"")
    (folder / "text.parquet").write_bytes(b"hello")
    flipped = bytearray(whole)
    flipped[whole.index(b"text_0") + 2] ^= 1
    (folder / "flipped.parquet").write_bytes(flipped)
    (folder / "directory.parquet").mkdir()
    (folder / "loop.parquet").symlink_to("loop.parquet")
    (folder / "dangling.parquet").symlink_to("nowhere")
    (folder / "notes.txt").write_text("mine")
    layer = table.column_names.index("layer")
    texts = pa.array(["0"])
    pq.write_table(table.set_column(layer, "layer", texts), folder / "types.parquet")
    nulls = pa.nulls(1, pa.string())
    task = table.column_names.index("task_id")
    pq.write_table(table.set_column(task, "task_id", nulls), folder / "nulls.parquet")
    pq.write_table(pa.table({"a": [1]}), folder / "another.parquet")
    (folder / ".tmp-1-abc").write_bytes(whole[:100])  # A writer was killed: of no interest.
    return {
        "truncated.parquet": "Parquet",
        "empty.parquet": "0 bytes",
        "text.parquet": "Parquet",
        "flipped.parquet": "CRC",
        "directory.parquet": "Is a directory",
        "loop.parquet": "Too many levels of symbolic links",
        "dangling.parquet": "No such file",
        "notes.txt": "lestd makes no such file",
        "types.parquet": "its column layer is string, expected int32",
        "nulls.parquet": "it has rows without task_id",
        "another.parquet": "it has rows without task_id",
    }


def test_what_is_damaged_or_foreign_is_named_and_spoils_nothing_else(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest"
    write_parts(manifest, 3)
    expected = rows_of(manifest)
    said = damage(manifest)
    for _ in range(2):  # Compaction takes what is whole, and leaves the rest to be named.
        assert {name: Manifest(manifest).table(name).to_pylist() for name in TABLES} == expected
        found = {bad.path: bad.reason for bad in Manifest(manifest).damaged()}
        assert sorted(path.name for path in found) == sorted(said)
        for path, reason in found.items():
            assert said[path.name] in reason
            assert "\n" not in reason
        Manifest(manifest).compact(NOTHING)
    left = {path.name for path in (manifest / "groups").iterdir()}
    assert left == {*said, ".tmp-1-abc"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    write_parts(tmp_path / "manifest", 2)
    path = tmp_path / "manifest" / "groups" / "1.parquet"
    path.chmod(0)
    (bad,) = Manifest(tmp_path / "manifest").damaged()
    assert (bad.path, bad.reason) == (path, "Permission denied")


def test_a_damaged_compacted_file_is_named_and_never_written_over(tmp_path: Path) -> None:
    write_parts(tmp_path / "manifest", 2)
    single = tmp_path / "manifest" / "groups.parquet"
    single.write_bytes(b"what is left of it")
    manifest = Manifest(tmp_path / "manifest")
    assert len(manifest.groups()) == 2
    assert [bad.path for bad in manifest.damaged()] == [single]
    assert manifest.compact(NOTHING) == 4 * 2
    assert single.read_bytes() == b"what is left of it"
    assert len(manifest.groups()) == 2


def test_any_flipped_bit_is_an_error_or_harmless_never_a_crash(tmp_path: Path) -> None:
    """The data of every column has a checksum; the rest says what there is, or is metadata."""
    path = tmp_path / "slices" / "a.parquet"
    path.parent.mkdir()
    write_part(path, parts_of(SLICES, 4)["3.parquet"], SLICES)
    whole = path.read_bytes()
    expected = read_table(tmp_path, SLICES).rows
    rng = random.Random(0)
    damaged = 0
    for _ in range(400):
        content = bytearray(whole)
        content[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        found = read_table(tmp_path, SLICES)
        damaged += bool(found.damaged)
        assert found.damaged or len(found.rows) == len(expected)
    assert damaged > 50


def test_files_of_a_newer_format_are_read(tmp_path: Path) -> None:
    """Columns, tables and files that this version does not know are left alone."""
    write_parts(tmp_path / "manifest", 2)
    expected = rows_of(tmp_path / "manifest")
    for path in (tmp_path / "manifest").glob("*/*.parquet"):
        table = pq.ParquetFile(path).read()
        newer = table.append_column("mood", pa.array(["fine"] * len(table)))
        newer = newer.replace_schema_metadata({"lestd_manifest_format": "99"})
        pq.write_table(newer.select(newer.column_names[::-1]), path)
    (tmp_path / "manifest" / "moods").mkdir()
    pq.write_table(pa.table({"mood": ["fine"]}), tmp_path / "manifest" / "moods" / "a.parquet")
    assert rows_of(tmp_path / "manifest") == expected
