"""Verdict of an audit: where a shared basis pays, and what to use where it does not.

The rule. At each keep the least predicted error of the methods with a shared basis (tucker, lestd)
is held against the least of the others at the same bytes. The basis *pays* where it is smaller by
at least 1 %, unless both are below 0.01, which no model notices. This is asked three times, of ever
more rivals:

    svd       svd alone, values of 16 bits: does sharing a basis beat one basis per matrix?
    16 bits   svd and magnitude pruning, values of 16 bits
    any       svd, magnitude and rtn, each in any number of bits, the shared basis too

Whether a subspace is shared at all is said beside it, by the margin of the units' bases on each
other (see lestd_kernels.audit.diagnostics): shared from 0.5 on, partly from 0.25 on. Errors are of
weights: they flatter pruning, and do not see what activations make of them; `lestd compare`
measures that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orchestrator.manifest.schemas import Row
from workers.audit import AuditResult

SHARED_METHODS = ("tucker", "lestd")
"""Methods whose slices share a basis."""
EVEN = 0.01
"""Errors that differ by less, relatively, are taken for equal."""
NARROW = 0.1
"""Predictions of methods in few bits are this near; a smaller lead is said to be narrow."""
NEGLIGIBLE = 0.01
"""So are all errors below: with them nothing is left to gain."""
SHARED_MARGIN, PARTLY_SHARED_MARGIN = 0.5, 0.25
RIVALS = ("svd", "16 bits", "any")
"""Rivals of a shared basis; see the head of this file."""

_PLAINEST = ("rtn", "magnitude", "svd", *SHARED_METHODS)


def is_shared(method: str) -> bool:
    """Whether a prediction's method has a shared basis."""
    return method.partition(" ")[0] in SHARED_METHODS


def margin_of(block: Mapping[str, Any], side: str = "width") -> float:
    """The margin of the units' bases on each other, at the most directions: p, see the worker."""
    found = [one for one in block["explained"] if one["side"] == side and one["choice"] >= 1]
    return float(found[-1]["margin"]) if found else math.nan


def sharing_word(margin: float) -> str:
    """Name of a margin; empty where there is none."""
    if math.isnan(margin):
        return ""
    if margin >= SHARED_MARGIN:
        return "shared"
    return "partly shared" if margin >= PARTLY_SHARED_MARGIN else "not shared"


def verdict(predictions: Sequence[Mapping[str, Any]], margin: float) -> Row:
    """The verdict on a block, or on all blocks of a scope.

    Args:
        predictions: as a block of `AuditResult` has them.
        margin: see `margin_of`.

    Returns:
        ``pays`` (for each of `RIVALS` the keeps at which the shared basis pays), ``text``,
        ``margin``, ``sharing``, and ``at``, about any rival: for each keep ``keep``, ``shared`` and
        ``other`` (``method`` and ``relative_error``, or None), ``pays``, ``narrow`` (whether the
        lead is), and ``use``, the method of the least error.
    """
    of_rival = {rival: _at_keeps(predictions, rival) for rival in RIVALS}
    at = of_rival["any"]
    pays = {rival: [one["keep"] for one in rows if one["pays"]] for rival, rows in of_rival.items()}
    use: dict[str, list[str]] = {}
    for one in at:
        if not one["pays"]:
            use.setdefault(one["use"], []).append(f"{one['keep']:g}")
    instead = ", ".join(f"{method} ({', '.join(keeps)})" for method, keeps in use.items())
    if not use:
        text = "shared basis pays"
    elif pays["any"]:
        text = f"shared basis pays at {keeps_text(pays['any'])}; else use {instead}"
    else:
        text = f"shared basis does not pay: use {instead}"
    if narrow := [one["keep"] for one in at if one["pays"] and one["narrow"]]:
        text += f"; narrowly at {keeps_text(narrow)}, within the error of the predictions"
    if pays["any"] and margin < PARTLY_SHARED_MARGIN:
        text += "; it is the sparse core that pays, the subspace is not shared"
    sharing = sharing_word(margin)
    return {"pays": pays, "text": text, "margin": margin, "sharing": sharing, "at": at}


