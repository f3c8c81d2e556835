"""What a report gathers and embeds; test_report_browser.py opens the page."""

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.cli import lestd
from support.manifests import at, call, evaluation, event, group, run_of, slices, write

from orchestrator.manifest.schemas import STAGES
from orchestrator.report.data import gather

EVIL = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Scripts, and the tags and attributes that are really there."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.lasttag == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data
        elif self.lasttag != "style":
            self.text += data


def report(run: Path, out: Path) -> Page:
    finished = lestd("report", run, "--out", out)
    assert finished.code == 0, finished.err
    return Page(out.read_text(encoding="utf-8"))


def table(page: Page, name: str) -> list[dict[str, Any]]:
    """Rows of an embedded table."""
    [content] = [
        json.loads(script)
        for script, (_, attrs) in zip(
            page.scripts, [one for one in page.tags if one[0] == "script"], strict=True
        )
        if attrs.get("type") == "application/json"
    ]
    found = content["tables"][name]
    names = [column["name"] for column in found["columns"]]
    return [dict(zip(names, row, strict=True)) for row in zip(*found["data"], strict=True)]


@pytest.mark.parametrize("killed", [True, False])
def test_an_unfinished_run_says_how_far_it_is(tmp_path: Path, killed: bool) -> None:
    runs = [call(0, "running" if killed else "failed", 40)]
    run = run_of(tmp_path / "out.run", 40, 12, runs=runs)
    page = report(run, tmp_path / "page.html")
    assert "12 of 40 layers done" in page.text
    assert ("the last call was killed" in page.text) == killed
    assert "known when all layers are done" in page.text


def test_a_call_that_was_killed_is_counted_and_has_no_time(tmp_path: Path) -> None:
    """Killed after 200 s; the same again a day later, which took 300 s."""
    day = 86_400
    groups = [group(layer, 32, 8, 2) for layer in range(2)]
    groups += [group(n, 32, 8, 2, started_at=at(day + 50 * n), worker="n:1") for n in range(2, 6)]
    times = {"started_at": at(day), "ended_at": at(day + 300), "seconds_assemble": 20.0}
    runs = [call(0, "running", 6), call(1, "complete", 6, **times)]
    run = run_of(tmp_path / "run", groups=groups, runs=runs)
    data = gather(str(run))
    assert [one["state"] for one in data.calls] == ["killed", "complete"]
    summary = data.summary
    assert (summary["calls"], summary["ended_calls"], summary["killed_calls"]) == (2, 1, 1)
    assert summary["seconds"] == 300.0
    # Layer 2 begins at 100 s of the second call; layer 5 at 250 s, and it takes 34 s.
    parts = {row["part"]: row["seconds"] for row in data.wall}
    last = sum(group(5, 32, 8, 2)[f"seconds_{stage}"] for stage in STAGES)
    assert parts == pytest.approx({"tasks": 150 + last, "assemble": 20, "rest": 130 - last})
    page = report(run, tmp_path / "page.html")
    assert "wall time of 1 call that ended; 1 has no end" in page.text
    assert "nothing was lost" not in page.text
    assert "1 call was killed" in page.text
    assert "Of 300.0 s wall time" in page.text


@pytest.mark.parametrize("table_name", ["groups", "slices"])
def test_a_complete_run_that_lost_rows_is_incomplete(tmp_path: Path, table_name: str) -> None:
    module = json.dumps({"modules": {"self_attn": {"slices": 12}}})
    groups = [group(layer, 32, 8, 2, format=module) for layer in range(6)]
    given = {"groups": groups, "slices": [row for n in range(6) for row in slices(n, 4, 2)]}
    assert gather(str(run_of(tmp_path / "whole", **given))).summary["state"] == "complete"
    given[table_name] = [row for row in given[table_name] if row["layer"] != 4]
    run = run_of(tmp_path / "run", **given)
    bad = run / "manifest" / table_name / "bad.parquet"
    bad.parent.mkdir()
    bad.write_bytes(b"hello")
    said = "1 layer's row is damaged; run the same lestd compress again"
    summary = gather(str(run)).summary
    assert (summary["state"], summary["state_reason"]) == ("incomplete", said)
    page = report(run, tmp_path / "page.html")
    assert f"incomplete: {said}" in page.text
    out = tmp_path / "report.md"
    finished = lestd("report", run, "--format", "md", "--out", out)
    assert f"{bad} is damaged and left out" in finished.err
    text = out.read_text(encoding="utf-8")
    assert f"incomplete: {said}" in text
    assert f"- run/manifest/{table_name}/bad.parquet" in text
    assert str(tmp_path) not in text


