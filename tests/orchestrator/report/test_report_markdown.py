"""The report as Markdown, read back by a Markdown parser: its figures are the manifest's."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from markdown_it import MarkdownIt
from support.cli import lestd
from support.families import save_tiny

from orchestrator.console.markdown import cell
from orchestrator.report.data import gather
from orchestrator.report.markdown import render

Table = list[list[str]]


def shown(token: Any) -> str:
    """What a reader sees of a piece of text; HTML and emphasis in it are not seen as text."""
    text = (c.content for c in token.children if c.type in ("text", "text_special", "softbreak"))
    return "".join(text)


def tables(text: str) -> dict[str, Table]:
    """Rows of the first table below each heading, the one of the columns' names first."""
    found: dict[str, Table] = {}
    heading, kind, row = "", "", []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type in ("heading_open", "th_open", "td_open"):
            kind = token.type
        elif token.type == "tr_open":
            row = []
        elif token.type == "tr_close":
            found.setdefault(heading, []).append(row)
        elif token.type == "inline" and kind == "heading_open":
            heading = shown(token)
        elif token.type == "inline" and kind:
            row.append(shown(token))
        elif token.type in ("heading_close", "th_close", "td_close"):
            kind = ""
    return found


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    model = save_tiny("llama-gqa", root / "model")
    (root / "run.yaml").write_text("rank_step: 4\n")
    options = ("--metric", "weight", "--keep", 0.4, "--executor", "serial")
    options += ("--config", root / "run.yaml")
    assert lestd("compress", model, "--out", root / "out", *options).code == 0
    return root / "out"


def test_figures_are_the_manifests(out: Path) -> None:
    groups = pq.read_table(out / "manifest" / "groups.parquet").to_pylist()
    slices = pq.read_table(out / "manifest" / "slices.parquet").to_pylist()
    found = tables(render(gather(str(out))))
    header, *rows = found["Layers"]
    assert rows == [
        [
            str(row["layer"]),
            "attention",
            str(row["dense_bytes"]),
            str(row["stored_bytes"]),
            f"{row['R1']} x {row['R2']}",
            f"{row['density']:.4f}",
            row["codec"],
            f"{row['relative_error']:.4f}",
        ]
        for row in groups
    ]
    assert len(header) == 8
    dense, stored = (sum(row[key] for row in groups) for key in ("dense_bytes", "stored_bytes"))
    assert found["Sizes"][1] == [
        "weights in scope",
        f"{dense / 2**20:,.2f} MiB",
        f"{stored / 2**20:,.2f} MiB",
        f"{stored / dense:.4f}",
    ]
    peak = max(row["peak_memory_bytes"] for row in groups)
    actual = {row[0]: row[2] for row in found["Planned and actual"]}
    assert actual["memory of a worker, at most"] == f"{peak / 2**20:,.2f} MiB"
    assert [row[0] for row in found["Projections"][1:]] == ["q", "k", "v", "o"]
    ranks = {row["block"]: row["R1"] * row["R2"] for row in groups}
    for projection, heads, nnz, density, core_bytes, error in found["Projections"][1:]:
        own = [row for row in slices if row["projection"] == projection]
        elements = sum(ranks[row["block"]] for row in own)
        norm = sum(row["squared_norm"] for row in own)
        squares = sum(row["relative_error"] ** 2 * row["squared_norm"] for row in own)
        count = sum(row["nnz"] for row in own)
        assert [heads, nnz, density] == [str(len(own)), str(count), f"{count / elements:.4f}"]
        assert float(core_bytes) == pytest.approx(sum(r["core_bytes"] for r in own), abs=0.5)
        assert error == f"{(squares / norm) ** 0.5:.4f}"
    seconds = sum(row["seconds_stage2"] for row in groups)
    assert ["stage2", f"{seconds:.1f}"] in found["Time"]
    assert "Evaluation" not in found
    assert "Retries and failures" not in found


