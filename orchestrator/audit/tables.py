"""An audit in words and tables: for a terminal, for Markdown, and as plain values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lestd_kernels.audit.diagnostics import OUTLIER_SIGMAS
from orchestrator.audit.audit import Audit
from orchestrator.audit.verdict import (
    across_rows,
    keeps_text,
    margin_of,
    mean_margin,
    together,
    verdict,
)
from orchestrator.console import output
from orchestrator.console.markdown import cell
from workers.audit import AuditResult

RULE = (
    "A shared basis pays at a keep where the least predicted error of tucker and lestd is at least "
    "1 % below the least of the others at the same bytes, and that is above 0.01. Against any: "
    "svd, magnitude and rtn in any number of bits; 16 bits, and svd: with values of 16 bits on "
    "both sides. Errors are of weights, ‖W − Ŵ‖ / ‖W‖, and flatter pruning: lestd compare measures "
    "what they mean."
)


@dataclass(frozen=True)
class Section:
    """A table and what it says.

    Attributes:
        title: what stands above it.
        note: what stands below it.
        columns: heads of the columns; the first stands left.
        rows: texts.
    """

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def by_scope(audit: Audit) -> dict[str, list[AuditResult]]:
    """The results of each scope, by layer."""
    scopes: dict[str, list[AuditResult]] = {}
    for result in audit.results:
        scopes.setdefault(result.scope, []).append(result)
    return scopes


def describe(audit: Audit) -> dict[str, Any]:
    """An audit as plain values: what ``--json`` prints, and what the figures are drawn of."""
    scopes = []
    for scope, results in by_scope(audit).items():
        predictions = together(results)
        margins = [margin_of(r.findings) for r in results if r.findings is not None]
        scopes.append(
            {
                "scope": scope,
                "blocks": len(results),
                "predictions": predictions,
                "verdict": verdict(predictions, _mean(margins)),
            }
        )
    blocks = []
    for result in audit.results:
        assert result.findings is not None
        plain = asdict(result)
        del plain["task_id"], plain["place"], plain["worker"], plain["seconds"]
        del plain["peak_memory_bytes"]
        plain["across"] = across_rows(result)
        found = verdict(result.findings["predictions"], margin_of(result.findings))
        blocks.append(plain | {"verdict": found})
    return {
        "model": audit.model,
        "keeps": list(audit.keeps),
        "complete": audit.complete,
        "scopes": scopes,
        "blocks": blocks,
        "failures": [{"block": one.task_id, "message": one.message} for one in audit.failures],
        "reference_bytes": audit.reference_bytes,
        "run_dir": audit.run_dir,
    }


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def figure(value: float | None, digits: int = 3) -> str:
    """A number as text; empty if there is none."""
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def sections(found: dict[str, Any]) -> list[Section]:
    """The tables of what `describe` gives: for each scope verdicts, sharing, structure, errors."""
    result = []
    for scope in found["scopes"]:
        blocks = [block for block in found["blocks"] if block["scope"] == scope["scope"]]
        result += [
            _verdicts(scope, blocks),
            _errors(scope, blocks, found["keeps"]),
            _sharing(scope["scope"], blocks),
            _structure(scope["scope"], blocks),
        ]
        if outliers := _outliers(scope["scope"], blocks):
            result.append(outliers)
    return result


def _verdicts(scope: dict[str, Any], blocks: Sequence[dict[str, Any]]) -> Section:
    keeps = [one["keep"] for one in scope["verdict"]["at"]]
    rows = [
        _verdict_row(name, one["verdict"])
        for name, one in [("all", scope), *((str(block["layer"]), block) for block in blocks)]
    ]
    return Section(
        f"{scope['scope']}: does a shared basis pay?",
        "Of each keep: the least predicted error of tucker and lestd, then that of the others. "
        + RULE,
        (
            *("layer", "subspace", *(f"keep {keep:g}" for keep in keeps)),
            *("pays, against any", "16 bits", "svd"),
        ),
        tuple(rows),
    )


def _verdict_row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    cells = []
    for one in found["at"]:
        sides = [
            f"{side['method']} {side['relative_error']:.3f}" if side else "–"
            for side in (one["shared"], one["other"])
        ]
        cells.append("\n".join(sides))
    sharing = found["sharing"] and f"{found['sharing']} ({found['margin']:.2f})"
    pays = (keeps_text(found["pays"][rival]) for rival in ("any", "16 bits", "svd"))
    return (name, sharing, *cells, *pays)


def _errors(
    scope: dict[str, Any], blocks: Sequence[dict[str, Any]], keeps: Sequence[float]
) -> Section:
    known = {(one["method"], one["keep"]): one for one in scope["predictions"]}
    methods = dict.fromkeys(one["method"] for one in scope["predictions"])
    rows = []
    for method in methods:
        cells = []
        for keep in keeps:
            one = known.get((method, keep))
            text = "" if one is None else f"{one['relative_error']:.3f}"
            if one and one["operator_error"] is not None:
                text += f" ({one['operator_error']:.2f})"
            cells.append(text)
        rows.append((method, *cells))
    best = [
        max(block["findings"]["operator_optimum"][at] for block in blocks)
        for at in range(len(keeps))
    ]
    rows.append(("least of any ranks", *(f"({one:.2f})" for one in best)))
    return Section(
        f"{scope['scope']}: predicted error at the same bytes, all layers together",
        "Relative error, of a method that reaches the keep; in parentheses the operator error "
        "‖W − Ŵ‖₂ / ‖W‖₂ of the worst matrix, and in the last row the least that low rank can have "
        "at that size.",
        ("method", *(f"keep {keep:g}" for keep in keeps)),
        tuple(rows),
    )


def _sharing(scope: str, blocks: Sequence[dict[str, Any]]) -> Section:
    rows = []
    for result in blocks:
        block = result["findings"]
        fixed = [e for e in block["explained"] if e["side"] == "width"][-1]
        at_90 = next(e for e in block["explained"] if e["choice"] < 1)
        columns = margin_of(block, "columns")
        rows.append(
            (
                str(result["layer"]),
                f"{block['units']} {block['unit']}s",
                str(max(fixed["ranks"], default=0)),
                *(figure(fixed[key]) for key in ("mean", "least", "optimum", "baseline")),
                figure(fixed["margin"], 2),
                f"{figure(at_90['mean'])} of {figure(at_90['optimum'])}",
                figure(columns, 2),
                figure(mean_margin(result["across"], "unit"), 2),
                figure(mean_margin(result["across"], "layer"), 2),
            )
        )
    return Section(
        f"{scope}: is there a shared subspace?",
        "R leading left singular vectors of one unit, on every other unit of the layer: mean and "
        "least share of its energy; the most that any R directions have, and R random ones. "
        "Margin: 0 as random, 1 as its own. At 90 %: a basis with 90 % of its own unit's energy, "
        "on the others. Columns: the margin of the right singular vectors (U2). Last: margins of "
        "other layers' bases, of their units and of the whole layers.",
        (
            *("layer", "units", "R", "mean", "least", "optimum", "random", "margin"),
            *("at 90 %", "columns", "units across", "layers across"),
        ),
        tuple(rows),
    )


def _structure(scope: str, blocks: Sequence[dict[str, Any]]) -> Section:
    rows = []
    for result in blocks:
        spectra = result["findings"]["spectra"]
        told = result["findings"]["entries"]
        modes = [
            f"{one['effective_rank']:.0f}, {one['rank_90']}, {one['rank_99']} of {one['size']}"
            for one in spectra
        ]
        kurtosis = [one["kurtosis"] for one in told if not math.isnan(one["kurtosis"])]
        rows.append(
            (
                str(result["layer"]),
                *modes,
                figure(max(kurtosis, default=math.nan), 2),
                str(sum(one["outliers"] for one in told)),
            )
        )
    return Section(
        f"{scope}: spectra and entries",
        "Of the unfoldings in mode 1 (width), 2 (columns) and 3 (units): effective rank exp(H) of "
        "the singular values, and directions with 90 % and 99 % of the energy. Kurtosis: the "
        f"largest of a tensor (normal: 3). Outliers: weights beyond {OUTLIER_SIGMAS:g} standard "
        "deviations.",
        ("layer", "mode 1", "mode 2", "mode 3", "kurtosis", "outliers"),
        tuple(rows),
    )


def _outliers(scope: str, blocks: Sequence[dict[str, Any]]) -> Section | None:
    found = [
        one
        for block in blocks
        for tensor in block["findings"]["entries"]
        for one in tensor["largest"]
    ]
    found.sort(key=lambda one: -one["sigmas"])
    if not found:
        return None
    return Section(
        f"{scope}: candidates for super weights",
        "The weights farthest from the others of their tensor. Candidates only: the rule of arXiv "
        "2411.07191 needs data.",
        ("tensor", "row", "column", "value", "sigmas"),
        tuple(
            (
                one["tensor"],
                str(one["row"]),
                str(one["column"]),
                f"{one['value']:.4g}",
                f"{one['sigmas']:.1f}",
            )
            for one in found[:10]
        ),
    )


def _on_one_line(text: str) -> str:
    return "<br>".join(map(cell, text.split("\n")))


def print_audit(found: dict[str, Any]) -> None:
    """Print the tables; a sentence for each scope at last."""
    for section in sections(found):
        output.print_table(section.title, section.columns, section.rows)
        output.out.print(section.note, soft_wrap=True)
        output.out.print()
    for scope in found["scopes"]:
        sharing = scope["verdict"]["sharing"]
        told = f" (subspace {sharing}, margin {scope['verdict']['margin']:.2f})" if sharing else ""
        output.out.print(f"{scope['scope']}: {scope['verdict']['text']}{told}", soft_wrap=True)


def markdown(found: dict[str, Any]) -> str:
    """The same as Markdown."""
    lines = [f"# Audit of {cell(found['model'].rstrip('/').rpartition('/')[2])}", ""]
    lines += [f"- {scope['scope']}: {cell(scope['verdict']['text'])}" for scope in found["scopes"]]
    for section in sections(found):
        lines += ["", f"## {cell(section.title)}", ""]
        lines.append(f"| {' | '.join(map(cell, section.columns))} |")
        lines.append("|---" + "|---:" * (len(section.columns) - 1) + "|")
        lines += [f"| {' | '.join(map(_on_one_line, row))} |" for row in section.rows]
        lines += ["", section.note]
    return "\n".join(lines) + "\n"