def test_a_run_without_a_finished_layer_has_a_page(tmp_path: Path) -> None:
    runs = [call(0, "running", 40)]
    page = report(write(tmp_path / "run", runs=runs), tmp_path / "page.html")
    assert "0 of 40 layers done" in page.text
    assert "No layer is finished yet." in page.text


def test_a_run_without_calls_and_spectra_has_a_page(tmp_path: Path) -> None:
    bare = group(0, 32, 8, 1, singular_values_1=None, singular_values_2=None)
    page = report(write(tmp_path / "run", groups=[bare]), tmp_path / "page.html")
    assert "layers done" in page.text
    assert "no singular values" in page.text
    assert "not recorded in this manifest" in page.text


def test_evaluations_say_what_they_were_measured_on(tmp_path: Path) -> None:
    def evaluated(windows: int, seconds: float, value: float, **more: Any) -> list[dict[str, Any]]:
        settings = {"text": "t.txt", "windows": windows, "window": 512} | more.pop("settings", {})
        more |= {"settings": json.dumps(settings), "samples": windows, "tokens": windows * 511}
        names = {"time": at(seconds), "evaluation_id": f"{seconds}", **more}
        return [
            evaluation(False, "ppl", 40.0, **names),
            evaluation(True, "ppl", value, **names),
        ]

    shots = {"task": "arc", "samples": 1172, "fewshot": 25, "time": at(0)}
    rows = [
        *(evaluation(compressed, "acc", 0.5, **shots) for compressed in (False, True)),
        *evaluated(718, 1, 44.0),
        *evaluated(20, 2, 60.0),
        *evaluated(718, 3, 45.0, model_id="made anew"),
        *evaluated(20, 4, 61.0, settings={"threads": 8}),
    ]
    run = run_of(tmp_path / "run", evaluations=rows)
    data = gather(str(run))
    twenty = "t.txt, the first 20 windows of 512 tokens, 10,220 tokens predicted"
    assert [(row["measured_on"], row["after"]) for row in data.evaluations] == [
        ("1,172 samples, 25-shot", 0.5),
        ("t.txt, the first 718 windows of 512 tokens, 366,898 tokens predicted", 45.0),
        (f"{twenty}, threads null", 60.0),
        (f"{twenty}, threads 8", 61.0),
    ]
    card = report(run, tmp_path / "page.html").text.partition("In short")[0]
    assert "61.0000" in card
    assert twenty in card


def test_a_run_directory_tells_of_the_evaluations_of_its_model(tmp_path: Path) -> None:
    run = run_of(tmp_path / "out.run")
    write(tmp_path / "out", evaluations=[evaluation(True, "ppl", 44.0)])
    assert gather(str(run)).evaluations[0]["after"] == 44.0
    page = report(run, tmp_path / "page.html")
    assert "No evaluation is recorded" not in page.text


def test_without_an_evaluation_the_page_names_the_command(tmp_path: Path) -> None:
    page = report(run_of(tmp_path / "out.run"), tmp_path / "page.html")
    command = f"lestd evaluate {tmp_path / 'out'} --against someone/a-model-7b --text FILE"
    assert command in page.text


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run")
    bad = run / "manifest" / "groups" / "bad.parquet"
    bad.parent.mkdir()
    bad.write_bytes(b"hello")
    finished = lestd("report", run, "--out", tmp_path / "page.html")
    assert f"{bad} is damaged and left out: " in finished.err
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert str(bad) in page.text
    assert "6 of 6 layers done" in page.text


def test_embedded_numbers_are_the_manifests(tmp_path: Path) -> None:
    page = report(run_of(tmp_path / "run"), tmp_path / "page.html")
    expected = [row for layer in range(6) for row in slices(layer, 4, 2)]
    found = table(page, "heads")
    assert [(r["layer"], r["projection"], r["head"]) for r in found] == [
        (r["layer"], r["projection"], r["head"]) for r in expected
    ]
    for name in ("density", "core_bytes", "relative_error"):
        assert [row[name] for row in found] == pytest.approx([r[name] for r in expected], rel=1e-6)
    shares = [row["squared_energy"] / row["squared_norm"] for row in expected]
    assert [row["energy_share"] for row in found] == pytest.approx(shares, rel=1e-6)


