"""What a report gathers and embeds; the page itself is opened in tests/test_report_browser.py."""

import base64
import hashlib
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from cli import lestd
from manifests import at, call, evaluation, event, group, slices, write

from orchestrator.report_data import gather
from orchestrator.report_timeline import timeline

EVIL = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"


def run_of(directory: Path, layers: int = 6, done: int = 6, **tables: Any) -> Path:
    """A run of which `done` layers of `layers` are finished, by two workers."""
    given = {
        "groups": [group(layer, 32, 8, 2) for layer in range(done)],
        "slices": [row for layer in range(done) for row in slices(layer, 4, 2)],
        "runs": [call(0, "complete" if done == layers else "interrupted", layers)],
    }
    return write(directory, **(given | tables))


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


def test_the_summary_adds_up_what_the_rows_say(tmp_path: Path) -> None:
    data = gather(str(run_of(tmp_path / "run")))
    rows = [group(layer, 32, 8, 2) for layer in range(6)]
    summary = data.summary
    assert (summary["finished"], summary["tasks"], summary["state"]) == (6, 6, "complete")
    assert summary["stored_bytes"] == sum(row["stored_bytes"] for row in rows)
    assert summary["model_stored_bytes"] == 48 * 2**20 + summary["stored_bytes"]
    error = sum(row["relative_error"] ** 2 * row["squared_norm"] for row in rows)
    expected = math.sqrt(error / sum(row["squared_norm"] for row in rows))
    assert summary["relative_error"] == pytest.approx(expected)
    assert (summary["workers"], summary["nodes"]) == (2, ["node-0", "node-1"])
    planned = {row["what"]: (row["planned"], row["actual"]) for row in data.planned}
    assert planned["memory of a worker, at most"] == (4 * 2**30, 3 * 2**30)
    assert planned["decomposing, all workers"] == (900.0, sum(29 + n % 5 for n in range(6)))
    [q, k, *_] = data.projections
    heads = [row for layer in range(6) for row in slices(layer, 4, 2) if row["projection"] == "q"]
    assert (q["projection"], q["slices"], k["slices"]) == ("q", 24, 12)
    assert q["core_bytes"] == pytest.approx(sum(row["core_bytes"] for row in heads))
    error = sum(2 * row["relative_error"] ** 2 for row in heads)
    assert q["relative_error"] == pytest.approx(math.sqrt(error / 48))


@pytest.mark.parametrize("killed", [True, False])
def test_an_unfinished_run_says_how_far_it_is(tmp_path: Path, killed: bool) -> None:
    runs = [call(0, "running" if killed else "failed", 40)]
    run = run_of(tmp_path / "out.run", 40, 12, runs=runs)
    page = report(run, tmp_path / "page.html")
    assert "12 of 40 layers done" in page.text
    assert ("it was killed" in page.text) == killed
    assert "known when all layers are done" in page.text


def test_a_run_without_a_finished_layer_has_a_page(tmp_path: Path) -> None:
    runs = [call(0, "running", 40)]
    page = report(write(tmp_path / "run", runs=runs), tmp_path / "page.html")
    assert "0 of 40 layers done" in page.text
    assert "No layer is finished yet." in page.text


@pytest.mark.parametrize("kind", ["model", "run"])
def test_manifests_of_the_first_format_have_a_report(tmp_path: Path, kind: str) -> None:
    old = Path(__file__).parent / "data" / "manifest-v1" / kind
    (tmp_path / "manifest").symlink_to(old)
    page = report(tmp_path, tmp_path / "page.html")
    assert "layers done" in page.text
    assert "This manifest has no singular values" in page.text
    assert "not recorded in this manifest" in page.text


def test_a_group_that_was_encoded_twice_counts_once(tmp_path: Path) -> None:
    again = group(2, 32, 8, 2, task_id="again", started_at=at(500), stored_bytes=7)
    groups = [*(group(layer, 32, 8, 2) for layer in range(6)), again]
    data = gather(str(run_of(tmp_path / "run", groups=groups)))
    assert [row["layer"] for row in data.layers] == list(range(6))
    assert data.layers[2]["stored_bytes"] == 7
    assert not [row for row in data.heads if row["layer"] == 2]  # Those are of the other encoding.
    assert len(data.timeline) == 7


def test_a_worker_computes_one_task_at_a_time(tmp_path: Path) -> None:
    """Three tasks that are read at once are computed one after the other."""
    groups = [group(n, 32, 8, 1, started_at=at(2.0 * n)) for n in range(3)]
    rows = timeline(groups, [])
    seconds = [
        {name: (row[name] - at(0)).total_seconds() for name in row if "_at" in name} for row in rows
    ]
    # 2 s of reading; 29, 30 and 31 s of computing; 3 s of writing.
    assert [one["read_at"] for one in seconds] == [0, 2, 4]
    assert [one["computed_at"] for one in seconds] == [2, 31, 61]
    assert [one["written_at"] for one in seconds] == [31, 61, 92]
    assert [one["ended_at"] for one in seconds] == [34, 64, 95]


def test_lost_attempts_have_their_start_their_end_and_their_reason(tmp_path: Path) -> None:
    events = [
        event(3, "started", 5, worker="node-1:7"),
        event(31, "retried", 5, error_type="WorkerDied", message="the worker died"),
        event(33, "started", 5, attempt=2),
        event(90, "failed", 9, error_type="NodeLost", message="gave up", attempt=3),
    ]
    data = gather(str(run_of(tmp_path / "run", events=events)))
    one, other = data.lost
    assert (one["started_at"], one["at"], one["worker"]) == (at(3), at(31), "node-1:7")
    assert (one["layer"], one["error_type"]) == (5, "WorkerDied")
    assert (other["started_at"], other["kind"], other["worker"]) == (None, "failed", None)
    assert (data.summary["retried"], data.summary["failed"]) == (1, 1)


def test_the_latest_evaluation_of_each_side_is_compared(tmp_path: Path) -> None:
    rows = [
        evaluation(False, "ppl", 50.0, at=at(1), evaluation_id="old"),
        evaluation(False, "ppl", 40.0, at=at(2)),
        evaluation(True, "ppl", 44.0, at=at(3)),
        evaluation(True, "ppl", 60.0, at=at(4), settings='{"window": 9}', evaluation_id="other"),
    ]
    found = gather(str(run_of(tmp_path / "run", evaluations=rows))).evaluations
    assert [(row["before"], row["after"]) for row in found] == [(40.0, 44.0), (None, 60.0)]
    assert found[0]["change"] == pytest.approx(0.1)


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
    page = report(run, tmp_path / "page.html")
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
    groups = [group(layer, 32, 8, 2, group=f"{EVIL}{layer}", worker=EVIL) for layer in range(6)]
    events = [event(3, "failed", 5, group=EVIL, error_type=EVIL, message=EVIL, worker=EVIL)]
    runs = [call(0, "complete", 6, model=EVIL, family=EVIL)]
    judged = [evaluation(True, EVIL, 1.0, task=EVIL, filter=EVIL)]
    run = run_of(tmp_path / "run", groups=groups, events=events, runs=runs, evaluations=judged)
    plain = report(run_of(tmp_path / "plain", events=events[:0]), tmp_path / "plain.html")
    page = report(run, tmp_path / "page.html")
    assert len(page.scripts) == len(plain.scripts) == 4
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert page.text.count(EVIL) > 5
    assert table(page, "lost")[0]["message"] == EVIL
    assert table(page, "layers")[0]["group"] == f"{EVIL}0"


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
