"""The report of a real run in a real browser: every control, every table, no network."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import EXAMPLE
from support.cli import lestd
from support.manifests import call, evaluation, event, group, slices, write

from orchestrator.report.data import gather
from orchestrator.report.html import render

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")

OPTIONS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
EVIL = "</script><script>document.title='taken'</script><b>bold</b><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, compressed and evaluated before and after by the command line."""
    directory = tmp_path_factory.mktemp("report")
    out, text = directory / "small", directory / "text.txt"
    text.write_bytes((EXAMPLE / "wikitext-2-test.txt").read_bytes()[:4000])
    model = EXAMPLE / "model"
    for command in (
        ("compress", model, "--keep", 0.6, "--out", out, "--executor", "serial"),
        ("evaluate", out, "--against", model, "--text", text, "--executor", "serial"),
        ("report", out, "--out", directory / "report.html"),
    ):
        finished = lestd(*command)
        assert finished.code == 0, finished.err
    return directory


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all that a run may have: shared heads, losses, two calls, hostile names."""
    directory = tmp_path_factory.mktemp("made-up")
    names = {"worker": EVIL, "node": EVIL}
    layers = [layer for layer in range(20) if layer != 3]
    rows = [group(layer, 64, 16, 3, **(names if layer == 7 else {})) for layer in layers]
    lost = {"error_type": "WorkerDied", "message": EVIL}
    started = event(3, "started", 5, worker=rows[0]["worker"])
    write(
        directory,
        groups=rows,
        slices=[row for layer in layers for row in slices(layer, 8, 2)],
        runs=[call(0, "interrupted", 20, model=EVIL), call(1, "running", 20, model=EVIL)],
        events=[started, event(31, "retried", 5, **lost), event(90, "failed", 6, **lost)],
        evaluations=[evaluation(False, EVIL, 40.0), evaluation(True, EVIL, 44.0)],
    )
    page = directory / "report.html"
    page.write_text(render(gather(str(directory))), encoding="utf-8")
    return directory


Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=[*OPTIONS, *QUIET])
        yield chromium
        chromium.close()


@dataclass
class Heard:
    """What pages said and asked for since somebody looked."""

    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def pages(browser: Any) -> tuple[Open, Heard]:
    """Opens a file once for each width and scheme: a page of some MB takes seconds to draw."""
    heard = Heard()

    @cache
    def open_file(path: Path, width: int = 1280, scheme: str = "dark") -> Any:
        phone = width < 600
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            has_touch=phone,
            is_mobile=phone,
            accept_downloads=True,
        )
        context.set_default_timeout(15_000)
        page = context.new_page()
        page.on("console", lambda message: heard.said.append(message.text))
        page.on("pageerror", lambda error: heard.said.append(str(error)))
        context.on("request", lambda request: heard.asked.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-drawn]", state="attached")
        return page

    return open_file, heard


@pytest.fixture
def open_page(pages: tuple[Open, Heard]) -> Iterator[Open]:
    """Open a file; at the end no error was said, and nothing but files was asked for."""
    open_file, heard = pages
    heard.asked.clear()
    yield open_file
    assert heard.said == []
    assert {url.partition(":")[0] for url in heard.asked} <= {"file", "blob"}
    assert {Path(url).name for url in heard.asked if url.startswith("file:")} <= {"report.html"}


def manifest(run: Path, name: str) -> pa.Table:
    """A table of the compressed model's manifest, read without lestd."""
    return pq.read_table(run / "small" / "manifest" / f"{name}.parquet", partitioning=None)


# Words of headers, and numbers, that are drawn on two lines.
BROKEN = """() => [...document.querySelectorAll('.wide thead th, .wide td.number, .wide tbody th')]
  .flatMap((cell) => {
    const text = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT).nextNode();
    if (!text) return [];
    const whole = cell.matches('.number, thead th') ? [text.data.trim()] : text.data.split(/\\s+/);
    return whole.filter((word) => {
      const range = document.createRange();
      range.setStart(text, text.data.indexOf(word));
      range.setEnd(text, text.data.indexOf(word) + word.length);
      return new Set([...range.getClientRects()].map((one) => one.top)).size > 1;
    });
  })"""


def heat_map(page: Any) -> dict[str, list[list[float | None]]]:
    """What is drawn of the heads, by the letter of the projection."""
    script = """() => {
      const plot = document.querySelector('[data-figure="heads"] .plot');
      const titles = plot.layout.annotations.slice(1).map((one) => one.text.match(/<b>(.)</)[1]);
      return Object.fromEntries(plot.data.map((trace, index) => [titles[index], trace.z]));
    }"""
    return dict(page.evaluate(script))