def test_a_spectrum_is_thinned_but_keeps_its_ends_and_its_rank(tmp_path: Path) -> None:
    whole = group(0, 5000, 8, 1, R1=1234)
    page = report(run_of(tmp_path / "run", groups=[whole]), tmp_path / "page.html")
    points = [row for row in table(page, "spectra") if row["mode"] == 1]
    assert len(points) < 100
    assert {1, 1234, 5000} <= {row["index"] for row in points}
    for point in points:
        expected = whole["singular_values_1"][point["index"] - 1]
        assert point["singular_value"] == pytest.approx(expected, rel=1e-5)
    assert [row["index"] for row in table(page, "spectra") if row["mode"] == 2] == list(range(1, 9))


def test_names_and_messages_stay_text(tmp_path: Path) -> None:
    groups = [group(layer, 32, 8, 2, block=f"layers.{layer}", worker=EVIL) for layer in range(6)]
    events = [event(3, "failed", 5, error_type=EVIL, message=EVIL, worker=EVIL)]
    runs = [call(0, "complete", 6, model=EVIL, family=EVIL)]
    evaluated = [evaluation(True, EVIL, 1.0, task=EVIL, answer_filter=EVIL)]
    run = run_of(tmp_path / "run", groups=groups, events=events, runs=runs, evaluations=evaluated)
    plain = report(run_of(tmp_path / "plain", events=events[:0]), tmp_path / "plain.html")
    page = report(run, tmp_path / "page.html")
    assert len(page.scripts) == len(plain.scripts) == 5
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert page.text.count(EVIL) > 5
    assert table(page, "lost")[0]["message"] == EVIL
    assert table(page, "layers")[0]["worker"] == EVIL


def test_the_policy_allows_these_scripts_and_no_network(tmp_path: Path) -> None:
    page = report(run_of(tmp_path / "run"), tmp_path / "page.html")
    [policy] = [
        str(attrs["content"])
        for tag, attrs in page.tags
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    scripts = page.scripts[1:]  # The first one holds data.
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert hashes == allowed
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy
    for tag, attrs in page.tags:
        for name in ("src", "href", "action"):
            assert (attrs.get(name) or "data:").startswith("data:"), (tag, attrs)


def test_same_manifest_same_page(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run")
    report(run, tmp_path / "one.html")
    report(run, tmp_path / "two.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_a_missing_plotly_ends_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    finished = lestd("report", run_of(tmp_path / "run"), "--out", tmp_path / "page.html")
    assert finished.code == 2
    assert 'pip install "lestd[report]"' in finished.err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("wrong", ["manifest", "directory"])
def test_what_is_not_there_is_named(tmp_path: Path, wrong: str) -> None:
    run = tmp_path / "nothing" if wrong == "manifest" else run_of(tmp_path / "run")
    out = tmp_path / "page.html" if wrong == "manifest" else tmp_path / "no" / "page.html"
    finished = lestd("report", run, "--out", out)
    assert finished.code == 2
    assert str(tmp_path / "nothing" if wrong == "manifest" else tmp_path / "no") in finished.err


def test_the_largest_models_have_a_page(tmp_path: Path) -> None:
    """400 layers of 128 heads: a row of numbers for each of 204,800 slices."""
    layers = 400
    groups = [group(layer, 256, 64, 16) for layer in range(layers)]
    heads = [row for layer in range(layers) for row in slices(layer, 128, 128)]
    run = run_of(tmp_path / "run", groups=groups, slices=heads, runs=[call(0, "complete", layers)])
    page = report(run, tmp_path / "page.html")
    assert "400 of 400 layers done" in page.text
    assert len(table(page, "heads")) == 204_800
    assert (tmp_path / "page.html").stat().st_size < 30e6


def test_a_report_in_markdown_needs_no_plotly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    out = tmp_path / "report.md"
    finished = lestd("report", run_of(tmp_path / "run"), "--format", "md", "--out", out)
    assert finished.code == 0, finished.err
    assert out.read_text(encoding="utf-8").startswith("#")
