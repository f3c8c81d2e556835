"""docs/manifest.md says what the code does: its columns are ours, its examples run."""

import re
import shutil
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.cli import lestd
from support.paths import ROOT

from orchestrator.manifest import schemas
from orchestrator.manifest.manifest import MANY_PARTS, Manifest
from orchestrator.manifest.schemas import MANIFEST_FORMAT, TABLES, TableSpec

DOCS = ROOT / "docs" / "manifest.md"


def type_name(kind: pa.DataType) -> str:
    return f"list of {kind.value_type}" if pa.types.is_list(kind) else str(kind)


def section(spec: TableSpec) -> str:
    """What docs/manifest.md has of a table."""
    lines = [
        f"### `{spec.name}`: {spec.meaning}",
        "",
        f"Key: {', '.join(f'`{name}`' for name in spec.key)}. "
        f"Sorted by {', '.join(f'`{name}`' for name in spec.order)}.",
        "",
        "| column | type | unit | meaning |",
        "| --- | --- | --- | --- |",
    ]
    for column in spec.columns:
        meaning = column.meaning.replace("|", r"\|") + (" (*never null*)" * column.required)
        cells = (f"`{column.name}`", type_name(column.type), column.unit, meaning)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def test_the_columns_in_the_docs_are_those_of_the_tables() -> None:
    expected = "\n".join(section(spec) for spec in TABLES.values())
    assert DOCS.read_text().partition("## Columns\n")[2].partition("\n### ")[2] == expected[4:]


def test_numbers_in_the_docs_are_those_of_the_code() -> None:
    text = " ".join(DOCS.read_text().split())
    assert f"more than {MANY_PARTS} of them" in text
    assert f"This is format {MANIFEST_FORMAT}." in text
    assert schemas.RUNS.schema.metadata[b"lestd_manifest_format"] == b"%d" % MANIFEST_FORMAT


def test_files_carry_unit_and_meaning(tiny_llama: Path, tmp_path: Path) -> None:
    Manifest(tmp_path / "manifest").record_run({"invocation": "a"})
    schema = pq.ParquetFile(tmp_path / "manifest" / "runs" / "a.parquet").schema_arrow
    assert schema.field("seconds").metadata[b"unit"] == b"seconds"
    assert schema.field("seconds").metadata[b"meaning"] == b"wall time of the call"
    assert schema.metadata[b"lestd_table"] == b"runs"


def test_the_examples_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = lestd("compress", tiny_llama, "--keep", 0.5, "--out", "OUT", "--executor", "serial")
    assert done.code == 0, done.err
    examples = re.findall(r"```(\w+)\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert [kind for kind, _ in examples] == ["python", "python", "sql"]
    for kind, code in examples:
        if kind == "python":
            exec(code, {})
    found = duckdb.sql(examples[-1][1]).fetchall()
    rows = Manifest("OUT").slices().to_pylist()
    expected = {
        projection: (
            pytest.approx(sum(r["density"] for r in ours) / len(ours)),
            pytest.approx(sum(r["core_bytes"] for r in ours)),
        )
        for projection in "qkvo"
        if (ours := [r for r in rows if r["projection"] == projection])
    }
    assert {projection: tuple(figures) for projection, *figures in found} == expected
    # The layout that is described, and the model alone.
    for pattern in ("OUT/manifest/groups.parquet", "OUT/manifest/model.json"):
        assert Path(pattern).is_file()
    assert [*Path("OUT.run/manifest/groups").glob("*.parquet")]
    assert len(Manifest("OUT.run").groups()) == 4
    shutil.rmtree("OUT.run")
    assert len(Manifest("OUT").events()) == 4