def test_heat_maps_show_what_the_manifest_says(run: Path, open_page: Open) -> None:
    page = open_page(run / "report.html")
    rows = manifest(run, "slices").to_pylist()
    for row in rows:
        row["energy_share"] = row["squared_energy"] / row["squared_norm"]
    for metric in ("relative_error", "energy_share", "density"):
        page.check(f'input[value="{metric}"]')
        drawn = heat_map(page)
        assert set(drawn) == {"Q", "K", "V", "O"}
        for row in rows:
            found = drawn[row["projection"].upper()][row["layer"]][row["head"]]
            assert found == pytest.approx(row[metric], rel=1e-6)
    assert sum(len(line) for lines in drawn.values() for line in lines) == len(rows)


def test_cards_and_figures_of_layers_say_what_the_manifest_says(run: Path, open_page: Open) -> None:
    page = open_page(run / "report.html")
    groups = manifest(run, "groups").to_pylist()
    cards = page.inner_text(".cards")
    stored, dense = (sum(row[name] for row in groups) for name in ("stored_bytes", "dense_bytes"))
    assert f"{dense / 2**20:.2f} MiB → {stored / 2**20:.2f} MiB" in cards
    error = sum(row["squared_error"] for row in groups) / sum(row["squared_norm"] for row in groups)
    assert f"{error**0.5:.4f}" in cards
    script = """(name) => document.querySelector(`[data-figure="${name}"] .plot`).data
      .map((trace) => [...trace.y])"""
    [errors] = page.evaluate(script, "errors")
    assert errors == pytest.approx([row["relative_error"] for row in groups], rel=1e-6)
    dense_drawn, stored_drawn, budgets = page.evaluate(script, "bytes")
    for drawn, name in (
        (dense_drawn, "dense_bytes"),
        (stored_drawn, "stored_bytes"),
        (budgets, "byte_budget"),
    ):
        assert [kib * 1024 for kib in drawn] == pytest.approx([row[name] for row in groups])


def test_evaluations_stand_before_and_after(run: Path, open_page: Open) -> None:
    paths = (run / "small" / "manifest" / "evaluations").glob("*.parquet")
    rows = [row for path in paths for row in pq.ParquetFile(path).read().to_pylist()]
    assert {row["compressed"] for row in rows} == {True, False}
    page = open_page(run / "report.html")
    for metric in {row["metric"] for row in rows}:
        values = {row["compressed"]: row["value"] for row in rows if row["metric"] == metric}
        line = page.inner_text(f"#quality tr:has-text('{metric}')")
        assert f"{values[False]:,.4f}" in line
        assert f"{values[True]:,.4f}" in line


def test_a_csv_file_has_the_rows_of_the_manifest(run: Path, open_page: Open) -> None:
    page = open_page(run / "report.html")
    with page.expect_download() as download:
        page.click('[data-file="heads"] .csv')
    assert download.value.suggested_filename == "heads.csv"
    text = Path(download.value.path()).read_text(encoding="utf-8")
    found = list(csv.DictReader(io.StringIO(text)))
    expected = manifest(run, "slices").to_pylist()
    assert len(found) == len(expected) == 128
    rows = {(int(r["layer"]), r["projection"], int(r["head"])): r for r in found}
    for row in expected:
        one = rows[row["layer"], row["projection"], row["head"]]
        assert int(one["nnz"]) == row["nnz"]
        for name in ("density", "core_bytes", "relative_error"):
            assert float(one[name]) == pytest.approx(row[name], rel=1e-6)


