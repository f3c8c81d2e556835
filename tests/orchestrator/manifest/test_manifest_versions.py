"""Files of the manifest's first format, which are read for ever."""

import hashlib
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.paths import TESTS

from orchestrator.manifest.manifest import Manifest
from orchestrator.manifest.schemas import TABLES

V1 = TESTS / "data" / "manifest-v1"


def test_columns_are_only_added_at_the_end() -> None:
    for name in ("groups", "slices", "curves", "events"):
        path = next(iter([*V1.glob(f"*/{name}.parquet"), *V1.glob(f"*/{name}/*.parquet")]))
        older = pq.ParquetFile(path).schema_arrow
        newer = TABLES[name].schema
        assert [*older.names] == newer.names[: len(older.names)]
        assert [field.type for field in older] == [newer.field(n).type for n in older.names]


@pytest.mark.parametrize("kind", ["run", "model"])
def test_files_of_format_1_are_read(tmp_path: Path, kind: str) -> None:
    """Against pyarrow's own reader; what they do not have is null."""
    shutil.copytree(V1 / kind, tmp_path / "manifest")
    manifest = Manifest(tmp_path)
    assert not manifest.damaged()
    for name, spec in TABLES.items():
        paths = [*V1.glob(f"{kind}/{name}.parquet"), *sorted(V1.glob(f"{kind}/{name}/*.parquet"))]
        expected = [one for path in paths for one in pq.ParquetFile(path).read().to_pylist()]
        found = manifest.table(name)
        assert found.schema == spec.schema
        assert len(found) == len(expected)
        for one in found.to_pylist():
            (stated,) = (e for e in expected if e.items() <= one.items())
            assert {one[column] for column in one.keys() - stated.keys()} <= {None}
            expected.remove(stated)
    assert len(manifest.slices()) == 4 * 32
    assert len(manifest.curves() if kind == "model" else manifest.events()) > 0


def test_a_run_of_format_1_is_continued(tmp_path: Path) -> None:
    """Its rows are trusted where the payload is what they state."""
    shutil.copytree(V1 / "run", tmp_path / "manifest")
    payloads = tmp_path / "payloads"
    payloads.mkdir()
    tasks = []
    for path in sorted((tmp_path / "manifest" / "groups").iterdir()):
        table = pq.ParquetFile(path).read()
        content = f"payload of {path.stem}".encode()
        (payloads / table["payload"][0].as_py()).write_bytes(content)
        new = {"payload_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, one in new.items():
            index = table.column_names.index(name)
            table = table.set_column(index, table.field(name), [[one]])
        pq.write_table(table, path)
        tasks.append(path.stem)
    assert len(tasks) == 4
    manifest = Manifest(tmp_path / "manifest")
    assert set(manifest.completed(tasks, payloads)) == {*tasks}
    next(payloads.glob(f"{tasks[0]}-*")).write_bytes(b"another")
    assert set(manifest.completed(tasks, payloads)) == {*tasks[1:]}
    before = manifest.groups()
    assert manifest.compact(lambda: None) == 4 + 4 + 4
    assert manifest.groups() == before
    assert set(manifest.completed(tasks, payloads)) == {*tasks[1:]}
