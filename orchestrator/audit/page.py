"""An audit as one HTML page that needs no network; styles and scripts are those of reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from orchestrator.audit.tables import sections
from orchestrator.console.output import finite, size
from orchestrator.manifest.schemas import Row
from orchestrator.report.page import column_table, csp_hash, inline_script, package_file, plotly_js


def render(found: dict[str, Any]) -> str:
    """The page of what `audit_tables.describe` gives. Same audit and same plotly, same page.

    Raises:
        LestdError: plotly is not installed.
    """
    names = ("report/report_figures.js", "audit/audit_figures.js", "report/report.js")
    scripts = [inline_script(text) for text in (plotly_js(), *map(package_file, names))]
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True
    )
    environment.filters["size"] = size
    content = {"tables": _tables(found), "missing": []}
    return environment.from_string(package_file("audit/audit.html.jinja")).render(
        found=found,
        title=found["model"].rstrip("/").rpartition("/")[2],
        sections=sections(found),
        choices=_choices(found["blocks"]),
        embedded=htmlsafe_json_dumps(finite(content), separators=(",", ":"), allow_nan=False),
        scripts=[Markup(script) for script in scripts],
        hashes=" ".join(map(csp_hash, scripts)),
        style=Markup(package_file("report/report.css")),
    )


def _choices(blocks: Sequence[Row]) -> list[str]:
    """How ranks were chosen, in words that the figures use too."""
    known = {_choice(one): None for b in blocks for one in b["findings"]["explained"]}
    return list(known)


def _choice(explained: Row) -> str:
    what = f"{explained['choice']:.0%} of the energy"
    if explained["choice"] >= 1:
        what = f"R = {explained['choice']:.0f}"
    return f"{what}, {explained['side']}"


def _tables(found: Row) -> Row:
    blocks = found["blocks"]
    pairs = [
        _of(block)
        | {
            "choice": _choice(one),
            "basis": block["findings"]["compared"][i],
            "unit": block["findings"]["compared"][j],
            "energy": energy,
            "random": one["ranks"][i] / _size(block, one),
        }
        for block in blocks
        for one in block["findings"]["explained"]
        for i, row in enumerate(one["energy"])
        for j, energy in enumerate(row)
    ]
    spectra = [
        _of(block) | {"mode": one["mode"], "index": index, "singular_value": value}
        for block in blocks
        for one in block["findings"]["spectra"]
        for index, value in one["points"]
    ]
    predictions = [
        {"layer": None, "block": f"all of {scope['scope']}", "scope": scope["scope"]} | one
        for scope in found["scopes"]
        for one in scope["predictions"]
    ]
    predictions += [
        _of(block) | one for block in blocks for one in block["findings"]["predictions"]
    ]
    across = [_of(block) | one for block in blocks for one in block["across"]]
    of = ("layer", "block", "scope")
    errors = ("method", "keep", "stored_keep", "relative_error", "operator_error")
    explained = ("reference", "kind", "rank", "energy", "baseline", "optimum", "margin")
    return {
        "pairs": column_table(pairs, (*of, "choice", "basis", "unit", "energy", "random")),
        "spectra": column_table(spectra, (*of, "mode", "index", "singular_value")),
        "predictions": column_table(predictions, (*of, *errors)),
        "across": column_table(across, (*of, *explained)),
    }


def _of(block: Row) -> Row:
    return {key: block[key] for key in ("layer", "block", "scope")}


def _size(block: Row, explained: Row) -> int:
    side = "width" if explained["side"] == "width" else "head_dim"
    return int(block["findings"][side])