@pytest.mark.parametrize(
    ("which", "width", "scheme"),
    [
        pytest.param("real", 1280, "dark", marks=pytest.mark.slow),
        ("made up", 390, "light"),
    ],
)
def test_every_control_and_every_table_opens(
    run: Path, made_up: Path, open_page: Open, which: str, width: int, scheme: str
) -> None:
    page = open_page((run if which == "real" else made_up) / "report.html", width, scheme)
    plots = page.locator("figure[data-figure]").count()
    assert page.locator("figure .plot .main-svg").count() >= plots >= 6
    for control in page.locator("input[type=radio]").all():
        control.check()
    for control in page.locator("select").all():
        values = control.locator("option").evaluate_all("all => all.map((one) => one.value)")
        for value in [*values[:3], values[-1]]:
            control.select_option(value)
    for numbers in page.locator(".numbers").all():
        button = numbers.locator(".csv")
        below = "(one) => one.offsetTop"
        before = button.evaluate(below)
        numbers.locator("summary").click()
        assert button.evaluate(below) == before
        aligned = """({ rows }) => [...rows[0].cells].every((head, place) =>
          getComputedStyle(head).textAlign === getComputedStyle(rows[1].cells[place]).textAlign)"""
        assert numbers.locator("table").evaluate(aligned)
        head = numbers.locator("th button").first
        head.click()
        head.click()
        assert numbers.locator("th[aria-sort=descending]").count() == 1
        with page.expect_download() as download:
            numbers.locator(".csv").click()
        lines = Path(download.value.path()).read_text(encoding="utf-8").splitlines()
        shown = numbers.locator("tbody tr").count()
        assert shown == min(len(lines) - 1, 500) or EVIL in "".join(lines)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(BROKEN) == []
    too_wide = """[...document.querySelectorAll('.plot .main-svg')]
      .filter((svg) => svg.getBoundingClientRect().right > innerWidth).length"""
    assert page.evaluate(too_wide) == 0
    color = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    light_text = page.evaluate(color) == "rgb(228, 232, 236)"
    assert light_text == (scheme == "dark")
    assert page.title() != "taken"
    assert page.locator("b:text('bold')").count() == 0


def test_figures_follow_the_theme_the_width_and_the_printer(made_up: Path, open_page: Open) -> None:
    page = open_page(made_up / "report.html")
    text = "document.querySelector('.plot').layout.font.color"
    dark = page.evaluate(text)
    page.emulate_media(color_scheme="light")
    page.wait_for_selector('html[data-drawn="light 1280"]', state="attached")
    light = page.evaluate(text)
    assert light != dark
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector('html[data-drawn="dark 1280"]', state="attached")
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_selector('html[data-drawn="dark 390"]', state="attached")
    assert page.evaluate("document.querySelector('.plot').layout.width") < 390
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(text) == light
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(text) == dark
    page.set_viewport_size({"width": 1280, "height": 900})
    page.wait_for_selector('html[data-drawn="dark 1280"]', state="attached")


def test_controls_work_from_the_keyboard(made_up: Path, open_page: Open) -> None:
    page = open_page(made_up / "report.html")
    page.check('input[value="density"]')
    before = heat_map(page)
    page.focus('input[value="density"]')
    page.keyboard.press("ArrowRight")
    assert page.is_checked('input[value="relative_error"]')
    assert heat_map(page) != before
    page.focus('[data-file="heads"] summary')
    page.keyboard.press("Enter")
    page.wait_for_selector('[data-file="heads"] tbody tr')


def test_shared_heads_are_fewer_and_a_missing_layer_is_a_gap(
    made_up: Path, open_page: Open
) -> None:
    drawn = heat_map(open_page(made_up / "report.html"))
    assert {name: max(map(len, lines)) for name, lines in drawn.items()} == {
        "Q": 8,
        "K": 2,
        "V": 2,
        "O": 8,
    }
    assert [layer for layer, line in enumerate(drawn["Q"]) if not line] == [3]


def test_axes_span_all_planned_layers_and_mark_those_that_are_missing(
    made_up: Path, open_page: Open
) -> None:
    page = open_page(made_up / "report.html")
    for name in ("errors", "bytes", "ranks"):
        script = f"""() => {{
          const plot = document.querySelector('[data-figure="{name}"] .plot');
          const hatched = plot.data.filter((trace) => trace.name === "not finished");
          return [plot.layout.xaxis.range, ...hatched.map((trace) => [...trace.x])];
        }}"""
        ends, *hatched = page.evaluate(script)
        assert ends == [-0.5, 19.5]
        assert [[3]] * len(hatched) == hatched != []
    said = page.inner_text('[data-figure="errors"] .plot')
    assert "finished layers 0." in said


def test_the_timeline_begins_with_the_last_call_in_which_something_was_done(
    made_up: Path, open_page: Open
) -> None:
    page = open_page(made_up / "report.html")
    chosen = page.locator('select[name="timeline-call"]')
    assert chosen.locator("option[selected]").get_attribute("value") == "0"
    assert "killed" in chosen.locator("option").last.inner_text()
    script = "document.querySelector('[data-figure=\"timeline\"] .plot').layout.yaxis.ticktext"
    chosen.select_option("0")
    # By their first task: layers 0, 1 and 2, and the one that layer 7 was done by.
    assert [name.partition(":")[2] for name in page.evaluate(script)][:3] == [
        "4000",
        "4001",
        "4002",
    ]
    chosen.select_option("1")
    assert page.evaluate(script) == []