def keeps_text(keeps: Sequence[float]) -> str:
    """Keeps in words."""
    return ", ".join(f"{keep:g}" for keep in keeps) or "none"


def _at_keeps(predictions: Sequence[Mapping[str, Any]], rival: str) -> list[Row]:
    by_keep: dict[float, list[Mapping[str, Any]]] = {}
    for one in predictions:
        method, bits = one["method"].partition(" ")[::2]
        if rival == "any" or (not bits and (rival != "svd" or method != "magnitude")):
            by_keep.setdefault(one["keep"], []).append(one)
    return [_at(keep, by_keep[keep]) for keep in sorted(by_keep, reverse=True)]


def _at(keep: float, predictions: Sequence[Mapping[str, Any]]) -> Row:
    sides = [
        [one for one in predictions if is_shared(one["method"]) == wanted]
        for wanted in (True, False)
    ]
    least = [min((one["relative_error"] for one in side), default=math.inf) for side in sides]
    shared, other = (
        _plainest([one for one in side if one["relative_error"] <= error * (1 + EVEN)])
        for side, error in zip(sides, least, strict=True)
    )
    pays = least[0] < least[1] * (1 - EVEN) and least[1] > NEGLIGIBLE
    best = shared if pays else other
    brief = [
        one and {"method": one["method"], "relative_error": one["relative_error"]}
        for one in (shared, other)
    ]
    assert best is not None
    return {
        "keep": keep,
        "shared": brief[0],
        "other": brief[1],
        "pays": pays,
        "narrow": least[0] > least[1] * (1 - NARROW),
        "use": best["method"],
    }


def _plainest(predictions: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Of predictions that are equally good that of the plainest method."""
    return min(
        predictions,
        key=lambda one: _PLAINEST.index(one["method"].partition(" ")[0]),
        default=None,
    )


def together(results: Sequence[AuditResult]) -> list[Row]:
    """The predictions for several blocks as one: each gets the same keep.

    Returns:
        Rows with ``method``, ``keep``, ``stored_keep``, ``relative_error`` over all blocks,
        ``operator_error`` of the worst, for what every block has.
    """
    blocks = [result.findings for result in results if result.findings is not None]
    found: dict[tuple[str, float], list[tuple[Row, Row]]] = {}
    for block in blocks:
        for one in block["predictions"]:
            found.setdefault((one["method"], one["keep"]), []).append((block, one))
    rows = []
    for (method, keep), pairs in found.items():
        if len(pairs) < len(blocks):
            continue
        norm = math.fsum(block["squared_norm"] for block, _ in pairs)
        error = math.fsum(b["squared_norm"] * one["relative_error"] ** 2 for b, one in pairs)
        dense = sum(block["dense_bytes"] for block, _ in pairs)
        operator = [one["operator_error"] for _, one in pairs]
        rows.append(
            {
                "method": method,
                "keep": keep,
                "stored_keep": sum(b["dense_bytes"] * o["stored_keep"] for b, o in pairs) / dense,
                "relative_error": math.sqrt(error / norm) if norm else 0.0,
                "operator_error": None if None in operator else max(operator),
            }
        )
    return rows


def across_rows(result: AuditResult) -> list[Row]:
    """Energy of a block in the reference layers' bases, with the optimum and the margin."""
    assert result.findings is not None
    optimum, rows = result.findings["optimum"], []
    for row in result.across:
        best = optimum["layer"][str(row["rank"])] if row["kind"] == "layer" else optimum["unit"]
        margin = math.nan
        if best is not None and best > row["baseline"]:
            margin = (row["energy"] - row["baseline"]) / (best - row["baseline"])
        rows.append(row | {"optimum": best, "margin": margin})
    return rows


def mean_margin(rows: Iterable[Mapping[str, Any]], kind: str) -> float:
    """Mean margin of the references' bases of a kind; NaN where there is none."""
    margins = [row["margin"] for row in rows if row["kind"] == kind]
    known = [margin for margin in margins if not math.isnan(margin)]
    return math.fsum(known) / len(known) if known else math.nan
