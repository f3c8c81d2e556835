"""One question to a run's manifest, in DuckDB, pandas and polars.

pip install pandas polars
python examples/query_manifest.py [DIRECTORY]
"""

from __future__ import annotations

import sys
from pathlib import Path

import duckdb
import polars as pl

import lestd

MODEL = Path(__file__).parent / "tiny-llama-wikitext2" / "model"


def main() -> None:
    """Ask which projection has the densest cores."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "examples-out") / "small"
    assert lestd.compress(MODEL, out, keep=0.6, executor="serial").complete

    manifest = lestd.Manifest(out / "manifest")
    slices = duckdb.from_arrow(manifest.slices())
    in_sql = dict(slices.aggregate("projection, avg(density)").order("projection").fetchall())
    print(f"duckdb: {in_sql}")

    frame = manifest.slices("pandas")
    in_pandas = frame.groupby("projection")["density"].mean().to_dict()
    print(f"pandas: {in_pandas}")

    table = manifest.slices("polars")
    means = table.group_by("projection").agg(pl.col("density").mean())
    in_polars = dict(zip(means["projection"], means["density"], strict=True))
    print(f"polars: {in_polars}")

    for projection, density in in_sql.items():
        assert abs(in_pandas[projection] - density) < 1e-9
        assert abs(in_polars[projection] - density) < 1e-9


if __name__ == "__main__":
    main()