def test_the_model_card_has_the_same_tables(out: Path) -> None:
    card, report = (out / "README.md").read_text(), render(gather(str(out)))
    assert tables(card)["Layers"] == tables(report)["Layers"]
    assert tables(card)["Sizes"][:2] == tables(report)["Sizes"][:2]
    # What a run took is not decided by its input, so the card says nothing of it.
    for word in ("seconds", "wall time", "worker", "hardware"):
        assert word in report
        assert word not in card
    total = json.loads((out / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert tables(card)["Sizes"][2][2] == f"{total / 2**20:,.2f} MiB"


NASTY = "a | b\nkilled by *signal* 9 `x|y` <class 'Foo'> \\| __init__ of a_b_c [1](http://x) |"


@pytest.mark.parametrize("text", [NASTY, "", "\\", "|", "a\\|b", "_a_", "**b**", "<!-- c", "\r\n|"])
def test_a_cell_shows_its_text_and_nothing_else(text: str) -> None:
    table = f"# T\n\n| a | b |\n|---|---|\n| {cell(text)} | end |\n"
    assert tables(table)["T"][1] == [" ".join(text.split()), "end"]


def test_what_happened_and_what_was_measured_is_told(out: Path) -> None:
    at = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
    lost = {"time": at, "block": None, "task_id": "t1", "attempt": 1, "kind": "retried"}
    lost |= {"error_type": "NodeLost", "message": NASTY}
    metric = {
        "task": "wiki|text",
        "metric": "word_perplexity",
        "answer_filter": "none",
        "fewshot": None,
    }
    metric |= {"before": 20.0, "after": 25.0, "change": 0.25, "before_stderr": None}
    metric |= {
        "after_stderr": None,
        "before_model": "/home/me/dense",
        "after_model": "/home/me/o|ut",
    }
    metric |= {"measured_on": "t|xt, the first 20 windows"}
    accuracy = metric | {"metric": "acc", "answer_filter": "strict", "fewshot": 5, "before": 0.5}
    accuracy |= {"after": None, "after_model": None, "before_stderr": 0.03, "change": None}
    accuracy |= {"measured_on": "5-shot"}
    data = gather(str(out))
    told = {"model": "/home/me/some-model", "state": "running", "tasks": 9, "retried": 1}
    data = replace(
        data,
        summary=data.summary | told | {"nodes": ["a", "b"], "ended_at": None},
        lost=[lost],
        evaluations=[metric, accuracy],
        damaged=[{"path": "/home/me/m", "name": "m/x|.parquet", "reason": "it is *not* Parquet"}],
    )
    text = render(data)
    assert "/home/me" not in text
    found = tables(text)
    facts = dict(found["me/some-model, compressed with LeSTD"][1:])
    assert facts["source"] == "me/some-model"
    assert facts["layers"] == "2 of 9"
    assert facts["worker processes"] == "1 on 2 nodes"
    assert facts["retries"] == "1"
    assert "finished at" not in facts
    assert "the layers that are finished" in text
    assert found["Retries and failures"][1] == [
        *("2026-01-02 03:04 UTC", "t1", "1", "retried", "NodeLost"),
        " ".join(NASTY.split()),
    ]
    told_of = "t|xt, the first 20 windows"
    assert found["Evaluation"][1:] == [
        ["wiki|text", "word_perplexity", told_of, "o|ut", "20.0000", "25.0000", "+25.00%"],
        ["wiki|text", "acc, strict", "5-shot", "dense", "0.5000 ± 0.0300", "", ""],
    ]
    assert "m/x\\|.parquet: it is \\*not\\* Parquet" in text


def test_a_run_that_has_nothing_yet_is_reported(out: Path, tmp_path: Path) -> None:
    events = tmp_path / "run" / "manifest" / "events"
    events.mkdir(parents=True)
    for part in (out.with_name("out.run") / "manifest" / "events").iterdir():
        (events / part.name).write_bytes(part.read_bytes())
    found = tables(render(gather(str(tmp_path / "run"))))
    assert dict(found["A model compressed with LeSTD"][1:])["layers"] == "0"
    assert "Layers" not in found


def test_the_whole_model_is_among_the_sizes_where_it_is_known(out: Path) -> None:
    data = gather(str(out))
    data.summary.update(model_bytes=4 * 2**20, model_stored_bytes=3 * 2**20)
    assert tables(render(data))["Sizes"][2] == ["whole model", "4.00 MiB", "3.00 MiB", "0.7500"]
